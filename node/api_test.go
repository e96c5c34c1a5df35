package node

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/imagewolf/imagewolf/api/nodeapi"
	imagewolfv1 "github.com/imagewolf/imagewolf/api/v1"
	"github.com/imagewolf/imagewolf/cluster"
	"github.com/imagewolf/imagewolf/config"
	"github.com/imagewolf/imagewolf/prefetch"
)

const empty = digest.Digest("sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")

// testEngine pulls nothing and says that it did.
type testEngine struct {
	mu     sync.Mutex
	pulled []prefetch.Request // guarded by mu
	has    string             // an image of whose repository it has one
	broken bool               // it panics when it is asked
}

func (e *testEngine) Pull(_ context.Context, r prefetch.Request, progress func(prefetch.Progress)) (prefetch.Result, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.pulled = append(e.pulled, r)
	progress(prefetch.Progress{Bytes: 5, Total: 5})
	return prefetch.Result{Digest: empty, Bytes: 5}, nil
}

func (e *testEngine) Record(r prefetch.Request) string { return r.Namespace + " " + r.Image }

func (e *testEngine) HasRepository(_ context.Context, _, image string) (bool, error) {
	if e.broken {
		panic("broken")
	}
	return image == e.has, nil
}

// startPrefetcher starts a node with an engine of the test's own.
func startPrefetcher(t *testing.T, cfg config.Config, e *testEngine) *testNode {
	t.Helper()
	return startNode(t, cfg, func(n *Node) { n.engine = e })
}

// apiClient returns a way to a node that waits until it serves.
func apiClient(t *testing.T, o nodeapi.Options) *nodeapi.Client {
	t.Helper()
	c, err := nodeapi.Dial(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func socketOf(tn *testNode) nodeapi.Options {
	return nodeapi.Options{Addresses: []string{"unix://" + tn.cfg.NodeAPI.Socket}}
}

// awaitAPI waits until a node answers.
func awaitAPI(t *testing.T, c *nodeapi.Client) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		_, err := c.ListPrefetches(ctx, &imagewolfv1.ListPrefetchesRequest{}, grpc.WaitForReady(true))
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatal(err)
		case <-tick.C:
		}
	}
}

// awaitEnd returns the last status of a request.
func awaitEnd(t *testing.T, c *nodeapi.Client, id string) *imagewolfv1.PrefetchStatus {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	stream, err := c.WatchPrefetch(ctx, &imagewolfv1.GetPrefetchRequest{Id: id})
	var last *imagewolfv1.PrefetchStatus
	for err == nil {
		var st *imagewolfv1.PrefetchStatus
		if st, err = stream.Recv(); err == nil {
			last = st
		}
	}
	if ctx.Err() != nil {
		t.Fatalf("it does not end: %v", last)
	}
	return last
}

