// Package tracker decides, for each blob, which node fetches it from the
// registry, who leeches and who is whose peer.
//
// Machine holds the decisions for one blob and is pure: events and the time
// go in, commands come out. Server puts one Machine per blob behind the gRPC
// service of api/v1, Client and Registrar are the other end of it.
//
// The package moves no blob data (but for blobs of at most MaxInline bytes,
// which travel in the stream), knows nothing of BitTorrent or of containerd,
// and keeps nothing on disk: members repeat what they have when they join.
package tracker

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"

	api "github.com/imagewolf/imagewolf/api/v1"
)

// MaxInline is the size in bytes up to which a blob travels inside the Join
// stream, without segments.
const MaxInline = 64 << 10

// DefaultStallTimeout is how long a fetcher may go without a new byte before
// another one is sent beside it.
const DefaultStallTimeout = 2 * time.Second

const (
	// decideGrace is how long the choice of a blob's first fetcher is held
	// open for more members to join, when the first one is busy with an
	// earlier blob. Nodes that pull the same image are this far apart.
	decideGrace = 30 * time.Millisecond
	// nudgeAfter is how long a leecher may go without progress before it is
	// given more peers.
	nudgeAfter = time.Second
	// hopPatience is how long a leecher that knows others who have a segment,
	// or are to have it, goes without progress before it is sent to an origin:
	// in a slow network, and with many segments at once, a piece takes that
	// long to come.
	hopPatience = 3 * time.Second
	// maxPace bounds how much longer a slow network makes these times.
	maxPace = 5 * time.Second
	// slowSlack is how much longer than the stall timeout a fetcher on a slow
	// line may go without a new byte.
	slowSlack = 3 * time.Second
	// busyStalls is after how many stall timeouts a fetcher is given up that
	// gets bytes of other blobs all the while.
	busyStalls = 10
	// receivingStalls is after how many a fetcher is given up that is known to get
	// bytes of this blob, where members wait for ever.
	receivingStalls = 12
	// askAgain is how often a member's Ask is listened to.
	askAgain = 250 * time.Millisecond
	// sweepEvery is how often all leechers are looked at.
	sweepEvery = 250 * time.Millisecond
	// maxFetchers is how many members may be at the registry at once.
	maxFetchers = 3
	// maxLoad is containerd's own limit of concurrent downloads for one
	// image (max_concurrent_downloads, default 3): a node that fetches as
	// many blobs already would leave one more waiting for its turn.
	maxLoad = 3
	// peersPerSegment is how many random members a leecher is told for one
	// segment; measured, see facts-bittorrent 4: more peers are slower.
	peersPerSegment = 3
	// maxGiven bounds the peers that one member is told for one segment.
	maxGiven = 16
	// nudgeSegments bounds the segments that one nudge adds peers for: a few
	// suffice to get a leecher going again without the whole crowd being
	// sent to the fetcher.
	nudgeSegments = 4
	// maxSeeders bounds the seeders that are asked to serve one blob.
	maxSeeders = 16
	// hopSources bounds the sources that have one leecher as the first hop
	// of one segment.
	hopSources = 3

	// MaxMembers bounds the members of one blob.
	MaxMembers = 10_000
	// MaxText bounds the bytes of a name, an address or a zone.
	MaxText = 512

	maxBad    = 10_000  // (author, reporter) pairs kept for one blob
	maxLosses = 4       // times a member may lose bytes it had
	maxSize   = 1 << 40 // bytes of a blob
	sha1Size  = 20
)

// wrongHashes is why a member is shut out that two others found wrong.
const wrongHashes = "it was wrong about what the bytes are"

// ErrFull is returned by Machine.Join when a blob has as many members as one
// tracker serves.
var ErrFull = errors.New("blob has too many members")

// Layout is how a blob is cut into segments. It is a function of the blob's
// size alone.
type Layout struct {
	Segments    int                   // how many, > 0
	SegmentSize int64                 // bytes of every segment but the last, > 0
	Pieces      func(segment int) int // pieces of one segment, for 0 <= segment < Segments
}

