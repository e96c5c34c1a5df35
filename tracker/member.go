package tracker

import (
	"slices"
	"time"

	api "github.com/imagewolf/imagewolf/api/v1"
)

// class is the part a member plays now.
type class int

const (
	gone    class = iota // not, or no longer, a member
	leecher              // lacks bytes and is to get them from the others
	fetcher              // told to fetch, or fetching
	source               // has the whole blob
	outcast              // called bad by two others: on its own
)

// member is one node that has joined the blob.
type member struct {
	name string
	zone string
	peer *api.Peer // shared by messages, never changed
	hash uint64

	// As last reported, clamped to the blob's size.
	prefix, present int64
	canFetch        bool
	fetching        bool
	whole           bool
	busy            bool
	receiving       bool
	busyAt          time.Time // when it was last heard to be busy
	load, rank      uint32
	retracted       uint32 // Retract messages it has taken
	line, registry  int64  // bytes/s, in the best second of half an hour
	inflow, lately  int64  // bytes/s, now, of all and of registries

	class   class
	banned  bool // for everyone
	relay   bool // got the blob here, from the others
	fetched bool // has been a fetcher for those that starve now
	pooled  bool
	counted bool // among the starving

	has   []bool      // per segment: announced
	held  int         // number of segments announced
	knows []bool      // per segment: has been sent the piece hashes
	given [][]*member // per segment that it lacks: the peers it was told
	// forgot is the hashes by which it announced segments that were forgotten since,
	// for as long as it is not known whether they were right; nil without any. Only what
	// was sent to the registry has such, and few are.
	forgot map[int][]byte

	// retracts is how many Retract messages it is to have taken: what it says
	// before it has does not count.
	retracts uint32

	chosen   int           // times it was first hop or a zone's entry
	told     time.Time     // when it was told to fetch; zero once it is known to, or not to
	losses   int           // times it had fewer bytes than before
	suspect  bool          // it has bytes by hashes that another member found wrong
	took     []string      // authors of hashes that were current, by which it may have bytes; maxTook at most
	anew     bool          // it threw away all it had when it last reported wrong bytes or hashes
	mending  bool          // a fetcher that went on behind wrong bytes, and now waits for the right ones
	proven   bool          // another has had a segment from it
	idle     bool          // it was named for not fetching
	vain     bool          // its zone waited for it, while it said that it gets bytes, for as long as it may; until it has a segment more
	tells    int           // times it was told in vain
	sent     bool          // it was told to fetch, and has not thrown away what it brought
	saysSlow bool          // it has found its line slow, whatever else is known of that
	crept    bool          // its line was slow until it was through with fetching the blob
	lags     bool          // as first hop it was overtaken by others, until it has a segment in time
	slow     time.Time     // since when it is known to be a slow fetcher; zero if it is not
	from     int64         // bytes from 0 on that it had when it became fetcher
	moved    time.Time     // when it last had more bytes, or became fetcher
	gap      time.Duration // between the last moves of a fetcher; 0 before its first byte
	heard    time.Time     // when it joined or last brought something for the others
	nudged   time.Time
	asked    time.Time
}

// seeder is a node that has registered the whole blob.
type seeder struct {
	name, zone string
	hash       uint64
	asked      time.Time // when it was asked to serve; zero if not
	failed     bool      // was asked and did not come
}

func newMember(now time.Time, h *api.Hello, segments int) *member {
	self := h.GetSelf()
	return &member{
		name:  self.GetName(),
		zone:  h.GetZone(),
		peer:  &api.Peer{Name: self.GetName(), Address: self.GetAddress()},
		hash:  hashString(self.GetName()),
		has:   make([]bool, segments),
		knows: make([]bool, segments),
		given: make([][]*member, segments),
		moved: now, heard: now, nudged: now,
		retracts: h.GetStatus().GetRetracted(),
	}
}

// stale says that the member speaks of bytes that it is about to throw away,
// because it has been told so.
func (x *member) stale() bool { return x.retracted < x.retracts }

// empty notes that the member has thrown away all that it had.
func (x *member) empty() {
	x.prefix, x.present, x.suspect, x.took, x.forgot = 0, 0, false, nil, nil
}

// fetchesAll says whether the member brings the blob from the registry from its first
// byte on.
func (x *member) fetchesAll() bool { return x.class == fetcher && x.from == 0 }

