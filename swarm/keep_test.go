package swarm

import (
	"log/slog"
	"testing"
	"time"
)

// A piece that was bad is the fault of whoever is known to send bad ones; those
// whose chunks were mixed with his are left alone.
func TestWhoIsToBlame(t *testing.T) {
	b := newBlob(&Swarm{opts: Options{Log: slog.New(slog.DiscardHandler), Counter: noCounter{}}}, "sha256:x", 4<<20, newMemory(4<<20))
	defer b.cancel()
	s := &segment{blob: b, n: 4 << 20, senders: map[int]map[string]struct{}{}, good: map[int]struct{}{}, broken: map[int]struct{}{}}
	now := time.Now()
	bad := func(piece int, from ...string) {
		s.senders[piece] = map[string]struct{}{}
		for _, p := range from {
			s.senders[piece][p] = struct{}{}
		}
		s.failed(piece, now)
	}
	bad(0, "liar")
	if !b.refuses("liar", now) {
		t.Fatal("who alone sent a bad piece is not shut out")
	}
	for i := range 2 * maxBad {
		now = now.Add(isolation)
		bad(i, "liar", "honest")
	}
	if b.refuses("honest", now) {
		t.Error("shut out for pieces that a known liar had a part in")
	}
	bad(1, "a", "b")
	if b.refuses("a", now) == b.refuses("b", now) {
		t.Error("of two that may be to blame, not one was left out")
	}
	if later := now.Add(isolation); b.refuses("a", later) || b.refuses("b", later) {
		t.Error("left out for longer than it takes to find out")
	}
}

// Nobody is to blame for a piece of which some was here from elsewhere: that may be what
// is wrong.
func TestOwnBytesAreNobodysFault(t *testing.T) {
	const size = 4 << 20
	mine := newMemory(size)
	b := newBlob(&Swarm{opts: Options{Log: slog.New(slog.DiscardHandler), Counter: noCounter{}}}, "sha256:x", size, mine)
	defer b.cancel()
	s := &segment{blob: b, n: size, senders: map[int]map[string]struct{}{}, good: map[int]struct{}{}, broken: map[int]struct{}{}}
	own := int(b.layout.PieceSize)
	mine.fill(make([]byte, size), own, minChunk)            // the first of piece 1
	mine.fill(make([]byte, size), 3*own-minChunk, minChunk) // the last of piece 2
	now := time.Now()
	for _, piece := range []int{1, 2} {
		for range 2 * maxBad {
			s.senders[piece] = map[string]struct{}{"honest": {}}
			s.failed(piece, now)
		}
		if !b.refuses("honest", now) {
			t.Errorf("piece %d: is asked for it again at once", piece)
		}
		if bad := b.BadSenders(0); len(bad) > 0 || b.refuses("honest", now.Add(isolation)) {
			t.Errorf("piece %d: shut out for what was here before; named: %v", piece, bad)
		}
		now = now.Add(isolation)
	}
	s.senders[3] = map[string]struct{}{"liar": {}}
	s.failed(3, now)
	if bad := b.BadSenders(0); len(bad) != 1 || bad[0].Peer != "liar" {
		t.Errorf("of a piece that came from one alone: %v", bad)
	}
}

// The last piece comes from elsewhere while a peer that has all is connected. The
// library is not to drop the peer while it notes that: its notes are in disorder until it
// is through, and it panics if it looks at them, which it does now and then. The peer is
// let go afterwards.
func TestLastPieceFromElsewhere(t *testing.T) {
	data, seeder, _, from, to, sink := pair(t, minSegment, func(o *Options) { o.UploadLimit = 128 << 10 })
	if err := to.Leech(0, offerAll(t, from)[0], addrs(seeder)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "bytes arrive", func() bool { return to.Stats().Downloaded > 0 })
	to.mu.Lock()
	s := to.segs[0]
	sink.fill(data, 0, len(data))
	for _, piece := range to.arrived(s) {
		to.settle(s, piece, true)
	}
	whole, connected := s.t.Complete().Bool(), len(s.t.PeerConns())
	to.mu.Unlock()
	if !whole || connected == 0 {
		t.Errorf("whole: %v, and %d connected", whole, connected)
	}
	eventually(t, "the peers have parted", func() bool { return len(s.t.PeerConns()) == 0 })
}

// Nobody waits for a blob while pieces that came from the registry are read and hashed.
func TestHashingHoldsNothingUp(t *testing.T) {
	const size = 2 * minSegment
	data, _, _, from, to, mine := pair(t, size)
	pieces := offerAll(t, from)
	reads, goOn := make(chan struct{}, 1), make(chan struct{})
	mine.mu.Lock()
	mine.reading = func() error {
		select {
		case reads <- struct{}{}:
		default:
		}
		<-goOn
		return nil
	}
	mine.mu.Unlock()
	if err := to.Leech(0, pieces[0], []string{"127.0.0.1:1"}); err != nil {
		t.Fatal(err)
	}
	mine.fill(data, 0, minSegment)
	<-reads
	asked := make(chan error)
	go func() { asked <- to.Leech(1, pieces[1], []string{"127.0.0.1:1"}) }()
	select {
	case err := <-asked:
		if err != nil {
			t.Error(err)
		}
		close(goOn)
	case <-time.After(patience / 9):
		t.Error("a call waits until all is hashed")
		close(goOn)
		<-asked
	}
	eventually(t, "the segment is whole", func() bool { return to.Ready(0) })
}
