package integration

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	api "github.com/imagewolf/imagewolf/api/v1"
	"github.com/imagewolf/imagewolf/cluster"
	"github.com/imagewolf/imagewolf/integration/harness"
	"github.com/imagewolf/imagewolf/swarm"
)

// liar is a node that has the cluster's key and means no good. It speaks the
// cluster's protocols by the product's own packages, and says with them what the
// test wants.
type liar struct {
	*testing.T
	name  string
	id    *cluster.Identity
	addr  string // of its data port
	swarm *swarm.Swarm
}

// liars is how many there have been.
var liars atomic.Int32

// newLiar starts one that ends with the test.
func newLiar(t *testing.T, w *world) *liar {
	t.Helper()
	quiet := slog.New(slog.DiscardHandler)
	// Daemons name one for the same once an hour: each has a name of its own.
	l := &liar{T: t, name: fmt.Sprintf("liar%d", liars.Add(1))}
	var err error
	l.id, err = cluster.LoadIdentity(cluster.IdentityOptions{ClusterKey: w.Key, NodeName: l.name, Log: quiet})
	must(t, err)
	listener, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	must(t, err)
	l.addr = listener.Addr().String()
	become(t, w, l.id, l.name, l.addr)
	port := cluster.NewDataPort(listener, l.id, everyone{}, quiet)
	l.swarm = swarm.New(swarm.Options{
		Listener: port.BitTorrent(), Log: quiet,
		Dial: func(ctx context.Context, addr string) (net.Conn, error) {
			return l.id.Dial(ctx, addr, cluster.ProtoBitTorrent)
		},
	})
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	for _, run := range []func(context.Context) error{port.Run, l.swarm.Run} {
		running.Go(func() {
			if err := run(ctx); err != nil {
				t.Error(err)
			}
		})
	}
	t.Cleanup(func() {
		cancel()
		running.Wait()
	})
	return l
}

// everyone is a membership of all who have a certificate of the cluster.
type everyone struct{}

func (everyone) Admits(string) bool                 { return true }
func (everyone) Await(context.Context, string) bool { return true }
func (everyone) Connected(net.Conn)                 {}

