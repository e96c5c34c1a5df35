package tracker

import (
	"bytes"
	"math/rand/v2"
	"slices"
	"time"

	api "github.com/imagewolf/imagewolf/api/v1"
)

// segment is what is known of one segment.
type segment struct {
	pieces  []byte              // the hashes first announced; nil until then
	origins []*member           // holders that have it from outside the swarm
	relays  []*member           // holders that have it from other members
	hops    map[*member]*member // origin -> the one leecher that was given its address
}

func (s *segment) holders() int { return len(s.origins) + len(s.relays) }

// announce notes that x holds a segment and tells those that lack it. It says
// whether nobody held the segment before.
func (m *Machine) announce(now time.Time, x *member, a *api.Announce) bool {
	i := int(a.GetSegment())
	if i >= len(m.segs) || x.has[i] || x.banned || len(a.GetPieces()) != sha1Size*m.layout.Pieces(i) {
		return false
	}
	s := &m.segs[i]
	known := s.pieces != nil
	if known && !bytes.Equal(s.pieces, a.GetPieces()) {
		if s.holders() > 0 {
			m.mismatches++
			return false
		}
		known = false
	}
	if !known {
		m.begin(i, a.GetPieces())
	}
	first := s.holders() == 0
	// A leecher has it from the swarm, if it was shown the way there.
	origin := x.class == fetcher || len(x.given[i]) == 0
	if origin {
		s.origins = append(s.origins, x)
	} else {
		s.relays = append(s.relays, x)
	}
	x.has[i], x.knows[i], x.given[i] = true, true, nil
	x.held++
	x.heard, m.progressed = now, now
	if !first {
		if origin {
			m.giveHop(i, x)
		}
		return false
	}
	m.covered++
	m.spread(i, x)
	return true
}

// begin opens a segment with the given piece hashes; what was known under
// other hashes is another torrent and is forgotten.
func (m *Machine) begin(i int, pieces []byte) {
	m.segs[i] = segment{pieces: bytes.Clone(pieces), hops: map[*member]*member{}}
	for _, y := range m.list {
		y.knows[i], y.given[i] = false, nil
	}
}

// spread tells all members that lack a segment about it, when its first
// holder x has announced it: one leecher is given x, all get a few others.
func (m *Machine) spread(i int, x *member) {
	extra := map[*member]*member{}
	hop := m.pickHop(i, x)
	if hop != nil {
		m.segs[i].hops[x] = hop
		extra[hop] = x
		m.linkZones(i, hop, extra)
	}
	for _, y := range m.list {
		if y.whole || y.has[i] {
			continue
		}
		var peers []*member
		if e := extra[y]; e != nil {
			peers = append(peers, e)
		}
		if n := peersPerSegment - len(y.given[i]); n > 0 {
			peers = m.sample(i, y, n, peers)
		}
		m.offer(i, y, peers)
	}
}

// linkZones gives one leecher of each zone a leecher of another zone, so that
// a segment gets everywhere although everyone's peers are of the own zone.
// The zones hang together as a random tree from the first hop's on.
func (m *Machine) linkZones(i int, hop *member, extra map[*member]*member) {
	if len(m.zones) < 2 {
		return
	}
	entries := map[string]*member{}
	for _, y := range m.pool {
		if e := entries[y.zone]; y.zone != hop.zone && m.lacks(i, y) && (e == nil || m.heavier(i, y, e)) {
			entries[y.zone] = y
		}
	}
	order := make([]*member, 0, len(entries)+1)
	for _, e := range entries {
		order = append(order, e)
	}
	slices.SortFunc(order, func(a, b *member) int {
		if m.heavier(i, a, b) {
			return -1
		}
		return 1
	})
	order = slices.Insert(order, 0, hop)
	for k := 1; k < len(order); k++ {
		up := order[m.dice(i, order[k]).IntN(k)]
		if !m.shuns(order[k], up) {
			extra[order[k]] = up
		}
	}
}

// giveHop gives an origin of a segment its one first hop.
func (m *Machine) giveHop(i int, origin *member) {
	if hop := m.pickHop(i, origin); hop != nil {
		m.segs[i].hops[origin] = hop
		m.offer(i, hop, []*member{origin})
	}
}

