package api

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	imagewolfv1 "github.com/imagewolf/imagewolf/api/v1"
	"github.com/imagewolf/imagewolf/config"
	"github.com/imagewolf/imagewolf/notifier/event"
	"github.com/imagewolf/imagewolf/notifier/work"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const token = "0123456789abcdef"

var d1 = digest.FromString("1")

// cluster is nodes that take everything.
type cluster struct {
	mu       sync.Mutex
	err      error
	known    map[string]*imagewolfv1.PrefetchStatus
	changed  chan struct{} // closed at every change
	watching int
}

func newCluster() *cluster {
	return &cluster{known: map[string]*imagewolfv1.PrefetchStatus{}, changed: make(chan struct{})}
}

func (c *cluster) Prefetch(_ context.Context, r *imagewolfv1.PrefetchRequest, _ ...grpc.CallOption) (*imagewolfv1.PrefetchStatus, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return nil, c.err
	}
	if c.known[r.Id] == nil {
		c.known[r.Id] = &imagewolfv1.PrefetchStatus{
			Request: r, Created: 1787217266402,
			Nodes: []*imagewolfv1.NodePrefetch{{Node: "a", State: imagewolfv1.PrefetchState_PREFETCH_STATE_PULLING, Bytes: 1, Total: 2}, {Node: "b", State: 1}},
		}
	}
	return c.known[r.Id], nil
}

func (c *cluster) GetPrefetch(_ context.Context, r *imagewolfv1.GetPrefetchRequest, _ ...grpc.CallOption) (*imagewolfv1.PrefetchStatus, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return nil, c.err
	}
	if s := c.known[r.Id]; s != nil {
		return proto.CloneOf(s), nil
	}
	return nil, status.Error(codes.NotFound, "unknown")
}

// set gives all nodes of a request a state.
func (c *cluster) set(id string, states ...imagewolfv1.PrefetchState) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := proto.CloneOf(c.known[id])
	s.Nodes = nil
	for _, state := range states {
		s.Nodes = append(s.Nodes, &imagewolfv1.NodePrefetch{Node: "n", State: state})
	}
	c.known[id] = s
	close(c.changed)
	c.changed = make(chan struct{})
}

func (c *cluster) WatchPrefetch(ctx context.Context, r *imagewolfv1.GetPrefetchRequest, _ ...grpc.CallOption) (grpc.ServerStreamingClient[imagewolfv1.PrefetchStatus], error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return nil, c.err
	}
	c.watching++
	return &watch{ctx: ctx, c: c, id: r.Id}, nil
}

type watch struct {
	grpc.ClientStream
	ctx  context.Context //nolint:containedctx // a stream has one
	c    *cluster
	id   string
	last *imagewolfv1.PrefetchStatus
}

func (w *watch) Recv() (*imagewolfv1.PrefetchStatus, error) {
	for {
		w.c.mu.Lock()
		s, changed, err := w.c.known[w.id], w.c.changed, w.c.err
		w.c.mu.Unlock()
		switch {
		case err != nil:
			return nil, err
		case s != w.last:
			w.last = s
			return s, nil
		case state(s) != running:
			return nil, io.EOF
		}
		select {
		case <-changed:
		case <-w.ctx.Done():
			return nil, w.ctx.Err()
		}
	}
}

type fakeRules func(event.Event) (work.Decision, error)

func (f fakeRules) Decide(_ context.Context, e event.Event) (work.Decision, error) { return f(e) }

// web is a rule that is about r.example.
func web(e event.Event) (work.Decision, error) {
	if e.Registry != "r.example" {
		return work.Decision{Kind: "not_allowed", Reason: "registry " + e.Registry + " is not on allow_registries"}, nil
	}
	return work.Decision{Rule: "web", Request: &imagewolfv1.PrefetchRequest{
		Image: "r.example/" + e.Repository + ":" + e.Tag, Digest: d1.String(), Platforms: []string{"linux/amd64", "linux/arm64"}, Namespace: "k8s.io",
		Nodes: &imagewolfv1.NodeSelection{Labels: "zone in (a,b)", Count: 5}, Priority: 7, TimeoutSeconds: 3600,
	}}, nil
}

type counted struct {
	mu        sync.Mutex
	nothing   []event.Kind
	requested []string
}

func (c *counted) Nothing(k event.Kind) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.nothing = append(c.nothing, k)
}

