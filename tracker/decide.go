package tracker

import (
	"cmp"
	"slices"
	"time"
)

// decide sees to it that the blob is on its way to whoever waits for it: from
// seeders, from a fetcher, or from one more fetcher. It is called after every
// event that may matter to that and when wake is reached.
func (m *Machine) decide(now time.Time) {
	m.wake = time.Time{}
	m.expireTold(now)
	m.releaseOutcasts(now)
	m.restore(now)
	if m.starving == 0 {
		m.vacant = time.Time{}
		m.rest()
		return
	}
	m.release(now)
	m.askSeeders(now)
	if slices.ContainsFunc(m.fetchers, func(f *member) bool { return !f.mending }) {
		m.vacant = time.Time{}
		m.hedge(now)
		return
	}
	if m.vacant.IsZero() {
		m.vacant = now
		m.loadedSince = time.Time{}
	}
	if m.supplied(now) {
		return
	}
	m.fill(now)
}

// wakeAt asks for decide to be called at t, unless it will be sooner.
func (m *Machine) wakeAt(t time.Time) { m.wake = earlier(m.wake, t) }

// lastMove is when there was last hope without a fetcher.
func (m *Machine) lastMove() time.Time { return later(m.progressed, m.vacant) }

// releaseOutcasts sends members that are banned for all to the registry: no
// one takes anything from them, and their own bytes are not to be trusted.
func (m *Machine) releaseOutcasts(now time.Time) {
	if !m.outcasts {
		return
	}
	for _, x := range m.list {
		if x.class == outcast && x.canFetch && !x.whole && !x.fetching && x.told.IsZero() {
			x.told = now
			m.send(x, fetchMessage())
		}
	}
}

// supplied says whether the bytes come from somewhere although there is no
// fetcher, and if so sets when to look again.
func (m *Machine) supplied(now time.Time) bool {
	if m.inline != nil {
		return true
	}
	if m.tainting() {
		return false
	}
	until := time.Time{}
	if !m.small() && m.covered == len(m.segs) {
		// Everything is among the members; but they may be unreachable, so
		// when nobody gets a byte for long the registry is asked after all.
		until = m.lastMove().Add(2 * m.stall)
	}
	for _, x := range m.list {
		if !until.IsZero() && x.starves(m.size) && x.works(now, m.stall) {
			// Its line works, and is slow or full of other blobs.
			until = later(until, m.lastMove().Add(m.most(busyStalls*m.stall)))
			m.wakeAt(x.busyAt.Add(m.stall))
		}
	}
	until = later(until, m.announcing(m.starvedUntil()))
	for _, s := range m.seeders {
		if m.members[s.name] == nil && !s.asked.IsZero() && !s.failed {
			until = later(until, s.asked.Add(m.stall))
		}
	}
	if !until.IsZero() && m.scarce() {
		until = earlier(until, m.vacant.Add(m.stall))
	}
	if !now.Before(until) {
		return false
	}
	m.wakeAt(until)
	return true
}

// fill tells somebody to fetch, now or at the end of a grace.
func (m *Machine) fill(now time.Time) {
	if until := m.settled(now); now.Before(until) {
		m.wakeAt(until)
		return
	}
	best := m.candidate(true)
	if best == nil {
		best = m.candidate(false)
		if best == nil {
			return // the status of somebody who can fetch brings us back
		}
		if m.loadedSince.IsZero() {
			m.loadedSince = now
		}
		if until := m.loadedSince.Add(m.stall); now.Before(until) {
			m.wakeAt(until)
			return
		}
	} else {
		m.loadedSince = time.Time{}
	}
	if !m.begun && best.rank > 0 && !m.everyone() {
		if m.graceUntil.IsZero() {
			m.graceUntil = now.Add(decideGrace)
		}
		if now.Before(m.graceUntil) {
			m.wakeAt(m.graceUntil)
			return
		}
	}
	var until time.Time
	switch {
	case m.reached(best) < m.reach(best):
		// Others hold what comes next: let the one that will go on take it
		// from them first, so that the registry is asked for no byte twice.
		until = m.lastMove().Add(m.stall)
		if most := m.starvedUntil(); until.After(most) {
			until = most
		}
	case best.suspect:
		// It has bytes that others found wrong, and is about to find out.
		until = m.vacant.Add(m.stall)
	}
	if now.Before(until) {
		m.wakeAt(until)
		return
	}
	m.tell(now, best)
}

// starvedUntil is until when members without a fetcher, none of which has come to a new byte,
// wait at most for what others announce.
func (m *Machine) starvedUntil() time.Time {
	fed := m.vacant
	for _, x := range m.list {
		if x.starves(m.size) {
			fed = later(fed, x.moved)
		}
	}
	return fed.Add(m.most(busyStalls * m.stall))
}

