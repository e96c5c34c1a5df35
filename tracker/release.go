package tracker

import (
	"math"
	"slices"
	"time"
)

// A holder's uplink is the narrow place: if it were to send all segments that it
// has at the same time, none would be whole for long, its first hops would have
// nothing to pass on, and others, who stand still meanwhile, would be sent to it
// too. So a segment is spread when a holder has a hand free for it: first hops
// that are still at work are few per holder, and the segments follow each other
// as they do from a fetcher.

const (
	// fewHops is how many first hops a holder has at work for one blob at least:
	// two, so that its uplink is never idle between them.
	fewHops = 2
	// manyHops is how many it has for all blobs that it sends at the same time,
	// since a first hop gets bytes from others, too; and for each blob where a
	// segment takes no longer than quickPace: then it is the messages between two
	// segments that take the time.
	manyHops = 8
	// quickPace is the pace up to which a segment takes little time.
	quickPace = 200 * time.Millisecond
)

// hands is how many first hops of a holder may be at work.
func (m *Machine) hands(o *member) int {
	switch {
	case o.fetched:
		return math.MaxInt // its segments come one after the other by themselves
	case m.pace == 0: // not known yet, nor what else it sends
		return fewHops
	case m.pace < quickPace:
		return manyHops
	}
	return max(fewHops, manyHops/(1+int(min(o.load, manyHops))))
}

// atWork counts the first hops of each origin that are at work. One that takes
// much longer than segments do here does not count: it may not reach its origin.
func (m *Machine) atWork(now time.Time) map[*member]int {
	busy := map[*member]int{}
	for i := range m.segs {
		s := &m.segs[i]
		if !s.spread {
			continue
		}
		for _, o := range s.origins {
			if hop := s.hops[o]; hop != nil && m.awaits(i, hop) && m.trusts(now, i, hop) {
				busy[o]++
				m.wakeAt(now.Add(sweepEvery))
			}
		}
	}
	return busy
}

// release spreads the segments that wait for it, in order, as far as their
// holders have hands free, and gives each origin of a segment a first hop once.
func (m *Machine) release(now time.Time) {
	if !m.wanted() {
		return
	}
	var busy map[*member]int
	for i := range m.segs {
		s := &m.segs[i]
		if len(s.relays) > 0 && !s.spread {
			m.spread(now, i, s.relays[0])
		}
		for _, o := range s.origins {
			if s.released[o] {
				continue
			}
			if busy == nil {
				busy = m.atWork(now)
			}
			if busy[o] >= m.hands(o) && (!s.spread || !m.mustSupply(i, o.zone)) {
				continue
			}
			s.released[o] = true
			if !s.spread {
				m.spread(now, i, o)
			} else if m.useful(i, o) {
				m.giveHop(now, i, o)
			}
			if s.hops[o] != nil {
				busy[o]++
			}
		}
	}
}

// wanted says whether a member lacks anything.
func (m *Machine) wanted() bool {
	return slices.ContainsFunc(m.list, func(x *member) bool { return !x.whole })
}

// rest is for when nobody lacks anything: who comes next is to be told of the
// segments little by little again, and may be elsewhere.
func (m *Machine) rest() {
	if !m.spreading || m.wanted() {
		return
	}
	m.spreading, m.pace = false, 0
	for i := range m.segs {
		s := &m.segs[i]
		s.spread = false
		clear(s.released)
		clear(s.hops)
	}
	for _, x := range m.list {
		x.fetched = false
	}
}

// mustSupply says whether a zone would have to get a segment that is spread from
// another zone, unless an origin of its own sends it.
func (m *Machine) mustSupply(i int, zone string) bool {
	return len(m.zones) > 1 && len(m.zones[zone]) > 0 && !m.suppliedFrom(i, zone)
}

// trusts says whether a first hop that has yet to get its segment is taken to be
// getting it.
func (m *Machine) trusts(now time.Time, i int, hop *member) bool {
	patience := max(hopPatience, 2*m.pace)
	if hop.works(now, m.stall) {
		patience *= 3
	}
	return now.Sub(m.segs[i].hopAt) < patience
}
