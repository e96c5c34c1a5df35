package tracker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

	api "github.com/imagewolf/imagewolf/api/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// testNet is a network of tracker servers: real gRPC over TCP on loopback, or
// over pipes where time is virtual.
type testNet struct {
	t     *testing.T
	pipes bool
	hold  chan struct{} // not nil: servers take nothing until it is closed

	mu      sync.Mutex
	servers map[string]*testServer
	order   []Peer // what Trackers returns; guarded by mu
}

type testServer struct {
	peer   Peer
	s      *Server
	g      *grpc.Server
	pipe   *bufconn.Listener
	cancel context.CancelFunc
	wg     sync.WaitGroup
}

func newTestNet(t *testing.T, pipes bool) *testNet {
	return &testNet{t: t, pipes: pipes, servers: map[string]*testServer{}}
}

// serve starts a tracker, which the test's end stops.
func (n *testNet) serve(name string, change func(o *ServerOptions)) *testServer {
	n.t.Helper()
	o := ServerOptions{Layout: testLayout, Log: slog.New(slog.DiscardHandler)}
	if change != nil {
		change(&o)
	}
	ts := &testServer{s: NewServer(o), g: grpc.NewServer()}
	ts.s.Register(ts.g)
	var l net.Listener
	if n.pipes {
		ts.pipe = bufconn.Listen(1 << 16)
		l, ts.peer = ts.pipe, Peer{name, name}
	} else {
		tcp, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			n.t.Fatal(err)
		}
		l, ts.peer = tcp, Peer{name, tcp.Addr().String()}
	}
	ctx, cancel := context.WithCancel(context.Background())
	ts.cancel = cancel
	ts.wg.Go(func() {
		if err := ts.s.Run(ctx); err != nil {
			n.t.Error(err)
		}
	})
	hold := n.hold
	ts.wg.Go(func() {
		if hold != nil {
			<-hold
		}
		_ = ts.g.Serve(l) // ends with Stop
	})
	n.mu.Lock()
	n.servers[ts.peer.Address] = ts
	n.order = append(n.order, ts.peer)
	n.mu.Unlock()
	n.t.Cleanup(ts.kill)
	return ts
}

// kill is what becomes of a tracker whose process ends.
func (ts *testServer) kill() {
	ts.cancel()
	ts.g.Stop()
	ts.wg.Wait()
}

func (n *testNet) setOrder(order ...Peer) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.order = order
}

func (n *testNet) trackers(digest.Digest) []Peer {
	n.mu.Lock()
	defer n.mu.Unlock()
	return append([]Peer(nil), n.order...)
}

func (n *testNet) dial(_ context.Context, addr string) (*grpc.ClientConn, error) {
	o := []grpc.DialOption{grpc.WithTransportCredentials(insecure.NewCredentials())}
	if n.pipes {
		o = append(o, grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
			n.mu.Lock()
			ts := n.servers[addr]
			n.mu.Unlock()
			if ts == nil {
				<-ctx.Done() // swallows packets
				return nil, ctx.Err()
			}
			return ts.pipe.DialContext(ctx)
		}))
	}
	return grpc.NewClient("passthrough:///"+addr, o...)
}

func (n *testNet) client(name, zone string) *Client {
	c := NewClient(ClientOptions{
		Self: Peer{name, name + ":7947"}, Zone: zone, Dial: n.dial, Trackers: n.trackers,
		Log: slog.New(slog.DiscardHandler),
	})
	n.t.Cleanup(func() {
		if err := c.Close(); err != nil {
			n.t.Error(err)
		}
	})
	return c
}

// says is a member that says the same everywhere.
func says(h *api.Hello) func() *api.Hello {
	return func() *api.Hello { return proto.CloneOf(h) }
}

// join joins the test blob.
func (n *testNet) join(c *Client, st *api.Status) *Session {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	s, err := c.Join(ctx, testDigest, says(&api.Hello{Size: testSize, Status: st}), nil)
	if err != nil {
		n.t.Fatal(err)
	}
	return s
}

// next is the session's next message as show has it, without the name.
func next(t *testing.T, s *Session) string {
	t.Helper()
	select {
	case msg, ok := <-s.Recv():
		if !ok {
			return fmt.Sprintf("over: %v", s.Err())
		}
		return show([]Command{{Msg: msg}})[0][1:]
	case <-time.After(20 * time.Second):
		t.Fatal("nothing comes")
	}
	return ""
}

func expect(t *testing.T, s *Session, want string) {
	t.Helper()
	if got := next(t, s); got != want {
		t.Fatalf("got %q, want %q", got, want)
	}
}

func sendSegment(s *Session, i int) error {
	return s.Send(&api.MemberMessage{Message: &api.MemberMessage_Announce{Announce: segmentOf(i, 1)}})
}

// bubble runs a test in virtual time on a network of pipes.
func bubble(t *testing.T, f func(t *testing.T, n *testNet)) {
	synctest.Test(t, func(t *testing.T) { f(t, newTestNet(t, true)) })
}

// world is what all nodes have, and who is connected to whom.
type world struct {
	mu      sync.Mutex
	has     map[string]map[int]bool
	links   map[link3]bool // connections go both ways
	changed chan struct{}
	fetches int
	fetched chan int // a segment's turn to be fetched
}

type link3 struct {
	a, b string
	i    int
}

func newWorld() *world {
	return &world{has: map[string]map[int]bool{}, links: map[link3]bool{}, changed: make(chan struct{}), fetched: make(chan int, 4)}
}