// become has the nodes know an identity as that of a member. It says goodbye at
// once, so that nobody takes it for a tracker; members that have just left are
// still let in.
func become(t *testing.T, w *world, id *cluster.Identity, name, data string) {
	t.Helper()
	c, err := cluster.New(cluster.Options{
		Identity: id, Name: name, BindAddr: "127.0.0.1:0", DataAddress: data, Log: slog.New(slog.DiscardHandler),
		Join: []string{w.Nodes[0].Wolf.Gossip, w.Nodes[1].Wolf.Gossip},
	})
	must(t, err)
	await := w.logged(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	await(fmt.Sprintf("msg=%q name=%s ", "node joined", name))
	cancel()
	must(t, <-done)
	await(fmt.Sprintf("msg=%q name=%s ", "node gone", name))
}

// logged returns what waits until every daemon has logged a text since now.
func (w *world) logged(t *testing.T) (await func(text string)) {
	t.Helper()
	began := map[*harness.Node]int{}
	read := func(n *harness.Node) string {
		data, err := os.ReadFile(n.Wolf.Log())
		must(t, err)
		return string(data)
	}
	for _, n := range w.Nodes {
		began[n] = len(read(n))
	}
	return func(text string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		must(t, harness.Poll(ctx, 20*time.Millisecond, func() error {
			for _, n := range w.Nodes {
				if !strings.Contains(read(n)[began[n]:], text) {
					return fmt.Errorf("%s has not logged %s", n.Name, text)
				}
			}
			return nil
		}))
	}
}

// dial returns a client of a node's tracker.
func (l *liar) dial(n *harness.Node) api.TrackerClient {
	l.Helper()
	conn, err := grpc.NewClient("passthrough:///"+n.Wolf.Data, l.id.GRPCDialOptions()...)
	must(l.T, err)
	l.Cleanup(func() { _ = conn.Close() }) // closed once, here
	return api.NewTrackerClient(conn)
}

// join makes the liar a member at a tracker. What it is told goes to told, which
// may be nil.
func (l *liar) join(n *harness.Node, hello *api.Hello, told func(*api.TrackerMessage)) api.Tracker_JoinClient {
	l.Helper()
	hello.Self = &api.Peer{Name: l.name, Address: l.addr}
	stream, err := l.dial(n).Join(l.Context())
	must(l.T, err)
	must(l.T, stream.Send(&api.MemberMessage{Message: &api.MemberMessage_Hello{Hello: hello}}))
	first, err := stream.Recv()
	must(l.T, err)
	go func() { // ends with the test's context
		for msg := first; err == nil; msg, err = stream.Recv() {
			if told != nil {
				told(msg)
			}
		}
	}()
	return stream
}

// seed joins a blob's swarm as one that has all of it: data, by the piece hashes
// of other bytes if those are given.
func (l *liar) seed(n *harness.Node, d digest.Digest, data swarm.Data, size int64, hashed []byte) {
	l.Helper()
	hashes := data
	if hashed != nil {
		hashes = &lie{bytes: hashed}
	}
	announced := l.offer(d, size, hashes)
	blob, err := l.swarm.Open(d, size, data)
	must(l.T, err)
	l.Cleanup(func() { _ = blob.Close() }) // the swarm ends with the test as well
	for _, a := range announced {
		_, err := blob.Offer(l.Context(), int(a.GetSegment()), a.GetPieces())
		must(l.T, err)
	}
	l.join(n, &api.Hello{
		Digest: d.String(), Size: size, Announced: announced,
		Status: &api.Status{Prefix: size, Present: size, Whole: true},
	}, nil)
}

// offer returns what a node with these bytes announces.
func (l *liar) offer(d digest.Digest, size int64, data swarm.Data) []*api.Announce {
	l.Helper()
	blob, err := l.swarm.Open(d, size, data)
	must(l.T, err)
	var out []*api.Announce
	for i := range swarm.LayoutOf(size).Segments() {
		pieces, err := blob.Offer(l.Context(), i, nil)
		must(l.T, err)
		out = append(out, &api.Announce{Segment: uint32(i), Pieces: pieces})
	}
	must(l.T, blob.Close())
	return out
}

// lie is bytes that are all there, as it says.
type lie struct {
	bytes []byte
	// after so many bytes it answers no more, until until is closed; 0: never.
	after int64
	until chan struct{}

	mu   sync.Mutex
	sent int64 // guarded by mu
}

func (d *lie) ReadAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	d.sent += int64(len(p))
	stall := d.after > 0 && d.sent > d.after
	d.mu.Unlock()
	if stall {
		<-d.until
		return 0, io.ErrClosedPipe
	}
	return bytes.NewReader(d.bytes).ReadAt(p, off)
}

func (d *lie) WriteAt([]byte, int64) (int, error) { return 0, io.ErrClosedPipe }
func (d *lie) MarkPresent(int64, int64) error     { return nil }
func (d *lie) Present(int64, int64) bool          { return true }

// blob returns the bytes of a layer.
func blob(ctx context.Context, t *testing.T, img *harness.Image, d string) []byte {
	t.Helper()
	repo, _, _ := strings.Cut(strings.TrimPrefix(img.Ref, registry.Host+"/"), ":")
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+registry.Host+"/v2/"+repo+"/blobs/"+d, nil)
	must(t, err)
	resp, err := http.DefaultClient.Do(req)
	must(t, err)
	defer resp.Body.Close() //nolint:errcheck // only read from
	data, err := io.ReadAll(resp.Body)
	must(t, err)
	return data
}

