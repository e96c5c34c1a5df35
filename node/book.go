package node

import (
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

// book keeps which blobs this node asked for, in which order, and which of
// them it fetches. Trackers of different blobs know nothing of each other;
// with what the book says they spread the layers of one image over the nodes.
type book struct {
	mu      sync.Mutex
	next    uint64                       // guarded by mu
	entries map[digest.Digest]*bookEntry // guarded by mu
}

type bookEntry struct {
	order    uint64
	decided  bool // a tracker has answered
	fetching bool
	users    int
	moved    time.Time // when a new byte last came
	sent     time.Time // when bytes were last sent to others
}

// busyFor is how long after a byte of another blob, or one that a peer sent, a
// node counts as busy.
const busyFor = 3 * time.Second

// busyWaits is how many times as long a node waits for a blob of which nothing comes
// while bytes of others do.
const busyWaits = 2

func newBook() *book { return &book{entries: map[digest.Digest]*bookEntry{}} }

func (b *book) enter(d digest.Digest) {
	b.mu.Lock()
	defer b.mu.Unlock()
	e := b.entries[d]
	if e == nil {
		b.next++
		e = &bookEntry{order: b.next}
		b.entries[d] = e
	}
	e.users++
}

func (b *book) leave(d digest.Digest) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if e := b.entries[d]; e != nil {
		if e.users--; e.users == 0 {
			delete(b.entries, d)
		}
	}
}

func (b *book) decided(d digest.Digest) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if e := b.entries[d]; e != nil {
		e.decided = true
	}
}

func (b *book) fetching(d digest.Digest, yes bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if e := b.entries[d]; e != nil {
		e.fetching = yes
	}
}

// moved notes that a new byte of a blob came.
func (b *book) moved(d digest.Digest, now time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if e := b.entries[d]; e != nil {
		e.moved = now
	}
}

// busy says whether bytes of other blobs are coming in.
func (b *book) busy(d digest.Digest, now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	for other, e := range b.entries {
		if other != d && now.Sub(e.moved) < busyFor {
			return true
		}
	}
	return false
}

// sending notes that bytes of a blob were sent to others.
func (b *book) sending(d digest.Digest, now time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if e := b.entries[d]; e != nil {
		e.sent = now
	}
}

// sends returns how many other blobs are being sent to others.
func (b *book) sends(d digest.Digest, now time.Time) (n uint32) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for other, e := range b.entries {
		if other != d && now.Sub(e.sent) < busyFor {
			n++
		}
	}
	return n
}

// standing returns how many other blobs the node fetches now (load), and how
// many it asked for before this one that are still undecided or fetched (rank).
func (b *book) standing(d digest.Digest) (load, rank uint32) {
	b.mu.Lock()
	defer b.mu.Unlock()
	self := b.entries[d]
	for other, e := range b.entries {
		if other == d {
			continue
		}
		if e.fetching {
			load++
		}
		if self != nil && e.order < self.order && (e.fetching || !e.decided) {
			rank++
		}
	}
	return load, rank
}
