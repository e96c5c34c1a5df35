package tracker

import (
	"bytes"
	"cmp"
	"math/rand/v2"
	"slices"
	"time"

	api "github.com/imagewolf/imagewolf/api/v1"
)

// segment is what is known of one segment.
type segment struct {
	pieces  []byte              // the current hashes; nil until there are some
	author  string              // who announced them first
	origins []*member           // holders that have it from outside the swarm
	relays  []*member           // holders that have it from other members
	hops    map[*member]*member // origin -> the one leecher that was given its address
	entries map[string]*member  // zone -> the one leecher that was given an address in another zone
	since   time.Time           // when somebody first held it, then when it was spread
	spread  bool                // the members have been told of it
	// released are the origins that were given their first hop, if there was one
	// to be had.
	released map[*member]bool
	hopAt    time.Time // when a first hop was last given an origin

	versions []version // what some said of it that is not current

	helped   int       // members that stood still and were given more peers, since helpedAt
	helpedAt time.Time // not longer ago than a little
}

func (s *segment) holders() int { return len(s.origins) + len(s.relays) }

// begin makes a segment that was reset one by these hashes.
func (s *segment) begin(pieces []byte, author string) {
	s.pieces, s.author = pieces, author
	s.hops, s.released, s.entries = map[*member]*member{}, map[*member]bool{}, map[string]*member{}
}

// prove notes, when another has got the segment from its holders, that it was from
// this one if there is one only.
func (s *segment) prove() {
	if s.holders() == 1 {
		append(slices.Clone(s.origins), s.relays...)[0].proven = true
	}
}

// announce notes that x holds a segment and tells those that lack it. It says
// whether there is more to decide: nobody held the segment before, or x contradicts
// others, or has said what cannot be and is shut out.
func (m *Machine) announce(now time.Time, x *member, a *api.Announce) bool {
	if x.banned || x.stale() || m.small() {
		return false
	}
	if uint64(a.GetSegment()) >= uint64(len(m.segs)) || len(a.GetPieces()) != sha1Size*m.layout.Pieces(int(a.GetSegment())) {
		m.expel(now, x, noSegment)
		return true
	}
	i := int(a.GetSegment())
	s := &m.segs[i]
	if x.has[i] {
		return false
	}
	var same version // of those that were not current, what x announces
	switch known := s.pieces != nil; {
	case known && bytes.Equal(s.pieces, a.GetPieces()):
	case known && m.contests(i, x):
		m.mismatches++
		m.keep(i, a.GetPieces(), x.name, x)
		m.witnesses(now, i)
		return true
	default:
		m.supersede(i, x.sent)
		same = s.take(a.GetPieces())
		s.begin(bytes.Clone(a.GetPieces()), cmp.Or(same.author, x.name))
	}
	first := m.hold(now, i, x)
	m.release(now) // it may have been a first hop
	for _, y := range same.who {
		m.announce(now, y, a)
	}
	m.witnesses(now, i)
	return first
}

// hold makes x a holder of a segment by its current hashes. It says whether it is the
// first.
func (m *Machine) hold(now time.Time, i int, x *member) bool {
	s := &m.segs[i]
	first := s.holders() == 0
	// A leecher has it from the swarm, if it was shown the way there.
	origin := x.class == fetcher || len(x.given[i]) == 0
	if !origin {
		s.prove()
	}
	if origin {
		s.origins = append(s.origins, x)
	} else {
		s.relays = append(s.relays, x)
	}
	s.withdraw(x)
	x.has[i], x.knows[i], x.given[i] = true, true, nil
	x.held++
	x.heard, x.vain, m.progressed = now, false, now
	if now.Sub(s.since) <= m.lagAfter() {
		x.lags = false
	}
	if !first {
		if m.isHop(i, x) {
			m.keepPace(now.Sub(s.hopAt))
		}
		return false
	}
	m.covered++
	if x.class == fetcher {
		m.keepPace(now.Sub(later(m.newest, m.lastTell)))
	}
	s.since, m.newest = now, now
	return true
}

// keepPace notes how long a segment took from one place to the next. Where
// that is long, nobody stands still yet who has no new piece for a second.
func (m *Machine) keepPace(took time.Duration) {
	took = min(took, maxPace)
	m.pace = max(took, (m.pace+took)/2)
}

