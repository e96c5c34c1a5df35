package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"

	apiv1 "github.com/imagewolf/imagewolf/api/v1"
	"github.com/imagewolf/imagewolf/config"
	"github.com/imagewolf/imagewolf/node/metrics"
	"github.com/imagewolf/imagewolf/plugin/store"
	"github.com/imagewolf/imagewolf/swarm"
	"github.com/imagewolf/imagewolf/tracker"
)

const (
	// inlineLimit is the size, in bytes, up to which a blob travels inside
	// the tracker's stream instead of as torrents.
	inlineLimit = tracker.MaxInline
	// pace is how often, at the most, a session looks at its blob. Every
	// chunk that arrives is a change; looking at each would cost more than
	// the transfer.
	pace = 5 * time.Millisecond
	// statusEvery is the least time between two Status messages that report
	// nothing but progress.
	statusEvery = 200 * time.Millisecond
	// busyEvery is how often a node that lacks bytes repeats that it is busy: one
	// that is not heard for a stall timeout, 2 s by default, is taken for stuck.
	busyEvery = 500 * time.Millisecond
	// rejoinEvery is how often a session without a tracker looks for one.
	rejoinEvery = time.Second
	// hastyRejoins is how many trackers in a row may end the stream within
	// rejoinEvery before the session does without one for that long.
	hastyRejoins = 3
	// retryLost is how often a session that has lost its tracker, and whose bytes
	// may come without one for a while, looks for the next.
	retryLost = 100 * time.Millisecond
	// maxRetracted is how often bytes of a blob are taken back from a session
	// before it goes by the registry alone.
	maxRetracted = 4
	// maxTold bounds the peers of a segment that nobody here has wanted yet. Trackers are
	// not trusted to keep to their own bounds, which are those of the rest.
	maxTold = 64
)

// source is the blob of a session as this node has it: an ingest, or a blob
// that is already whole.
type source interface {
	swarm.Data
	Watch() (store.State, <-chan struct{})
	Fetch() bool
	Forget()
	// exchange is the bytes for as long as they are not thrown away.
	exchange() swarm.Data
}

// ingest is a blob on its way in.
type ingest struct{ *store.Ingest }

func (in ingest) exchange() swarm.Data { return in.View() }

// session is this node's membership in one blob's swarm, from the first
// client that waits for the blob (or the first peer that asks for it) until
// nobody needs it from here. Its fields belong to the goroutine of run.
type session struct {
	node    *Node
	stack   *stack
	log     *slog.Logger
	digest  digest.Digest
	size    int64
	layout  swarm.Layout
	content source

	blob    *swarm.Blob // nil for a blob that travels inline
	offers  *offers     // nil like blob
	tracker trackerSession
	joined  time.Time     // when the tracker was last reached
	lostAt  time.Time     // when the session was last left without; zero while it has not been
	heldUp  time.Duration // of the time since then, by trackers that were connected and did not answer
	retryAt time.Time     // when to look for a tracker again; zero while there is one
	hasty   int           // joins in a row that ended at once
	resumed bool          // has been a member before

	state      store.State
	pieces     map[int][]byte    // hashes of the segments known so far
	peers      map[int][]string  // of segments that nobody here has wanted yet
	met        map[string]string // addresses of the peers told so far, by name
	recalled   map[int][]byte    // hashes that this node made when it first had the blob
	announced  map[int]bool      // segments whose torrents are ready here and told
	sent       *apiv1.Status     // the last Status sent
	sentAt     time.Time
	inlineSent bool
	ownWay     bool        // the swarm's bytes were wrong: only the registry is believed from here on
	retracted  int         // times that the tracker took back what others had brought
	seen       store.State // at the look before
	failed     int         // State.Failed when last looked at
	movedAt    time.Time   // when the last new byte was seen, or the wait began
	askedAt    time.Time
	accused    int       // those that sent bad pieces of whom the tracker was told
	named      []string  // the silent peers that were named when it last asked
	usedAt     time.Time // when the session was last of use to anyone
	started    time.Time
	metered    metered
	from       int64 // bytes that were here when the session began
	asLeecher  int64 // bytes that came from peers
	uploaded   int64 // bytes that went to peers
}

