package swarm

import (
	"time"

	"github.com/anacrolix/torrent"
)

const (
	// late is after how long without a byte a peer that was asked is left out for a
	// while, if a segment stands still and others have what is missing. The client
	// asks one peer at a time for each chunk, and waits.
	late = 3 * time.Second
	// maxLate bounds that time where peers are known to take long: their lines are
	// full, and what they were asked for is under way. Asked of others, it would come
	// twice, over the same lines.
	maxLate = 12 * time.Second
	// gapFor is how long it is remembered how long they took.
	gapFor = 10 * time.Second
)

// took notes how long a peer that was asked has sent nothing before it did. acct
// must be held.
func (b *Blob) took(gap time.Duration, now time.Time) {
	if gap >= b.gap || now.Sub(b.gapAt) > gapFor {
		b.gap, b.gapAt = gap, now
	}
}

// lateness is after how long without a byte a peer that was asked for some of a
// segment is late: twice what others took lately, and as long as can be while the
// segment gets bytes from others. acct must be held.
func (b *Blob) lateness(s *segment, now time.Time) time.Duration {
	d := max(late, b.slowness(now))
	if now.Sub(s.moved) < d {
		return maxLate
	}
	return d
}

// slowness is twice the longest that a peer took lately, and zero if none did. acct
// must be held.
func (b *Blob) slowness(now time.Time) time.Duration {
	if now.Sub(b.gapAt) > gapFor {
		return 0
	}
	return min(2*b.gap, maxLate)
}

// Slowness is after how long without a byte a peer that was asked is out of the
// ordinary: twice the longest that any took in the last ten seconds, but at most 12 s;
// zero if none is known to have taken any time. It may be called often.
func (b *Blob) Slowness(now time.Time) time.Duration {
	b.acct.Lock()
	defer b.acct.Unlock()
	return b.slowness(now)
}

// asked is called with the client locked, for every request that is sent.
func (s *Swarm) asked(e torrent.PeerRequestEvent) { owe(e.Peer, 1) }

// settled is called with the client locked, for every request that is answered
// or taken back.
func (s *Swarm) settled(e torrent.PeerRequestEvent) { owe(e.Peer, -1) }

// owe counts the requests that a peer has not answered.
func owe(p *torrent.Peer, n int) {
	f, _ := p.RemoteAddr.(*face)
	if f == nil {
		return
	}
	b := f.blob.Load()
	if b == nil {
		return
	}
	now := time.Now()
	b.acct.Lock()
	defer b.acct.Unlock()
	a := b.account(f.peer)
	if a.owed == 0 {
		a.since = now
	}
	a.owed += n
}

// Owed is since when a peer, named as in Stats, owes bytes of the blob: it was
// asked and has sent none since, or it cannot be reached. The zero time if it
// owes nothing. It may be called often.
func (b *Blob) Owed(peer string) time.Time {
	b.acct.Lock()
	a := b.accounts[peer]
	var since time.Time
	if a != nil && a.owed > 0 {
		since = a.since
	}
	b.acct.Unlock()
	if since.IsZero() {
		b.swarm.mu.Lock()
		since = b.swarm.unreachable[peer].since
		b.swarm.mu.Unlock()
	}
	return since
}

// overdue says whether a peer has owed bytes for as long as the patience, or for a second
// if it was left out for that before and has not sent a byte since: it would hold up one
// segment after the other.
func (b *Blob) overdue(peer string, patience time.Duration, now time.Time) bool {
	since := b.Owed(peer)
	b.acct.Lock()
	defer b.acct.Unlock()
	if a := b.accounts[peer]; a != nil && a.silent {
		patience = min(patience, isolation)
	}
	return !since.IsZero() && now.Sub(since) >= patience
}

// dismiss leaves out for a while the peers of an incomplete segment that have been
// asked and send nothing, if one that is connected has what is missing: sooner if the
// segment stands still. b.mu must be held.
func (b *Blob) dismiss(s *segment, now time.Time) {
	b.acct.Lock()
	patience := b.lateness(s, now)
	b.acct.Unlock()
	var silent []string
	able := false
	for _, c := range s.t.PeerConns() {
		f, ok := c.RemoteAddr.(*face)
		if !ok {
			continue
		}
		if b.overdue(f.peer, patience, now) {
			silent = append(silent, f.peer)
			continue
		}
		have := c.PeerPieces()
		for i := 0; i < s.t.NumPieces() && !able; i++ {
			able = have.Contains(uint32(i)) && !s.t.Piece(i).State().Complete
		}
	}
	if !able || len(silent) == 0 {
		return
	}
	b.acct.Lock()
	for _, p := range silent {
		a := b.account(p)
		a.until, a.silent = now.Add(isolation), true
		b.kicked[p] = struct{}{}
	}
	b.acct.Unlock()
	b.swarm.opts.Log.Debug("peers left out: they send nothing", "digest", b.digest, "segment", s.index, "peers", silent)
	b.poke()
}
