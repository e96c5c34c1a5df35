package notifier

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/imagewolf/imagewolf/api/nodeapi"
	imagewolfv1 "github.com/imagewolf/imagewolf/api/v1"
	"github.com/imagewolf/imagewolf/config"
	"github.com/imagewolf/imagewolf/notifier/rules"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	secret   = "0123456789abcdef"
	patience = 30 * time.Second // for what is only not to hang
)

// nodes is a node that takes requests, on a socket.
type nodes struct {
	imagewolfv1.UnimplementedNodeServer
	socket string
	asked  chan *imagewolfv1.PrefetchRequest
	watch  chan struct{} // told when somebody watches

	mu    sync.Mutex
	away  bool
	known map[string]*imagewolfv1.PrefetchStatus
}

func newNodes(t *testing.T) *nodes {
	t.Helper()
	n := &nodes{socket: filepath.Join(t.TempDir(), "n"), asked: make(chan *imagewolfv1.PrefetchRequest, 100), watch: make(chan struct{}, 100), known: map[string]*imagewolfv1.PrefetchStatus{}}
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "unix", n.socket)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	imagewolfv1.RegisterNodeServer(s, n)
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Stop()
		if err := <-ended; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			t.Error(err)
		}
	})
	return n
}

func (n *nodes) Prefetch(_ context.Context, r *imagewolfv1.PrefetchRequest) (*imagewolfv1.PrefetchStatus, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.away {
		return nil, status.Error(codes.Internal, "not now")
	}
	s := n.known[r.Id]
	if s == nil {
		s = &imagewolfv1.PrefetchStatus{Request: r, Created: 1, Nodes: []*imagewolfv1.NodePrefetch{{Node: "a", State: imagewolfv1.PrefetchState_PREFETCH_STATE_DONE}}}
		n.known[r.Id] = s
		n.asked <- r
	}
	return s, nil
}

func (n *nodes) GetPrefetch(_ context.Context, r *imagewolfv1.GetPrefetchRequest) (*imagewolfv1.PrefetchStatus, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if s := n.known[r.Id]; s != nil {
		return s, nil
	}
	return nil, status.Error(codes.NotFound, "unknown")
}

// WatchPrefetch tells of no change.
func (n *nodes) WatchPrefetch(_ *imagewolfv1.GetPrefetchRequest, stream grpc.ServerStreamingServer[imagewolfv1.PrefetchStatus]) error {
	n.watch <- struct{}{}
	<-stream.Context().Done()
	return stream.Context().Err()
}

func (n *nodes) setAway(away bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.away = away
}

// next returns the image of the next request that a node is asked for.
func (n *nodes) next(t *testing.T) *imagewolfv1.PrefetchRequest {
	t.Helper()
	select {
	case r := <-n.asked:
		return r
	case <-time.After(patience):
		t.Fatal("the nodes were not asked")
		return nil
	}
}

// running is a notifier that runs.
type running struct {
	t                *testing.T
	address, metrics string
	client           *http.Client
	stop             func()
}

func settings(t *testing.T, n *nodes) config.Notifier {
	t.Helper()
	c := config.DefaultNotifier()
	c.Queue.File = filepath.Join(t.TempDir(), "queue.db")
	c.AllowRegistries = []string{"registry.example.com"}
	c.Registry.CheckTags = false // there is no registry
	c.Rule = []config.Rule{
		{Name: "no-tests", Images: []string{"registry.example.com/tests/**"}, Skip: true},
		{Name: "web", Images: []string{"registry.example.com/apps/**"}, Nodes: "zone=a", Platforms: []string{"linux/amd64"}},
	}
	c.Nodes.Addresses = []string{"unix://" + n.socket}
	return c
}

