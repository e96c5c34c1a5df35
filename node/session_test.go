package node

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	apiv1 "github.com/imagewolf/imagewolf/api/v1"
	"github.com/imagewolf/imagewolf/cluster"
	"github.com/imagewolf/imagewolf/config"
	"github.com/imagewolf/imagewolf/node/metrics"
	"github.com/imagewolf/imagewolf/plugin/store"
	"github.com/imagewolf/imagewolf/swarm"
	"github.com/imagewolf/imagewolf/tracker"
)

// TestReplacedHashes: a tracker that has other piece hashes for a segment is
// followed, but not once a piece has come whose hash is another: it would be handed on
// as if it were right by the new one, and this node be banned for it.
func TestReplacedHashes(t *testing.T) {
	content := make([]byte, 2*mib)
	p := newZoned(t, content, 1, 1).peers[0]
	s := &session{
		blob: p.blob, layout: swarm.LayoutOf(int64(len(content))), log: slog.New(slog.DiscardHandler),
		pieces: map[int][]byte{}, peers: map[int][]string{}, met: map[string]string{}, announced: map[int]bool{},
	}
	hashes := func(with byte) []byte { return bytes.Repeat([]byte{with}, 20*s.layout.Pieces(0)) }
	told := func(seg int, pieces []byte) {
		s.segment(&apiv1.Segment{Segment: uint32(seg), Pieces: pieces, Peers: []*apiv1.Peer{{Address: "127.0.0.1:1"}}})
	}
	if err := p.data.MarkPresent(mib, unit); err != nil { // of segment 1
		t.Fatal(err)
	}
	for seg, want := range [][]byte{hashes(2), hashes(1)} {
		told(seg, hashes(1))
		told(seg, hashes(2))
		if !bytes.Equal(s.pieces[seg], want) {
			t.Errorf("segment %d goes by hashes of %d, want %d", seg, s.pieces[seg][0], want[0])
		}
	}
	same := hashes(2)
	copy(same, hashes(1)[:20]) // of the piece that is here
	if told(1, same); !bytes.Equal(s.pieces[1], same) {
		t.Error("hashes that say the same of the piece that is here are not followed")
	}
}

// TestAccuse: the tracker is told once, and a new one again, of a peer that sent a
// piece which does not have its hash.
func TestAccuse(t *testing.T) {
	content := make([]byte, 2*mib)
	nodes := newZoned(t, content, 2, 1).peers
	liar, leecher := nodes[0], nodes[1]
	if err := liar.data.MarkPresent(0, int64(len(content))); err != nil {
		t.Fatal(err)
	}
	tracker := &asks{}
	s := &session{blob: leecher.blob, tracker: tracker, met: map[string]string{"lies": liar.addr, "does not": "127.0.0.1:1"}}
	s.accuse()
	lies := bytes.Repeat([]byte{5}, 20*swarm.LayoutOf(int64(len(content))).Pieces(0))
	if _, err := liar.blob.Offer(t.Context(), 0, lies); err != nil {
		t.Fatal(err)
	}
	if err := leecher.blob.Leech(0, lies, []string{liar.addr}); err != nil {
		t.Fatal(err)
	}
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	limit := time.After(20 * time.Second)
	for len(leecher.blob.BadSenders(0)) == 0 {
		select {
		case <-tick.C:
		case <-limit:
			t.Fatal("no piece was bad")
		}
	}
	s.accuse()
	said := tracker.n
	if got, want := tracker.accused, []string{"lies"}; said == 0 || !slices.Equal(got.GetPeers(), want) || !bytes.Equal(got.GetPieces(), lies) {
		t.Errorf("told %d times, last %v, want of %v", said, got, want)
	}
	if s.accuse(); len(leecher.blob.BadSenders(said)) == 0 && tracker.n != said {
		t.Errorf("told %d times more of the same", tracker.n-said)
	}
	s.accused = 0 // as when it joins at another tracker
	if s.accuse(); tracker.n < 2*said {
		t.Errorf("the next tracker was told %d times, want %d", tracker.n-said, said)
	}
}