// reset forgets a segment: under other hashes it is another torrent.
func (m *Machine) reset(i int) {
	s := &m.segs[i]
	if s.holders() > 0 {
		m.covered--
	}
	for _, y := range m.list {
		if y.has[i] {
			y.has[i] = false
			y.held--
		}
		y.knows[i], y.given[i] = false, nil
	}
	*s = segment{versions: s.versions}
}

// spread tells all members that lack a segment about it, which x holds: one
// leecher is given x, one of each other zone is given one of those, all others
// get a few at random.
func (m *Machine) spread(now time.Time, i int, x *member) {
	m.segs[i].spread, m.segs[i].since, m.segs[i].hopAt = true, now, now
	m.spreading = true
	extra := map[*member][]*member{}
	var heads []*member
	if hop := m.pickHop(i, x); hop != nil {
		m.segs[i].hops[x] = hop
		extra[hop] = append(extra[hop], x)
		heads = append(heads, hop)
		heads = m.enterZones(i, heads, extra)
	}
	// Heads are told first and have others come to them: they may have all of
	// the segment before those know of it, and a connection comes from
	// whoever lacks something.
	for _, h := range heads {
		for _, y := range m.sample(i, h, peersPerSegment, slices.Clone(extra[h])) {
			if !slices.Contains(extra[h], y) {
				extra[y] = append(extra[y], h)
			}
		}
	}
	for _, h := range heads {
		m.offer(i, h, extra[h])
	}
	for _, y := range m.list {
		if y.whole || y.has[i] || slices.Contains(heads, y) {
			continue
		}
		peers := extra[y]
		if n := peersPerSegment - len(y.given[i]) - len(peers); n > 0 {
			peers = m.sample(i, y, n, peers)
		}
		m.offer(i, y, peers)
	}
}

// giveHop gives an origin of a segment its one first hop.
func (m *Machine) giveHop(now time.Time, i int, origin *member) {
	if hop := m.pickHop(i, origin); hop != nil {
		m.segs[i].hops[origin], m.segs[i].hopAt = hop, now
		m.offer(i, hop, []*member{origin})
	}
}

// pickHop chooses among the leechers that lack a segment the one that takes
// it from origin, of the origin's zone if there is one.
func (m *Machine) pickHop(i int, origin *member) *member {
	s := &m.segs[i]
	sources := map[*member]int{}
	for _, h := range s.hops {
		sources[h]++
	}
	fits := func(y *member) bool {
		return y != origin && !m.shuns(y, origin) && sources[y] < hopSources && !slices.Contains(y.given[i], origin)
	}
	rank := func(y *member) int { return sources[y] }
	hop := m.choose(i, m.zones[origin.zone], fits, rank)
	if hop == nil {
		hop = m.choose(i, m.pool, fits, rank)
	}
	return hop
}

// choose returns the leecher among from that is to take a segment on behalf
// of others, nil if none lacks it: of those with the lowest rank the one that
// was chosen the fewest times, since whoever is chosen sends more than the
// others; then the heaviest.
func (m *Machine) choose(i int, from []*member, fits func(*member) bool, rank func(*member) int) *member {
	var best *member
	for _, y := range from {
		if !m.lacks(i, y) || !fits(y) {
			continue
		}
		if best == nil {
			best = y
			continue
		}
		order := cmp.Or(m.compareLines(y, best), cmp.Compare(rank(y), rank(best)), cmp.Compare(y.chosen, best.chosen))
		if order < 0 || (order == 0 && m.heavier(i, y, best)) {
			best = y
		}
	}
	if best != nil {
		best.chosen++
	}
	return best
}

// lacks says whether y is a leecher that has yet to get a segment, and wants
// it: one whose client has gone takes no more.
func (m *Machine) lacks(i int, y *member) bool {
	return y.class == leecher && y.canFetch && !y.has[i] && y.present < m.size && !m.tainted(i, y)
}

// awaits says whether y, which was chosen to take a segment on behalf of
// others, will have it: one that has all bytes is about to say so.
func (m *Machine) awaits(i int, y *member) bool {
	return m.lacks(i, y) || (!y.has[i] && !y.banned && y.present == m.size)
}

// heavier compares rendezvous weights for a segment.
func (m *Machine) heavier(i int, a, b *member) bool {
	key := m.hash + uint64(i)
	wa, wb := weight(a.hash, key), weight(b.hash, key)
	return wa > wb || (wa == wb && a.name < b.name)
}

