package node

import (
	"context"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	apiv1 "github.com/imagewolf/imagewolf/api/v1"
	"github.com/imagewolf/imagewolf/node/metrics"
	"github.com/imagewolf/imagewolf/swarm"
)

// look brings everybody up to date with what the content has become: the
// swarm (new segments), the tracker (status), and the client that waits.
func (s *session) look(ctx context.Context) {
	now := time.Now()
	switch {
	case s.failed != s.state.Failed:
		s.bad(ctx)
	case s.state.Present < s.seen.Present:
		s.log.Warn("the store has thrown away what was here of the blob")
		s.restart(ctx)
	}
	s.resume()
	s.news(now)
	s.accuse()
	s.tell(now)
	if s.tracker == nil && !s.retryAt.IsZero() && now.After(s.retryAt) {
		s.join(ctx)
	}
	s.patience(now)
}

// news notes what has come of the blob, and hands on what of it is whole.
func (s *session) news(now time.Time) {
	s.progress(now)
	s.node.book.fetching(s.digest, s.state.Writing > 0 && !s.state.Whole)
	s.offer()
	s.sendInline()
}

// progress notes when the last new byte came and what it was worth.
func (s *session) progress(now time.Time) {
	state := s.state
	if state.Present != s.seen.Present || state.Waiting > 0 && s.seen.Waiting == 0 {
		s.movedAt, s.usedAt = now, now
	}
	if state.Present > s.seen.Present {
		s.node.book.moved(s.digest, now)
	}
	if state.Waiting+state.Writing > 0 {
		s.usedAt = now
	}
	if s.blob != nil {
		s.blob.Fetching(state.Writing > 0 || state.Present == s.size)
		stats := s.blob.Stats()
		s.measure(now, stats)
		s.asLeecher = min(stats.Downloaded, s.size-s.from)
		if stats.Uploaded > s.uploaded {
			s.uploaded = stats.Uploaded
			s.node.book.sending(s.digest, now)
		}
		if stats.LastActive.After(s.usedAt) {
			s.usedAt = stats.LastActive
		}
	}
	if state.Whole && !s.seen.Whole {
		s.report()
	}
	s.seen = state
}

// measure tells the meter what has come and gone since it was last told.
func (s *session) measure(now time.Time, stats swarm.Stats) {
	m, meter := &s.metered, &s.node.meter
	meter.received(stats.Downloaded-m.in, false, m.at, now)
	meter.sent(stats.Uploaded-m.out, m.at, now)
	m.in, m.out, m.at = stats.Downloaded, stats.Uploaded, now
	if s.state.Writing > 0 && s.seen.Writing == 0 {
		m.broughtAt = now
	}
	if s.state.Brought != m.brought {
		meter.received(s.state.Brought-m.brought, true, m.broughtAt, now)
		m.brought, m.broughtAt = s.state.Brought, now
	}
}

// offer has every segment that is whole and not yet told hashed and its
// torrent made ready. The answers come back through offered.
func (s *session) offer() {
	if s.blob == nil || s.stack.alone() {
		return
	}
	n := s.layout.Segments()
	first := s.firstSegment(n)
	for k := range n {
		i := (first + k) % n
		if s.announced[i] || s.offers.pending[i] {
			continue
		}
		off, length := s.layout.Segment(i)
		if s.content.Present(off, length) {
			// Hashes that a peer told are not handed on as this node's own.
			s.offers.add(i, s.recalled[i])
		}
	}
}

// firstSegment spreads the beginning over the nodes that hold the same whole
// blob, so that several seeders that still have to hash it do not all begin
// with the same segment.
func (s *session) firstSegment(n int) int {
	if s.from < s.size {
		return 0
	}
	var h uint32
	for _, c := range []byte(s.stack.cluster.Self().Name + s.digest.String()) {
		h = h*31 + uint32(c)
	}
	return int(h % uint32(n))
}

// offered takes a segment whose torrent is ready to be asked.
func (s *session) offered(o offerResult) {
	delete(s.offers.pending, o.segment)
	if o.err != nil {
		s.log.Warn("segment cannot be seeded", "segment", o.segment, "err", o.err)
		s.announced[o.segment] = true // not told, and not tried in a circle
		delete(s.pieces, o.segment)
		return
	}
	s.announced[o.segment] = true
	s.pieces[o.segment] = o.pieces
	s.send(&apiv1.MemberMessage{Message: &apiv1.MemberMessage_Announce{
		Announce: &apiv1.Announce{Segment: uint32(o.segment), Pieces: o.pieces},
	}})
	if len(s.announced) == s.layout.Segments() && s.state.Whole {
		s.keepPieces()
	}
}

// keepPieces stores the hashes beside the blob, so that seeding it again
// later needs no reading.
func (s *session) keepPieces() {
	var all []byte
	for i := range s.layout.Segments() {
		all = append(all, s.pieces[i]...)
	}
	if err := s.node.store.SetPieces(s.digest, all); err != nil {
		s.log.Debug("piece hashes not kept", "err", err)
	}
}