func (c *counted) Requested(rule string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.requested = append(c.requested, rule)
}

func handler(c *cluster, r fakeRules) (*Handler, *counted) {
	count := &counted{}
	return New(config.NotifierAPI{Token: token}, r, c, count, nil), count
}

func call(h http.Handler, method, path, body string, head ...string) (int, string, http.Header) {
	req := httptest.NewRequest(method, path, strings.NewReader(body))
	req.Header.Set("Authorization", "Bearer "+token)
	for i := 0; i < len(head); i += 2 {
		req.Header.Set(head[i], head[i+1])
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, req)
	return w.Code, strings.TrimSpace(w.Body.String()), w.Result().Header
}

func signed(text string) string {
	m := hmac.New(sha256.New, []byte(token))
	m.Write([]byte(text))
	return "sha256=" + hex.EncodeToString(m.Sum(nil))
}

func TestAnImageIsPrefetchedByName(t *testing.T) {
	c := newCluster()
	h, count := handler(c, web)
	code, body, head := call(h, "POST", "/v1/prefetch", `{"image": "r.example/apps/web:1.4", "id": "build-17"}`)
	want := `{"id":"ci-build-17","image":"r.example/apps/web:1.4","digest":"` + d1.String() + `","created":"2026-08-20T09:14:26.402Z","state":"running",` +
		`"nodes":[{"node":"a","state":"pulling","bytes":1,"total":2},{"node":"b","state":"queued","bytes":0,"total":0}]}`
	if code != 202 || body != want || head.Get("Content-Type") != "application/json" {
		t.Errorf("%d %s\ngot  %s\nwant %s", code, head, body, want)
	}
	if !slices.Equal(count.requested, []string{"web"}) {
		t.Errorf("%+v", count)
	}
	if code, again, _ := call(h, "GET", "/v1/prefetch/ci-build-17", ""); code != 200 || again != want {
		t.Errorf("%d %s", code, again)
	}
	// The same id is the same prefetch, also when the tag has moved.
	if code, again, _ := call(h, "POST", "/v1/prefetch", `{"image": "r.example/apps/web:1.4", "id": "build-17"}`); code != 202 || again != want || len(c.known) != 1 {
		t.Errorf("%d %s", code, again)
	}
	if code, body, _ := call(h, "POST", "/v1/prefetch", `{"image": "r.example/apps/web:1.5", "id": "build-17"}`); code != 409 || !strings.Contains(body, "build-17") {
		t.Errorf("%d %s", code, body)
	}
	// Without an id, each is one of its own.
	for range 2 {
		if code, body, _ := call(h, "POST", "/v1/prefetch", `{"image": "r.example/apps/web:1.4"}`); code != 202 {
			t.Errorf("%d %s", code, body)
		}
	}
	if len(c.known) != 3 {
		t.Errorf("%d prefetches", len(c.known))
	}
}

func TestStates(t *testing.T) {
	const q, p, d, f, x, u, s = 1, 2, 3, 4, 5, 6, 7 // s: canceled, for a younger one
	for _, c := range []struct {
		states []imagewolfv1.PrefetchState
		want   string
	}{
		{nil, "no_nodes"},
		{[]imagewolfv1.PrefetchState{d, d}, "done"},
		{[]imagewolfv1.PrefetchState{d, f}, "failed"},
		{[]imagewolfv1.PrefetchState{f, d}, "failed"},
		{[]imagewolfv1.PrefetchState{d, x}, "failed"},
		{[]imagewolfv1.PrefetchState{s, d}, "superseded"},
		{[]imagewolfv1.PrefetchState{f, s}, "failed"},
		{[]imagewolfv1.PrefetchState{s, x}, "failed"},
		{[]imagewolfv1.PrefetchState{s, q}, "running"},
		{[]imagewolfv1.PrefetchState{f, q}, "running"},
		{[]imagewolfv1.PrefetchState{d, p}, "running"},
		{[]imagewolfv1.PrefetchState{d, u}, "running"},
		{[]imagewolfv1.PrefetchState{d, 0}, "running"},
	} {
		all := &imagewolfv1.PrefetchStatus{}
		for _, st := range c.states {
			n := &imagewolfv1.NodePrefetch{State: st}
			if st == s {
				n.State, n.Superseded = x, true
			}
			all.Nodes = append(all.Nodes, n)
		}
		if got := state(all); got != c.want {
			t.Errorf("%v: %s, should be %s", c.states, got, c.want)
		}
	}
}