// metered is what of the blob's bytes the node's meter has been told.
type metered struct {
	at        time.Time // when it was last told
	in, out   int64     // bytes from and to peers
	brought   int64     // State.Brought
	broughtAt time.Time // when that last grew, or a client was sent to the registry
}

// trackerSession is the part of tracker.Session that a session speaks to.
type trackerSession interface {
	Send(m *apiv1.MemberMessage) error
	Recv() <-chan *apiv1.TrackerMessage
	Err() error
	Close()
}

func newSession(n *Node, st *stack, d digest.Digest, size int64, c source) *session {
	now := time.Now()
	return &session{
		node: n, stack: st, digest: d, size: size, content: c,
		log:       n.log.With("digest", d, "size", size),
		layout:    swarm.LayoutOf(size),
		pieces:    map[int][]byte{},
		peers:     map[int][]string{},
		met:       map[string]string{},
		recalled:  map[int][]byte{},
		announced: map[int]bool{},
		movedAt:   now, usedAt: now, started: now,
		metered: metered{at: now, broughtAt: now},
	}
}

// run blocks until the session is of no more use: the blob is whole and
// nobody has asked for it for the idle timeout, nobody waits for it any
// longer, its bytes can no more be written or read here, or ctx ends.
// Afterwards nothing reads or writes the content.
func (s *session) run(ctx context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer s.leave()
	defer s.node.leaving(s.digest)
	state, changed := s.content.Watch()
	s.state, s.from, s.failed = state, state.Present, state.Failed
	s.metered.brought = state.Brought
	s.node.book.enter(s.digest)
	defer s.node.book.leave(s.digest)
	if err := s.open(ctx); err != nil {
		s.log.Warn("blob cannot be shared: going to the registry", "err", err)
		return
	}
	s.join(ctx)
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		s.look(ctx)
		if s.done() || s.broken() {
			return
		}
		select {
		case <-ctx.Done():
			return
		case m, ok := <-s.messages():
			if !ok {
				s.lost(ctx)
				continue
			}
			s.handle(ctx, m)
			continue
		case o := <-s.offers.results():
			s.offered(o)
			continue
		case <-tick.C:
		case <-changed:
			if s.blob == nil {
				break // a small blob has few changes, and others wait for each
			}
			// Give more changes time to come, then see them all at once.
			select {
			case <-ctx.Done():
				return
			case <-time.After(pace):
			}
		}
		s.state, changed = s.content.Watch()
	}
}

// open makes the blob's torrents possible. Small blobs need none.
func (s *session) open(ctx context.Context) error {
	if s.size <= inlineLimit {
		return nil
	}
	b, err := s.stack.swarm.Open(s.digest, s.size, s.content.exchange())
	if err != nil {
		return fmt.Errorf("open torrents of %s: %w", s.digest, err)
	}
	s.blob = b
	s.offers = newOffers(ctx, b, func(f func() error) error { return s.node.guard(partOffer, f) })
	return nil
}

// leave ends the membership and drops the torrents.
func (s *session) leave() {
	if s.tracker != nil {
		s.tracker.Close()
	}
	s.shut()
}

// shut drops the torrents and waits until nothing touches the content.
func (s *session) shut() {
	if s.blob == nil {
		return
	}
	s.offers.stop()
	if err := s.blob.Close(); err != nil {
		s.log.Warn("torrents did not close", "err", err)
	}
	s.blob, s.offers = nil, nil
}

// report says, when a blob has become whole, where it came from.
func (s *session) report() {
	if s.from == s.size {
		return
	}
	s.log.Info("blob is here", "peer_bytes", s.asLeecher,
		"registry_bytes", s.size-s.from-s.asLeecher, "seconds", time.Since(s.started).Seconds())
}