func TestRequestReachesTheSelectedNodes(t *testing.T) {
	key, seed := cluster.GenerateKey(), freeAddress(t)
	var nodes []*testNode
	var engines []*testEngine
	for i, zone := range []string{"a", "b", "a"} {
		cfg := testConfig(t, fmt.Sprintf("node%d", i), key, seed)
		cfg.Cluster.Labels = map[string]string{"zone": zone}
		if i == 0 {
			cfg.Cluster.GossipAddress = seed
		}
		e := &testEngine{}
		engines = append(engines, e)
		nodes = append(nodes, startPrefetcher(t, cfg, e))
	}
	for _, tn := range nodes {
		tn.awaitMembers(t, 3)
	}
	c := apiClient(t, socketOf(nodes[1]))
	awaitAPI(t, c)
	st, err := c.Prefetch(t.Context(), &imagewolfv1.PrefetchRequest{
		Image: "r/app:1", Digest: empty.String(), Namespace: "space", Platforms: []string{"linux/arm64"}, Referrers: true,
		Nodes: &imagewolfv1.NodeSelection{Labels: "zone=a"},
	})
	if err != nil {
		t.Fatal(err)
	}
	last := awaitEnd(t, c, st.Request.Id)
	if len(last.Nodes) != 2 || last.Nodes[0].Node != "node0" || last.Nodes[1].Node != "node2" ||
		last.Nodes[1].State != imagewolfv1.PrefetchState_PREFETCH_STATE_DONE || last.Nodes[1].Bytes != 5 {
		t.Errorf("in the end: %v", last)
	}
	for i, want := range []int{1, 0, 1} {
		engines[i].mu.Lock()
		if got := engines[i].pulled; len(got) != want {
			t.Errorf("node%d pulled %v", i, got)
		} else if want == 1 && (got[0].Image != "r/app:1" || got[0].Digest != empty || got[0].Namespace != "space" || !got[0].Referrers || len(got[0].Platforms) != 1) {
			t.Errorf("node%d was asked for %+v", i, got[0])
		}
		engines[i].mu.Unlock()
	}
	if got := told(t, nodes[2].Node); got[`imagewolf_prefetch_ended_total{result="done"}`] != 1 || got["imagewolf_prefetch_bytes_total"] != 5 {
		t.Errorf("node2 counts %v", got)
	}
	if got := told(t, nodes[1].Node); got["imagewolf_prefetch_requests_total"] != 1 || got["imagewolf_prefetch_queued"] != 0 {
		t.Errorf("node1 counts %v", got)
	}
	// Only nodes that have one of the repository, and one that panics over it.
	engines[0].has, engines[2].broken = "r/app:2", true
	st, err = c.Prefetch(t.Context(), &imagewolfv1.PrefetchRequest{Image: "r/app:2", Nodes: &imagewolfv1.NodeSelection{RunningRepository: true}})
	if err != nil || len(st.Nodes) != 1 || st.Nodes[0].Node != "node0" {
		t.Errorf("running: %v, %v", st, err)
	}
	if got := told(t, nodes[2].Node)[`imagewolf_panics_total{part="grpc"}`]; got != 1 {
		t.Errorf("%v panics are counted", got)
	}
}

func TestLoneNodePrefetchesForItself(t *testing.T) {
	e := &testEngine{}
	tn := startPrefetcher(t, testConfig(t, "lone", cluster.GenerateKey(), ""), e)
	c := apiClient(t, socketOf(tn))
	awaitAPI(t, c)
	st, err := c.Prefetch(t.Context(), &imagewolfv1.PrefetchRequest{Image: "r/app:1"})
	if err != nil {
		t.Fatal(err)
	}
	if last := awaitEnd(t, c, st.Request.Id); len(last.Nodes) != 1 || last.Nodes[0].State != imagewolfv1.PrefetchState_PREFETCH_STATE_DONE {
		t.Errorf("%v", last)
	}
	fi, err := os.Stat(tn.cfg.NodeAPI.Socket)
	if err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", fi, err)
	}
}

func TestSocketIsOpenToWhomItIsSaid(t *testing.T) {
	cfg := testConfig(t, "one", cluster.GenerateKey(), "")
	cfg.NodeAPI.SocketMode, cfg.NodeAPI.SocketGroup = "0660", fmt.Sprint(os.Getgid())
	awaitAPI(t, apiClient(t, socketOf(startPrefetcher(t, cfg, &testEngine{}))))
	fi, err := os.Stat(cfg.NodeAPI.Socket)
	if err != nil || fi.Mode().Perm() != 0o660 {
		t.Errorf("%v, %v", fi, err)
	}
	n := &Node{cfg: cfg}
	n.cfg.NodeAPI.Socket, n.cfg.NodeAPI.SocketGroup = filepath.Join(t.TempDir(), "s"), "no such group"
	if l, err := n.listenSocket(t.Context()); err == nil || !strings.Contains(err.Error(), "node_api.socket_group") {
		l.Close()
		t.Errorf("of an unknown group: %v", err)
	}
}