func TestWhoMayAsk(t *testing.T) {
	const body = `{"image": "r.example/a:1", "id": "x"}`
	c := newCluster()
	h, _ := handler(c, web)
	for _, k := range []struct {
		name, method, path string
		head               []string
		status             int
	}{
		{"token", "POST", "/v1/prefetch", nil, 202},
		{"no token", "POST", "/v1/prefetch", []string{"Authorization", ""}, 401},
		{"wrong token", "POST", "/v1/prefetch", []string{"Authorization", "Bearer 0123456789abcdeX"}, 401},
		{"empty token", "POST", "/v1/prefetch", []string{"Authorization", "Bearer "}, 401},
		{"wrong token and signature", "POST", "/v1/prefetch", []string{"Authorization", "Bearer x", "X-Signature", signed(body)}, 401},
		{"signature", "POST", "/v1/prefetch", []string{"Authorization", "", "X-Signature", signed(body)}, 202},
		{"signature of something else", "POST", "/v1/prefetch", []string{"Authorization", "", "X-Signature", signed(body + " ")}, 401},
		{"no hex", "POST", "/v1/prefetch", []string{"Authorization", "", "X-Signature", "sha256=x"}, 401},
		{"other hash", "POST", "/v1/prefetch", []string{"Authorization", "", "X-Signature", "sha1=00"}, 401},
		{"get", "GET", "/v1/prefetch/ci-x", nil, 200},
		{"get without", "GET", "/v1/prefetch/ci-x", []string{"Authorization", ""}, 401},
		{"get signed", "GET", "/v1/prefetch/ci-x?wait=0s", []string{"Authorization", "", "X-Signature", signed("/v1/prefetch/ci-x?wait=0s")}, 200},
		{"get with the signature of a body", "GET", "/v1/prefetch/ci-x", []string{"Authorization", "", "X-Signature", signed(body)}, 401},
		{"get with the signature of nothing", "GET", "/v1/prefetch/ci-x", []string{"Authorization", "", "X-Signature", signed("")}, 401},
		{"put", "PUT", "/v1/prefetch", nil, 405},
		{"other path", "GET", "/v1/prefetch/a/b", nil, 404},
	} {
		if code, got, _ := call(h, k.method, k.path, body, k.head...); code != k.status {
			t.Errorf("%s: %d %s, should be %d", k.name, code, got, k.status)
		}
	}
}

func TestWhatIsRefused(t *testing.T) {
	for _, k := range []struct {
		name, body string
		nodes      error
		rules      fakeRules
		status     int
		said       string
	}{
		{"not allowed", `{"image": "evil.example/a:1"}`, nil, web, 403, "evil.example is not on allow_registries"},
		{"registry away", `{"image": "r.example/a:1"}`, nil, func(event.Event) (work.Decision, error) {
			return work.Decision{}, errors.New("r.example does not answer")
		}, 503, "r.example does not answer"},
		{"nodes away", `{"image": "r.example/a:1"}`, status.Error(codes.Unavailable, "nobody"), web, 503, "nobody"},
		{"token of nodes wrong", `{"image": "r.example/a:1"}`, status.Error(codes.Unauthenticated, "no"), web, 503, "no"},
		{"nodes do not understand", `{"image": "r.example/a:1", "nodes": {"labels": "=="}}`, status.Error(codes.InvalidArgument, "bad selector"), web, 400, "bad selector"},
		{"other platform", `{"image": "r.example/a:1", "platforms": ["linux/arm/v7"]}`, nil, web, 403, "platform linux/arm/v7 is not one of"},
		{"no JSON", `image`, nil, web, 400, "not the JSON"},
		{"no image", `{}`, nil, web, 400, "image: missing"},
		{"unknown key", `{"image": "r.example/a:1", "namespace": "x"}`, nil, web, 400, "namespace"},
		{"trailing", `{"image": "r.example/a:1"}{}`, nil, web, 400, "follows"},
		{"short name", `{"image": "nginx:1"}`, nil, web, 400, "image: "},
		{"no tag", `{"image": "r.example/a"}`, nil, web, 400, "neither tag nor digest"},
		{"two digests", `{"image": "r.example/a@` + d1.String() + `", "digest": "` + digest.FromString("2").String() + `"}`, nil, web, 400, "digest is not the image's"},
		{"bad digest", `{"image": "r.example/a:1", "digest": "sha256:1"}`, nil, web, 400, "image: "},
		{"bad id", `{"image": "r.example/a:1", "id": "a/b"}`, nil, web, 400, "id: "},
		{"bad percent", `{"image": "r.example/a:1", "nodes": {"percent": 101}}`, nil, web, 400, "nodes.percent"},
		{"negative count", `{"image": "r.example/a:1", "nodes": {"count": -1}}`, nil, web, 400, "not the JSON"},
		{"timeout without unit", `{"image": "r.example/a:1", "timeout": 5}`, nil, web, 400, "not the JSON"},
		{"short timeout", `{"image": "r.example/a:1", "timeout": "5ms"}`, nil, web, 400, "timeout: "},
		{"empty platform", `{"image": "r.example/a:1", "platforms": [""]}`, nil, web, 400, "platforms: "},
		{"large", `{"image": "` + strings.Repeat("a", maxBody) + `"}`, nil, web, 413, "too large"},
	} {
		c := newCluster()
		c.err = k.nodes
		h, count := handler(c, k.rules)
		code, body, head := call(h, "POST", "/v1/prefetch", k.body)
		var got struct{ Error string }
		if err := json.Unmarshal([]byte(body), &got); code != k.status || err != nil || !strings.Contains(got.Error, k.said) {
			t.Errorf("%s: %d %s, should be %d %q", k.name, code, body, k.status, k.said)
		}
		if (code == 503) != (head.Get("Retry-After") != "") || (k.name == "not allowed") != (len(count.nothing) == 1) || len(count.requested) > 0 || len(c.known) > 0 {
			t.Errorf("%s: %s %+v", k.name, head, count)
		}
	}
}