// TestSilent: peers are silent that have been asked, or could not be reached.
func TestSilent(t *testing.T) {
	content := make([]byte, 2*mib)
	nodes := newZoned(t, content, 2, 1).peers
	seeder, leecher := nodes[0], nodes[1]
	if err := seeder.data.MarkPresent(0, int64(len(content))); err != nil {
		t.Fatal(err)
	}
	pieces, err := seeder.blob.Offer(t.Context(), 0, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := leecher.blob.Leech(0, pieces, []string{seeder.addr}); err != nil {
		t.Fatal(err)
	}
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	limit := time.After(20 * time.Second)
	for !leecher.blob.Ready(0) {
		select {
		case <-tick.C:
		case <-limit:
			t.Fatal("nothing was sent")
		}
	}
	s := &session{blob: leecher.blob, met: map[string]string{"sends": seeder.addr, "is not there": "127.0.0.1:1"}}
	if err := leecher.blob.Leech(1, pieces, []string{"127.0.0.1:1"}); err != nil {
		t.Fatal(err)
	}
	for leecher.blob.Owed("127.0.0.1:1").IsZero() {
		select {
		case <-tick.C:
		case <-limit:
			t.Fatal("nobody was dialed")
		}
	}
	tracker, cfg := &asks{}, config.Default()
	s.node, s.tracker, s.state = &Node{cfg: cfg}, tracker, store.State{Waiting: 1}
	stall := cfg.Tracker.StallTimeout.Duration()
	now, want := time.Now().Add(time.Minute), []string{"is not there"}
	for _, c := range []struct {
		name  string
		at    time.Time
		still time.Duration // without a new piece
		want  []string
	}{
		{"not for long", now, stall, nil},
		{"bytes came from another", s.blob.LastReceived().Add(stall + stall/2 - 1), time.Hour, nil},
		{"silent", now, stall + stall/2, want},
	} {
		if got := s.silent(c.at, c.still); !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
	// They are named at once, and then as often as the tracker is asked anyway.
	s.movedAt, s.askedAt = now.Add(-stall-stall/2+time.Millisecond), now
	for after, n := range []int{0, 1, 1} {
		if s.patience(now.Add(time.Duration(after) * 10 * time.Millisecond)); tracker.n != n {
			t.Errorf("%d looks: %d asks, want %d", after+1, tracker.n, n)
		}
	}
	if !slices.Equal(tracker.silent, want) {
		t.Errorf("the tracker is told of %v", tracker.silent)
	}
	if s.patience(now.Add(stall)); tracker.n != 2 {
		t.Errorf("%d asks later, want 2", tracker.n)
	}
}

// clients counts those that are sent to the registry.
type clients struct {
	source
	sent int
}

func (c *clients) Watch() (store.State, <-chan struct{}) { return store.State{Waiting: 1}, nil }

func (c *clients) Fetch() bool { c.sent++; return true }

// TestLostTracker: a session that finds no tracker sends its client to the registry;
// one that had a tracker a moment ago looks again first.
func TestLostTracker(t *testing.T) {
	cfg := testConfig(t, "a", cluster.GenerateKey(), "")
	cfg.Tracker.DecideTimeout = config.Duration(50 * time.Millisecond)
	n, err := New(cfg, testLog(t))
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0") // takes connections and never answers
	if err != nil {
		t.Fatal(err)
	}
	st, err := newStack(n, l)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(st.tracker.Close(), l.Close()); err != nil {
			t.Error(err)
		}
	})
	stall := cfg.Tracker.StallTimeout.Duration()
	for _, c := range []struct {
		name string
		join func(s *session)
		sent int
	}{
		{"never had one", func(s *session) { s.join(t.Context()) }, 1},
		{"has lost it", func(s *session) { s.tracker = &asks{}; s.lost(t.Context()) }, 0},
		{"lost it long ago", func(s *session) { s.lostAt = time.Now().Add(-stall); s.join(t.Context()) }, 1},
	} {
		content := &clients{}
		s := newSession(n, st, "sha256:00", mib, content)
		c.join(s)
		if content.sent != c.sent || s.retryAt.IsZero() {
			t.Errorf("%s: %d sent to the registry, want %d; looks again at %v", c.name, content.sent, c.sent, s.retryAt)
		}
		if s.heldUp >= time.Second { // it would be two, were there no bound
			t.Errorf("%s: one that cannot be reached was waited for %v longer than decide_timeout", c.name, s.heldUp)
		}
	}
	synctest.Test(t, func(t *testing.T) { silentTracker(t, n, st) })
}

