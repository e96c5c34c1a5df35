package swarm

import (
	"bytes"
	"crypto/sha1"
	"io"
	"maps"
	"slices"
	"time"

	"github.com/anacrolix/torrent"
)

const (
	// isolation is how long a peer is left out of a blob after it sent part of
	// a piece that was bad, when others had sent parts of it too.
	isolation = time.Second
	// maxBad is how many bad pieces a peer may have had a part in, beyond the
	// good ones, before it is banned whoever else had a part in them.
	maxBad = 8
	// maxSenders is how many bad pieces of a blob it is remembered who sent them.
	maxSenders = 64
	// settling is after how long a connection has become the client's, however busy
	// that is, and says what its peer has.
	settling = 3 * time.Second
)

// account is what is known of one peer's doings in one blob.
type account struct {
	bytes     int64
	owed      int       // requests that it has not answered
	since     time.Time // when it last sent something, or was asked when it owed nothing
	good, bad int       // pieces it had a part in
	until     time.Time // left out before that
	silent    bool      // left out since it sent nothing, and has sent nothing after that
	banned    bool
}

// account returns the peer's account. b.acct must be held.
func (b *Blob) account(peer string) *account {
	a := b.accounts[peer]
	if a == nil {
		a = &account{}
		b.accounts[peer] = a
	}
	return a
}

// refuses reports whether nothing is to be exchanged with the peer now.
func (b *Blob) refuses(peer string, now time.Time) bool {
	b.acct.Lock()
	defer b.acct.Unlock()
	a := b.accounts[peer]
	return a != nil && (a.banned || now.Before(a.until))
}

// BadSender is a peer that sent all of a piece which does not have its hash: nothing of it
// was here from elsewhere.
type BadSender struct {
	Peer    string // named as in Stats
	Segment int
	Pieces  []byte // the segment's piece hashes; not to be changed
}

// BadSenders returns all but the first n that there have been since Open. It may be
// called very often.
func (b *Blob) BadSenders(n int) []BadSender {
	b.acct.Lock()
	defer b.acct.Unlock()
	return slices.Clone(b.bad[min(n, len(b.bad)):])
}

// ban excludes the peer from this blob for good.
func (b *Blob) ban(peer, why string) {
	b.acct.Lock()
	a := b.account(peer)
	first := !a.banned
	a.banned = true
	b.kicked[peer] = struct{}{}
	b.acct.Unlock()
	if first {
		b.swarm.opts.Counter.ShutOut()
		b.swarm.opts.Log.Warn("peer banned from blob", "digest", b.digest, "peer", peer, "reason", why)
	}
	b.poke()
}

// received notes a chunk that came from the peer. The client is locked.
func (s *segment) received(peer string, piece, n int) {
	b := s.blob
	now := time.Now()
	b.downloaded.Add(int64(n))
	b.swarm.opts.Counter.Received(n)
	b.lastReceived.Store(sinceStart(now))
	b.touch()
	b.acct.Lock()
	defer b.acct.Unlock()
	s.moved = now
	a := b.account(peer)
	if !a.since.IsZero() && a.good > 0 {
		b.took(now.Sub(a.since), now)
	}
	a.bytes, a.since, a.silent = a.bytes+int64(n), now, false
	from := s.senders[piece]
	if from == nil {
		from = map[string]struct{}{}
		s.senders[piece] = from
	}
	from[peer] = struct{}{}
}

// passed notes that a piece was good.
func (s *segment) passed(piece int) {
	b := s.blob
	b.acct.Lock()
	defer b.acct.Unlock()
	s.good[piece], s.came[piece] = struct{}{}, struct{}{}
	for p := range s.senders[piece] {
		b.account(p).good++
	}
	delete(s.senders, piece)
	if len(s.good) == b.layout.Pieces(s.index) {
		b.poke() // there is room for one more segment
	}
}

// unread notes that a piece could not be read to be checked, which is no
// peer's fault.
func (s *segment) unread(piece int) {
	s.blob.acct.Lock()
	defer s.blob.acct.Unlock()
	s.broken[piece] = struct{}{}
}

