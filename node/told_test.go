package node

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/proto"

	apiv1 "github.com/imagewolf/imagewolf/api/v1"
	"github.com/imagewolf/imagewolf/cluster"
	"github.com/imagewolf/imagewolf/config"
	"github.com/imagewolf/imagewolf/node/metrics"
	"github.com/imagewolf/imagewolf/plugin/store"
	"github.com/imagewolf/imagewolf/swarm"
	"github.com/imagewolf/imagewolf/tracker"
)

// strict is the content of a blob that nothing of is here yet. It notes what must not
// be asked of it.
type strict struct {
	size int64

	mu    sync.Mutex // guards what follows
	state store.State
	wrong string
}

func (c *strict) within(what string, off, n int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if off < 0 || n <= 0 || n > c.size-off {
		c.wrong = fmt.Sprintf("%s %d bytes at %d of %d", what, n, off, c.size)
	}
}

func (c *strict) ReadAt([]byte, int64) (int, error) { return 0, io.EOF }

func (c *strict) WriteAt(p []byte, off int64) (int, error) {
	c.within("write", off, int64(len(p)))
	return len(p), nil
}

func (c *strict) MarkPresent(off, n int64) error {
	c.within("mark", off, n)
	return nil
}

func (c *strict) Present(int64, int64) bool { return false }

func (c *strict) Watch() (store.State, <-chan struct{}) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.state, nil
}

func (c *strict) Fetch() bool { return true }

func (c *strict) Forget() {}

func (c *strict) exchange() swarm.Data { return c }

// lonely is a swarm that reaches nobody.
func lonely(t testing.TB) *swarm.Swarm {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := swarm.New(swarm.Options{
		Listener: l, Log: slog.New(slog.DiscardHandler),
		Dial: func(context.Context, string) (net.Conn, error) { return nil, errors.New("nobody is dialed here") },
	})
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return s
}

// saying is messages as a tracker sends them, each behind a byte for what is here of
// the blob by then, and its length.
func saying(first byte, messages ...*apiv1.TrackerMessage) []byte {
	data := []byte{first}
	for _, m := range messages {
		b, err := proto.Marshal(m)
		if err != nil {
			panic(err)
		}
		data = append(binary.AppendUvarint(append(data, 1), uint64(len(b))), b...)
	}
	return data
}

func segmentMessage(s *apiv1.Segment) *apiv1.TrackerMessage {
	return &apiv1.TrackerMessage{Message: &apiv1.TrackerMessage_Segment{Segment: s}}
}

// alone is the stack of a node that reaches nobody.
func alone(t testing.TB) *stack {
	t.Helper()
	id, err := cluster.LoadIdentity(cluster.IdentityOptions{ClusterKey: cluster.GenerateKey(), NodeName: "alone"})
	if err != nil {
		t.Fatal(err)
	}
	c, err := cluster.New(cluster.Options{
		Identity: id, Name: "alone", BindAddr: "127.0.0.1:0", DataAddress: "127.0.0.1:1", Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	return &stack{cluster: c, swarm: lonely(t)}
}

// newTold is the session of a client that waits for a blob of size bytes.
func newTold(t testing.TB, st *stack, size int64) (*session, *strict) {
	cfg := config.Default()
	n := &Node{cfg: cfg, log: slog.New(slog.DiscardHandler), book: newBook(), metrics: metrics.New(metrics.Now{})}
	content := &strict{size: size, state: store.State{Waiting: 1}}
	out := newSession(n, st, digest.FromString("x"), size, content)
	if err := out.open(t.Context()); err != nil {
		t.Fatal(err)
	}
	return out, content
}

// bounded fails the test if a session remembers more than it may, or what cannot be.
func bounded(t *testing.T, s *session) {
	t.Helper()
	if len(s.met) > tracker.MaxMembers {
		t.Fatalf("%d peers are remembered", len(s.met))
	}
	for i, p := range s.peers {
		if len(p) > maxTold || i < 0 || i >= s.layout.Segments() {
			t.Fatalf("%d peers of segment %d are kept", len(p), i)
		}
	}
	for i, p := range s.pieces {
		if i < 0 || i >= s.layout.Segments() || len(p) != 20*s.layout.Pieces(i) {
			t.Fatalf("%d bytes of hashes of segment %d", len(p), i)
		}
	}
	if s.ownWay && len(s.pieces)+len(s.met)+len(s.peers) > 0 {
		t.Fatal("the swarm is still believed")
	}
}

// FuzzTold has a tracker say anything: nothing is written but what may be, and what is
// remembered is bounded.
func FuzzTold(f *testing.F) {
	layout := swarm.LayoutOf(2 * mib)
	pieces := make([]byte, 20*layout.Pieces(0))
	peers := []*apiv1.Peer{{Name: "a", Address: "127.0.0.1:1"}, {Name: "b", Address: "no address"}, {}}
	f.Add(saying(0, segmentMessage(&apiv1.Segment{Pieces: pieces, Peers: peers}), segmentMessage(&apiv1.Segment{Segment: 1, Peers: peers}),
		&apiv1.TrackerMessage{Message: &apiv1.TrackerMessage_Wait{}}, &apiv1.TrackerMessage{Message: &apiv1.TrackerMessage_Fetch{}},
		&apiv1.TrackerMessage{Message: &apiv1.TrackerMessage_Retract{}}, segmentMessage(&apiv1.Segment{Segment: 1 << 31, Pieces: []byte{1}})))
	f.Add(saying(1, &apiv1.TrackerMessage{Message: &apiv1.TrackerMessage_Inline{Inline: &apiv1.Inline{Data: make([]byte, 100)}}},
		&apiv1.TrackerMessage{}, segmentMessage(nil)))
	st := alone(f)
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) == 0 {
			return
		}
		size := int64(2 * mib)
		if data[0]&1 > 0 {
			size = 100
		}
		s, content := newTold(t, st, size)
		defer s.leave()
		retracted := 0
		for data = data[1:]; len(data) > 1; {
			here := store.State{Waiting: int(data[0] & 1), Writing: int(data[0] >> 1 & 1), Whole: data[0]&4 > 0}
			content.mu.Lock()
			content.state, s.state = here, here
			content.mu.Unlock()
			n, used := binary.Uvarint(data[1:])
			if used <= 0 {
				return
			}
			data = data[1+used:]
			one := data[:min(n, uint64(len(data)))]
			data = data[len(one):]
			m := &apiv1.TrackerMessage{}
			if proto.Unmarshal(one, m) != nil {
				continue
			}
			s.handle(t.Context(), m)
			if _, ok := m.GetMessage().(*apiv1.TrackerMessage_Retract); ok {
				retracted++
			}
			s.resume()
			bounded(t, s)
		}
		if s.retracted != retracted || s.ownWay != (retracted > maxRetracted) || (s.blob == nil) != (size <= inlineLimit) {
			t.Errorf("%d of %d taken back, by the registry alone: %v", s.retracted, retracted, s.ownWay)
		}
		content.mu.Lock()
		defer content.mu.Unlock()
		if content.wrong != "" {
			t.Error(content.wrong)
		}
	})
}