// MachineOptions is what a Machine has to be told of the world.
type MachineOptions struct {
	// StallTimeout is how long a fetcher may stand still before another one
	// is sent beside it; 0 means DefaultStallTimeout.
	StallTimeout time.Duration
	// MaxWait is after how long without a new byte members go to the registry
	// by themselves, all of them: a second fetcher is sent well before that. Those
	// that get bytes of other blobs wait twice as long.
	// 0 means never.
	MaxWait time.Duration
	// Members is how many nodes the cluster has now; nil if unknown. Once
	// all of them have joined there is no one left to wait for.
	Members func() int
	// TakesOver says that members may be at another tracker, and on their way here.
	TakesOver bool
	// Elsewhere says that another is the blob's tracker, for which this one stands in.
	Elsewhere bool
	// Layout cuts a blob of the given size (bytes) into segments.
	Layout func(size int64) Layout
}

// Command is what a Machine wants sent.
type Command struct {
	To    string              // the member's or the seeder's name
	Msg   *api.TrackerMessage // to member To; nil when Serve
	Serve bool                // ask the registered seeder To to join the blob
	// Reason is what member or seeder To is named for, and Outcast says that it
	// was shut out of the blob for that. Nothing is sent; it is for the log.
	Reason  string
	Outcast bool
}

// Machine is one blob's tracker. It starts no goroutine, reads no clock and
// does no I/O. It is not safe for concurrent use; times given to it must not
// go backwards.
type Machine struct {
	digest  digest.Digest
	size    int64
	stall   time.Duration
	maxWait time.Duration
	count   func() int
	layout  Layout
	hash    uint64
	members map[string]*member
	list    []*member // all members, by name: makes every walk the same
	seeders map[string]*seeder
	segs    []segment
	covered int // segments with at least one holder
	// spreading says that a segment has been spread since nobody lacked anything.
	spreading bool
	inline    []byte // the small blob itself, verified

	fetchers []*member            // members of class fetcher
	pool     []*member            // members that swarm with each other
	zones    map[string][]*member // pool by zone
	starving int                  // leechers that lack bytes
	latest   latest               // of those in list; to be reset when one comes or goes, or says otherwise
	fastest  int64                // bytes/s: the most that a member has said it had from a registry

	takesOver bool            // nobody has joined yet, and members may be at another tracker
	resumed   bool            // a member has come from another tracker
	movers    map[string]bool // fetchers that went to another tracker, by name
	here      bool            // this is the blob's tracker, and not one that stands in for it
	leftUntil time.Time       // until when members may leave for another tracker

	begun       bool      // a fetcher has been told before
	vacant      time.Time // since when leechers starve without a fetcher
	progressed  time.Time // when any member last had more bytes
	graceUntil  time.Time
	resumeUntil time.Time     // until when members from another tracker are waited for
	newest      time.Time     // when a segment was last held for the first time
	pace        time.Duration // how long a segment takes from one place to the next
	loadedSince time.Time     // since when every candidate is too busy
	lastTell    time.Time
	wake        time.Time // when decide wants to be called again
	sweepAt     time.Time

	bad        map[string][]string // author of wrong piece hashes -> names of those that reported them
	refuted    map[string][]string // of bad, those that got a wrong blob
	awaited    map[string]bool     // names that had the whole blob, were waited for and have announced nothing; maxBad at most
	absent     map[string]bool     // seeders that took themselves back when they were asked or had not come; maxBad at most
	outcasts   bool                // there is or was an outcast
	mute       map[string][]string // member that announced and sent nothing -> names of those that waited for it
	spoilt     map[string][]string // member that sent pieces without their hashes -> names of those that got them
	badPairs   int                 // entries of bad, mute and spoilt
	expelled   map[string]bool     // members that did what no honest one does, by name
	contested  bool                // segments were announced by different hashes
	mismatches int

	out []Command
}