// failed notes that a piece was bad. A peer that sent all of it is banned. Of
// several, one is to blame, but not known which: chunks of a
// good and a bad peer could be mixed for ever. So all but the one with the
// best record are left out for a while: either the piece is good then, and the
// client finds out and bans who had sent something else, or it is bad, and the
// one is banned. Pieces in which they were mixed before one was left out say
// nothing new, and there may be dozens of them. If one is banned already, it is
// the one, and the others are innocent. If some of the piece was here from elsewhere,
// that may be what is wrong, or the hashes may be: nobody is to blame, and who sent the
// rest is left out for a while, so that it is not sent over and over.
func (s *segment) failed(piece int, now time.Time) {
	b := s.blob
	mixed := s.begunElsewhere(piece)
	b.acct.Lock()
	defer b.acct.Unlock()
	from := slices.Collect(maps.Keys(s.senders[piece]))
	delete(s.senders, piece)
	if _, ok := s.broken[piece]; ok {
		delete(s.broken, piece)
		return
	}
	best := ""
	record := func(p string) int { a := b.account(p); return a.good - a.bad }
	stale := slices.ContainsFunc(from, func(p string) bool { return b.account(p).banned || now.Before(b.account(p).until) })
	for _, p := range from {
		if best == "" || record(p) > record(best) {
			best = p
		}
	}
	for _, p := range from {
		a := b.account(p)
		if mixed {
			a.until = now.Add(isolation)
			b.kicked[p] = struct{}{}
			continue
		}
		if len(from) > 1 && stale {
			continue
		}
		a.bad++
		if len(from) == 1 && len(b.bad) < maxSenders {
			b.bad = append(b.bad, BadSender{p, s.index, s.pieces})
		}
		switch {
		case len(from) == 1 || a.bad-a.good >= maxBad:
			if !a.banned {
				b.swarm.opts.Counter.ShutOut()
			}
			a.banned = true
			b.swarm.opts.Log.Warn("peer banned from blob", "digest", b.digest, "peer", p, "reason", "it sent a bad piece")
		case p != best:
			a.until = now.Add(isolation)
		default:
			continue
		}
		b.kicked[p] = struct{}{}
	}
	b.swarm.opts.Log.Warn("piece from peers was bad", "digest", b.digest, "segment", s.index, "piece", piece, "peers", from, "partly_own", mixed)
	b.poke()
}

// begunElsewhere reports whether bytes of a piece that is not complete are here: they
// came from the registry, up to or from somewhere in the piece. It looks at the ends of
// chunks, beyond which such bytes cannot lie.
func (s *segment) begunElsewhere(piece int) bool {
	b := s.blob
	off := s.off + int64(piece)*b.layout.PieceSize
	end := min(off+b.layout.PieceSize, s.off+s.n)
	for chunk := b.layout.ChunkSize(); off < end; off += chunk {
		if b.present(off, 1) || b.present(min(off+chunk, end)-1, 1) {
			return true
		}
	}
	return false
}

// keep hands the peers of incomplete segments in again, for the client forgets
// a peer that could not be reached or did not have the torrent yet, and does
// what callbacks must not: everything that takes the client's lock.
func (b *Blob) keep() {
	tick := time.NewTicker(pace)
	defer tick.Stop()
	for {
		due := tick.C
		if !b.look(time.Now()) {
			due = nil // nothing to hand in until somebody asks for more
		}
		select {
		case <-b.ctx.Done():
			return
		case <-b.wake:
		case <-due:
		}
	}
}

// look does what is to be done now, and reports whether there will be more:
// a segment is incomplete, or has connections that may be of no more use.
func (b *Blob) look(now time.Time) (more bool) {
	b.refresh()
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return false
	}
	if b.Err() != nil {
		for _, s := range maps.Clone(b.segs) {
			b.drop(s)
		}
		return false
	}
	b.kick()
	room := b.limit - b.underWay(now)
	// In the same order on all nodes: they pass on to each other what they are
	// downloading, and one source is not asked for everything at once.
	for _, i := range slices.Sorted(maps.Keys(b.segs)) {
		s := b.segs[i]
		if s.t.Complete().Bool() {
			more = b.part(s, now) || more
			continue
		}
		more = true
		b.dismiss(s, now)
		b.rouseIdle(s, now)
		begun := !s.begun.IsZero()
		if !b.begin(s, now, room) {
			continue
		}
		if b.handIn(s, now); !begun {
			room--
		}
	}
	return more
}

// begin reports whether the segment's peers are to be handed in, which it is not
// for long if there is no room for one more segment. b.mu must be held.
func (b *Blob) begin(s *segment, now time.Time, room int) bool {
	if s.begun.IsZero() && len(s.peers) > 0 && room > 0 {
		s.begun = now
	}
	return !s.begun.IsZero()
}

// underWay counts the segments that peers are sending. b.mu must be held.
func (b *Blob) underWay(now time.Time) (n int) {
	for _, s := range b.segs {
		if s.begun.IsZero() || s.t.Complete().Bool() {
			continue
		}
		b.acct.Lock()
		last := s.moved
		b.acct.Unlock()
		if now.Sub(last) < stalled || now.Sub(s.begun) < stalled {
			n++
		}
	}
	return n
}

// part closes the connections of a segment that is whole here with peers that
// have it whole as well, rouses the others if none has got a byte for a while, and
// reports whether there are others, or may be in a moment. The client itself leaves
// most of them open, and each costs as much as a busy one. b.mu must be held.
func (b *Blob) part(s *segment, now time.Time) (more bool) {
	more = now.Sub(atStart(s.joined.Load())) < settling
	if s.parted && !more {
		return false
	}
	idle := s.due(atStart(s.sent.Load()), now, 2*rousing)
	n := uint64(s.t.NumPieces())
	for _, c := range s.t.PeerConns() {
		if c.PeerPieces().GetCardinality() == n {
			_ = c.Close() // returns nothing but nil
			continue
		}
		more = true
		if idle {
			rouse(c)
		}
	}
	// A peer that completes it later closes the connection on its side.
	s.parted = !more
	return more
}

