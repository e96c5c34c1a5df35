package fanout

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	imagewolfv1 "github.com/imagewolf/imagewolf/api/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	queued      = imagewolfv1.PrefetchState_PREFETCH_STATE_QUEUED
	pulling     = imagewolfv1.PrefetchState_PREFETCH_STATE_PULLING
	done        = imagewolfv1.PrefetchState_PREFETCH_STATE_DONE
	failed      = imagewolfv1.PrefetchState_PREFETCH_STATE_FAILED
	canceled    = imagewolfv1.PrefetchState_PREFETCH_STATE_CANCELED
	unreachable = imagewolfv1.PrefetchState_PREFETCH_STATE_UNREACHABLE
)

// world is a cluster in one process: nodes that call each other, and can be made
// deaf.
type world struct {
	t *testing.T

	mu      sync.Mutex
	nodes   map[string]*testNode // guarded by mu
	running int                  // guarded by mu: pulls of all nodes now
	most    int                  // guarded by mu: and at any time
}

// testNode is one node of a world.
type testNode struct {
	*Fanout
	w      *world
	name   string
	labels map[string]string
	path   string
	slots  int

	// Pull is what its pulls do; nil: a second each.
	do func(ctx context.Context, r *imagewolfv1.PrefetchRequest, progress func(bytes, total int64)) (string, error)

	broken atomic.Bool     // Record panics
	asks   func(of string) // called when the way to a member is looked for; may be nil

	mu     sync.Mutex
	gone   bool            // guarded by mu: no member
	deaf   bool            // guarded by mu: a member that answers nothing
	pulled []string        // guarded by mu: images, in the order of the pulls' beginnings
	has    map[string]bool // guarded by mu: images of whose repository it says it has some
	counts map[string]int  // guarded by mu
	called int             // guarded by mu: by other nodes
	calls  int             // guarded by mu: by other nodes, now
	most   int             // guarded by mu: and at any time
	stop   func()          // ends its run
}

func newWorld(t *testing.T) *world {
	return &world{t: t, nodes: map[string]*testNode{}}
}

// add starts a node.
func (w *world) add(name string, labels map[string]string) *testNode {
	n := &testNode{w: w, name: name, labels: labels, path: filepath.Join(w.t.TempDir(), "prefetch.db"), slots: 2, counts: map[string]int{}, has: map[string]bool{}}
	w.mu.Lock()
	w.nodes[name] = n
	w.mu.Unlock()
	n.start()
	w.t.Cleanup(func() { n.stop() })
	return n
}

// addAll starts nodes n00, n01, … without labels.
func (w *world) addAll(n int) []*testNode {
	var out []*testNode
	for i := range n {
		out = append(out, w.add(fmt.Sprintf("n%02d", i), nil))
	}
	return out
}

// start makes the node anew on its file, as a process would.
func (n *testNode) start() {
	n.Fanout = New(Options{
		Self: n.name, Path: n.path, Slots: n.slots, Puller: n, Cluster: n, Counter: n,
		Log: slog.New(slog.NewTextHandler(n.w.t.Output(), nil)),
		Guard: func(f func() error) (err error) {
			defer func() {
				if p := recover(); p != nil {
					err = fmt.Errorf("panic: %v", p)
				}
			}()
			return f()
		},
	})
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	f := n.Fanout
	go func() {
		defer close(ended)
		if err := f.Run(ctx); err != nil {
			n.w.t.Errorf("%s: %v", n.name, err)
		}
	}()
	n.stop = sync.OnceFunc(func() { cancel(); <-ended })
	for f.running() != nil {
		time.Sleep(time.Millisecond)
	}
}

func (n *testNode) set(f func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	f()
}

// Members implements Cluster.
func (n *testNode) Members(context.Context) ([]Member, error) {
	n.w.mu.Lock()
	defer n.w.mu.Unlock()
	var out []Member
	for _, name := range slices.Sorted(maps.Keys(n.w.nodes)) {
		o := n.w.nodes[name]
		o.mu.Lock()
		if !o.gone {
			out = append(out, Member{Name: o.name, Labels: o.labels})
		}
		o.mu.Unlock()
	}
	return out, nil
}