// lies are what a member can do to the others. Each is told before three nodes
// pull an image of one layer.
var lies = []struct {
	name string
	// quick ones are told in every run, the others by `make faults`.
	quick bool
	// tell tells it; right is the layer's bytes.
	tell func(l *liar, n *harness.Node, d digest.Digest, right []byte)
	// within is how many seconds the pulls may take.
	within float64
	// copies may leave the registry.
	copies float64
	// log is what some node must have said about the liar, who must be counted as well;
	// "" for one that nobody can name.
	log string
	// elsewhere says that this is not about the layer.
	elsewhere bool
}{
	{
		name: "wrong bytes by right hashes", quick: true, within: 12, copies: 1.05, log: "piece from peers was bad",
		tell: func(l *liar, n *harness.Node, d digest.Digest, right []byte) {
			l.seed(n, d, &lie{bytes: make([]byte, len(right))}, int64(len(right)), right)
		},
	},
	{
		name: "another blob by its own hashes", quick: true, within: 15, copies: 2.1, log: "wrong about what the bytes are",
		tell: func(l *liar, n *harness.Node, d digest.Digest, right []byte) {
			wrong := bytes.Clone(right)
			for i := range wrong {
				wrong[i]++
			}
			l.seed(n, d, &lie{bytes: wrong}, int64(len(right)), nil)
		},
	},
	{
		name: "one wrong byte at the end", within: 12, copies: 1.3, log: "wrong about what the bytes are",
		tell: func(l *liar, n *harness.Node, d digest.Digest, right []byte) {
			wrong := bytes.Clone(right)
			wrong[len(wrong)-1]++
			l.seed(n, d, &lie{bytes: wrong}, int64(len(right)), nil)
		},
	},
	{
		// Nobody takes pieces by them, and two who say so have it shut out.
		name: "right bytes by another blob's hashes", quick: true, within: 10, copies: 1.3, log: "member shut out of blob",
		tell: func(l *liar, n *harness.Node, d digest.Digest, right []byte) {
			l.seed(n, d, &lie{bytes: right}, int64(len(right)), make([]byte, len(right)))
		},
	},
	{
		// Some pieces can be taken, and are gone on with by the right hashes.
		name: "right bytes by hashes of which some are wrong", within: 10, copies: 1.3, log: "member shut out of blob",
		tell: func(l *liar, n *harness.Node, d digest.Digest, right []byte) {
			hashed := bytes.Clone(right)
			layout := swarm.LayoutOf(int64(len(right)))
			for i := range layout.Segments() {
				off, size := layout.Segment(i)
				hashed[off+size-1]++
			}
			l.seed(n, d, &lie{bytes: right}, int64(len(right)), hashed)
		},
	},
	{
		// The registry is asked when nothing has come for a while, and believed rather.
		name: "hashes of another blob and no bytes", within: 10, copies: 1.3, log: "member shut out of blob",
		tell: func(l *liar, n *harness.Node, d digest.Digest, right []byte) {
			l.join(n, &api.Hello{
				Digest: d.String(), Size: int64(len(right)), Announced: l.offer(d, int64(len(right)), &lie{bytes: make([]byte, len(right))}),
				Status: &api.Status{Prefix: int64(len(right)), Present: int64(len(right)), Whole: true},
			}, nil)
		},
	},
	{
		// It says that it has all, and sends no block.
		name: "a seeder that stalls after the handshake", within: 8, copies: 1.05, log: "announced segments and sent nothing",
		tell: func(l *liar, n *harness.Node, d digest.Digest, right []byte) {
			stalled := &lie{bytes: right, after: 1, until: make(chan struct{})}
			l.seed(n, d, stalled, int64(len(right)), right)
			l.Cleanup(func() { close(stalled.until) })
		},
	},
	{
		name: "a seeder that stalls after a block", within: 8, copies: 1.05, log: "announced segments and sent nothing",
		tell: func(l *liar, n *harness.Node, d digest.Digest, right []byte) {
			stalled := &lie{bytes: right, after: 64 << 10, until: make(chan struct{})}
			l.seed(n, d, stalled, int64(len(right)), right)
			l.Cleanup(func() { close(stalled.until) })
		},
	},
	{
		name: "a seeder that is not there", within: 8, copies: 1.05, log: "announced segments and sent nothing",
		tell: func(l *liar, n *harness.Node, d digest.Digest, right []byte) {
			announced := l.offer(d, int64(len(right)), &lie{bytes: right})
			l.addr = "127.0.0.1:1" // where nobody listens
			l.join(n, &api.Hello{
				Digest: d.String(), Size: int64(len(right)), Announced: announced,
				Status: &api.Status{Prefix: int64(len(right)), Present: int64(len(right)), Whole: true},
			}, nil)
		},
	},
	{
		name: "a promise to be seeder", within: 10, copies: 1.05, log: "member did not do as it said",
		tell: func(l *liar, n *harness.Node, d digest.Digest, right []byte) {
			stream, err := l.dial(n).Register(l.Context())
			must(l.T, err)
			must(l.T, stream.Send(&api.RegisterMessage{
				Self:  &api.Peer{Name: l.name, Address: l.addr},
				Added: []*api.Held{{Digest: d.String(), Size: int64(len(right))}},
			}))
		},
	},
	{
		name: "a fetcher that never moves", within: 10, copies: 1.05, log: "member did not do as it said",
		tell: func(l *liar, n *harness.Node, d digest.Digest, right []byte) {
			// A tracker that has just become one waits for others before it sends the first.
			told := make(chan struct{})
			once := sync.OnceFunc(func() { close(told) })
			hello := &api.Hello{Digest: d.String(), Size: int64(len(right)), Status: &api.Status{CanFetch: true}}
			l.join(n, hello, func(m *api.TrackerMessage) {
				if m.GetFetch() != nil {
					once()
				}
			})
			select {
			case <-told:
			case <-time.After(20 * time.Second):
				l.Error("it is not told to fetch")
			}
		},
	},
	{
		name: "ten thousand false segments", quick: true, within: 8, copies: 1.05, log: "member shut out of blob",
		tell: func(l *liar, n *harness.Node, d digest.Digest, right []byte) {
			stream := l.join(n, &api.Hello{Digest: d.String(), Size: int64(len(right)), Status: &api.Status{}}, nil)
			for i := range 10_000 {
				a := &api.Announce{Segment: uint32(i), Pieces: make([]byte, 20*(i%64))}
				if stream.Send(&api.MemberMessage{Message: &api.MemberMessage_Announce{Announce: a}}) != nil {
					return // refused, which is well
				}
			}
		},
	},
	{
		name: "a flood of registrations", quick: true, within: 10, copies: 1.05,
		log: "it registers more blobs than a node may", elsewhere: true,
		tell: func(l *liar, n *harness.Node, _ digest.Digest, _ []byte) {
			// Four that take more than they may, then one that keeps all it may.
			for k, blobs := range []int{200_000, 200_000, 200_000, 200_000, 130_000} {
				stream, err := l.dial(n).Register(l.Context())
				must(l.T, err)
				msg := &api.RegisterMessage{Self: &api.Peer{Name: l.name, Address: l.addr}}
				for i := 0; i < blobs && err == nil; i += 1000 {
					for j := range 1000 {
						d := digest.FromString(fmt.Sprint(k, i+j)).String()
						msg.Added = append(msg.Added, &api.Held{Digest: d, Size: 1 << 20})
					}
					err = stream.Send(msg) // refused sooner or later
					msg = &api.RegisterMessage{}
				}
				if k < 4 {
					for err == nil || err == io.EOF { //nolint:errorlint // gRPC's own
						_, err = stream.Recv()
					}
					if status.Code(err) != codes.ResourceExhausted {
						l.Errorf("the flood ends with %v", err)
					}
				}
			}
		},
	},
	{
		name: "a flood of joins", within: 12, copies: 1.05,
		log: "it is a member of more blobs at once than a node may", elsewhere: true,
		tell: func(l *liar, n *harness.Node, _ digest.Digest, _ []byte) {
			client := l.dial(n)
			for i := range 3000 {
				stream, err := client.Join(l.Context())
				if err != nil {
					return
				}
				hello := &api.Hello{
					Digest: digest.FromString(fmt.Sprint(i)).String(), Size: 1 << 30, Status: &api.Status{CanFetch: true},
					Self: &api.Peer{Name: l.name, Address: l.addr},
				}
				if stream.Send(&api.MemberMessage{Message: &api.MemberMessage_Hello{Hello: hello}}) != nil {
					return
				}
			}
		},
	},
	{
		name: "huge messages", within: 12, copies: 1.05, log: "member shut out of blob",
		tell: func(l *liar, n *harness.Node, d digest.Digest, right []byte) {
			for range 20 { // 600 MiB in all
				stream := l.join(n, &api.Hello{Digest: d.String(), Size: int64(len(right)), Status: &api.Status{}}, nil)
				a := &api.Announce{Pieces: make([]byte, 3<<20)}
				for range 10 {
					_ = stream.Send(&api.MemberMessage{Message: &api.MemberMessage_Announce{Announce: a}}) // refused sooner or later
				}
			}
		},
	},
	{
		name: "endless messages", within: 12, copies: 1.05, log: "it sends more messages than there is to say",
		tell: func(l *liar, n *harness.Node, d digest.Digest, right []byte) {
			stream := l.join(n, &api.Hello{Digest: d.String(), Size: int64(len(right)), Status: &api.Status{}}, nil)
			go func() { // ends with the test's context
				for i := int64(0); ; i++ {
					if stream.Send(&api.MemberMessage{Message: &api.MemberMessage_Status{Status: &api.Status{Line: i}}}) != nil {
						return
					}
				}
			}()
		},
	},
	{
		// It moves from tracker to tracker, as it says, and each time is to be waited for.
		name: "a fetcher that leaves again and again", within: 8, copies: 1.05, log: "it joins the blob again and again",
		tell: func(l *liar, n *harness.Node, d digest.Digest, right []byte) {
			client := l.dial(n)
			go func() { // ends with the test's context
				for {
					stream, err := client.Join(l.Context())
					if err != nil {
						return
					}
					for _, m := range []*api.MemberMessage{
						{Message: &api.MemberMessage_Hello{Hello: &api.Hello{
							Digest: d.String(), Size: int64(len(right)), Self: &api.Peer{Name: l.name, Address: l.addr}, Resumed: true,
							Status: &api.Status{Fetching: true},
						}}},
						{Message: &api.MemberMessage_Moved{Moved: &api.Moved{}}},
					} {
						_ = stream.Send(m) // Recv has the error
					}
					for err == nil {
						_, err = stream.Recv()
					}
				}
			}()
		},
	},
	{
		// Whoever does not show a certificate has no name: nobody is named or counted.
		name: "connections that say nothing", within: 12, copies: 1.05,
		tell: func(l *liar, n *harness.Node, _ digest.Digest, _ []byte) {
			for range 1000 {
				conn, err := (&net.Dialer{}).DialContext(l.Context(), "tcp", n.Wolf.Data)
				if err != nil {
					return
				}
				l.Cleanup(func() { _ = conn.Close() }) // perhaps by the other side already
			}
		},
	},
}