// silentTracker: the time that a session waits in vain for a tracker that seemed to be
// there is not that in which it looks for another, or all members would go to the
// registry after one such try. It is no excuse for ever.
func silentTracker(t *testing.T, n *Node, st *stack) {
	tries := 0
	client := tracker.NewClient(tracker.ClientOptions{Trackers: func(digest.Digest) []tracker.Peer {
		tries++
		time.Sleep(n.cfg.Tracker.StallTimeout.Duration()) // virtual
		return nil
	}})
	content := &clients{}
	s := newSession(n, &stack{cluster: st.cluster, tracker: client}, "sha256:00", mib, content)
	s.tracker = &asks{}
	s.lost(t.Context())
	if content.sent != 0 {
		t.Error("one silent tracker sends the client to the registry")
	}
	for content.sent == 0 && tries < 10 {
		time.Sleep(time.Until(s.retryAt)) // virtual
		s.join(t.Context())
	}
	if tries != 2 {
		t.Errorf("sent to the registry after %d tries, want 2", tries)
	}
	s.tracker = &asks{}
	if s.lost(t.Context()); content.sent != 1 {
		t.Error("the tracker that is lost next is not looked for any longer")
	}
	if err := client.Close(); err != nil {
		t.Error(err)
	}
}

// hesitant is a tracker that answers once it has heard a status, if it answers at all.
type hesitant struct {
	apiv1.UnimplementedTrackerServer
	answers bool
	heard   chan *apiv1.MemberMessage
}

func (h *hesitant) Join(stream grpc.BidiStreamingServer[apiv1.MemberMessage, apiv1.TrackerMessage]) error {
	for {
		m, err := stream.Recv()
		if err != nil {
			return err
		}
		h.heard <- m
		if h.answers && m.GetStatus() != nil {
			if err := stream.Send(&apiv1.TrackerMessage{Message: &apiv1.TrackerMessage_Wait{Wait: &apiv1.Wait{}}}); err != nil {
				return err
			}
		}
	}
}

// growing is content that has become something else at the second look.
type growing struct {
	*strict
	looks int
	then  store.State
}

func (g *growing) Watch() (store.State, <-chan struct{}) {
	if g.looks++; g.looks > 1 {
		return g.then, nil
	}
	return g.strict.Watch()
}

// A session tells what is new while its tracker has yet to answer: where the line is full,
// that takes seconds. It is without one if there is no answer. That the blob is wrong it
// tells only where it is answered.
func TestTellsBeforeTheAnswer(t *testing.T) {
	st := alone(t)
	for _, c := range []struct {
		answers, wrong bool
	}{{true, false}, {false, false}, {false, true}} {
		answers := c.answers
		synctest.Test(t, func(t *testing.T) {
			pipe, srv := bufconn.Listen(1<<16), grpc.NewServer()
			h := &hesitant{answers: answers, heard: make(chan *apiv1.MemberMessage, 100)}
			apiv1.RegisterTrackerServer(srv, h)
			served := make(chan error, 1)
			go func() { served <- srv.Serve(pipe) }()
			client := tracker.NewClient(tracker.ClientOptions{
				Self: tracker.Peer{Name: "a", Address: "a:1"}, Reach: time.Second,
				Trackers: func(digest.Digest) []tracker.Peer { return []tracker.Peer{{Name: "t", Address: "t:1"}} },
				Dial: func(context.Context, string) (*grpc.ClientConn, error) {
					return grpc.NewClient("passthrough:///t", grpc.WithTransportCredentials(insecure.NewCredentials()),
						grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return pipe.DialContext(ctx) }))
				},
			})
			s, content := newTold(t, &stack{cluster: st.cluster, tracker: client}, inlineLimit)
			then := store.State{Waiting: 1, Present: 100}
			if c.wrong {
				then = store.State{Waiting: 1, Failed: 1}
			}
			s.content = &growing{strict: content, then: then}
			s.announced[0], s.announced[1], s.pieces[1] = true, true, []byte{1} // 0 could not be offered
			s.join(t.Context())
			if has := s.tracker != nil; has != answers {
				t.Errorf("the tracker answers: %v; the session has one: %v", answers, has)
			}
			s.leave()
			if err := client.Close(); err != nil {
				t.Error(err)
			}
			srv.Stop()
			if err := <-served; err != nil {
				t.Error(err)
			}
			if got := (<-h.heard).GetHello(); got.GetDigest() != s.digest.String() || got.GetSize() != inlineLimit || got.GetStatus().GetPresent() != 0 ||
				len(got.GetAnnounced()) != 1 || got.GetAnnounced()[0].GetSegment() != 1 {
				t.Errorf("says %v at first", got)
			}
			if c.wrong {
				if n := len(h.heard); n != 0 || s.failed != 0 {
					t.Errorf("says %d things more, and has told %d times that the blob is wrong", n, s.failed)
				}
				return
			}
			if got := (<-h.heard).GetStatus(); got.GetPresent() != 100 {
				t.Errorf("then says %v, and 100 bytes have come", got)
			}
			if n := len(h.heard); n != 0 {
				t.Errorf("says %d things more, and nothing is new", n)
			}
		})
	}
}