// A caller's wishes make what a rule asks for less, never more.
func TestWishesNarrow(t *testing.T) {
	rule := func() *imagewolfv1.PrefetchRequest { d, _ := web(event.Event{Registry: "r.example"}); return d.Request }
	open := func() *imagewolfv1.PrefetchRequest { return &imagewolfv1.PrefetchRequest{} }
	for _, c := range []struct {
		name string
		rule *imagewolfv1.PrefetchRequest
		wish string
		want func(*imagewolfv1.PrefetchRequest)
	}{
		{"nothing", rule(), `{}`, func(*imagewolfv1.PrefetchRequest) {}},
		{"labels", rule(), `{"nodes": {"labels": "gpu"}}`, func(r *imagewolfv1.PrefetchRequest) { r.Nodes.Labels = "zone in (a,b),gpu" }},
		{"fewer", rule(), `{"nodes": {"count": 2, "percent": 50}, "timeout": "10m"}`, func(r *imagewolfv1.PrefetchRequest) {
			r.Nodes.Count, r.Nodes.Percent, r.TimeoutSeconds = 2, 50, 600
		}},
		{"more", rule(), `{"nodes": {"count": 9}, "timeout": "10h"}`, func(*imagewolfv1.PrefetchRequest) {}},
		{"platform", rule(), `{"platforms": ["linux/arm64"]}`, func(r *imagewolfv1.PrefetchRequest) { r.Platforms = []string{"linux/arm64"} }},
		{"flags", rule(), `{"referrers": true, "nodes": {"running_repository": true}}`, func(r *imagewolfv1.PrefetchRequest) {
			r.Referrers, r.Nodes.RunningRepository = true, true
		}},
		{"of a rule that says nothing", open(), `{"platforms": ["linux/arm64"], "nodes": {"labels": "a=b", "count": 9}, "timeout": "10h"}`, func(r *imagewolfv1.PrefetchRequest) {
			r.Platforms, r.Nodes, r.TimeoutSeconds = []string{"linux/arm64"}, &imagewolfv1.NodeSelection{Labels: "a=b", Count: 9}, 36000
		}},
	} {
		var w wish
		if err := json.Unmarshal([]byte(c.wish), &w); err != nil {
			t.Fatal(err)
		}
		want := proto.CloneOf(c.rule)
		c.want(want)
		if err := w.narrow(c.rule); err != nil || !proto.Equal(c.rule, want) {
			t.Errorf("%s: %v\ngot  %v\nwant %v", c.name, err, c.rule, want)
		}
	}
}

