package swarm

import (
	"testing"
	"time"
)

// trunkCount is how many trunks the peer has dialed and accepted.
func (p *peer) trunkCount() (dialed, accepted int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.trunks), len(p.accepted)
}

// TestOneTrunkPerPair: whatever two nodes exchange goes over one connection,
// which is closed when it has been of no use for a while.
func TestOneTrunkPerPair(t *testing.T) {
	data, seeder, leecher, from, to, sink := pair(t, 8<<20)
	for seg, pieces := range offerAll(t, from) {
		if err := to.Leech(seg, pieces, addrs(seeder)); err != nil {
			t.Fatal(err)
		}
	}
	sink.await(t, 0, int64(len(data)))
	if !sink.equal(data) {
		t.Fatal("other bytes arrived")
	}
	if dialed, accepted := leecher.trunkCount(); dialed != 1 || accepted != 0 {
		t.Errorf("the leecher has dialed %d trunks and accepted %d", dialed, accepted)
	}
	if dialed, accepted := seeder.trunkCount(); dialed != 0 || accepted != 1 {
		t.Errorf("the seeder has dialed %d trunks and accepted %d", dialed, accepted)
	}
	eventually(t, "no peer connection is left", func() bool {
		leecher.mu.Lock()
		defer leecher.mu.Unlock()
		for _, tr := range leecher.trunks {
			if tr.session.NumStreams() > 0 {
				return false
			}
		}
		return true
	})
	leecher.sweepTrunks(time.Now())
	if dialed, _ := leecher.trunkCount(); dialed != 1 {
		t.Error("a trunk was closed that had been used a moment ago")
	}
	leecher.sweepTrunks(time.Now().Add(2 * trunkIdle))
	eventually(t, "an idle trunk is closed at both ends", func() bool {
		dialed, _ := leecher.trunkCount()
		_, accepted := seeder.trunkCount()
		return dialed == 0 && accepted == 0
	})
}

// TestTrunkIsMadeAgain: one that breaks costs a moment, and no transfer.
func TestTrunkIsMadeAgain(t *testing.T) {
	data, seeder, leecher, from, to, sink := pair(t, 8<<20, func(o *Options) { o.UploadLimit = 8 << 20 })
	for seg, pieces := range offerAll(t, from) {
		if err := to.Leech(seg, pieces, addrs(seeder)); err != nil {
			t.Fatal(err)
		}
	}
	for range 3 {
		before := to.Stats().Downloaded
		eventually(t, "bytes arrive", func() bool { return to.Stats().Downloaded > before })
		eventually(t, "a trunk is broken", func() (broken bool) {
			leecher.mu.Lock()
			defer leecher.mu.Unlock()
			for _, tr := range leecher.trunks {
				select {
				case <-tr.ready:
					broken = tr.err == nil && tr.conn.Close() == nil // what the network does
				default: // one that is being made
				}
			}
			return broken || sink.Present(0, int64(len(data)))
		})
	}
	sink.await(t, 0, int64(len(data)))
	if !sink.equal(data) {
		t.Fatal("other bytes arrived")
	}
}

// TestFewSegmentsAtATime: a node that is told of many segments at once takes a
// few after the other, and those that stand still do not hold up the rest.
func TestFewSegmentsAtATime(t *testing.T) {
	data, seeder, _, from, to, sink := pair(t, 16<<20, func(o *Options) { o.UploadLimit = 16 << 20 })
	nobody := newPeer(t)
	nobody.stop()
	const limit = 3
	to.mu.Lock()
	to.limit = limit
	to.mu.Unlock()
	for seg, pieces := range offerAll(t, from) {
		peer := seeder
		if seg < limit {
			peer = nobody
		}
		if err := to.Leech(seg, pieces, addrs(peer)); err != nil {
			t.Fatal(err)
		}
	}
	const off = limit << 20 // segments of 1 MiB
	eventually(t, "the rest is there", func() bool {
		to.mu.Lock()
		n := to.underWay(time.Now())
		to.mu.Unlock()
		if n > limit {
			t.Fatalf("%d segments under way", n)
		}
		return sink.Present(off, int64(len(data)-off))
	})
}
