package swarm

import (
	"testing"
	"time"
)

// TestNeeded: who stops is needed while peers may want what it alone has, or are being
// sent it, and no longer.
func TestNeeded(t *testing.T) {
	const size = 2 * minSegment
	_, seeder, leecher, from, to, sink := pair(t, size)
	check := func(what string, p *peer, at time.Time, want bool) {
		t.Helper()
		if got := p.Needed(at); got != want {
			t.Errorf("%s: needed: %v", what, got)
		}
	}
	// sent is when something was last sent, last when it was sent, told or asked for.
	times := func() (sent, last time.Time) {
		from.mu.Lock()
		defer from.mu.Unlock()
		var s, l int64
		for _, seg := range from.segs {
			s, l = max(s, seg.sent.Load()), max(l, seg.joined.Load())
		}
		return atStart(s), atStart(max(s, l, from.offered.Load()))
	}
	check("nothing is offered", seeder, time.Now(), false)
	pieces := offerAll(t, from)
	_, last := times()
	check("told of it a moment ago", seeder, last.Add(interest-1), true)
	check("told of it, and nobody comes", seeder, last.Add(interest), false)
	take := func(seg int) {
		t.Helper()
		if err := to.Leech(seg, pieces[seg], addrs(seeder)); err != nil {
			t.Fatal(err)
		}
		sink.await(t, int64(seg)*minSegment, minSegment)
	}
	take(0)
	_, last = times()
	check("half of it given away", seeder, last.Add(interest-1), true)
	check("half of it, and no more is wanted", seeder, last.Add(interest), false)
	take(1)
	sent, _ := times()
	check("the last bytes are on their way", seeder, sent.Add(arriving-1), true)
	check("all of it given away", seeder, sent.Add(arriving), false)
	if _, err := to.Offer(t.Context(), 0, nil); err != nil {
		t.Fatal(err)
	}
	check("who has it from another", leecher, time.Now(), false)
}

// TestNeededForTheRegistrysBytes: what a leecher has got from the registry, while it was
// told to take it from others, is only here.
func TestNeededForTheRegistrysBytes(t *testing.T) {
	data, _, leecher, from, to, mine := pair(t, minSegment)
	if err := to.Leech(0, offerAll(t, from)[0], []string{"127.0.0.1:1"}); err != nil {
		t.Fatal(err)
	}
	mine.fill(data, 0, minSegment)
	eventually(t, "the segment is whole", func() bool { return to.Ready(0) })
	if _, err := to.Offer(t.Context(), 0, nil); err != nil {
		t.Fatal(err)
	}
	if last := atStart(to.offered.Load()); !leecher.Needed(last.Add(interest - 1)) {
		t.Error("what it alone has from the registry is not needed")
	}
}