func (s *session) messages() <-chan *apiv1.TrackerMessage {
	if s.tracker == nil {
		return nil
	}
	return s.tracker.Recv()
}

// join looks for the blob's tracker for at most the decide timeout, and for the stall
// timeout before that where there is a connection to one, which may be slow to answer.
// Without one, a client that waits is sent to the registry at once, or, if there was
// one before, when the session has looked for the stall timeout: all members look for
// the next at the same moment, and what is on its way comes without one.
func (s *session) join(ctx context.Context) {
	began := time.Now()
	ts, err := s.stack.tracker.Join(ctx, s.digest, s.hello, s.unanswered)
	if err != nil {
		s.tracker = nil
		s.heldUp += max(0, time.Since(began)-s.node.cfg.Tracker.DecideTimeout.Duration())
		if errors.Is(err, tracker.ErrNoTracker) && s.looked() < s.node.cfg.Tracker.StallTimeout.Duration() {
			s.log.Debug("no tracker yet", "err", err)
			s.retryAt = time.Now().Add(retryLost)
			return
		}
		s.log.Info("no tracker: going to the registry", "err", err)
		s.retryAt = time.Now().Add(rejoinEvery)
		s.fetch(metrics.NoTracker)
		return
	}
	s.tracker, s.retryAt, s.sentAt, s.resumed = ts, time.Time{}, time.Now(), true
	s.joined = s.sentAt
}

// hello is what the session says first at a tracker: all that it would have said so far.
func (s *session) hello() *apiv1.Hello {
	s.state, _ = s.content.Watch()
	s.sent, s.inlineSent, s.accused = s.status(), false, 0
	hello := &apiv1.Hello{Size: s.size, Status: s.sent, Resumed: s.resumed}
	for i := range s.announced {
		if p := s.pieces[i]; p != nil {
			hello.Announced = append(hello.Announced, &apiv1.Announce{Segment: uint32(i), Pieces: p})
		}
	}
	return hello
}

// unanswered tells a tracker that has yet to answer what is new. What must not be lost, or
// asks for something, is for the one that does answer.
func (s *session) unanswered(ts *tracker.Session) {
	s.tracker = ts
	state, _ := s.content.Watch()
	if state.Failed != s.failed || state.Present < s.seen.Present {
		return
	}
	s.state = state
	for more := true; more; {
		select {
		case o := <-s.offers.results():
			s.offered(o)
		default:
			more = false
		}
	}
	now := time.Now()
	s.news(now)
	s.tell(now)
}

// looked is for how long the session has looked for a tracker since it lost its last.
// What it waited for those that seemed to be there does not count, up to the time that
// one such has: a single try may take that long, and says nothing of the others.
func (s *session) looked() time.Duration {
	return time.Since(s.lostAt) - min(s.heldUp, answerTime(s.node.cfg))
}

// answerTime is what a tracker that there is a connection to has to answer.
func answerTime(cfg config.Config) time.Duration {
	return max(cfg.Tracker.DecideTimeout, cfg.Tracker.StallTimeout).Duration()
}

// lost is called when the tracker has gone: the next in the order takes over.
func (s *session) lost(ctx context.Context) {
	err := s.tracker.Err()
	s.tracker.Close()
	s.tracker, s.lostAt, s.heldUp = nil, time.Now(), 0
	// Trackers that end the stream at once must not be asked in a circle.
	if s.hasty++; time.Since(s.joined) >= rejoinEvery || errors.Is(err, tracker.ErrMoved) {
		s.hasty = 0
	}
	if s.hasty > hastyRejoins {
		s.retryAt = time.Now().Add(rejoinEvery)
		s.fetch(metrics.NoTracker)
		return
	}
	s.join(ctx)
}

// fetch sends one waiting client to the registry, if there is one and none of
// this node's is on its way there already, for a reason that is counted.
func (s *session) fetch(reason string) {
	if s.state, _ = s.content.Watch(); s.state.Whole || s.state.Writing > 0 {
		return
	}
	if s.content.Fetch() {
		s.node.metrics.FellBack(reason)
	}
	s.state, _ = s.content.Watch()
}