// sendInline hands a small blob that this node fetched to the tracker.
func (s *session) sendInline() {
	if s.inlineSent || s.size > inlineLimit || !s.state.Whole || s.tracker == nil {
		return
	}
	data := make([]byte, s.size)
	if _, err := s.content.ReadAt(data, 0); err != nil {
		s.log.Warn("small blob not read", "err", err)
		return
	}
	s.inlineSent = true
	s.send(&apiv1.MemberMessage{Message: &apiv1.MemberMessage_Inline{Inline: &apiv1.Inline{Data: data}}})
}

// status is what the tracker should know now.
func (s *session) status() *apiv1.Status {
	now := time.Now()
	fetching := s.state.Writing > 0 && !s.state.Whole
	load, rank := s.node.book.standing(s.digest)
	if s.state.Whole {
		load = s.node.book.sends(s.digest, now)
	}
	line, registry := s.node.meter.rates(now)
	receiving := fetching && s.node.inflow.receiving(now, s.metered.broughtAt, 1+int(load), busyWaits*s.node.cfg.Tracker.MaxWait.Duration())
	peers, lately := s.node.meter.now(now)
	var inflow int64
	if receiving {
		if others := s.node.inflow.rate(now); others > 0 {
			inflow = roundUp(others + peers)
		}
	}
	self, _ := s.stack.cluster.Member(s.stack.cluster.Self().Name)
	return &apiv1.Status{
		Prefix: s.state.Prefix, Present: s.state.Present,
		CanFetch: s.state.Waiting > 0, Fetching: fetching,
		Whole: s.state.Whole, Load: load, Rank: rank, Retracted: uint32(s.retracted),
		Line: line, Registry: registry, Inflow: inflow, Lately: lately,
		Receiving: receiving, Slow: self.Slow,
		Busy: receiving || s.node.book.busy(s.digest, now) || s.receives(now),
	}
}

// receives says whether peers have sent bytes a moment ago. They count for
// nothing until a piece is whole, which takes seconds on a slow line.
func (s *session) receives(now time.Time) bool {
	return s.blob != nil && now.Sub(s.blob.LastReceived()) < busyFor
}

// tell sends a Status when something but progress has changed, or when
// progress is due.
func (s *session) tell(now time.Time) {
	if s.tracker == nil {
		return
	}
	st := s.status()
	if proto.Equal(st, s.sent) {
		if st.GetBusy() && !st.GetWhole() && now.Sub(s.sentAt) >= busyEvery {
			s.sentAt = now
			s.send(&apiv1.MemberMessage{Message: &apiv1.MemberMessage_Status{Status: st}})
		}
		return
	}
	only := proto.CloneOf(st)
	only.Prefix, only.Present, only.Load, only.Rank = s.sent.GetPrefix(), s.sent.GetPresent(), s.sent.GetLoad(), s.sent.GetRank()
	only.Busy, only.Line, only.Registry = s.sent.GetBusy(), s.sent.GetLine(), s.sent.GetRegistry()
	only.Receiving, only.Inflow, only.Lately = s.sent.GetReceiving(), s.sent.GetInflow(), s.sent.GetLately()
	only.Slow = s.sent.GetSlow()
	if proto.Equal(only, s.sent) && now.Sub(s.sentAt) < statusEvery {
		return
	}
	s.sent, s.sentAt = st, now
	s.send(&apiv1.MemberMessage{Message: &apiv1.MemberMessage_Status{Status: st}})
}

func (s *session) send(m *apiv1.MemberMessage) {
	if s.tracker == nil {
		return
	}
	if err := s.tracker.Send(m); err != nil {
		s.log.Debug("tracker not told", "err", err) // the end of Recv brings a new one
	}
}

// patience bounds the wait of a client that sees no new byte: first the
// tracker is asked again, in the end the client goes to the registry.
func (s *session) patience(now time.Time) {
	if s.state.Waiting == 0 || s.state.Whole {
		return
	}
	if s.ownWay {
		s.fetch(metrics.WrongBytes)
		return
	}
	cfg := s.node.cfg.Tracker
	still := now.Sub(s.movedAt)
	// A line that is full of other blobs would be of this one twice, if it came from
	// the registry, too.
	full := func() bool { return s.node.book.busy(s.digest, now) || s.receives(now) }
	if wait := cfg.MaxWait.Duration(); still >= busyWaits*wait || still >= wait && !full() {
		// Also when another client of this node is at the registry already: its
		// connection may hang.
		s.log.Info("no new byte: going to the registry", "waited", still, "prefix", s.state.Prefix)
		s.movedAt = now
		if s.content.Fetch() {
			s.node.metrics.FellBack(metrics.NoProgress)
		}
		s.state, _ = s.content.Watch()
		return
	}
	stall := cfg.StallTimeout.Duration()
	if s.state.Writing > 0 || still < stall {
		return
	}
	// Who is silent is named sooner than the tracker does without, and at once: soon
	// it sends somebody to the registry, and then nobody waits for them any more.
	silent := s.silent(now, still)
	if now.Sub(s.askedAt) >= stall/2 || len(silent) > 0 && !slices.Equal(silent, s.named) {
		s.askedAt, s.named = now, silent
		s.send(&apiv1.MemberMessage{Message: &apiv1.MemberMessage_Ask{Ask: &apiv1.Ask{Silent: silent}}})
	}
}