// refresh tells the client of pieces that have arrived from elsewhere, and drops a
// segment's torrent if one that the registry sends does not have its hash: the hashes that
// this node was told are wrong, or its bytes are, and neither is to go on by the other.
// Reading and hashing may take long, so b.mu is not held meanwhile.
func (b *Blob) refresh() {
	type arrival struct {
		s     *segment
		piece int
	}
	var arrived []arrival
	b.mu.Lock()
	if !b.closed && b.Err() == nil {
		for _, i := range slices.Sorted(maps.Keys(b.segs)) {
			for _, piece := range b.arrived(b.segs[i]) {
				arrived = append(arrived, arrival{b.segs[i], piece})
			}
		}
	}
	b.mu.Unlock()
	var wrong *segment
	for _, a := range arrived {
		if a.s == wrong {
			continue
		}
		right, err := b.right(a.s, a.piece)
		if err != nil {
			return // it is being closed, or whoever reads next says so
		}
		if !right {
			wrong = a.s
		}
		b.mu.Lock()
		if b.segs[a.s.index] == a.s { // nobody has dropped it meanwhile
			b.settle(a.s, a.piece, right)
		}
		b.mu.Unlock()
	}
}

// arrived returns the pieces of a segment that are here and that the client does not know
// of. b.mu must be held.
func (b *Blob) arrived(s *segment) (pieces []int) {
	if s.t.Complete().Bool() {
		return nil
	}
	for i := range s.t.NumPieces() {
		if st := s.t.Piece(i).State(); st.Complete || st.Hashing || st.QueuedForHash || st.Marking {
			continue
		}
		if off := int64(i) * b.layout.PieceSize; b.present(s.off+off, min(b.layout.PieceSize, s.n-off)) {
			pieces = append(pieces, i)
		}
	}
	return pieces
}

// right reports whether a piece that is here has its hash. b.mu need not be held.
func (b *Blob) right(s *segment, piece int) (bool, error) {
	off := int64(piece) * b.layout.PieceSize
	buf := getBuffer()
	defer putBuffer(buf)
	h := sha1.New()
	src := io.NewSectionReader(gatedReader{b}, s.off+off, min(b.layout.PieceSize, s.n-off))
	_, err := io.CopyBuffer(struct{ io.Writer }{h}, struct{ io.Reader }{src}, *buf)
	return bytes.Equal(h.Sum(nil), s.pieces[piece*sha1.Size:(piece+1)*sha1.Size]), err
}

// settle tells the client of a piece that has arrived, or drops the torrent if the piece
// is not right and more of the registry's bytes are to come. b.mu must be held, and the
// torrent be there.
func (b *Blob) settle(s *segment, piece int, right bool) {
	if !right {
		b.swarm.opts.Log.Warn("bytes of the registry do not have the hash that the tracker told", "digest", b.digest, "segment", s.index, "piece", piece)
	}
	switch {
	case right:
		b.acct.Lock()
		s.good[piece] = struct{}{}
		b.acct.Unlock()
	case b.fetching:
		b.refuted[s.index] = s
		b.drop(s)
		return
	}
	s.t.Piece(piece).UpdateCompletion()
}

// handIn gives the segment's peers to the client, which connects to those it
// is not connected to. b.mu must be held.
func (b *Blob) handIn(s *segment, now time.Time) {
	if s.t.Complete().Bool() {
		return
	}
	connected := map[string]struct{}{}
	for _, c := range s.t.PeerConns() {
		if f, ok := c.RemoteAddr.(*face); ok {
			connected[f.peer] = struct{}{}
		}
	}
	infos := make([]torrent.PeerInfo, 0, len(s.peers))
	for _, p := range s.peers {
		if _, ok := connected[p]; ok || b.refuses(p, now) {
			continue
		}
		f := b.faces[p]
		if f == nil {
			f = b.swarm.newFace(p, p)
			f.blob.Store(b)
			b.faces[p] = f
		}
		infos = append(infos, torrent.PeerInfo{Addr: f, Source: torrent.PeerSourceDirect})
	}
	if len(infos) > 0 {
		s.t.AddPeers(infos)
	}
}

// kick closes the connections with peers that were banned or left out. b.mu
// must be held.
func (b *Blob) kick() {
	b.acct.Lock()
	kicked := b.kicked
	b.kicked = map[string]struct{}{}
	b.acct.Unlock()
	if len(kicked) == 0 {
		return
	}
	for _, s := range b.segs {
		for _, c := range s.t.PeerConns() {
			f, ok := c.RemoteAddr.(*face)
			if !ok {
				continue
			}
			if _, out := kicked[f.peer]; out {
				_ = c.Close() // returns nothing but nil
			}
		}
	}
}
