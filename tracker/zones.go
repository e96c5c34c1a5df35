package tracker

import (
	"slices"
	"time"
)

// Zones are near within and far from each other: a byte is to cross into each
// once. So per segment one leecher of each zone, its entry, is given one
// address in another zone, and the rest of the zone have it from each other.

// chainZones is up to how many zones a segment goes from each to just one
// other, so that a zone sends no more than it receives. With more zones that
// would take too long, and each passes it on to two.
const chainZones = 8

// enterZones gives each zone but the first hop's an entry, when a segment is
// spread: extra says which address it is given, and ups, which begins with the
// first hop, is returned with all entries. The zones' order is another one for
// each segment.
func (m *Machine) enterZones(i int, ups []*member, extra map[*member][]*member) []*member {
	for _, zone := range m.zonesInOrder(i) {
		if m.supplies(i, zone) {
			continue
		}
		up := ups[len(ups)-1]
		if len(m.zones) > chainZones {
			up = ups[len(ups)/2]
		}
		if e := m.pickEntry(i, zone, up); e != nil {
			extra[e] = append(extra[e], up)
			ups = append(ups, e)
		}
	}
	return ups
}

// mendZones gives an entry to each zone that lacks a segment and has none.
func (m *Machine) mendZones(i int) {
	if len(m.zones) < 2 || !m.segs[i].spread || m.segs[i].holders() == 0 {
		return
	}
	for _, zone := range m.zonesInOrder(i) {
		if m.supplies(i, zone) {
			continue
		}
		if up := m.upstream(i, zone, nil); up != nil {
			if e := m.pickEntry(i, zone, up); e != nil {
				m.offer(i, e, []*member{up})
			}
		}
	}
}

// enter makes y the entry of its zone, if it is that already or nobody is,
// and returns the address it is to be given; nil if it is not the entry, or
// there is none to give.
func (m *Machine) enter(i int, y *member) *member {
	s := &m.segs[i]
	if len(m.zones) < 2 || !m.lacks(i, y) || m.isHop(i, y) {
		return nil
	}
	if s.entries[y.zone] != y {
		if m.supplies(i, y.zone) {
			return nil
		}
	} else if knowsFar(i, y) {
		return nil
	}
	up := m.upstream(i, y.zone, y)
	if up != nil {
		s.entries[y.zone] = y
	}
	return up
}

// relieve has another leecher be its zone's entry in place of y, if y is and
// knows nobody in another zone any more.
func (m *Machine) relieve(i int, y *member) {
	s := &m.segs[i]
	if s.entries[y.zone] == y && len(m.zones) > 1 && !knowsFar(i, y) {
		delete(s.entries, y.zone)
		m.mendZones(i)
	}
}

// knowsFar says whether y was given an address in another zone.
func knowsFar(i int, y *member) bool {
	return slices.ContainsFunc(y.given[i], func(c *member) bool { return c.zone != y.zone })
}

// upstream is who a zone can have a segment from when it is under way
// already: any that holds it, else the first hop, which waits for no other
// zone.
func (m *Machine) upstream(i int, zone string, y *member) *member {
	s := &m.segs[i]
	fits := func(c *member) bool {
		return c.zone != zone && (y == nil || (!m.shuns(y, c) && !slices.Contains(y.given[i], c)))
	}
	r := dice(m.hash+uint64(i), hashString(zone))
	for range min(len(s.relays), 32) {
		if c := s.relays[r.IntN(len(s.relays))]; fits(c) {
			return c
		}
	}
	if hop := m.workingHop(i); hop != nil && fits(hop) {
		return hop
	}
	return nil
}

// pickEntry chooses a zone's entry for a segment that it can have from up.
func (m *Machine) pickEntry(i int, zone string, up *member) *member {
	e := m.choose(i, m.zones[zone],
		func(y *member) bool { return !m.shuns(y, up) && !slices.Contains(y.given[i], up) },
		func(*member) int { return 0 })
	if e != nil {
		m.segs[i].entries[zone] = e
	}
	return e
}

// supplies says whether a segment is in a zone, or on its way into it.
func (m *Machine) supplies(i int, zone string) bool {
	if e := m.segs[i].entries[zone]; e != nil && !e.has[i] && (m.awaits(i, e) || e.class == fetcher) {
		return true
	}
	for _, sd := range m.seeders { // one that is about to announce it
		if sd.zone == zone && !sd.asked.IsZero() && !sd.failed {
			return true
		}
	}
	return m.suppliedFrom(i, zone)
}

// comes says whether x, which stands still, is to go on waiting for a segment that is
// in its zone, or on its way into it. Twice as long as others wait; and where its zone's
// entry gets bytes, as long as a fetcher is waited for that does: then the line into the
// zone is full, of what the zone waits for, and the same bytes once more would fill it
// for longer. An entry waits half as long, for its one address in another zone: if that
// is of no use, it is to find out before the rest of its zone does. One that was waited
// for in vain so long is not again before it has a segment more: what it says may be of
// other blobs, or a lie.
func (m *Machine) comes(now time.Time, i int, x *member, still time.Duration) bool {
	e := m.segs[i].entries[x.zone]
	if len(m.zones) < 2 || !m.supplies(i, x.zone) {
		return false
	}
	full := e != nil && !e.vain && e.works(now, m.stall)
	patience := 2 * max(nudgeAfter, m.pace)
	if full {
		patience = max(2*patience, m.most(busyStalls*m.stall))
	}
	if e == x {
		return full && knowsFar(i, x) && still < patience/2
	}
	if full && still >= patience {
		e.vain = true
	}
	return still < patience
}

// suppliedFrom says whether members of a zone have a segment from others, or one
// of them is about to as a first hop.
func (m *Machine) suppliedFrom(i int, zone string) bool {
	s := &m.segs[i]
	for _, o := range s.origins {
		if hop := s.hops[o]; hop != nil && hop.zone == zone && m.awaits(i, hop) {
			return true
		}
	}
	return slices.ContainsFunc(s.relays, func(h *member) bool { return h.zone == zone })
}

// isHop says whether y is the first hop of an origin for a segment.
func (m *Machine) isHop(i int, y *member) bool {
	s := &m.segs[i]
	for _, o := range s.origins {
		if s.hops[o] == y {
			return true
		}
	}
	return false
}

// useful says whether one more origin of a segment is to send it to anyone:
// where there are zones, not into one that has it from elsewhere.
func (m *Machine) useful(i int, origin *member) bool {
	return len(m.zones[origin.zone]) > 0 ||
		(len(m.segs[i].relays) == 0 && m.workingHop(i) == nil)
}

// zonesInOrder are the zones that members swarm in, in an order of the
// segment's own.
func (m *Machine) zonesInOrder(i int) []string {
	if len(m.zones) < 2 {
		return nil
	}
	key := m.hash + uint64(i)
	type ranked struct {
		zone   string
		weight uint64
	}
	all := make([]ranked, 0, len(m.zones))
	for z := range m.zones {
		all = append(all, ranked{z, weight(hashString(z), key)})
	}
	slices.SortFunc(all, func(a, b ranked) int {
		if a.weight > b.weight || (a.weight == b.weight && a.zone < b.zone) {
			return -1
		}
		return 1
	})
	zones := make([]string, len(all))
	for k, r := range all {
		zones[k] = r.zone
	}
	return zones
}