// silent returns the names of the peers that the tracker told of and that were asked
// long ago and have sent nothing since, or that cannot be reached; none unless nothing
// at all has come for as long. Long is one and a half times the stall timeout, and
// longer where honest peers take long: two who name one have it shut out, and on full
// lines that would be many.
func (s *session) silent(now time.Time, still time.Duration) []string {
	if s.blob == nil {
		return nil
	}
	stall := s.node.cfg.Tracker.StallTimeout.Duration()
	long := max(stall+stall/2, s.blob.Slowness(now))
	since := now.Add(-long)
	if still < long || s.blob.LastReceived().After(since) {
		return nil
	}
	var names []string
	for name, address := range s.met {
		// One that connected to us goes by its name.
		for _, p := range []string{address, name} {
			if owed := s.blob.Owed(p); !owed.IsZero() && owed.Before(since) {
				names = append(names, name)
				break
			}
		}
	}
	slices.Sort(names)
	return names
}

// accuse tells the tracker who sent pieces that do not have their hashes: what such a
// peer has announced is of no use to others either.
func (s *session) accuse() {
	if s.blob == nil || s.tracker == nil {
		return
	}
	for _, bad := range s.blob.BadSenders(s.accused) {
		s.accused++
		for name, address := range s.met {
			// One that connected to us goes by its name.
			if bad.Peer == address || bad.Peer == name {
				s.send(&apiv1.MemberMessage{Message: &apiv1.MemberMessage_BadPieces{BadPieces: &apiv1.BadPieces{
					Segment: uint32(bad.Segment), Pieces: bad.Pieces, Peers: []string{name},
				}}})
			}
		}
	}
}

// bad is called when the assembled bytes did not have the digest. The store
// has thrown away what came from the swarm. The first time it is tried again:
// the tracker, which is told, keeps those from this node that were wrong about
// the bytes, so that still one node alone asks the registry for all. The second
// time nothing of the swarm is believed about this blob any more.
func (s *session) bad(ctx context.Context) {
	s.failed = s.state.Failed
	var sources []string
	if s.blob != nil {
		sources = s.stack.names(s.blob.Stats().Sources)
	}
	own := s.blob != nil && s.blob.Stats().Downloaded == 0
	if own {
		s.log.Error("bytes from the registry do not have the digest: thrown away, here and wherever they were passed on to", "times", s.failed)
	} else {
		s.log.Error("bytes from the swarm do not have the digest: thrown away", "peers", sources, "times", s.failed)
	}
	s.send(&apiv1.MemberMessage{Message: &apiv1.MemberMessage_Bad{Bad: &apiv1.Bad{Own: own}}})
	s.ownWay = s.failed > 1 || s.blob == nil
	s.restart(ctx)
	if s.ownWay {
		s.fetch(metrics.WrongBytes)
	}
}

// retract throws away what came from others: the tracker knows it to be wrong,
// because the node that brought it into the cluster has found that. The right
// bytes are on their way as if these had never come.
func (s *session) retract(ctx context.Context) {
	s.retracted++
	s.log.Warn("bytes from the swarm were wrong, as the node that fetched them has found: thrown away", "times", s.retracted)
	s.content.Forget()
	s.state, _ = s.content.Watch()
	s.seen, s.movedAt = s.state, time.Now()
	s.ownWay = s.ownWay || s.retracted > maxRetracted
	s.restart(ctx)
}

// restart forgets all that was known of bytes that are no more.
func (s *session) restart(ctx context.Context) {
	s.shut()
	clear(s.pieces)
	clear(s.recalled)
	clear(s.peers)
	clear(s.met)
	s.accused = 0
	clear(s.announced)
	s.from, s.asLeecher = 0, 0
	s.metered.in, s.metered.out = 0, 0
	if err := s.open(ctx); err != nil {
		s.log.Warn("blob is not shared", "err", err)
	}
}

// broken says that the blob can no more be exchanged here, since its bytes cannot be
// written or read: the disk is full, perhaps. The others are not to wait for them, and a
// client that waits here hears it from its own write. Where the store has thrown away what
// was here, old torrents cannot be written either: look makes new ones.
func (s *session) broken() bool {
	if s.blob == nil || s.blob.Err() == nil {
		return false
	}
	state, _ := s.content.Watch()
	return state.Failed == s.failed && state.Present >= s.seen.Present
}

// done says that nobody needs the session any more.
func (s *session) done() bool {
	if s.state.Waiting > 0 || s.state.Writing > 0 && !s.state.Whole {
		return false
	}
	return time.Since(s.usedAt) >= s.node.cfg.Swarm.IdleTimeout.Duration()
}