// NewMachine returns the machine of the blob d of the given size in bytes,
// without members.
func NewMachine(d digest.Digest, size int64, o MachineOptions) *Machine {
	m := &Machine{
		digest:  d,
		size:    size,
		stall:   cmp.Or(o.StallTimeout, DefaultStallTimeout),
		maxWait: o.MaxWait,

		takesOver: o.TakesOver,
		here:      !o.Elsewhere,
		count:     o.Members,
		hash:      hashString(d.String()),
		members:   map[string]*member{},
		seeders:   map[string]*seeder{},
		zones:     map[string][]*member{},
		bad:       map[string][]string{},
		refuted:   map[string][]string{},
		awaited:   map[string]bool{},
		absent:    map[string]bool{},
		mute:      map[string][]string{},
		spoilt:    map[string][]string{},
		expelled:  map[string]bool{},
		movers:    map[string]bool{},
	}
	if !m.small() {
		m.layout = o.Layout(size)
		m.segs = make([]segment, m.layout.Segments)
	}
	return m
}

// Size is the blob's size in bytes.
func (m *Machine) Size() int64 { return m.size }

// Members is how many members have joined.
func (m *Machine) Members() int { return len(m.list) }

// Mismatches counts announcements that were not believed because their piece
// hashes contradict those announced before.
func (m *Machine) Mismatches() int { return m.mismatches }

// Next is when Tick is due; the zero time when nothing is.
func (m *Machine) Next() time.Time {
	return earlier(m.wake, m.sweepAt)
}

// Join adds a member. Among the commands is at least one to the member. One
// of the same name that is there already leaves first. The error is about
// this member alone: its Hello is malformed, or ErrFull.
func (m *Machine) Join(now time.Time, hello *api.Hello) ([]Command, error) {
	if err := checkHello(hello); err != nil {
		return nil, err
	}
	name := hello.GetSelf().GetName()
	if hello.GetSize() != m.size {
		return nil, fmt.Errorf("size %d of %s differs from %d", hello.GetSize(), m.digest, m.size)
	}
	if old := m.members[name]; old != nil {
		m.drop(now, old)
	} else if len(m.list) >= MaxMembers {
		return nil, ErrFull
	}
	x := newMember(now, hello, len(m.segs))
	m.members[name] = x
	at, _ := m.find(name)
	m.list = slices.Insert(m.list, at, x)
	m.latest = latest{}
	if m.banned(name) {
		m.castOut(x, "it was shut out before")
	}
	m.apply(now, x, hello.GetStatus())
	for _, a := range hello.GetAnnounced() {
		m.announce(now, x, a)
	}
	if m.takesOver {
		m.takesOver = false
		m.resumeUntil = now.Add(takeoverGrace)
	}
	if hello.GetResumed() {
		m.resumes(now)
	}
	if s := m.seeders[name]; s != nil && x.whole {
		s.asked = now
	}
	m.welcome(now, x)
	m.decide(now)
	out := m.take()
	if !slices.ContainsFunc(out, func(c Command) bool { return c.To == name && c.Msg != nil }) {
		out = append(out, waitFor(name))
	}
	return out, nil
}

// Leave removes a member; unknown names are ignored.
func (m *Machine) Leave(now time.Time, name string) []Command {
	x := m.members[name]
	if x == nil {
		return nil
	}
	m.drop(now, x)
	if len(m.list) == 0 {
		m.inline = nil // a seeder will bring it again
	}
	m.decide(now)
	return m.take()
}

// Message handles what a member says after its Hello. Messages from unknown
// members, and those that do not fit the blob, are ignored.
func (m *Machine) Message(now time.Time, name string, msg *api.MemberMessage) []Command {
	x := m.members[name]
	if x == nil {
		return nil
	}
	switch t := msg.GetMessage().(type) {
	case *api.MemberMessage_Announce:
		if m.announce(now, x, t.Announce) {
			m.decide(now)
		}
	case *api.MemberMessage_Status:
		if m.apply(now, x, t.Status) {
			m.decide(now)
		}
	case *api.MemberMessage_Inline:
		m.takeInline(now, x, t.Inline.GetData())
		m.decide(now)
	case *api.MemberMessage_Ask:
		m.complain(now, x, t.Ask.GetSilent())
		m.ask(now, x)
		m.decide(now)
	case *api.MemberMessage_BadPieces:
		m.accuse(now, x, t.BadPieces)
		m.decide(now)
	case *api.MemberMessage_Bad:
		if t.Bad.GetOwn() {
			m.retract(now, x)
		} else {
			m.reportBad(now, x)
		}
		m.decide(now)
	}
	return m.take()
}