// TestLiars: whatever a member says or does, the others get the right image, and
// soon.
func TestLiars(t *testing.T) {
	for _, c := range lies {
		if !c.quick && os.Getenv("FAULTS") != "all" {
			continue
		}
		t.Run(c.name, func(t *testing.T) {
			each(t, func(ctx context.Context, t *testing.T, w *world) {
				w.ns = "liars"
				line := record(t, "liar: "+c.name, w.version)
				img := image(ctx, t, 12)
				layer := img.Layer(0)
				right := blob(ctx, t, img, layer)
				registry.Reset()
				at := trackerOf(layer, w.Nodes)
				l := newLiar(t, w)
				counted := named(ctx, t, w)
				before := map[*harness.Node]int64{}
				for _, n := range w.Nodes {
					must(t, n.Wolf.Process().ForgetPeak())
					before[n] = memory(t, n)
				}
				c.tell(l, at, digest.Digest(layer), right)
				nodes := w.Nodes[:3]
				took, err := harness.PullOn(ctx, nodes, w.ns, img.Ref)
				must(t, err)
				whole(ctx, t, w.ns, img, nodes...)
				last, copies := max(took[0], took[1], took[2]).Seconds(), float64(registry.Bytes(""))/float64(img.Bytes())
				line.Seconds, line.RegistryCopies = last, copies
				var grown, most int64
				for _, n := range w.Nodes {
					peak, err := n.Wolf.Process().PeakRSS()
					must(t, err)
					grown, most = max(grown, peak-before[n]), max(most, peak)
				}
				t.Logf("%.1f s, registry copies %.3f, the memory of a node grew by %d MiB at most, to %d MiB at most", last, copies, grown>>20, most>>20)
				if last > c.within {
					t.Errorf("took %.1f s, more than %.0f", last, c.within)
				}
				if copies > c.copies {
					t.Errorf("the registry sent %.3f copies, more than %.2f", copies, c.copies)
				}
				// Also all of it, since a node may still have what it grew by for an earlier liar.
				if grown > 128*mib || most > 192*mib {
					t.Errorf("the memory of a node grew by %d MiB, to %d MiB", grown>>20, most>>20)
				}
				about := layer
				if c.elsewhere {
					about = ""
				}
				if c.log != "" && !l.said(w.Nodes, c.log, about) {
					t.Errorf("nobody said %q about the liar", c.log)
				}
				if more := named(ctx, t, w) - counted; c.log != "" && more < 1 {
					t.Errorf("%v peers more are counted as wrong or silent", more)
				}
				panics, err := w.Metric(ctx, "imagewolf_panics_total")
				must(t, err)
				if panics > 0 {
					t.Errorf("%v panics were contained", panics)
				}
			}, harness.V2)
		})
	}
}