// pickHop chooses among the leechers that lack a segment the one that takes
// it from origin: of those that have the fewest origins for it, the heaviest;
// of the origin's zone where there are enough to pass it on.
func (m *Machine) pickHop(i int, origin *member) *member {
	s := &m.segs[i]
	sources := map[*member]int{}
	for _, h := range s.hops {
		sources[h]++
	}
	var best *member
	// Where few share the origin's zone, each of them would be first hop all
	// the time, and its uplink as narrow a place as the origin's.
	from := m.pool
	if near := m.zones[origin.zone]; len(near) > peersPerSegment {
		from = near
	}
	for _, y := range from {
		if !m.lacks(i, y) || y == origin || m.shuns(y, origin) || sources[y] >= hopSources ||
			slices.Contains(y.given[i], origin) {
			continue
		}
		if best == nil || sources[y] < sources[best] || (sources[y] == sources[best] && m.heavier(i, y, best)) {
			best = y
		}
	}
	return best
}

// lacks says whether y is a leecher that has yet to get a segment, and wants
// it: one whose client has gone takes no more.
func (m *Machine) lacks(i int, y *member) bool {
	return y.class == leecher && y.canFetch && !y.has[i] && y.present < m.size
}

// heavier compares rendezvous weights for a segment.
func (m *Machine) heavier(i int, a, b *member) bool {
	key := m.hash + uint64(i)
	wa, wb := weight(a.hash, key), weight(b.hash, key)
	return wa > wb || (wa == wb && a.name < b.name)
}

func (m *Machine) dice(i int, y *member) *rand.Rand { return dice(m.hash+uint64(i), y.hash) }

// sample adds up to n peers for y to peers, at random: holders before those
// that still leech, the own zone before others. Origins are left out: their
// uplinks are the narrow place.
func (m *Machine) sample(i int, y *member, n int, peers []*member) []*member {
	r := m.dice(i, y)
	near := func(c *member) bool { return c.zone == y.zone }
	end := len(peers) + n
	peers = m.draw(r, i, y, m.segs[i].relays, near, end, peers)
	peers = m.draw(r, i, y, m.zones[y.zone], anyone, end, peers)
	peers = m.draw(r, i, y, m.segs[i].relays, anyone, end, peers)
	return m.draw(r, i, y, m.pool, anyone, end, peers)
}

func anyone(*member) bool { return true }

// draw adds random members of from that fit until peers has end of them. In a
// crowd it is content with having tried a few times.
func (m *Machine) draw(r *rand.Rand, i int, y *member, from []*member, fit func(*member) bool, end int, peers []*member) []*member {
	const crowd = 32
	try := func(c *member) {
		if len(peers) < end && c != y && fit(c) && !m.shuns(y, c) && !slices.Contains(y.given[i], c) &&
			!slices.Contains(peers, c) {
			peers = append(peers, c)
		}
	}
	if len(peers) >= end || len(from) == 0 {
		return peers
	}
	if len(from) > crowd {
		for range crowd {
			try(from[r.IntN(len(from))])
		}
		return peers
	}
	for _, k := range r.Perm(len(from)) {
		try(from[k])
	}
	return peers
}

// offer sends a member peers for a segment, and the piece hashes if it has
// not had them.
func (m *Machine) offer(i int, y *member, peers []*member) {
	peers = peers[:min(len(peers), maxGiven-len(y.given[i]))]
	if y.knows[i] && len(peers) == 0 {
		return
	}
	msg := &api.Segment{Segment: uint32(i)}
	if !y.knows[i] {
		msg.Pieces = m.segs[i].pieces
		y.knows[i] = true
	}
	for _, p := range peers {
		msg.Peers = append(msg.Peers, p.peer)
	}
	y.given[i] = append(y.given[i], peers...)
	m.send(y, &api.TrackerMessage{Message: &api.TrackerMessage_Segment{Segment: msg}})
}

// welcome tells a new member what there is.
func (m *Machine) welcome(x *member) {
	if x.whole || x.banned {
		return
	}
	if m.inline != nil {
		m.send(x, inlineMessage(m.inline))
		return
	}
	for i := range m.segs {
		s := &m.segs[i]
		if x.has[i] || s.holders() == 0 {
			continue
		}
		var peers []*member
		if o := m.spareOrigin(i, x); o != nil {
			s.hops[o] = x
			peers = append(peers, o)
		}
		m.offer(i, x, m.sample(i, x, peersPerSegment, peers))
	}
}