// A session ends whose bytes cannot be written: nobody is to wait for them. It does not where
// the store has thrown away what was here, which ends the same torrents.
func TestBroken(t *testing.T) {
	content := bytes.Repeat([]byte{7}, 2*mib)
	z := newZoned(t, content, 2, 1)
	from, to := z.peers[0], z.peers[1]
	from.data.bytes, to.data.full = content, true
	if err := from.data.MarkPresent(0, 2*mib); err != nil {
		t.Fatal(err)
	}
	pieces, err := from.blob.Offer(t.Context(), 0, nil)
	if err != nil {
		t.Fatal(err)
	}
	has := &strict{state: store.State{Waiting: 1, Present: mib}}
	s := &session{blob: to.blob, content: has, seen: has.state}
	if s.broken() {
		t.Error("broken before anything was written")
	}
	if err := to.blob.Leech(0, pieces, []string{from.addr}); err != nil {
		t.Fatal(err)
	}
	tick, limit := time.NewTicker(time.Millisecond), time.After(time.Minute)
	defer tick.Stop()
	for to.blob.Err() == nil {
		select {
		case <-tick.C:
		case <-limit:
			t.Fatal("nothing is written")
		}
	}
	for _, c := range []struct {
		state store.State
		want  bool
	}{
		{store.State{Waiting: 1, Present: mib}, true},
		{store.State{Waiting: 1, Present: mib, Failed: 1}, false},
		{store.State{Waiting: 1, Present: mib - 1}, false},
	} {
		if has.state = c.state; s.broken() != c.want {
			t.Errorf("%+v: broken: %v", c.state, !c.want)
		}
	}
	if s.blob = nil; s.broken() {
		t.Error("a small blob is broken")
	}
}

// TestFullLine: who waits for a blob whose line is full of another waits twice as long.
func TestFullLine(t *testing.T) {
	cfg := config.Default()
	wait := cfg.Tracker.MaxWait.Duration()
	for _, c := range []struct {
		still time.Duration
		full  bool
		sent  int
	}{{wait, false, 1}, {wait, true, 0}, {2 * wait, true, 1}} {
		n := &Node{cfg: cfg, log: testLog(t), book: newBook(), metrics: metrics.New(metrics.Now{})}
		content, now := &clients{}, time.Now()
		s := newSession(n, &stack{}, "sha256:00", mib, content)
		s.tracker, s.state, s.movedAt = &asks{}, store.State{Waiting: 1}, now.Add(-c.still)
		if n.book.enter("sha256:01"); c.full {
			n.book.moved("sha256:01", now)
		}
		if s.patience(now); content.sent != c.sent {
			t.Errorf("after %v, the line full: %v: %d sent to the registry, want %d", c.still, c.full, content.sent, c.sent)
		}
	}
}

// asks has the silent peers, and those that sent bad pieces, that a tracker was last
// told of, and how often it was told anything.
type asks struct {
	trackerSession
	n       int
	silent  []string
	accused *apiv1.BadPieces
}

func (a *asks) Err() error { return nil }

func (a *asks) Close() {}

func (a *asks) Send(m *apiv1.MemberMessage) error {
	a.n++
	a.silent, a.accused = m.GetAsk().GetSilent(), m.GetBadPieces()
	return nil
}