func TestNetworkTakesTheTokenAlone(t *testing.T) {
	key, dir := cluster.GenerateKey(), t.TempDir()
	path := func(name, content string) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	pem, err := cluster.AuthorityPEM(key)
	if err != nil {
		t.Fatal(err)
	}
	ca := path("ca", string(pem))
	cfg := testConfig(t, "one", key, "")
	cfg.NodeAPI.Address, cfg.NodeAPI.TokenFile = freeAddress(t), path("token", "the-right-token-of-all")
	tn := startPrefetcher(t, cfg, &testEngine{})
	right := apiClient(t, nodeapi.Options{Addresses: []string{cfg.NodeAPI.Address}, CAFile: ca, TokenFile: path("mine", "the-right-token-of-all")})
	awaitAPI(t, right)
	wrong := apiClient(t, nodeapi.Options{Addresses: []string{cfg.NodeAPI.Address}, CAFile: ca, TokenFile: path("other", "the-wrong-token-of-all")})
	if _, err := wrong.ListPrefetches(t.Context(), &imagewolfv1.ListPrefetchesRequest{}); status.Code(err) != codes.Unauthenticated {
		t.Errorf("with the wrong token: %v", err)
	}
	stream, err := wrong.WatchPrefetch(t.Context(), &imagewolfv1.GetPrefetchRequest{Id: "x"})
	if err == nil {
		_, err = stream.Recv()
	}
	if status.Code(err) != codes.Unauthenticated {
		t.Errorf("stream with the wrong token: %v", err)
	}
	if got := told(t, tn.Node)["imagewolf_node_api_refused_total"]; got != 2 {
		t.Errorf("%v refused", got)
	}
	// The token is exchanged while the node runs.
	path("token", "the-wrong-token-of-all")
	awaitAPI(t, wrong)
	if _, err := right.ListPrefetches(t.Context(), &imagewolfv1.ListPrefetchesRequest{}); status.Code(err) != codes.Unauthenticated {
		t.Errorf("with the old token: %v", err)
	}
	// Nodes of another cluster are not believed.
	other, err := cluster.AuthorityPEM(cluster.GenerateKey())
	if err != nil {
		t.Fatal(err)
	}
	stranger := apiClient(t, nodeapi.Options{Addresses: []string{cfg.NodeAPI.Address}, CAFile: path("other-ca", string(other)), TokenFile: path("token2", "the-wrong-token-of-all")})
	if _, err := stranger.ListPrefetches(t.Context(), &imagewolfv1.ListPrefetchesRequest{}); status.Code(err) != codes.Unavailable {
		t.Errorf("of another cluster: %v", err)
	}
}

func TestShortTokenIsRefusedAtStart(t *testing.T) {
	cfg := testConfig(t, "one", cluster.GenerateKey(), "")
	cfg.NodeAPI.TokenFile = filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(cfg.NodeAPI.TokenFile, []byte("short"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := New(cfg, testLog(t)); err == nil || !strings.Contains(err.Error(), "at least 16") {
		t.Errorf("got %v", err)
	}
}

// What goes wrong with the Node API does not end the node.
func TestBrokenAPIEndsNothing(t *testing.T) {
	cfg := testConfig(t, "one", cluster.GenerateKey(), "")
	if err := os.WriteFile(cfg.NodeAPI.Socket, nil, 0o600); err != nil { // no socket, and in the way
		t.Fatal(err)
	}
	taken, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	cfg.NodeAPI.Address, cfg.NodeAPI.TokenFile = taken.Addr().String(), filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(cfg.NodeAPI.TokenFile, []byte("a-token-of-some-length"), 0o600); err != nil {
		t.Fatal(err)
	}
	tn := startPrefetcher(t, cfg, &testEngine{})
	tn.awaitMembers(t, 1)
	if _, err := tn.client.Info(t.Context(), empty); err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the store answers %v", err)
	}
}