// handle does what the tracker says.
func (s *session) handle(ctx context.Context, m *apiv1.TrackerMessage) {
	s.node.book.decided(s.digest)
	s.log.Debug("tracker says", "message", m, "prefix", s.state.Prefix)
	switch m := m.GetMessage().(type) {
	case *apiv1.TrackerMessage_Wait:
	case *apiv1.TrackerMessage_Fetch:
		// More than one client may be sent: the tracker hedges.
		s.content.Fetch()
		s.state, _ = s.content.Watch()
	case *apiv1.TrackerMessage_Inline:
		s.inline(m.Inline.GetData())
	case *apiv1.TrackerMessage_Segment:
		s.segment(m.Segment)
	case *apiv1.TrackerMessage_Retract:
		s.retract(ctx)
	}
}

// inline takes a small blob as it came through the tracker. Its digest is
// checked by the store like any other's.
func (s *session) inline(data []byte) {
	if s.ownWay || s.state.Whole || int64(len(data)) != s.size || s.size > inlineLimit {
		return
	}
	if _, err := s.content.WriteAt(data, 0); err != nil {
		s.log.Warn("inline blob not written", "err", err)
		return
	}
	if err := s.content.MarkPresent(0, s.size); err != nil {
		s.log.Warn("inline blob not taken", "err", err)
	}
	s.asLeecher = s.size
	s.node.metrics.Swarm().Received(len(data))
	s.inlineSent = true // whoever sent it has told the tracker already
}

// segment starts or widens the download of one segment.
func (s *session) segment(m *apiv1.Segment) {
	i := int(m.GetSegment())
	if s.ownWay || s.blob == nil || i < 0 || i >= s.layout.Segments() || s.announced[i] {
		return
	}
	p := m.GetPieces()
	if len(p) > 0 && len(p) != 20*s.layout.Pieces(i) {
		s.log.Warn("segment refused: the tracker's piece hashes cannot be its own", "segment", i, "bytes", len(p))
		return
	}
	if len(p) > 0 && !bytes.Equal(p, s.pieces[i]) {
		if s.pieces[i] != nil && s.blob.Clash(i, p, s.pieces[i]) {
			return // what came by the other hashes must not be handed on by these
		}
		s.pieces[i] = p // others than before, if the first turned out to be wrong
		delete(s.peers, i)
	}
	if s.pieces[i] == nil {
		return
	}
	for _, p := range m.GetPeers() {
		s.meet(i, p.GetName(), p.GetAddress())
	}
	if !s.passive() {
		s.leech(i)
	}
}

// meet remembers a peer of a segment, within bounds.
func (s *session) meet(i int, name, address string) {
	if len(name) > tracker.MaxText || len(address) > tracker.MaxText {
		return
	}
	if told := s.peers[i]; !slices.Contains(told, address) {
		if len(told) >= maxTold {
			told = told[1:] // the oldest
		}
		s.peers[i] = append(told, address)
	}
	if _, known := s.met[name]; known || len(s.met) < tracker.MaxMembers {
		s.met[name] = address
	}
}

// leech takes a segment from the peers that are known to have it, or to be
// about to. Peers are told once, so those told while nobody here wanted the
// blob are kept until somebody does.
func (s *session) leech(i int) {
	if err := s.blob.Leech(i, s.pieces[i], s.peers[i]); err != nil {
		s.log.Warn("segment refused", "segment", i, "err", err)
		delete(s.pieces, i)
	}
	delete(s.peers, i)
}

// resume takes up what was told while nobody here wanted the blob.
func (s *session) resume() {
	if s.passive() {
		return
	}
	for i := range s.peers {
		s.leech(i)
	}
}

// passive says that no client here wants the blob: what is here is seeded,
// nothing more is asked for.
func (s *session) passive() bool {
	return !s.state.Whole && s.state.Waiting == 0 && s.state.Writing == 0
}
