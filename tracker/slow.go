package tracker

import (
	"math"
	"slices"
	"time"
)

const (
	// slowFactor is how many times as fast as its line another member has had
	// bytes from a registry, for a member's line to be called slow.
	slowFactor = 8
	// slowRest is how long a fetcher on a slow line must have to go yet for
	// another to be sent beside it.
	slowRest = 5 * time.Second
	// lagFactor is how many times as long as segments take a first hop may take for
	// one, and lagOthers how many that were sent on their way later others must have
	// had meanwhile, for another first hop to be sent for it.
	lagFactor = 4
	lagOthers = 3
	// overtakeMost is for how many segments at a time another first hop is sent.
	overtakeMost = 16
)

// slow says whether a member's line is known to be slow: a registry has sent
// another many times as much per second as ever came in there, or went out, from
// wherever. So it is not the registry that is slow, nor is the line full: all that
// comes over it counts. Where a registry is slow for everyone, so are all lines as
// far as is known, and a node that is not slow has sent on what it got.
func (m *Machine) slow(x *member) bool { return m.slowLine(x) || m.slowNow(x) }

func (m *Machine) slowLine(x *member) bool { return x.line > 0 && x.line <= m.fastest/slowFactor }

// slowNow says whether all that comes in now at a member that fetches the blob is little
// against what another has had from a registry a moment ago, or, if the member's line is
// not known to have been faster, or says itself that it is slow now, has ever had: then it
// is not the registry. Lines that were fast become slow as well.
func (m *Machine) slowNow(x *member) bool {
	if !x.fetching || x.inflow == 0 {
		return false
	}
	fastest := m.latelyBut(x)
	if x.line == 0 || m.slowLine(x) || x.saysSlow {
		fastest = max(fastest, m.fastest)
	}
	return x.inflow <= fastest/slowFactor
}

// latest is which member has lately had most from a registry, and what that is of the
// others.
type latest struct {
	known bool
	best  *member
	next  int64
}

// latelyBut is the most, in bytes/s, that another member than x has lately had from a
// registry. It is asked for of many, one after the other.
func (m *Machine) latelyBut(x *member) int64 {
	if !m.latest.known {
		m.latest = latest{known: true}
		for _, y := range m.list {
			switch best := m.latest.best; {
			case best == nil:
				m.latest.best = y
			case y.lately > best.lately:
				m.latest.best, m.latest.next = y, best.lately
			default:
				m.latest.next = max(m.latest.next, y.lately)
			}
		}
	}
	if best := m.latest.best; best != nil && best != x {
		return best.lately
	}
	return m.latest.next
}

// outpaced is when a fetcher is to get one beside it because its line is slow;
// the zero time for never. Where all that there is to go by is what comes in now, which
// is of some seconds, it may be this blob's registry that is slow, and not that of the
// others: that does not count beside a second one.
func (m *Machine) outpaced(now time.Time, f *member) time.Time {
	slowNow := m.slowNow(f) && len(m.fetchers) == 1
	if !f.fetching || !slowNow && !m.slowLine(f) || !m.restsLong(f) {
		f.slow = time.Time{}
		return time.Time{}
	}
	if f.slow.IsZero() {
		f.slow = now
	}
	if slowNow {
		return f.slow
	}
	return f.slow.Add(m.stall)
}

// restsLong says whether a fetcher takes long for what it lacks, as far as its line tells.
func (m *Machine) restsLong(f *member) bool {
	rate := float64(max(f.line, 1))
	if m.slowNow(f) {
		rate = float64(f.inflow) / (1 + float64(f.load))
	}
	return float64(m.size-f.present) >= rate*slowRest.Seconds()
}

// behind says whether a member is sent only where no other can be: its line is slow, or
// seems to be.
func (m *Machine) behind(x *member) bool { return m.slow(x) || x.saysSlow || x.lags }

// compareLines orders members by whether their lines are slow, or seem to be: those come
// last.
func (m *Machine) compareLines(a, b *member) int {
	sa, sb := m.behind(a), m.behind(b)
	switch {
	case sa == sb:
		return 0
	case sa:
		return 1
	}
	return -1
}

// overtake has other first hops take the segments of those that lag behind.
func (m *Machine) overtake(now time.Time) {
	left := overtakeMost
	for i := range m.segs {
		s := &m.segs[i]
		if !s.spread || len(s.relays) > 0 || now.Sub(s.hopAt) < m.lagAfter() {
			continue
		}
		for _, o := range s.origins {
			hop := s.hops[o]
			if hop == nil || !m.lacks(i, hop) {
				continue
			}
			overtaken := m.overtaken(i, o, hop)
			if !overtaken && (len(m.segs) > lagOthers || m.slowLine(o) || o.crept || now.Sub(s.hopAt) < m.longFor(i)) {
				continue
			}
			if overtaken {
				hop.lags = true
			}
			fits := func(y *member) bool {
				return y != hop && !y.lags && !m.shuns(y, o) && !slices.Contains(y.given[i], o)
			}
			// Not in another zone: that has it from this one.
			if other := m.choose(i, m.zones[hop.zone], fits, func(*member) int { return 0 }); other != nil {
				s.hops[o], s.hopAt = other, now
				m.offer(i, other, []*member{o})
			}
		}
		if left--; left == 0 {
			return
		}
	}
}

// lagAfter is how long a first hop may take for a segment where others take less.
func (m *Machine) lagAfter() time.Duration { return max(nudgeAfter, lagFactor*m.pace) }

// overtaken says whether an origin has given others than a first hop of segment i several
// segments since that was sent for it, which they can have had from nobody else first.
func (m *Machine) overtaken(i int, o, hop *member) bool {
	n := 0
	for k := range m.segs {
		s := &m.segs[k]
		if h := s.hops[o]; h == nil || h == hop || !h.has[k] || len(s.origins) != 1 || !s.hopAt.After(m.segs[i].hopAt) {
			continue
		}
		if n++; n == lagOthers {
			return true
		}
	}
	return false
}

// longFor is how long a first hop may take for a segment of a blob that has too few for it
// to be overtaken: with a line that is called slow it would take that long.
func (m *Machine) longFor(i int) time.Duration {
	if m.fastest < slowFactor {
		return math.MaxInt64 // nothing is known of how fast lines are here
	}
	size := m.segmentEnd(i) - int64(i)*m.layout.SegmentSize
	return max(m.stall, time.Duration(float64(size)/float64(m.fastest/slowFactor)*float64(time.Second)))
}

// thin says whether a segment of a short blob is with those alone that crept.
func (m *Machine) thin(i int) bool {
	s := &m.segs[i]
	fast := func(x *member) bool { return !x.crept }
	return len(m.segs) <= lagOthers && s.holders() > 0 && !slices.ContainsFunc(s.origins, fast) && !slices.ContainsFunc(s.relays, fast)
}

// scarce says whether somebody whose line is not slow waits for what is with those alone
// that crept.
func (m *Machine) scarce() bool {
	best := m.candidate(true)
	if best == nil || m.behind(best) {
		return false
	}
	for i := range m.segs {
		if !best.has[i] && m.thin(i) {
			return true
		}
	}
	return false
}