// SeederAdded says that a node that is not necessarily a member holds the
// whole blob and can be asked to serve it.
func (m *Machine) SeederAdded(now time.Time, name, zone string) []Command {
	if name == "" || len(name) > MaxText || len(zone) > MaxText || (m.seeders[name] == nil && len(m.seeders) >= MaxMembers) {
		return nil
	}
	s := m.seeders[name]
	if s == nil {
		s = &seeder{name: name, hash: hashString(name), failed: m.absent[name]}
		m.seeders[name] = s
	}
	s.zone = zone
	m.decide(now)
	return m.take()
}

// SeederRemoved takes back SeederAdded.
func (m *Machine) SeederRemoved(now time.Time, name string) []Command {
	s := m.seeders[name]
	if s != nil && (s.failed || !s.asked.IsZero() && m.members[name] == nil) && len(m.absent) < maxBad {
		m.absent[name] = true // it is not waited for once more each time that it registers
	}
	delete(m.seeders, name)
	m.decide(now)
	return m.take()
}

// Tick does what time alone brings about. It may be called at any time and
// has to be at Next.
func (m *Machine) Tick(now time.Time) []Command {
	if !m.sweepAt.IsZero() && !now.Before(m.sweepAt) {
		m.sweepAt = time.Time{}
		m.sweep(now)
	}
	m.decide(now)
	return m.take()
}

func (m *Machine) take() []Command {
	out := m.out
	m.out = nil
	return out
}

func (m *Machine) send(to *member, msg *api.TrackerMessage) {
	m.out = append(m.out, Command{To: to.name, Msg: msg})
}

func (m *Machine) small() bool { return m.size <= MaxInline }

func (m *Machine) find(name string) (int, bool) {
	return slices.BinarySearchFunc(m.list, name, func(x *member, n string) int { return cmp.Compare(x.name, n) })
}

// drop forgets a member and gives those that knew it somebody else.
func (m *Machine) drop(now time.Time, x *member) {
	delete(m.members, x.name)
	if at, ok := m.find(x.name); ok {
		m.list = slices.Delete(m.list, at, at+1)
		m.latest = latest{}
	}
	if s := m.seeders[x.name]; s != nil {
		// One that has served can be asked again, one that never did not.
		s.failed = s.failed || (!s.asked.IsZero() && x.whole && x.held == 0 && m.inline == nil)
		s.asked = time.Time{}
	}
	if x.held > 0 {
		delete(m.awaited, x.name)
	}
	m.reclass(now, x, gone)
	m.disown(now, x)
}

// takeInline keeps a small blob that is what its digest says and hands it to
// all that lack it.
func (m *Machine) takeInline(now time.Time, x *member, data []byte) {
	if !m.small() || m.inline != nil || int64(len(data)) != m.size {
		return
	}
	if m.digest.Validate() != nil || m.digest.Algorithm().FromBytes(data) != m.digest {
		m.mismatches++
		return
	}
	x.heard = now
	m.inline = data
	m.progressed = now
	for _, y := range m.list {
		if y != x && !y.whole {
			m.send(y, inlineMessage(data))
		}
	}
}

// ask answers a member that has seen no new byte for a while.
func (m *Machine) ask(now time.Time, x *member) {
	if now.Sub(x.asked) < askAgain {
		return
	}
	x.asked = now
	before := len(m.out)
	switch {
	case x.whole:
	case m.inline != nil:
		m.send(x, inlineMessage(m.inline))
	default:
		m.nudge(now, x)
	}
	if len(m.out) == before {
		m.out = append(m.out, waitFor(x.name))
	}
}