// spareOrigin is an origin whose address a late joiner may have: one that has
// the whole blob and no first hop at work, or a fetcher if there is no other
// way to the segment.
func (m *Machine) spareOrigin(i int, x *member) *member {
	if !m.lacks(i, x) {
		return nil
	}
	s := &m.segs[i]
	var best *member
	for _, o := range s.origins {
		if m.shuns(x, o) {
			continue
		}
		if o.class == fetcher && (len(s.relays) > 0 || len(s.hops) > 0) {
			continue
		}
		if hop := s.hops[o]; hop != nil && m.lacks(i, hop) {
			continue
		}
		if best == nil || m.heavier(i, o, best) {
			best = o
		}
	}
	return best
}

// disown forgets what x holds and gives those that were told its address
// somebody else.
func (m *Machine) disown(x *member) {
	m.unhold(x)
	for i := range m.segs {
		for _, y := range m.list {
			if n := len(y.given[i]); n > 0 && !y.whole {
				if y.given[i] = remove(y.given[i], x); len(y.given[i]) < n {
					m.offer(i, y, m.sample(i, y, 1, nil))
				}
			}
		}
	}
}

// unhold forgets what x holds and what first hops it has or is.
func (m *Machine) unhold(x *member) {
	for i := range m.segs {
		s := &m.segs[i]
		if s.pieces == nil {
			continue
		}
		if x.has[i] {
			s.origins, s.relays = remove(s.origins, x), remove(s.relays, x)
			x.has[i] = false
			x.held--
			if s.holders() == 0 {
				m.covered--
			}
		}
		delete(s.hops, x)
		for o, hop := range s.hops {
			if hop == x {
				delete(s.hops, o)
			}
		}
		m.mendHop(i)
	}
}

// promote makes a member that has become fetcher an origin of all it holds:
// its uplink is for the bytes to come.
func (m *Machine) promote(x *member) {
	for i, has := range x.has {
		s := &m.segs[i]
		if n := len(s.relays); has && n > 0 {
			if s.relays = remove(s.relays, x); len(s.relays) < n {
				s.origins = append(s.origins, x)
				m.mendHop(i)
			}
		}
	}
}

// part takes y away from x as a peer.
func (m *Machine) part(x, y *member) {
	for i := range m.segs {
		n := len(x.given[i])
		if x.given[i] = remove(x.given[i], y); len(x.given[i]) < n {
			if m.segs[i].hops[y] == x {
				delete(m.segs[i].hops, y)
				m.mendHop(i)
			}
			m.offer(i, x, m.sample(i, x, 1, nil))
		}
	}
}

// mendHop sees to it that a segment that only origins hold has a first hop.
func (m *Machine) mendHop(i int) {
	s := &m.segs[i]
	if len(s.relays) > 0 || len(s.origins) == 0 {
		return
	}
	for _, hop := range s.hops {
		if m.lacks(i, hop) {
			return
		}
	}
	best := s.origins[0]
	for _, o := range s.origins[1:] {
		if m.heavier(i, o, best) {
			best = o
		}
	}
	m.giveHop(i, best)
}

// sweep gives more peers to leechers that stand still.
func (m *Machine) sweep(now time.Time) {
	for _, x := range m.list {
		if x.starves(m.size) && !now.Before(later(x.moved, x.nudged).Add(nudgeAfter)) {
			m.nudge(now, x)
		}
	}
	if m.starving > 0 {
		m.sweepAt = now.Add(sweepEvery)
	}
}

// nudge gives a member more peers for segments that it ought to have had: any
// holder of any zone, an origin when it knows all others.
func (m *Machine) nudge(now time.Time, x *member) {
	x.nudged = now
	left := nudgeSegments
	for i := range m.segs {
		s := &m.segs[i]
		if x.has[i] || s.holders() == 0 {
			continue
		}
		if len(x.given[i]) >= maxGiven {
			x.given[i] = x.given[i][:1] // none of them was of use: start over
		}
		r := m.dice(i, x)
		peers := m.draw(r, i, x, s.relays, anyone, peersPerSegment-1, nil)
		for _, k := range r.Perm(len(s.origins)) {
			if o := s.origins[k]; len(peers) == 0 && !m.shuns(x, o) && !slices.Contains(x.given[i], o) {
				peers = append(peers, o)
			}
		}
		m.offer(i, x, peers)
		if left--; left == 0 {
			return
		}
	}
}