func TestWaiting(t *testing.T) {
	post := func(h *Handler) { call(h, "POST", "/v1/prefetch", `{"image": "r.example/a:1", "id": "x"}`) }
	get := func(t *testing.T, h *Handler, path string) (string, time.Duration) {
		t.Helper()
		start := time.Now()
		code, body, _ := call(h, "GET", path, "")
		var a answer
		if err := json.Unmarshal([]byte(body), &a); code != 200 || err != nil {
			t.Errorf("%d %s", code, body)
		}
		return a.State, time.Since(start)
	}
	for _, c := range []struct {
		name  string
		path  string
		run   func(*cluster)
		state string
		after time.Duration
	}{
		{"not", "/v1/prefetch/ci-x", nil, running, 0},
		{"until done", "/v1/prefetch/ci-x?wait=10m", func(c *cluster) {
			time.Sleep(time.Minute)
			c.set("ci-x", 2, 3)
			time.Sleep(time.Minute)
			c.set("ci-x", 3, 3)
		}, done, 2 * time.Minute},
		{"until the time is up", "/v1/prefetch/ci-x?wait=60s", func(c *cluster) {
			time.Sleep(50 * time.Second)
			c.set("ci-x", 2, 3)
		}, running, time.Minute},
		{"while the node is away", "/v1/prefetch/ci-x?wait=10m", func(c *cluster) {
			time.Sleep(10 * time.Second)
			c.mu.Lock()
			c.err = status.Error(codes.Unavailable, "away")
			close(c.changed)
			c.changed = make(chan struct{})
			c.mu.Unlock()
			time.Sleep(time.Minute + time.Millisecond)
			c.mu.Lock()
			c.err = nil
			c.mu.Unlock()
			c.set("ci-x", 3, 4)
		}, failed, 71 * time.Second},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				nodes := newCluster()
				h, _ := handler(nodes, web)
				post(h)
				if c.run != nil {
					go c.run(nodes)
				}
				if s, after := get(t, h, c.path); s != c.state || after != c.after {
					t.Errorf("%s after %s, should be %s after %s", s, after, c.state, c.after)
				}
				synctest.Wait()
			})
		})
	}
	nodes := newCluster()
	h, _ := handler(nodes, web)
	post(h)
	for path, want := range map[string]int{
		"/v1/prefetch/ci-x?wait=11m": 400, "/v1/prefetch/ci-x?wait=60": 400, "/v1/prefetch/ci-x?wait=-1s": 400,
		"/v1/prefetch/ci-y": 404, "/v1/prefetch/a%20b": 404,
	} {
		if code, body, _ := call(h, "GET", path, ""); code != want {
			t.Errorf("%s: %d %s, should be %d", path, code, body, want)
		}
	}
}

func TestTooManyAtOnceAreSentAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		h, _ := handler(newCluster(), func(e event.Event) (work.Decision, error) { <-release; return web(e) })
		var wg sync.WaitGroup
		for range maxPosts {
			wg.Go(func() {
				if code, body, _ := call(h, "POST", "/v1/prefetch", `{"image": "r.example/a:1"}`); code != 202 {
					t.Errorf("%d %s", code, body)
				}
			})
		}
		synctest.Wait()
		if code, _, _ := call(h, "POST", "/v1/prefetch", `{"image": "r.example/a:1"}`); code != 503 {
			t.Errorf("%d", code)
		}
		close(release)
		wg.Wait()
	})
}

// slow is a connection whose body never comes.
type slow struct {
	*httptest.ResponseRecorder
	until time.Time
}

func (s *slow) SetReadDeadline(t time.Time) error { s.until = t; return nil }

func (s *slow) Read([]byte) (int, error) {
	time.Sleep(time.Until(s.until))
	return 0, os.ErrDeadlineExceeded
}