func (w *world) put(name string, i int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.has[name][i] = true
	w.wake()
}

func (w *world) link(a, b string, i int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.links[link3{a, b, i}], w.links[link3{b, a, i}] = true, true
	w.wake()
}

// wake needs w.mu.
func (w *world) wake() {
	close(w.changed)
	w.changed = make(chan struct{})
}

// look returns the segments that name can take, whether it has all, and
// whether all have; w.mu must be held.
func (w *world) look(name string) (ready []int, whole, everyone bool) {
	for i := range testSize / mib {
		for o, has := range w.has {
			if !w.has[name][i] && has[i] && w.links[link3{name, o, i}] {
				ready = append(ready, i)
				break
			}
		}
	}
	everyone = true
	for _, has := range w.has {
		everyone = everyone && len(has) == testSize/mib
	}
	return ready, len(w.has[name]) == testSize/mib, everyone
}

// pull is a node that pulls the test blob: it joins and, when a tracker dies,
// joins again, until everyone has all segments.
func (w *world) pull(ctx context.Context, c *Client, log func(string)) error {
	name := c.o.Self.Name
	st := &api.Status{CanFetch: true}
	hello := &api.Hello{Size: testSize}
	for {
		hello.Status = &api.Status{
			CanFetch: st.CanFetch, Fetching: st.Fetching, Prefix: st.Prefix, Present: st.Present,
		}
		s, err := c.Join(ctx, testDigest, says(hello), nil)
		if err != nil {
			return err
		}
		err = w.session(ctx, s, name, st, hello)
		s.Close()
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return errors.Join(err, ctx.Err())
		}
		log(fmt.Sprintf("%s joins again: %v", name, err))
		hello.Resumed = true
	}
}

func (w *world) session(ctx context.Context, s *Session, name string, st *api.Status, hello *api.Hello) error {
	report := func() {
		_ = s.Send(&api.MemberMessage{Message: &api.MemberMessage_Status{Status: &api.Status{
			CanFetch: st.CanFetch, Fetching: st.Fetching, Whole: st.Present == testSize, Prefix: st.Prefix, Present: st.Present,
		}}})
	}
	got := func(i int) {
		w.put(name, i)
		hello.Announced = append(hello.Announced, segmentOf(i, 1))
		st.Present += mib
		if st.Prefix == int64(i)*mib {
			st.Prefix += mib
		}
		_ = sendSegment(s, i)
		report()
	}
	for {
		w.mu.Lock()
		changed := w.changed
		ready, whole, everyone := w.look(name)
		w.mu.Unlock()
		for _, i := range ready {
			got(i)
		}
		if len(ready) > 0 {
			continue
		}
		if whole && everyone {
			return nil // it stays until then, for the others
		}
		var fetched <-chan int
		if st.Fetching {
			fetched = w.fetched
		}
		select {
		case i := <-fetched:
			got(i)
		case <-changed:
		case msg, ok := <-s.Recv():
			if !ok {
				return s.Err()
			}
			if msg.GetFetch() != nil {
				w.mu.Lock()
				w.fetches++
				w.mu.Unlock()
				st.Fetching, st.CanFetch = true, false
				report()
			}
			if seg := msg.GetSegment(); seg != nil {
				i := int(seg.GetSegment())
				for _, p := range seg.GetPeers() {
					w.link(name, p.GetName(), i)
				}
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// swarmOf starts n nodes that pull and returns how to wait for them.
func (w *world) swarmOf(ctx context.Context, t *testing.T, net *testNet, n int) (wait func()) {
	var wg sync.WaitGroup
	for k := range n { // before any of them may think that it is the last
		w.has[fmt.Sprintf("n%02d", k)] = map[int]bool{}
	}
	for k := range n {
		name := fmt.Sprintf("n%02d", k)
		c := net.client(name, []string{"a", "b"}[k%2])
		wg.Go(func() {
			if err := w.pull(ctx, c, func(s string) { t.Log(s) }); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		})
	}
	return wg.Wait
}

func TestTwelveNodesFetchOnce(t *testing.T) {
	net := newTestNet(t, false)
	net.serve("t0", func(o *ServerOptions) { o.Members = func() int { return 12 } })
	w := newWorld()
	for i := range testSize / mib {
		w.fetched <- i
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	w.swarmOf(ctx, t, net, 12)()
	if w.fetches != 1 {
		t.Errorf("%d fetches", w.fetches)
	}
}

func TestTrackerDiesAndTheNextGoesOn(t *testing.T) {
	net := newTestNet(t, false)
	first := net.serve("t0", nil)
	second := net.serve("t1", nil)
	w := newWorld()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	wait := w.swarmOf(ctx, t, net, 10)
	w.fetched <- 0
	for spread := false; !spread; { // until all have the first segment
		w.mu.Lock()
		changed := w.changed
		spread = true
		for _, h := range w.has {
			spread = spread && h[0]
		}
		w.mu.Unlock()
		if !spread {
			select {
			case <-changed:
			case <-ctx.Done():
				t.Fatal("the first segment does not get around")
			}
		}
	}
	first.kill()
	for i := 1; i < testSize/mib; i++ {
		w.fetched <- i
	}
	wait()
	if w.fetches != 1 {
		t.Errorf("%d fetches", w.fetches)
	}
	second.s.mu.Lock()
	defer second.s.mu.Unlock()
	if len(first.s.blobs) != 0 {
		t.Errorf("the dead tracker keeps %d blobs", len(first.s.blobs))
	}
}