// reach is the end of the bytes from 0 on that are among the members and that
// x can take, not from those alone that crept.
func (m *Machine) reach(x *member) int64 {
	var end int64
	for i := range m.segs {
		if m.segs[i].holders() == 0 || m.barred(i, x) || m.thin(i) {
			break
		}
		end = m.segmentEnd(i)
	}
	return end
}

// tainting says whether somebody waits for a segment that is there only under
// hashes it has found wrong, or with members that sent it bad pieces.
func (m *Machine) tainting() bool {
	if len(m.bad) == 0 && len(m.spoilt) == 0 {
		return false
	}
	for _, x := range m.list {
		for i := range m.segs {
			if x.starves(m.size) && !x.has[i] && m.barred(i, x) {
				return true
			}
		}
	}
	return false
}

// hedge sends one more member to the registry when all fetchers stand still, or
// would be long over what another has in no time.
func (m *Machine) hedge(now time.Time) {
	still := later(m.lastTell.Add(m.stall), m.settled(now))
	if !m.small() && m.covered == len(m.segs) {
		// The members have all that a fetcher would bring, as in supplied.
		still = later(still, m.progressed.Add(2*m.stall))
	}
	due := still
	for _, f := range m.fetchers {
		if f.present >= m.size {
			return // has all, is checking it
		}
		stands := f.moved.Add(m.patience(now, f))
		still = later(still, stands)
		due = later(due, earlier(stands, m.outpaced(now, f)))
		if f.works(now, m.stall) {
			m.wakeAt(f.busyAt.Add(m.stall))
		}
	}
	if now.Before(due) {
		m.wakeAt(due)
		return
	}
	if len(m.fetchers) >= maxFetchers {
		return
	}
	// One that has just fetched all is about to announce it, and may leave others behind
	// that were sent before it and stand still.
	if until := m.announcing(still.Add(2 * m.stall)); now.Before(until) && !m.tainting() {
		m.wakeAt(until)
		return
	}
	best := m.candidate(true)
	if best == nil {
		best = m.candidate(false)
	}
	if now.Before(still) && (best == nil || m.behind(best)) {
		m.wakeAt(still)
		return
	}
	if best != nil {
		for _, f := range m.fetchers {
			m.idles(f)
		}
		m.tell(now, best)
		m.wakeAt(now.Add(m.stall))
	}
}

// announcing is until when members that have the whole blob are waited for, which are
// about to announce more of it; the zero time if there are none. They are not waited for
// beyond the limit, however much they announce: it may be that nobody can take it.
func (m *Machine) announcing(limit time.Time) (until time.Time) {
	for _, x := range m.list {
		if x.class == source {
			until = later(until, x.heard.Add(m.stall))
		}
	}
	if until.After(limit) {
		return limit
	}
	return until
}

// idles has a member named that was told to fetch and has not begun.
func (m *Machine) idles(f *member) {
	if !f.fetching && !f.idle {
		f.idle = true
		m.name(f.name, "it was told to fetch and did not")
	}
}

// patience is how long a fetcher may stand still before another is sent beside
// it. containerd hands bytes on 1 MiB at a time, so on a slow line a fetcher
// seems to stand still between two of them, and a second one would make the
// line slower yet. Above all where bytes of other blobs keep coming in: its
// line works, but is shared by many; and where bytes of this one come in, too.
func (m *Machine) patience(now time.Time, f *member) time.Duration {
	if !f.fetching {
		return m.stall // it was told, and its client has not even begun
	}
	d := min(max(2*f.gap, m.stall), m.stall+slowSlack)
	switch {
	case f.receiving && f.works(now, m.stall):
		if m.maxWait == 0 {
			return receivingStalls * m.stall
		}
		// Members whose lines are full wait for twice max_wait, the others do not.
		soon := max(m.maxWait*4/5, m.stall)
		if now.Before(f.moved.Add(soon)) || m.idleWaits(now) {
			return soon
		}
		return 2 * soon
	case f.works(now, m.stall):
		d = busyStalls * m.stall
	case f.gap == 0:
		d = 2 * m.stall
	}
	return m.most(d)
}

// idleWaits says whether a member waits for the blob and gets no bytes of others.
func (m *Machine) idleWaits(now time.Time) bool {
	return slices.ContainsFunc(m.list, func(x *member) bool { return x.starves(m.size) && !x.works(now, m.stall) })
}

// most bounds a wait, so that it ends before members go to the registry by
// themselves.
func (m *Machine) most(d time.Duration) time.Duration {
	if m.maxWait > 0 {
		d = min(d, max(m.maxWait*2/3, m.stall))
	}
	return d
}