// named is how many peers the nodes have counted as wrong or silent.
func named(ctx context.Context, t *testing.T, w *world) (sum float64) {
	t.Helper()
	for _, metric := range []string{
		`imagewolf_peers_shut_out_total{reason="bad piece"}`, `imagewolf_peers_shut_out_total{reason="bad hashes"}`,
		"imagewolf_promises_broken_total",
	} {
		n, err := w.Metric(ctx, metric)
		must(t, err)
		sum += n
	}
	return sum
}

// memory is what a node's daemon has resident, in bytes.
func memory(t *testing.T, n *harness.Node) int64 {
	t.Helper()
	rss, err := n.Wolf.Process().RSS()
	must(t, err)
	return rss
}

// said reports whether some daemon's log has a line with these words in it that names
// the liar, by its name or its very address.
func (l *liar) said(nodes []*harness.Node, words ...string) bool {
	whole := regexp.MustCompile(`(^|[^\w.:-])(` + regexp.QuoteMeta(l.name) + `|` + regexp.QuoteMeta(l.addr) + `)($|[^\w.:-])`)
	return slices.ContainsFunc(lines(nodes, words...), whole.MatchString)
}

// said reports whether some daemon's log has a line with these words in it.
func said(nodes []*harness.Node, words ...string) bool { return len(lines(nodes, words...)) > 0 }

// lines are those of the daemons' logs that have all these words in them.
func lines(nodes []*harness.Node, words ...string) (out []string) {
	for _, n := range nodes {
		data, err := os.ReadFile(n.Wolf.Log())
		if err != nil {
			return nil
		}
		for line := range strings.Lines(string(data)) {
			if !slices.ContainsFunc(words, func(word string) bool { return !strings.Contains(line, word) }) {
				out = append(out, line)
			}
		}
	}
	return out
}