func (m *Machine) dice(i int, y *member) *rand.Rand { return dice(m.hash+uint64(i), y.hash) }

// sample adds up to n peers for y to peers, at random, of its own zone:
// holders before those that still leech. Origins are left out: their uplinks
// are the narrow place. One of another zone is added only for a member that
// would have nobody else.
func (m *Machine) sample(i int, y *member, n int, peers []*member) []*member {
	r := m.dice(i, y)
	near := func(c *member) bool { return c.zone == y.zone }
	end := len(peers) + n
	peers = m.draw(r, i, y, m.segs[i].relays, near, end, peers)
	peers = m.draw(r, i, y, m.zones[y.zone], anyone, end, peers)
	if len(peers)+len(y.given[i]) > 0 {
		return peers
	}
	peers = m.draw(r, i, y, m.segs[i].relays, anyone, 1, peers)
	return m.draw(r, i, y, m.pool, anyone, 1, peers)
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
	if (y.knows[i] && len(peers) == 0) || m.tainted(i, y) || y.banned {
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
func (m *Machine) welcome(now time.Time, x *member) {
	if x.whole || x.banned {
		return
	}
	if m.inline != nil {
		m.send(x, inlineMessage(m.inline))
		return
	}
	busy := m.atWork(now)
	for i := range m.segs {
		s := &m.segs[i]
		if x.has[i] || !s.spread || s.holders() == 0 || m.tainted(i, x) {
			continue
		}
		var peers []*member
		if o := m.spareOrigin(i, x, busy); o != nil {
			s.hops[o], s.hopAt = x, now
			busy[o]++
			peers = append(peers, o)
		} else if up := m.enter(i, x); up != nil {
			peers = append(peers, up)
		} else if e := s.entries[x.zone]; e != nil && e != x && !m.shuns(x, e) {
			peers = append(peers, e)
		}
		m.offer(i, x, m.sample(i, x, peersPerSegment, peers))
	}
}

// spareOrigin is an origin whose address a late joiner may have: one that has
// the whole blob, a hand free (busy counts those in use) and no first hop of this
// segment at work, or a fetcher if there is no other way to the segment; of
// another zone only if the segment is not on its way into the joiner's.
func (m *Machine) spareOrigin(i int, x *member, busy map[*member]int) *member {
	if !m.lacks(i, x) {
		return nil
	}
	s := &m.segs[i]
	supplied := m.supplies(i, x.zone)
	var best *member
	for _, o := range s.origins {
		if m.shuns(x, o) || (supplied && o.zone != x.zone) || busy[o] >= m.hands(o) {
			continue
		}
		if o.class == fetcher && (len(s.relays) > 0 || len(s.hops) > 0) {
			continue
		}
		if hop := s.hops[o]; hop != nil && m.awaits(i, hop) {
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
func (m *Machine) disown(now time.Time, x *member) {
	m.unhold(now, x)
	for _, y := range m.list {
		if y.whole {
			continue
		}
		for i := range m.segs {
			n := len(y.given[i])
			if y.given[i] = remove(y.given[i], x); len(y.given[i]) < n {
				m.replace(i, y)
			}
		}
	}
}

// replace gives y one peer for one that it has lost.
func (m *Machine) replace(i int, y *member) {
	if up := m.enter(i, y); up != nil {
		m.offer(i, y, []*member{up})
		return
	}
	m.offer(i, y, m.sample(i, y, 1, nil))
	m.relieve(i, y)
}

// unhold forgets what x holds and what first hops it has or is.
func (m *Machine) unhold(now time.Time, x *member) {
	for i := range m.segs {
		s := &m.segs[i]
		s.withdraw(x)
		if s.pieces == nil {
			continue
		}
		if x.has[i] {
			s.origins, s.relays = remove(s.origins, x), remove(s.relays, x)
			x.has[i] = false
			x.held--
			if s.holders() == 0 {
				m.covered--
				s.spread = false
			}
		}
		delete(s.hops, x)
		delete(s.released, x)
		for o, hop := range s.hops {
			if hop == x {
				delete(s.hops, o)
			}
		}
		m.mend(now, i)
	}
}

// promote makes a member that has become fetcher an origin of all it holds:
// its uplink is for the bytes to come.
func (m *Machine) promote(now time.Time, x *member) {
	for i, has := range x.has {
		s := &m.segs[i]
		if n := len(s.relays); has && n > 0 {
			if s.relays = remove(s.relays, x); len(s.relays) < n {
				s.origins = append(s.origins, x)
				m.mend(now, i)
			}
		}
	}
}

// part takes y away from x as a peer.
func (m *Machine) part(now time.Time, x, y *member) {
	for i := range m.segs {
		n := len(x.given[i])
		if x.given[i] = remove(x.given[i], y); len(x.given[i]) < n {
			if m.segs[i].hops[y] == x {
				delete(m.segs[i].hops, y)
				m.mend(now, i)
			}
			m.replace(i, x)
		}
	}
}

// mend sees to it that a segment is on its way to all that lack it: from an
// origin to a first hop where only origins have it, and into every zone.
func (m *Machine) mend(now time.Time, i int) {
	m.mendHop(now, i)
	m.mendZones(i)
}

func (m *Machine) mendHop(now time.Time, i int) {
	s := &m.segs[i]
	if !s.spread || len(s.relays) > 0 || len(s.origins) == 0 || m.workingHop(i) != nil {
		return
	}
	best := s.origins[0]
	for _, o := range s.origins[1:] {
		if m.heavier(i, o, best) {
			best = o
		}
	}
	m.giveHop(now, i, best)
}

// workingHop is a first hop of a segment that has yet to get it, nil if there
// is none.
func (m *Machine) workingHop(i int) *member {
	s := &m.segs[i]
	for _, o := range s.origins { // not over hops: the same order in every run
		if hop := s.hops[o]; hop != nil && m.awaits(i, hop) {
			return hop
		}
	}
	return nil
}

// sweep gives more peers to leechers that stand still, and other first hops to segments
// whose first hops do.
func (m *Machine) sweep(now time.Time) {
	m.overtake(now)
	patience := max(nudgeAfter, m.pace)
	for _, x := range m.list {
		if x.starves(m.size) && !now.Before(later(x.moved, x.nudged).Add(patience)) {
			m.nudge(now, x)
		}
	}
	if m.starving > 0 {
		m.sweepAt = now.Add(sweepEvery)
	}
}

// nudge gives a member that stands still more peers for segments that it
// ought to have had by now. Where thousands stand still only so many are sent
// to the few that can help.
func (m *Machine) nudge(now time.Time, x *member) {
	left := nudgeSegments
	for i := range m.segs {
		s := &m.segs[i]
		still := now.Sub(later(x.moved, s.since))
		if x.has[i] || !s.spread || s.holders() == 0 || still < max(nudgeAfter, m.pace) {
			continue
		}
		if now.Sub(s.helpedAt) >= nudgeAfter {
			s.helped, s.helpedAt = 0, now
		}
		if s.helped >= peersPerSegment*s.holders() {
			continue // when these have it, others will have it from them
		}
		s.helped++
		x.nudged = now
		if len(x.given[i]) >= maxGiven {
			x.given[i] = x.given[i][:1] // none of them was of use: start over
		}
		m.offer(i, x, m.help(now, i, x, still))
		if left--; left == 0 {
			return
		}
	}
}

// help returns more peers for a member that has been standing still: holders
// of its zone or its zone's entry; later holders of any zone or a first hop;
// in the end an origin.
func (m *Machine) help(now time.Time, i int, x *member, still time.Duration) []*member {
	s := &m.segs[i]
	patience := max(nudgeAfter, m.pace)
	r := m.dice(i, x)
	peers := m.draw(r, i, x, s.relays, func(c *member) bool { return c.zone == x.zone }, peersPerSegment-1, nil)
	if m.comes(now, i, x, still) {
		if e := s.entries[x.zone]; len(peers) == 0 && e != nil {
			peers = m.draw(r, i, x, []*member{e}, anyone, 1, peers)
		}
		return peers
	}
	if peers = m.draw(r, i, x, s.relays, anyone, peersPerSegment-1, peers); len(peers) > 0 {
		return peers
	}
	hop := m.workingHop(i)
	if hop != nil && hop != x {
		peers = m.draw(r, i, x, []*member{hop}, anyone, 1, peers)
	}
	waited := still >= max(hopPatience, 2*patience) && (hop == nil || !m.trusts(now, i, hop))
	if len(peers) == 0 && (waited || (hop == nil && len(s.relays) == 0)) {
		peers = m.draw(r, i, x, s.origins, anyone, 1, peers)
	}
	return peers
}