// reportBad is told by x that the blob it assembled did not have its digest.
// Every piece that x took from others had the hash it was to have, or it would
// not have been taken; so what was wrong is the hashes, and whoever was the
// first to announce them is to blame, not those that passed the pieces on. x has
// thrown away what it took. If x was told to do so, and said this before it heard
// that, it speaks of bytes that are dealt with already, and by none of the hashes
// that it has been told since.
func (m *Machine) reportBad(now time.Time, x *member) {
	if x.stale() {
		return
	}
	x.mending = x.class == fetcher
	for _, name := range m.wrong(x) {
		m.blame(now, x, name, wrongHashes)
	}
	x.empty()
	x.anew = true
	m.sort(now, x)
	m.lose(now, x)
}

// retract is told by x that the blob did not have its digest although nothing
// of it came from others: the registry sent x other bytes, and x has handed them
// on. All that have anything by x's hashes throw it away now, before one of them
// is sent to the registry behind it or finds out only at the end. Nobody is to
// blame.
func (m *Machine) retract(now time.Time, x *member) {
	told := m.takers(x.name)
	for i := range m.segs {
		if m.segs[i].author == x.name {
			m.renounce(now, i)
		}
	}
	m.takeBack(now, told)
	x.empty()
	x.mending = false
	m.sort(now, x)
	m.lose(now, x)
	m.name(x.name, "the registry sent it bytes that do not have the digest")
}

// takeBack has members throw away all that others have brought them.
func (m *Machine) takeBack(now time.Time, told []*member) {
	for _, y := range told {
		y.mending = y.class == fetcher && y.from > 0
		y.retracts++
		y.empty()
		m.send(y, &api.TrackerMessage{Message: &api.TrackerMessage_Retract{Retract: &api.Retract{}}})
		clear(y.knows)
		clear(y.given)
		m.unhold(now, y)
		m.sort(now, y)
	}
	for _, y := range told {
		m.welcome(now, y)
	}
}

// reported says whether a member has blamed anyone.
func (m *Machine) reported(name string) bool {
	for _, by := range m.bad {
		if slices.Contains(by, name) {
			return true
		}
	}
	return false
}

// blame bans a member for the reporter, and for everyone when a second member
// says the same: one bad reporter must not be able to drive good nodes out.
func (m *Machine) blame(now time.Time, x *member, name, reason string) {
	by := m.bad[name]
	if x.banned || slices.Contains(by, x.name) || m.badPairs >= maxBad {
		return
	}
	m.badPairs++
	m.bad[name], x.anew = append(by, x.name), false
	if reason == wrongHashes {
		m.refuted[name] = append(m.refuted[name], x.name)
	}
	banned := m.banned(name)
	if !banned {
		m.name(name, reason+", says one")
	}
	var told []*member
	for _, z := range m.takers(name) {
		if z.present == 0 && z.held == 0 {
			continue
		}
		z.suspect = true
		if banned && z != x && !z.fetchesAll() {
			told = append(told, z)
		}
	}
	for i := range m.segs {
		switch {
		case m.segs[i].author != name:
		case banned:
			m.renounce(now, i)
		default:
			m.mend(now, i) // x takes it no more, not on behalf of others either
		}
	}
	y := m.members[name]
	if y != nil && !banned {
		m.part(now, x, y)
	}
	if y != nil && banned && !y.banned {
		m.castOut(y, reason)
		m.sort(now, y)
		m.disown(now, y)
	}
	m.takeBack(now, told)
}