// TestToldTooMuch: a tracker cannot fill a node's memory.
func TestToldTooMuch(t *testing.T) {
	s, _ := newTold(t, alone(t), 2*mib)
	defer s.leave()
	s.state = store.State{} // nobody wants it: what is told is kept
	pieces := make([]byte, 20*s.layout.Pieces(0))
	s.handle(t.Context(), segmentMessage(&apiv1.Segment{Pieces: make([]byte, 1<<20)}))
	if len(s.pieces) != 0 {
		t.Error("hashes that cannot be the segment's are kept")
	}
	for i := range 20 {
		m := &apiv1.Segment{Pieces: pieces, Peers: []*apiv1.Peer{{Name: strings.Repeat("a", tracker.MaxText+1)}, {Name: "far", Address: strings.Repeat("a", tracker.MaxText+1)}}}
		for j := range 1000 {
			m.Peers = append(m.Peers, &apiv1.Peer{Name: fmt.Sprint(i, "-", j), Address: fmt.Sprintf("127.0.0.1:%d", i*1000+j)},
				&apiv1.Peer{Name: "again", Address: "127.0.0.1:19998"})
		}
		s.handle(t.Context(), segmentMessage(m))
	}
	bounded(t, s)
	// The newest are kept, each once.
	if len(s.met) != tracker.MaxMembers || len(s.peers[0]) != maxTold || s.met["far"] != "" || s.peers[0][maxTold-1] != "127.0.0.1:19999" ||
		s.peers[0][0] != "127.0.0.1:19936" {
		t.Errorf("%d met, %d told", len(s.met), len(s.peers[0]))
	}
}

// A node says what comes in now while it fetches and its bytes come slowly, and what
// registries have sent it just now.
func TestSaysHowFast(t *testing.T) {
	lone := alone(t)
	synctest.Test(t, func(t *testing.T) {
		var received uint64
		cfg := config.Default()
		n := &Node{
			cfg: cfg, log: slog.New(slog.DiscardHandler), book: newBook(), metrics: metrics.New(metrics.Now{}),
			inflow: &inflow{log: slog.New(slog.DiscardHandler), connections: func() (map[uint32]uint64, error) {
				return map[uint32]uint64{1: received}, nil
			}},
		}
		n.meter.received(8*mib, true, time.Now(), time.Now().Add(time.Second))
		s := newSession(n, lone, "sha256:00", mib, &strict{size: mib})
		s.state = store.State{Writing: 1}
		s.metered.broughtAt = time.Now()
		var st *apiv1.Status
		for range 10 {
			time.Sleep(sampleEvery)
			received += 50 << 10
			st = s.status()
		}
		if st.GetSlow() {
			t.Error("says that it is slow")
		}
		if st.GetInflow() != 128<<10 || st.GetLately() != 8*mib || !st.GetReceiving() {
			t.Errorf("fetching slowly: %v", st)
		}
		if s.state.Writing = 0; s.status().GetInflow() != 0 {
			t.Error("not fetching, and says what comes in")
		}
		time.Sleep(meterLately * time.Second)
		if got := s.status().GetLately(); got != 0 {
			t.Errorf("%d bytes/s lately, ten seconds after them", got)
		}
	})
}
