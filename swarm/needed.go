package swarm

import (
	"maps"
	"slices"
	"time"
)

const (
	// interest is how long after peers were told of something, connected or took
	// something they are taken to want more of a blob.
	interest = time.Second
	// arriving is how long what was read for a peer may be on its way.
	arriving = 300 * time.Millisecond
)

// Needed says whether peers want something of which this node is not known to have
// given one copy away, or are about to have it: what it fetched a moment ago would be
// lost with it. It takes the torrent client's lock, and is for a node that stops.
func (s *Swarm) Needed(now time.Time) bool {
	s.mu.Lock()
	blobs := slices.Collect(maps.Values(s.blobs))
	s.mu.Unlock()
	return slices.ContainsFunc(blobs, func(b *Blob) bool { return b.needed(now) })
}

func (b *Blob) needed(now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	var sent int64
	last, only := b.offered.Load(), false
	for _, s := range b.segs {
		if !s.t.Complete().Bool() {
			continue
		}
		sent = max(sent, s.sent.Load())
		last = max(last, s.joined.Load())
		only = only || !s.elsewhere()
	}
	within := func(n int64, d time.Duration) bool { return n > 0 && now.Sub(atStart(n)) < d }
	return only && within(max(last, sent), interest) || within(sent, arriving)
}

// elsewhere reports whether the segment, which is whole here, is not only here: it came
// from peers, or as much as there is of each piece was read for them. blob.mu must be
// held.
func (s *segment) elsewhere() bool {
	s.blob.acct.Lock()
	from := len(s.came)
	s.blob.acct.Unlock()
	if from == len(s.read) {
		return true
	}
	for i := range s.read {
		if s.read[i].Load() < s.t.Piece(i).Info().Length() {
			return false
		}
	}
	return true
}