func start(t *testing.T, c config.Notifier) *running {
	t.Helper()
	if err := c.Validate(); err != nil {
		t.Fatal(err)
	}
	decide, err := rules.New(c, rules.Options{})
	if err != nil {
		t.Fatal(err)
	}
	client, err := nodeapi.Dial(nodeapi.Options{Addresses: c.Nodes.Addresses})
	if err != nil {
		t.Fatal(err)
	}
	o := Options{Rules: Decider{decide}, Nodes: client}
	for _, l := range []*net.Listener{&o.Listener, &o.Metrics} {
		if *l, err = (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0"); err != nil {
			t.Fatal(err)
		}
	}
	n, err := New(c, o)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- n.Run(ctx) }()
	r := &running{
		t: t, address: "http://" + o.Listener.Addr().String(), metrics: "http://" + o.Metrics.Addr().String(),
		client: &http.Client{Transport: &http.Transport{}, Timeout: patience},
	}
	r.stop = sync.OnceFunc(func() {
		r.client.CloseIdleConnections()
		cancel()
		if err := errors.Join(<-ended, client.Close()); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(r.stop)
	return r
}

// do sends a request with the token, and returns what was answered.
func (r *running) do(method, url, body string) (int, string) {
	r.t.Helper()
	req, err := http.NewRequestWithContext(r.t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		r.t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+secret)
	res, err := r.client.Do(req)
	if err != nil {
		r.t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		r.t.Fatal(err)
	}
	return res.StatusCode, string(b)
}

func (r *running) push(repository, tag string) digest.Digest {
	r.t.Helper()
	d := digest.FromString(repository + tag)
	code, body := r.do("POST", r.address+"/hooks/registry", fmt.Sprintf(`{"events":[{"id":%q,"action":"push","target":{"mediaType":"application/vnd.oci.image.index.v1+json",`+
		`"digest":%q,"repository":%q,"tag":%q},"request":{"host":"registry.example.com"}}]}`, repository+tag, d, repository, tag))
	if code != http.StatusOK {
		r.t.Errorf("the webhook was answered %d %s", code, body)
	}
	return d
}

// A push comes in over HTTP, and a node is asked; the feed takes it to another
// notifier, whose nodes are asked, too; and CI asks by name.
func TestFromAPushToTheNodes(t *testing.T) {
	here, there := newNodes(t), newNodes(t)
	c := settings(t, here)
	c.Receiver["registry"] = config.Receiver{Type: "distribution", Secret: secret}.WithDefaults("registry")
	c.Feed.Token, c.API.Token = secret, secret
	origin := start(t, c)
	d := settings(t, there)
	d.Poll["origin"] = config.Poll{URL: origin.address + "/feed/rss", Token: secret, Interval: config.Duration(time.Second), FromStart: true}
	reader := start(t, d)

	origin.push("tests/web", "1")
	origin.push("other/web", "1")
	want := origin.push("apps/web", "1.4.2")
	ids := map[string]bool{}
	for _, n := range []*nodes{here, there} {
		r := n.next(t)
		if r.Image != "registry.example.com/apps/web:1.4.2" || r.Digest != want.String() || r.Nodes.GetLabels() != "zone=a" || len(r.Platforms) != 1 {
			t.Errorf("the nodes were asked for %v", r)
		}
		ids[r.Id] = true
	}
	if len(ids) != 2 {
		t.Errorf("ids %v", ids) // each cluster's own
	}

	code, body := origin.do("POST", origin.address+"/v1/prefetch", `{"image":"registry.example.com/apps/api:2","id":"build-7","nodes":{"labels":"gpu"}}`)
	if r := here.next(t); code != http.StatusAccepted || r.Id != "ci-build-7" || r.Nodes.GetLabels() != "zone=a,gpu" {
		t.Errorf("%d %s, %v", code, body, r)
	}
	code, body = origin.do("GET", origin.address+"/v1/prefetch/ci-build-7?wait=1m", "")
	var told struct{ State string }
	if err := json.Unmarshal([]byte(body), &told); code != http.StatusOK || err != nil || told.State != "done" {
		t.Errorf("%d %s, %v", code, body, err)
	}
	for image, said := range map[string]string{"registry.example.com/tests/a:1": "the rule says to skip it", "evil.example/apps/a:1": "allow_registries", "registry.example.com/x:1": "no rule matches"} {
		if code, body := origin.do("POST", origin.address+"/v1/prefetch", `{"image":"`+image+`"}`); code != http.StatusForbidden || !strings.Contains(body, said) {
			t.Errorf("%s: %d %s", image, code, body)
		}
	}

	reader.stop()
	code, body = origin.do("GET", origin.metrics+"/metrics", "")
	for _, line := range []string{
		"imagewolf_notifier_events_taken_total 3", `imagewolf_notifier_events_nothing_total{kind="no_match"} 2`, `imagewolf_notifier_events_nothing_total{kind="skipped"} 2`,
		`imagewolf_notifier_prefetches_total{rule="web"} 2`, `imagewolf_notifier_http_requests_total{code="200",part="webhook"} 3`,
		`imagewolf_notifier_http_requests_total{code="202",part="api"} 1`, `imagewolf_notifier_http_requests_total{code="200",part="feed"} `,
	} {
		if !strings.Contains(body, "\n"+line) {
			t.Errorf("%d: no %s in\n%s", code, line, body)
		}
	}
	for _, at := range []string{origin.address, origin.metrics} {
		if code, body := origin.do("GET", at+"/healthz", ""); code != http.StatusOK || body != "ok\n" {
			t.Errorf("%d %s", code, body)
		}
	}
	for path, want := range map[string]int{"/hooks/other": 404, "/v1/prefetches": 404, "/feed": 404, "/": 404} {
		if code, _ := origin.do("POST", origin.address+path, ""); code != want {
			t.Errorf("%s: %d", path, code)
		}
	}
}

// What was taken while the nodes were away is prefetched after a restart.
func TestEventsSurviveARestart(t *testing.T) {
	n := newNodes(t)
	n.setAway(true)
	c := settings(t, n)
	c.Receiver["registry"] = config.Receiver{Type: "distribution", Secret: secret}.WithDefaults("registry")
	r := start(t, c)
	r.push("apps/web", "1")
	r.stop()
	n.setAway(false)
	start(t, c)
	if got := n.next(t); got.Image != "registry.example.com/apps/web:1" {
		t.Errorf("%v", got)
	}
}

// A caller that waits is answered at once when the notifier ends.
func TestTheEndIsNotHeldUp(t *testing.T) {
	n := newNodes(t)
	c := settings(t, n)
	c.API.Token = secret
	r := start(t, c)
	if code, body := r.do("POST", r.address+"/v1/prefetch", `{"image":"registry.example.com/apps/api:2","id":"x"}`); code != http.StatusAccepted {
		t.Errorf("%d %s", code, body)
	}
	n.mu.Lock()
	n.known["ci-x"].Nodes[0].State = imagewolfv1.PrefetchState_PREFETCH_STATE_QUEUED
	n.mu.Unlock()
	answered := make(chan string, 1)
	go func() {
		_, body := r.do("GET", r.address+"/v1/prefetch/ci-x?wait=10m", "")
		answered <- body
	}()
	select {
	case <-n.watch:
	case <-time.After(patience):
		t.Error("nobody watches")
	}
	begun := time.Now()
	r.stop()
	if took := time.Since(begun); took > 5*time.Second {
		t.Errorf("the end took %s", took)
	}
	if body := <-answered; !strings.Contains(body, `"state":"running"`) && !strings.Contains(body, "error") {
		t.Errorf("answered %s", body)
	}
}

func TestWhatCannotWorkIsSaid(t *testing.T) {
	n := newNodes(t)
	c := settings(t, n)
	c.Poll["x"] = config.Poll{URL: "https://feed.example/feed/atom", Token: secret, CAFile: filepath.Join(t.TempDir(), "none"), Interval: config.Duration(time.Second)}
	c.Receiver["y"] = config.Receiver{Type: "quay"}
	if _, err := New(c, Options{}); err == nil || !strings.Contains(err.Error(), "poll.x.ca_file: ") || !strings.Contains(err.Error(), "receiver.y") {
		t.Errorf("got %v", err)
	}
	c = settings(t, n)
	c.API.Token = secret
	c.Queue.File = filepath.Join(t.TempDir(), "no", "such", "queue.db")
	made, err := New(c, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := made.Run(t.Context()); err == nil || !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v", err)
	}
}