// Peer implements Cluster.
func (n *testNode) Peer(name string) (imagewolfv1.PrefetcherClient, error) {
	if n.asks != nil {
		n.asks(name)
	}
	n.w.mu.Lock()
	defer n.w.mu.Unlock()
	o := n.w.nodes[name]
	if o == nil {
		return nil, errors.New("no member")
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.gone {
		return nil, errors.New("no member")
	}
	return wire{o}, nil
}

// Requested implements Counter.
func (n *testNode) Requested() { n.set(func() { n.counts["requested"]++ }) }

// Retried implements Counter.
func (n *testNode) Retried() { n.set(func() { n.counts["retried"]++ }) }

// Ended implements Counter.
func (n *testNode) Ended(s string) { n.set(func() { n.counts[s]++ }) }

// HasRepository implements Puller.
func (n *testNode) HasRepository(_ context.Context, _, image string) (bool, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.has[image], nil
}

// Record implements Puller.
func (n *testNode) Record(r *imagewolfv1.PrefetchRequest) string {
	if n.broken.Load() {
		panic("broken")
	}
	if strings.Contains(r.Image, "@") {
		return ""
	}
	return r.Namespace + " " + r.Image
}

// Pull implements Puller.
func (n *testNode) Pull(ctx context.Context, r *imagewolfv1.PrefetchRequest, progress func(bytes, total int64)) (string, error) {
	n.set(func() { n.pulled = append(n.pulled, r.Image) })
	n.w.mu.Lock()
	n.w.running++
	n.w.most = max(n.w.most, n.w.running)
	n.w.mu.Unlock()
	defer func() {
		n.w.mu.Lock()
		defer n.w.mu.Unlock()
		n.w.running--
	}()
	if n.do != nil {
		return n.do(ctx, r, progress)
	}
	return pause(time.Second)(ctx, r, progress)
}

// pause is a pull that takes so long.
func pause(d time.Duration) func(context.Context, *imagewolfv1.PrefetchRequest, func(bytes, total int64)) (string, error) {
	return func(ctx context.Context, _ *imagewolfv1.PrefetchRequest, progress func(bytes, total int64)) (string, error) {
		progress(1, 10)
		select {
		case <-ctx.Done():
			return "", ctx.Err()
		case <-time.After(d):
			progress(10, 10)
			return testDigest, nil
		}
	}
}

const testDigest = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

// wire calls another node as the network would: nothing is shared, and who is
// deaf does not answer.
type wire struct{ to *testNode }

func call[In, Out proto.Message](ctx context.Context, w wire, in In, do func(context.Context, In) (Out, error)) (Out, error) {
	w.to.mu.Lock()
	deaf := w.to.deaf
	w.to.called++
	w.to.calls++
	w.to.most = max(w.to.most, w.to.calls)
	w.to.mu.Unlock()
	defer w.to.set(func() { w.to.calls-- })
	var none Out
	if deaf {
		<-ctx.Done()
		return none, status.FromContextError(ctx.Err()).Err()
	}
	out, err := do(ctx, proto.CloneOf(in))
	if err != nil {
		return none, err
	}
	return proto.CloneOf(out), nil
}

func (w wire) Offer(ctx context.Context, in *imagewolfv1.OfferRequest, _ ...grpc.CallOption) (*imagewolfv1.OfferResponse, error) {
	return call(ctx, w, in, w.to.Prefetcher().Offer)
}

func (w wire) Start(ctx context.Context, in *imagewolfv1.StartRequest, _ ...grpc.CallOption) (*imagewolfv1.NodePrefetch, error) {
	return call(ctx, w, in, w.to.Prefetcher().Start)
}

func (w wire) Report(ctx context.Context, in *imagewolfv1.ReportRequest, _ ...grpc.CallOption) (*imagewolfv1.ReportResponse, error) {
	return call(ctx, w, in, w.to.Prefetcher().Report)
}

func (w wire) Cancel(ctx context.Context, in *imagewolfv1.CancelPrefetchRequest, _ ...grpc.CallOption) (*imagewolfv1.NodePrefetch, error) {
	return call(ctx, w, in, w.to.Prefetcher().Cancel)
}

// prefetchOn sends a request to a node and fails the test if it is refused.
func prefetchOn(t *testing.T, n *testNode, r *imagewolfv1.PrefetchRequest) *imagewolfv1.PrefetchStatus {
	t.Helper()
	st, err := n.Node().Prefetch(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	return st
}

// statusOn asks a node about a request.
func statusOn(t *testing.T, n *testNode, id string) *imagewolfv1.PrefetchStatus {
	t.Helper()
	st, err := n.Node().GetPrefetch(t.Context(), &imagewolfv1.GetPrefetchRequest{Id: id})
	if err != nil {
		t.Fatal(err)
	}
	return st
}

// statesOf is a status in one line: "n00:done n01:queued".
func statesOf(st *imagewolfv1.PrefetchStatus) string {
	var out []string
	for _, n := range st.Nodes {
		out = append(out, n.Node+":"+strings.ToLower(strings.TrimPrefix(n.State.String(), "PREFETCH_STATE_")))
	}
	return strings.Join(out, " ")
}

// wants fails the test unless a request is where it should be.
func wants(t *testing.T, n *testNode, id, want string) *imagewolfv1.PrefetchStatus {
	t.Helper()
	st := statusOn(t, n, id)
	if got := statesOf(st); got != want {
		t.Errorf("%s says of %s:\n%s, want\n%s", n.name, id, got, want)
	}
	return st
}

func code(err error) codes.Code { return status.Code(err) }

// images returns what the node has pulled, in the order of the pulls' beginnings.
func (n *testNode) images() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.pulled)
}

// count returns how often the node counted something.
func (n *testNode) count(what string) int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.counts[what]
}

// peak returns how many pulls there were at the same time.
func (w *world) peak() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.most
}

// held returns how many requests a node remembers.
func (n *testNode) held() int {
	n.Fanout.mu.Lock()
	defer n.Fanout.mu.Unlock()
	return len(n.records)
}