// complain is told by x, which stands still, of whom it has had no byte for one
// and a half times the stall timeout. That counts against those that have announced
// something that x was sent to them for, and of whom nobody is known to have had a
// segment: honest nodes, however slow, are through with one some time. What one
// says gets such a member named, what two say shut out.
func (m *Machine) complain(now time.Time, x *member, names []string) {
	for _, name := range names[:min(len(names), maxGiven)] {
		y := m.members[name]
		by := m.mute[name]
		if y == nil || x.banned || y.banned || y.proven || slices.Contains(by, x.name) || m.badPairs >= maxBad || !m.owes(now, y, x) {
			continue
		}
		m.badPairs++
		m.mute[name] = append(by, x.name)
		if !m.banned(name) {
			m.name(name, "it announced segments and sent nothing of them to one who waits")
			continue
		}
		m.castOut(y, "it announced segments and sent nothing of them to two who wait")
		m.sort(now, y)
		m.disown(now, y)
	}
}

// owes says whether x has waited for long for a segment that y announced, and
// knows y.
func (m *Machine) owes(now time.Time, y, x *member) bool {
	// It looks less often than this machine, by a clock of its own.
	if long := m.stall + m.stall/2 - askAgain; now.Sub(x.moved) < long || now.Sub(y.heard) < long {
		return false
	}
	for i := range m.segs {
		if y.has[i] && slices.Contains(x.given[i], y) {
			return true
		}
	}
	return false
}

// banned says whether a node is banned for everyone.
func (m *Machine) banned(name string) bool {
	return len(m.bad[name]) >= 2 || len(m.mute[name]) >= 2 || len(m.spoilt[name]) >= 2 || m.expelled[name]
}

// castOut bans a member for everyone; the caller sorts it. What it alone has said of
// others is forgotten.
func (m *Machine) castOut(x *member, reason string) {
	x.banned, m.outcasts = true, true
	for _, said := range []map[string][]string{m.bad, m.mute, m.spoilt} {
		for name, by := range said {
			if len(by) == 1 && by[0] == x.name {
				delete(said, name)
				m.badPairs--
			}
		}
	}
	for name, by := range m.refuted {
		if len(by) == 1 && by[0] == x.name {
			delete(m.refuted, name)
		}
	}
	m.out = append(m.out, Command{To: x.name, Reason: reason, Outcast: true})
}

// name has a member or seeder named in the log.
func (m *Machine) name(who, reason string) {
	m.out = append(m.out, Command{To: who, Reason: reason})
}

// tainted says whether x has reported the hashes that segment i goes by, or
// others of the same author.
func (m *Machine) tainted(i int, x *member) bool {
	return len(m.bad) > 0 && slices.Contains(m.bad[m.segs[i].author], x.name)
}

// shuns says whether a has reported b as bad.
func (m *Machine) shuns(a, b *member) bool {
	return len(m.bad) > 0 && slices.Contains(m.bad[b.name], a.name) ||
		len(m.spoilt) > 0 && slices.Contains(m.spoilt[b.name], a.name)
}

func checkHello(h *api.Hello) error {
	self := h.GetSelf()
	switch {
	case self.GetName() == "" || len(self.GetName()) > MaxText:
		return errors.New("hello without a usable name")
	case self.GetAddress() == "" || len(self.GetAddress()) > MaxText:
		return fmt.Errorf("hello of %q without a usable address", self.GetName())
	case len(h.GetZone()) > MaxText:
		return fmt.Errorf("zone of %q is too long", self.GetName())
	case h.GetSize() <= 0 || h.GetSize() > maxSize:
		return fmt.Errorf("hello of %q with size %d", self.GetName(), h.GetSize())
	}
	return nil
}

func waitFor(name string) Command {
	return Command{To: name, Msg: &api.TrackerMessage{Message: &api.TrackerMessage_Wait{Wait: &api.Wait{}}}}
}

func fetchMessage() *api.TrackerMessage {
	return &api.TrackerMessage{Message: &api.TrackerMessage_Fetch{Fetch: &api.Fetch{}}}
}

func inlineMessage(data []byte) *api.TrackerMessage {
	return &api.TrackerMessage{Message: &api.TrackerMessage_Inline{Inline: &api.Inline{Data: data}}}
}

// earlier is the earlier of two times, of which zero means never.
func earlier(a, b time.Time) time.Time {
	if a.IsZero() || (!b.IsZero() && b.Before(a)) {
		return b
	}
	return a
}

func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}