// works says whether a member is heard to get bytes, though it has no more of
// this blob that count. One that is busy says so again and again; one that has
// lost its network says nothing.
func (x *member) works(now time.Time, stall time.Duration) bool {
	return x.busy && now.Sub(x.busyAt) < stall
}

// expireTold takes the role from members that were told to fetch long ago and
// never did.
func (m *Machine) expireTold(now time.Time) {
	for i := len(m.fetchers) - 1; i >= 0; i-- {
		f := m.fetchers[i]
		if f.fetching {
			continue
		}
		if until := f.told.Add(2 * m.stall); now.Before(until) {
			m.wakeAt(until)
			continue
		}
		f.told, f.sent = time.Time{}, false
		if f.tells++; f.tells > 1 {
			m.castOut(f, "it was told to fetch and did not, again")
		} else {
			m.idles(f)
		}
		m.sort(now, f)
	}
}

func (m *Machine) tell(now time.Time, x *member) {
	x.told, x.moved, m.lastTell, x.sent = now, now, now, true
	m.begun = true
	m.sort(now, x)
	m.send(x, fetchMessage())
}

// candidate is the best member to fetch, nil if there is none. With idle,
// members that fetch as much as they can already are passed over.
func (m *Machine) candidate(idle bool) *member {
	var best *member
	for _, x := range m.list {
		if !x.canFetch || !x.starves(m.size) || (idle && x.load >= maxLoad) {
			continue
		}
		if best == nil || m.better(x, best) {
			best = x
		}
	}
	return best
}

// beside is how many fetchers there are in a member's zone: it may share their way to
// the registry, and with it whatever makes them slow.
func (m *Machine) beside(x *member) int {
	n := 0
	for _, f := range m.fetchers {
		if f.zone == x.zone {
			n++
		}
	}
	return n
}

// better says whether a is to fetch rather than b. Those whose bytes may be wrong,
// those that did nothing when told, and those on slow lines come last; the longest
// prefix leaves the least to fetch; then those come whose zone has no fetcher; the
// rest spreads the layers of one image over the nodes.
func (m *Machine) better(a, b *member) bool {
	if a.suspect != b.suspect {
		return b.suspect
	}
	return cmp.Or(
		cmp.Compare(a.tells, b.tells),
		m.compareLines(a, b),
		cmp.Compare(m.reached(b), m.reached(a)),
		cmp.Compare(m.beside(a), m.beside(b)),
		cmp.Compare(a.load, b.load),
		cmp.Compare(min(a.rank, 1), min(b.rank, 1)),
		cmp.Compare(weight(b.hash, m.hash), weight(a.hash, m.hash)),
		cmp.Compare(a.name, b.name),
	) < 0
}

// askSeeders asks as many registered seeders to serve as the leechers that
// wait are worth: half as many, so that each first hop has others to pass its
// segment on to.
func (m *Machine) askSeeders(now time.Time) {
	if len(m.seeders) == 0 || m.inline != nil {
		return
	}
	want := min(max((m.starving+1)/2, 1), maxSeeders)
	if m.small() {
		want = 1
	}
	have := 0
	asked := map[string]int{} // by zone
	for _, x := range m.list {
		if x.class == source && (x.held > 0 || now.Before(x.heard.Add(m.stall))) {
			have++
			asked[x.zone]++
		}
	}
	for _, s := range m.seeders {
		if s.asked.IsZero() || s.failed || m.members[s.name] != nil {
			continue
		}
		until := s.asked.Add(m.stall)
		if !now.Before(until) {
			s.failed = true
			m.name(s.name, "it registered the blob and did not come when it was asked for it")
			continue
		}
		m.wakeAt(until)
		have++
		asked[s.zone]++
	}
	for have < want {
		s := m.nextSeeder(asked)
		if s == nil {
			return
		}
		s.asked = now
		m.wakeAt(now.Add(m.stall))
		m.out = append(m.out, Command{To: s.name, Serve: true})
		have++
		asked[s.zone]++
	}
}

// nextSeeder is the one to ask next: where the most leechers wait per seeder
// asked, then by rendezvous.
func (m *Machine) nextSeeder(asked map[string]int) *seeder {
	var best *seeder
	rank := func(s *seeder) float64 {
		return float64(len(m.zones[s.zone])) / float64(asked[s.zone]+1)
	}
	for _, s := range m.seeders {
		if !s.asked.IsZero() || s.failed || m.members[s.name] != nil || m.banned(s.name) {
			continue
		}
		if best == nil || cmp.Or(
			cmp.Compare(rank(best), rank(s)),
			cmp.Compare(weight(best.hash, m.hash), weight(s.hash, m.hash)),
			cmp.Compare(s.name, best.name),
		) < 0 {
			best = s
		}
	}
	return best
}