// Whether a signature is right shows only when the body is there. Who makes one up
// and sends nothing holds up no caller with a token, and others not for long.
func TestMadeUpSignaturesHoldNoPlaces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const body = `{"image": "r.example/a:1"}`
		h, count := handler(newCluster(), web)
		var wg sync.WaitGroup
		for range maxUnknown {
			wg.Go(func() {
				s := &slow{ResponseRecorder: httptest.NewRecorder()}
				req := httptest.NewRequest(http.MethodPost, "/v1/prefetch", s)
				req.Header.Set("X-Signature", signed("made up"))
				start := time.Now()
				if h.ServeHTTP(s, req); s.Code != http.StatusBadRequest || time.Since(start) != readTime {
					t.Errorf("%d after %s", s.Code, time.Since(start))
				}
			})
		}
		synctest.Wait()
		if code, got, _ := call(h, "POST", "/v1/prefetch", body); code != 202 {
			t.Errorf("with a token: %d %s", code, got)
		}
		if code, got, _ := call(h, "POST", "/v1/prefetch", body, "Authorization", "", "X-Signature", signed(body)); code != 503 {
			t.Errorf("signed: %d %s", code, got)
		}
		wg.Wait()
		if code, got, _ := call(h, "POST", "/v1/prefetch", body, "Authorization", "", "X-Signature", signed(body)); code != 202 {
			t.Errorf("signed, later: %d %s", code, got)
		}
		if code, _, _ := call(h, "POST", "/v1/prefetch", body, "Authorization", "", "X-Signature", signed("made up")); code != 401 || !slices.Equal(count.nothing, []event.Kind{event.Refused}) {
			t.Errorf("%d, counted %v", code, count.nothing)
		}
	})
}

// unread is a body that a stranger sends, and that nobody waits for.
type unread struct{ t *testing.T }

func (u unread) Read([]byte) (int, error) {
	u.t.Error("the body was read")
	return 0, io.EOF
}

// Strangers take no place of those who have a token.
func TestStrangersAreSentAwayUnread(t *testing.T) {
	h, _ := handler(newCluster(), web)
	for _, c := range []struct{ token, signature string }{
		{"", ""}, {"Bearer wrong", ""}, {"Bearer wrong", signed("made up")}, {"", "sha256=0123"}, {"", "made up"},
	} {
		req := httptest.NewRequest(http.MethodPost, "/v1/prefetch", unread{t})
		req.Header.Set("Authorization", c.token)
		req.Header.Set("X-Signature", c.signature)
		w := httptest.NewRecorder()
		if h.ServeHTTP(w, req); w.Code != http.StatusUnauthorized {
			t.Errorf("%q: %d %s", c, w.Code, w.Body)
		}
	}
}

// FuzzStranger: nobody gets past the check that does not know the token, whatever the
// headers and the body.
func FuzzStranger(f *testing.F) {
	const body = `{"image": "r.example/apps/web:1.4"}`
	f.Add("Bearer "+token, "", []byte(body))
	f.Add("", signed(body), []byte(body))
	f.Add("", signed(body), []byte("{}"))
	f.Add("Basic x", "sha256=0123", []byte(nil))
	f.Add("bEaReR  x", "sha256=", []byte(body))
	h, _ := handler(newCluster(), web)
	f.Fuzz(func(t *testing.T, authorization, signature string, body []byte) {
		req := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/v1/prefetch", nil)
		req.Header["Authorization"], req.Header["X-Signature"] = []string{authorization}, []string{signature}
		knows := strings.Contains(authorization, token) || strings.EqualFold(signature, signed(string(body)))
		if err := h.authenticate(req, body); err == nil && !knows {
			t.Errorf("%q with %q is let in", authorization, signature)
		} else if p := (*problem)(nil); err != nil && (!errors.As(err, &p) || p.status != http.StatusUnauthorized) {
			t.Errorf("refused with %v", err)
		}
	})
}

func FuzzWish(f *testing.F) {
	f.Add([]byte(`{"image": "r.example/a:1@` + d1.String() + `", "digest": "` + d1.String() + `", "id": "x", "platforms": ["linux/arm64"],` +
		` "nodes": {"labels": "zone=a", "count": 2, "percent": 50, "running_repository": true}, "referrers": true, "timeout": "10m"}`))
	f.Add([]byte(`{"image": "r.example/a:1"} x`))
	f.Fuzz(func(t *testing.T, body []byte) {
		w, e, err := understand(body)
		if err != nil {
			return
		}
		if checked := event.Check(e); len(checked.Events) != 1 || !reflect.DeepEqual(checked.Events[0], e) {
			t.Errorf("%+v becomes %+v", e, checked)
		}
		r := &imagewolfv1.PrefetchRequest{}
		if err := w.narrow(r); err != nil || !requestID.MatchString(w.requestID()) || r.Nodes.Percent > 100 || r.TimeoutSeconds < 0 {
			t.Errorf("%+v: %v, %v", w, r, err)
		}
	})
}