// apply takes over a member's status and says whether anything has changed
// that decide has to know of.
func (m *Machine) apply(now time.Time, x *member, s *api.Status) bool {
	prefix := min(max(s.GetPrefix(), 0), m.size)
	present := min(max(s.GetPresent(), prefix), m.size)
	if x.retracted = s.GetRetracted(); x.stale() && !s.GetWhole() {
		prefix, present = 0, 0
	}
	if present != x.present {
		if x.class == fetcher {
			x.gap = max(now.Sub(x.moved), x.gap/2)
		}
		x.moved = now
		if present > x.present {
			m.progressed = now
		}
	}
	changed := x.class == gone || x.canFetch != s.GetCanFetch() || x.fetching != s.GetFetching() ||
		x.line != s.GetLine() || x.registry != s.GetRegistry() || x.inflow != s.GetInflow() || x.lately != s.GetLately() || x.saysSlow != s.GetSlow() ||
		x.whole != s.GetWhole() || x.load != s.GetLoad() || x.busy != s.GetBusy() || x.receiving != s.GetReceiving() || (x.present < m.size) != (present < m.size) ||
		(!m.vacant.IsZero() && prefix > x.prefix && prefix >= m.reach(x))
	if s.GetWhole() && !x.whole {
		x.relay = x.class == leecher
		x.heard = time.Time{}
		if !m.awaited[x.name] {
			x.heard = now // it has a while to announce something, and once only if it does not
		}
		if len(m.awaited) < maxBad {
			m.awaited[x.name] = true
		}
		x.suspect, x.took = false, nil
	}
	switch {
	case s.GetWhole() || (x.fetching && !s.GetFetching()):
		x.told = time.Time{}
	case s.GetFetching():
		if !x.fetching && x.told.IsZero() {
			x.moved = now // it went on its own
		}
		x.told, x.tells = time.Time{}, 0
	case !s.GetCanFetch():
		x.told = time.Time{} // the client that was to be sent is gone
	}
	lost := present < x.present && !s.GetWhole()
	completed := s.GetWhole() && !x.whole
	turned := x.class != gone && x.canFetch != s.GetCanFetch()
	x.prefix, x.present = prefix, present
	if x.fetching && (s.GetWhole() || !s.GetFetching()) {
		x.crept = m.slow(x) // a short blob may be through before another is sent beside it
	}
	x.canFetch, x.fetching, x.whole = s.GetCanFetch(), s.GetFetching(), s.GetWhole()
	x.load, x.rank, x.busy, x.receiving = s.GetLoad(), s.GetRank(), s.GetBusy(), s.GetReceiving()
	if x.lately != s.GetLately() {
		m.latest = latest{}
	}
	x.line, x.registry, x.inflow, x.lately = s.GetLine(), s.GetRegistry(), max(s.GetInflow(), 0), max(s.GetLately(), 0)
	x.saysSlow = s.GetSlow()
	m.fastest = max(m.fastest, x.registry)
	if x.busy {
		x.busyAt = now
	}
	m.sort(now, x)
	if turned { // its client has come or gone, and with it the use of a first hop
		for i := range m.segs {
			m.mend(now, i)
		}
	}
	if completed {
		m.recall(now, x)
	}
	if completed && m.contested {
		for i := range m.segs {
			m.witness(now, i, x)
		}
	}
	if lost {
		x.suspect, x.took, x.forgot = false, nil, nil
		m.lose(now, x)
		return true
	}
	return changed
}

// lose forgets what a member has announced, when it has thrown its bytes
// away, and tells it anew what there is.
func (m *Machine) lose(now time.Time, x *member) {
	if x.losses++; x.losses > maxLosses {
		m.castOut(x, "it lost its bytes again and again") // no honest disk does that; and every loss is felt by all
		m.sort(now, x)
		m.disown(now, x)
		return
	}
	x.sent = false
	clear(x.knows)
	clear(x.given)
	m.unhold(now, x)
	m.welcome(now, x)
}

// sort puts a member into the class that its state asks for.
func (m *Machine) sort(now time.Time, x *member) {
	switch {
	case x.banned:
		m.reclass(now, x, outcast)
	case x.whole:
		m.reclass(now, x, source)
	case x.fetching || !x.told.IsZero():
		m.reclass(now, x, fetcher)
	default:
		m.reclass(now, x, leecher)
	}
}

func (m *Machine) reclass(now time.Time, x *member, to class) {
	if x.class == fetcher && to != fetcher {
		x.mending = false
		m.fetchers = remove(m.fetchers, x)
	}
	if x.class != fetcher && to == fetcher {
		x.gap, x.fetched = 0, true
		x.from, x.slow = m.reached(x), time.Time{}
		m.fetchers = append(m.fetchers, x)
		m.promote(now, x)
	}
	x.class = to
	pooled := to == leecher || (to == source && x.relay)
	if x.pooled && !pooled {
		m.pool = remove(m.pool, x)
		if m.zones[x.zone] = remove(m.zones[x.zone], x); len(m.zones[x.zone]) == 0 {
			delete(m.zones, x.zone)
		}
	}
	if !x.pooled && pooled {
		m.pool = append(m.pool, x)
		m.zones[x.zone] = append(m.zones[x.zone], x)
	}
	x.pooled = pooled
	m.settle(now, x)
}

// settle keeps the number of starving leechers, and the sweep that looks
// after them.
func (m *Machine) settle(now time.Time, x *member) {
	starves := x.starves(m.size)
	if starves != x.counted {
		x.counted = starves
		if starves {
			m.starving++
		} else {
			m.starving--
		}
	}
	switch {
	case m.starving == 0:
		m.sweepAt = time.Time{}
	case m.sweepAt.IsZero():
		m.sweepAt = now.Add(sweepEvery)
	}
}

// starves says whether a member waits for bytes of others. One that has them all
// and is only checking and syncing them does not.
func (x *member) starves(size int64) bool {
	return (x.class == leecher || x.mending) && x.present < size
}

// reached is the end of the bytes that the member has from 0 on. What it has
// announced may be ahead of its last status.
func (m *Machine) reached(x *member) int64 {
	end := x.prefix
	if m.small() {
		return end
	}
	for i := int(end / m.layout.SegmentSize); i < len(x.has) && x.has[i]; i++ {
		end = m.segmentEnd(i)
	}
	return end
}

func (m *Machine) segmentEnd(i int) int64 {
	return min(int64(i+1)*m.layout.SegmentSize, m.size)
}

// remove deletes x, which is there once at most, keeping the order.
func remove(list []*member, x *member) []*member {
	if i := slices.Index(list, x); i >= 0 {
		return slices.Delete(list, i, i+1)
	}
	return list
}
