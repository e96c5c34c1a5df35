package swarm

import (
	"bytes"
	"context"
	"crypto/sha1"
	"errors"
	"math/rand/v2"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/anacrolix/torrent/metainfo"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

func TestOneToOne(t *testing.T) {
	data, seeder, _, from, to, sink := pair(t, 9<<20+12345)
	for i, pieces := range offerAll(t, from) {
		if err := to.Leech(i, pieces, addrs(seeder)); err != nil {
			t.Fatal(err)
		}
	}
	sink.await(t, 0, int64(len(data)))
	if !sink.equal(data) {
		t.Fatal("other bytes arrived")
	}
	for i := range to.layout.Segments() {
		eventually(t, "ready", func() bool { return to.Ready(i) })
	}
	up, down := from.Stats(), to.Stats()
	if up.Uploaded < int64(len(data)) || down.Downloaded < int64(len(data)) {
		t.Errorf("uploaded %d, downloaded %d of %d", up.Uploaded, down.Downloaded, len(data))
	}
	if up.LastActive.IsZero() || down.LastActive.IsZero() {
		t.Error("no activity noted")
	}
	if len(down.Sources) != 1 || down.Sources[seeder.addr] != down.Downloaded {
		t.Errorf("sources: %v", down.Sources)
	}
}

// group is leechers of one blob, each with its bytes.
type group struct {
	data  []byte
	peers []*peer
	blobs []*Blob
	sinks []*memory
}

func newGroup(t *testing.T, n int, data []byte) *group {
	g := &group{data: data}
	for range n {
		p, m := newPeer(t), newMemory(len(data))
		g.peers, g.sinks = append(g.peers, p), append(g.sinks, m)
		g.blobs = append(g.blobs, p.open(t, digest.FromBytes(data), m))
	}
	return g
}

// leech has every peer download every segment from degree random others, and
// besides from the one that first returns for the segment.
func (g *group) leech(t *testing.T, pieces [][]byte, degree int, first func(seg, i int) []string) {
	r := rand.New(rand.NewPCG(1, 2))
	for seg, hashes := range pieces {
		for i, b := range g.blobs {
			from := first(seg, i)
			for _, j := range r.Perm(len(g.peers))[:degree+1] {
				if j != i {
					from = append(from, g.peers[j].addr)
				}
			}
			if err := b.Leech(seg, hashes, from); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func (g *group) await(t *testing.T) {
	t.Helper()
	for i, m := range g.sinks {
		m.await(t, 0, int64(len(g.data)))
		if !m.equal(g.data) {
			t.Errorf("peer %d has other bytes", i)
		}
	}
}

// Every segment leaves the seeder towards one leecher only; the rest is theirs.
func TestTenPeers(t *testing.T) {
	data := content(16<<20, 2)
	seeder := newPeer(t)
	from := seeder.open(t, digest.FromBytes(data), wholeMemory(data))
	g := newGroup(t, 10, data)
	g.leech(t, offerAll(t, from), 3, func(seg, i int) []string {
		if seg%10 == i {
			return addrs(seeder)
		}
		return nil
	})
	g.await(t)
	// Chunks are sent twice at the end of a segment at most.
	if up := from.Stats().Uploaded; up > int64(len(data))*3/2 {
		t.Errorf("the seeder sent %d bytes of %d", up, len(data))
	}
}

// To keep it short all have the first three quarters of each segment.
func TestEachHoldsAnotherSegment(t *testing.T) {
	const n, common = 5, minSegment / 4 * 3
	data := content(n*minSegment, 3)
	pieces := make([][]byte, n)
	g := newGroup(t, n, data)
	for i, m := range g.sinks {
		for seg := range n {
			m.fill(data, seg*minSegment, common)
		}
		m.fill(data, i*minSegment, minSegment)
		var err error
		if pieces[i], err = g.blobs[i].Offer(t.Context(), i, nil); err != nil {
			t.Fatal(err)
		}
	}
	g.leech(t, pieces, 0, func(seg, _ int) []string { return addrs(g.peers[seg]) })
	g.await(t)
	for i, b := range g.blobs {
		if got, want := b.Stats().Downloaded, int64((n-1)*minSegment/4); got < want || got > want*2 {
			t.Errorf("peer %d downloaded %d bytes for %d", i, got, want)
		}
	}
}

func TestSeederLeavesMidway(t *testing.T) {
	data := content(24<<20, 4)
	seeder := newPeer(t, func(o *Options) { o.UploadLimit = 16e6 })
	from := seeder.open(t, digest.FromBytes(data), wholeMemory(data))
	g := newGroup(t, 4, data)
	pieces := offerAll(t, from)
	g.leech(t, pieces, 3, func(int, int) []string { return addrs(seeder) })
	g.sinks[0].await(t, 0, 256<<10)
	// What the others do not have yet comes, as if from the registry, to one.
	seeder.stop()
	g.sinks[2].fill(data, 0, len(data))
	for i := range pieces {
		if _, err := g.blobs[2].Offer(t.Context(), i, nil); err != nil {
			t.Fatal(err)
		}
	}
	g.await(t)
}

// A peer whose bytes are not what it says they are must not keep a good one
// from being heard, nor be asked for ever.
func TestPeerLies(t *testing.T) {
	for _, c := range []struct {
		name   string
		dialed bool
	}{{"is dialed", true}, {"connects to us", false}} {
		t.Run(c.name, func(t *testing.T) {
			data := content(8<<20, 5)
			d := digest.FromBytes(data)
			lie := bytes.Clone(data)
			for i := 100; i < len(lie); i += minChunk {
				lie[i]++
			}
			wrong := wholeMemory(lie)
			if !c.dialed {
				// It lacks something, so it has a reason to connect.
				wrong.there = make([]bool, len(wrong.there))
				wrong.fill(lie, 0, 2<<20)
				wrong.fill(lie, 4<<20, 2<<20)
			}
			good, liar, leecher := newPeer(t), newPeer(t), newPeer(t)
			sink := newMemory(len(data))
			from, to := good.open(t, d, wholeMemory(data)), leecher.open(t, d, sink)
			lying := liar.open(t, d, wrong)
			for i, pieces := range offerAll(t, from) {
				var peers []string
				if c.dialed {
					peers = addrs(liar)
				}
				if err := lying.Leech(i, pieces, addrs(leecher)); err != nil {
					t.Fatal(err)
				}
				if err := to.Leech(i, pieces, append(peers, good.addr)); err != nil {
					t.Fatal(err)
				}
			}
			sink.await(t, 0, int64(len(data)))
			if !sink.equal(data) {
				t.Fatal("the lie was believed")
			}
			if to.refuses(good.addr, time.Now().Add(time.Hour)) {
				t.Error("the good peer was banned")
			}
			// Once with chunks of both in every piece, once from the good one, and
			// what the liar sends alone before it is found out.
			if got := to.Stats().Downloaded; got > 5*int64(len(data))/2 {
				t.Errorf("%d bytes were downloaded, of %d", got, len(data))
			}
		})
	}
}

// What is said of when bytes went by must not depend on a clock that can be set:
// a session would take its peers for busy, or its blob for in use, for a day.
func TestTimesAreOfAClockThatNobodySets(t *testing.T) {
	data, seeder, _, from, to, sink := pair(t, minSegment)
	if !to.LastReceived().IsZero() || !to.Stats().LastActive.IsZero() {
		t.Error("bytes are said to have come before any did")
	}
	began := time.Now()
	pieces, err := from.Offer(t.Context(), 0, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := to.Leech(0, pieces, addrs(seeder)); err != nil {
		t.Fatal(err)
	}
	sink.await(t, 0, int64(len(data)))
	for what, at := range map[string]time.Time{
		"received": to.LastReceived(), "active": to.Stats().LastActive, "sent": from.Stats().LastActive,
	} {
		// Only such a moment has it in its text.
		if !strings.Contains(at.String(), " m=") {
			t.Errorf("%s: %v is of the wall clock", what, at)
		}
		if at.Before(began) || time.Since(at) > patience || time.Since(at) < 0 {
			t.Errorf("%s at %v, begun at %v", what, at, began)
		}
	}
}

func TestOnlyLiars(t *testing.T) {
	data, seeder, leecher, from, to, sink := pair(t, minSegment)
	seen := leecher.seen
	wrong := sha1.Sum([]byte("wrong"))
	pieces := bytes.Repeat(wrong[:], from.layout.Pieces(0))
	if _, err := from.Offer(t.Context(), 0, pieces); err != nil {
		t.Fatal(err)
	}
	if err := to.Leech(0, pieces, addrs(seeder)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "banned", func() bool { return to.refuses(seeder.addr, time.Now().Add(time.Hour)) })
	if sink.Present(0, 1) || to.Ready(0) {
		t.Error("a piece with the wrong hash was taken")
	}
	if got := to.Stats().Downloaded; got > 2*int64(len(data)) {
		t.Errorf("%d bytes were downloaded of a segment of %d", got, len(data))
	}
	if got := seen.shutOut.Load(); got != 1 {
		t.Errorf("%d peers counted as shut out, want 1", got)
	}
	// The ban is for this blob only.
	other := content(minSegment, 9)
	d := digest.FromBytes(other)
	p, err := seeder.open(t, d, wholeMemory(other)).Offer(t.Context(), 0, nil)
	if err != nil {
		t.Fatal(err)
	}
	again := newMemory(len(other))
	if err := leecher.open(t, d, again).Leech(0, p, addrs(seeder)); err != nil {
		t.Fatal(err)
	}
	again.await(t, 0, minSegment)
	if got := seen.received.Load(); got != to.Stats().Downloaded+minSegment {
		t.Errorf("%d bytes counted as received", got)
	}
	if got := seeder.seen.sent.Load(); got < seen.received.Load() {
		t.Errorf("%d bytes counted as sent", got)
	}
}

// The client loses a wake-up about once in a hundred transfers, and then waits
// for its keep-alive.
func TestNoLostWakeUp(t *testing.T) {
	data := content(256<<10, 6)
	seeder, leecher := newPeer(t), newPeer(t)
	for i := range 200 {
		d := digest.FromString(name(i))
		from, err := seeder.Open(d, int64(len(data)), wholeMemory(data))
		if err != nil {
			t.Fatal(err)
		}
		sink := newMemory(len(data))
		to, err := leecher.Open(d, int64(len(data)), sink)
		if err != nil {
			t.Fatal(err)
		}
		pieces, err := from.Offer(t.Context(), 0, nil)
		if err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		if err := to.Leech(0, pieces, addrs(seeder)); err != nil {
			t.Fatal(err)
		}
		sink.await(t, 0, int64(len(data)))
		if took := time.Since(start); took > 2*time.Second {
			t.Errorf("transfer %d took %v", i, took)
		}
		for _, b := range []*Blob{from, to} {
			if err := b.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func TestOfferWhileLeeching(t *testing.T) {
	data, seeder, leecher, from, to, sink := pair(t, 2*minSegment)
	pieces := offerAll(t, from)
	// Nobody has it for now.
	for i := range pieces {
		if err := to.Leech(i, pieces[i], nil); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := to.Offer(t.Context(), 0, nil); !errdefs.IsFailedPrecondition(err) {
		t.Fatalf("offer of what is not here: %v", err)
	}
	sink.fill(data, 0, minSegment)
	got, err := to.Offer(t.Context(), 0, nil)
	if err != nil || !bytes.Equal(got, pieces[0]) {
		t.Fatalf("other hashes, %v", err)
	}
	eventually(t, "ready", func() bool { return to.Ready(0) })
	// The other arrives from elsewhere without a word.
	sink.fill(data, minSegment, minSegment)
	eventually(t, "ready", func() bool { return to.Ready(1) })
	// Leech of what is whole only seeds it.
	if err := to.Leech(0, pieces[0], addrs(seeder)); err != nil {
		t.Fatal(err)
	}
	third := newPeer(t)
	m := newMemory(len(data))
	b := third.open(t, digest.FromBytes(data), m)
	for i := range pieces {
		if err := b.Leech(i, pieces[i], addrs(leecher)); err != nil {
			t.Fatal(err)
		}
	}
	m.await(t, 0, int64(len(data)))
	if to.Stats().Downloaded != 0 {
		t.Error("bytes were downloaded that are here")
	}
}

func TestWrongHashesAreReplaced(t *testing.T) {
	data, seeder, leecher, from, to, sink := pair(t, minSegment)
	right := offerAll(t, from)[0]
	wrong := bytes.Repeat([]byte{7}, len(right))
	if err := to.Leech(0, wrong, nil); err != nil {
		t.Fatal(err)
	}
	if err := to.Leech(0, right, addrs(seeder)); err != nil {
		t.Fatal(err)
	}
	sink.await(t, 0, minSegment)
	if err := to.Leech(0, wrong, nil); err != nil {
		t.Fatal(err)
	}
	if got, err := to.Offer(t.Context(), 0, nil); err != nil || !bytes.Equal(got, right) {
		t.Fatalf("not the right hashes, %v", err)
	}
	third := newPeer(t)
	m := newMemory(len(data))
	if err := third.open(t, digest.FromBytes(data), m).Leech(0, right, addrs(leecher)); err != nil {
		t.Fatal(err)
	}
	m.await(t, 0, int64(len(data)))
}

func TestPeerThatIsNotReadyYet(t *testing.T) {
	data, seeder, _, from, to, sink := pair(t, minSegment)
	pieces, err := hashPieces(t.Context(), bytes.NewReader(data), to.layout, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := to.Leech(0, pieces, addrs(seeder)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a connection was tried", func() bool {
		seeder.mu.Lock()
		defer seeder.mu.Unlock()
		return seeder.lastFace.Load() > 0
	})
	if _, err := from.Offer(t.Context(), 0, pieces); err != nil {
		t.Fatal(err)
	}
	sink.await(t, 0, minSegment)
}

func TestDataFails(t *testing.T) {
	boom := errors.New("disk full")
	for _, c := range []struct {
		name  string
		spoil func(*memory)
	}{
		{"write", func(m *memory) { m.failing = boom }},
		{"mark", func(m *memory) { m.marking = boom }},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, seeder, _, from, to, sink := pair(t, minSegment)
			pieces := offerAll(t, from)[0]
			c.spoil(sink)
			if err := to.Leech(0, pieces, addrs(seeder)); err != nil {
				t.Fatal(err)
			}
			eventually(t, "the error is seen", func() bool { return errors.Is(to.Err(), boom) })
			eventually(t, "torrents are dropped", func() bool {
				to.mu.Lock()
				defer to.mu.Unlock()
				return len(to.segs) == 0
			})
			if err := to.Leech(0, pieces, addrs(seeder)); !errors.Is(err, boom) {
				t.Errorf("Leech: %v", err)
			}
			if to.Ready(0) {
				t.Error("ready all the same")
			}
		})
	}
}

// The library panics over a read that fails when its torrent is dropped.
func TestReadFails(t *testing.T) {
	boom := errors.New("disk gone")
	for _, c := range []struct {
		name  string
		close bool
	}{{"while it is open", false}, {"while it closes", true}} {
		t.Run(c.name, func(t *testing.T) {
			data := content(minSegment, 10)
			d := digest.FromBytes(data)
			seeder, leecher := newPeer(t), newPeer(t)
			source, sink := wholeMemory(data), newMemory(len(data))
			from, to := seeder.open(t, d, source), leecher.open(t, d, sink)
			pieces := offerAll(t, from)[0]
			asked, fail := make(chan struct{}, 100), make(chan struct{})
			source.mu.Lock()
			source.reading = func() error {
				asked <- struct{}{}
				<-fail
				return boom
			}
			source.mu.Unlock()
			if err := to.Leech(0, pieces, addrs(seeder)); err != nil {
				t.Fatal(err)
			}
			<-asked
			closed := make(chan error, 1)
			if c.close {
				go func() { closed <- from.Close() }()
				eventually(t, "the torrent is dropped", func() bool {
					return from.hashOf(0) == metainfo.Hash{}
				})
			}
			close(fail)
			if c.close {
				if err := <-closed; err != nil {
					t.Error(err)
				}
			} else {
				eventually(t, "the error is seen", func() bool { return errors.Is(from.Err(), boom) })
				eventually(t, "the torrent is dropped", func() bool { return !from.Ready(0) })
			}
			if sink.Present(0, 1) || to.refuses(seeder.addr, time.Now()) {
				t.Error("bytes that were not read were sent")
			}
		})
	}
}

// hashOf returns the infohash of an offered segment.
func (b *Blob) hashOf(seg int) metainfo.Hash {
	v := metainfo.Hash{}
	b.swarm.segments.Range(func(k, s any) bool {
		if s := s.(*segment); s.blob == b && s.index == seg {
			v = k.(metainfo.Hash)
		}
		return true
	})
	return v
}

func TestCloseInMidTransfer(t *testing.T) {
	_, seeder, leecher, from, to, sink := pair(t, 16<<20)
	for i, pieces := range offerAll(t, from) {
		if err := to.Leech(i, pieces, addrs(seeder)); err != nil {
			t.Fatal(err)
		}
	}
	sink.await(t, 0, 1)
	for range 2 {
		if err := to.Close(); err != nil {
			t.Fatal(err)
		}
	}
	sink.seal() // the cleanup looks whether it was used
	if err := to.Leech(0, make([]byte, 80), nil); !errdefs.IsUnavailable(err) {
		t.Errorf("Leech after Close: %v", err)
	}
	if _, err := to.Offer(t.Context(), 0, nil); !errdefs.IsUnavailable(err) {
		t.Errorf("Offer after Close: %v", err)
	}
	// It can be opened again.
	m := newMemory(16 << 20)
	again := leecher.open(t, to.digest, m)
	if err := again.Leech(0, from.segs[0].pieces, addrs(seeder)); err != nil {
		t.Fatal(err)
	}
	m.await(t, 0, minSegment)
}

// Nodes that both have all of a segment keep no connection for it: each would
// cost as much as a busy one for as long as the blob is open.
func TestNoConnectionOutlivesItsUse(t *testing.T) {
	const size = 8 * minSegment
	data := content(size, 1)
	d := digest.FromBytes(data)
	peers := make([]*peer, 6)
	blobs, sinks := make([]*Blob, len(peers)), make([]*memory, len(peers))
	for i := range peers {
		peers[i], sinks[i] = newPeer(t), newMemory(size)
		if i == 0 {
			sinks[i] = wholeMemory(data)
		}
		blobs[i] = peers[i].open(t, d, sinks[i])
	}
	for i, pieces := range offerAll(t, blobs[0]) {
		for _, b := range blobs[1:] {
			if err := b.Leech(i, pieces, addrs(peers...)); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, m := range sinks {
		m.await(t, 0, size)
	}
	for _, p := range peers {
		eventually(t, "disconnected", func() bool {
			p.mu.Lock()
			defer p.mu.Unlock()
			return len(p.conns) == 0
		})
	}
}

func TestBan(t *testing.T) {
	_, seeder, _, from, to, sink := pair(t, minSegment, func(o *Options) { o.UploadLimit = 2e6 })
	pieces := offerAll(t, from)[0]
	if err := to.Leech(0, pieces, addrs(seeder)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "bytes flow", func() bool { return to.Stats().Downloaded > 0 })
	to.Ban(seeder.addr)
	eventually(t, "disconnected", func() bool {
		to.mu.Lock()
		defer to.mu.Unlock()
		return len(to.segs[0].t.PeerConns()) == 0
	})
	if sink.Present(0, minSegment) {
		t.Error("it was whole before the ban")
	}
	if bad := to.BadSenders(0); len(bad) > 0 {
		t.Errorf("who was banned for nothing sent bad pieces: %v", bad)
	}
}

// A peer that connects to us is known by its name, once it was dialed.
func TestNamedPeers(t *testing.T) {
	data := content(minSegment, 7)
	d := digest.FromBytes(data)
	left, right := newPeer(t, naming("right")), newPeer(t, naming("left"))
	a, b := newMemory(len(data)), newMemory(len(data))
	a.fill(data, 0, len(data)/2)
	b.fill(data, len(data)/2, len(data)/2)
	x, y := left.open(t, d, a), right.open(t, d, b)
	pieces, err := hashPieces(t.Context(), bytes.NewReader(data), x.layout, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := x.Leech(0, pieces, nil); err != nil { // never dials
		t.Fatal(err)
	}
	if err := y.Leech(0, pieces, addrs(left)); err != nil {
		t.Fatal(err)
	}
	a.await(t, 0, minSegment)
	b.await(t, 0, minSegment)
	if got := x.Stats().Sources; len(got) != 1 || got["right"] == 0 {
		t.Errorf("left was served by %v", got)
	}
	if got := y.Stats().Sources; len(got) != 1 || got[left.addr] == 0 {
		t.Errorf("right was served by %v", got)
	}
	if got := right.identify(named{nil, "left"}); got != left.addr {
		t.Errorf("left is known as %q", got)
	}
	x.Ban("right")
	if !x.refuses("right", time.Now()) {
		t.Error("right is not banned")
	}
}

// naming has all connections, in and out, be with a peer of that name.
func naming(other string) func(*Options) {
	return func(o *Options) {
		dial := o.Dial
		o.Listener = namedListener{o.Listener, other}
		o.Dial = func(ctx context.Context, addr string) (net.Conn, error) {
			c, err := dial(ctx, addr)
			if err != nil {
				return nil, err
			}
			return named{c, other}, nil
		}
	}
}

func TestOpen(t *testing.T) {
	p := newPeer(t)
	d := digest.FromString("x")
	if _, err := p.Open("nonsense", 1, newMemory(1)); !errdefs.IsInvalidArgument(err) {
		t.Errorf("no digest: %v", err)
	}
	if _, err := p.Open(d, 0, newMemory(1)); !errdefs.IsInvalidArgument(err) {
		t.Errorf("empty: %v", err)
	}
	p.open(t, d, newMemory(1))
	if _, err := p.Open(d, 1, newMemory(1)); !errdefs.IsAlreadyExists(err) {
		t.Errorf("twice: %v", err)
	}
	if err := p.Run(t.Context()); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("ran twice: %v", err)
	}
	p.stop()
	if _, err := p.Open(digest.FromString("y"), 1, newMemory(1)); !errdefs.IsUnavailable(err) {
		t.Errorf("after Run: %v", err)
	}
}

func TestInfoIsTheSameEverywhere(t *testing.T) {
	l := LayoutOf(5 << 20)
	b, err := infoBytes(digest.FromString("x"), l, 1, bytes.Repeat([]byte{1}, 80))
	if err != nil {
		t.Fatal(err)
	}
	const want = "d6:lengthi1048576e4:name73:sha256:2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881.112:piece lengthi262144e6:pieces80:" +
		"\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01" +
		"\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01" +
		"7:privatei1e6:source9:imagewolfe"
	if string(b) != want {
		t.Errorf("got  %q\nwant %q", b, want)
	}
}
