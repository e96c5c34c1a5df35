package node

import (
	"math/bits"
	"sync"
	"time"
)

const (
	// meterSpan is how many seconds are kept one by one: a slow line's bytes come
	// in big lumps, each of which is spread over the time that it took.
	meterSpan = 64
	// meterSlot is how long peaks are kept together, and meterSlots how many such
	// times are kept: a line is as fast as it has been in the last half hour.
	meterSlot  = 5 * time.Minute
	meterSlots = 6
	// meterLately is how many seconds ago something is that has just been.
	meterLately = 10
	// meterRun is how many seconds in a row bytes have to flow for them to tell
	// anything of how fast the line is.
	meterRun = 3
)

// meter measures how fast bytes of blobs come in here and go out, all blobs
// together. What it knows is what the line has done, which may be less than what
// it can do; so it says nothing where no transfer was long enough. It is safe for
// concurrent use.
type meter struct {
	mu      sync.Mutex
	base    time.Time              // guarded by mu: an hour before the first bytes
	seconds [meterSpan]meterSecond // guarded by mu; by second modulo meterSpan
	peaks   [meterSlots]meterPeak  // guarded by mu; by slot number modulo meterSlots
}

// meterSecond is the bytes of one second. Registry's are among in.
type meterSecond struct {
	at                int64 // seconds since base, by the clock that nobody sets
	in, out, registry float64
}

// meterPeak is the best of one slot, in bytes/s.
type meterPeak struct {
	slot           int64
	line, registry float64
}

// received counts n bytes that came in from since until now, from a registry or
// from peers.
func (m *meter) received(n int64, registry bool, since, now time.Time) {
	m.spread(float64(n), since, now, func(s *meterSecond, n float64) {
		s.in += n
		if registry {
			s.registry += n
		}
	})
}

// sent counts n bytes that went out from since until now.
func (m *meter) sent(n int64, since, now time.Time) {
	m.spread(float64(n), since, now, func(s *meterSecond, n float64) { s.out += n })
}

// spread hands out n bytes evenly to the seconds from since until now.
func (m *meter) spread(n float64, since, now time.Time, add func(s *meterSecond, n float64)) {
	if n <= 0 {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if oldest := now.Add((2 - meterSpan) * time.Second); since.Before(oldest) {
		since = oldest
	}
	if m.base.IsZero() {
		m.base = since.Add(-time.Hour)
	}
	whole, first := now.Sub(since), m.secondsAt(since)
	for at := first; at <= m.secondsAt(now); at++ {
		part := 1.0
		if whole > 0 {
			lo := m.base.Add(time.Duration(at) * time.Second)
			hi := lo.Add(time.Second)
			if lo.Before(since) {
				lo = since
			}
			if hi.After(now) {
				hi = now
			}
			part = float64(hi.Sub(lo)) / float64(whole)
		}
		add(m.second(at), n*part)
	}
	m.peak(first, now)
}

// secondsAt is how many whole seconds base is ago at a moment. mu must be held.
func (m *meter) secondsAt(at time.Time) int64 { return int64(at.Sub(m.base) / time.Second) }

// second is the one that began so many seconds after base. mu must be held.
func (m *meter) second(at int64) *meterSecond {
	s := &m.seconds[at%meterSpan]
	if s.at != at {
		*s = meterSecond{at: at}
	}
	return s
}

// peak takes the best of the seconds from a second until now into the slot of
// now. mu must be held.
func (m *meter) peak(from int64, now time.Time) {
	slot := int64(now.Sub(m.base) / meterSlot)
	p := &m.peaks[slot%meterSlots]
	if p.slot != slot {
		*p = meterPeak{slot: slot}
	}
	for at := from; at <= m.secondsAt(now); at++ {
		var in, out float64
		run := true
		for k := range int64(meterRun) {
			s := m.seconds[(at-k)%meterSpan]
			run = run && s.at == at-k && s.in+s.out > 0
			in, out = max(in, s.in), out+s.out
		}
		if run {
			// What goes out is counted when it is read for a peer, and lies in
			// buffers for a while.
			p.line = max(p.line, in, out/meterRun)
		}
		p.registry = max(p.registry, m.second(at).registry)
	}
}

// rates returns the bytes per second of the best time lately: of the line, either
// way, and of what registries have sent. 0 is not known. Both are powers of two, so
// that they change rarely: the line's rounded up, the other down.
func (m *meter) rates(now time.Time) (line, registry int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.base.IsZero() {
		return 0, 0
	}
	slot := int64(now.Sub(m.base) / meterSlot)
	var l, r float64
	for _, p := range m.peaks {
		if slot-p.slot < meterSlots {
			l, r = max(l, p.line), max(r, p.registry)
		}
	}
	return roundUp(l), roundDown(r)
}

// now returns the bytes per second that come in from peers, averaged over flowSpan and
// what of a second goes before it, and
// what registries have sent in the best of the last seconds, rounded down to a power of
// two.
func (m *meter) now(now time.Time) (peers float64, registry int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.base.IsZero() {
		return 0, 0
	}
	var in, best float64
	last := m.secondsAt(now)
	first := last - int64(flowSpan/time.Second)
	for at := last; at > last-meterLately; at-- {
		s := m.seconds[at%meterSpan]
		if s.at != at {
			continue
		}
		best = max(best, s.registry)
		if at >= first {
			in += s.in - s.registry
		}
	}
	return in / now.Sub(m.base.Add(time.Duration(first)*time.Second)).Seconds(), roundDown(best)
}

// roundUp and roundDown return the next power of two; 0 of what is below 1.
func roundUp(n float64) int64 {
	if n < 1 {
		return 0
	}
	return 1 << bits.Len64(uint64(n)-1)
}

func roundDown(n float64) int64 {
	if n < 1 {
		return 0
	}
	return 1 << (bits.Len64(uint64(n)) - 1)
}
