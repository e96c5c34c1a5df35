package tracker

import (
	"context"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/time/rate"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// What members can make a tracker hold. docs/security.md has the same bounds for
// operators; the bytes are what the tests of them measure, about.
const (
	// maxHeld bounds the blobs that one node registers at one tracker: those of
	// 13,000 images, in a cluster where one tracker has all of them. About 50 MiB.
	maxHeld = 1 << 17
	// maxOffered is how many of its blobs a node registers at one tracker: fewer
	// than it may, as what it has dropped and what is new may overlap.
	maxOffered = 100_000
	// maxRegistered bounds the registrations of all nodes: 10,000 nodes with 1,000
	// blobs each make 310,000 at one of 32 trackers. About 170 MiB, if no two are of
	// the same blob.
	maxRegistered = 1 << 19
	// maxRegistrants bounds the nodes that register anything: where certificates prove no
	// names, one may have any number.
	maxRegistrants = 2 * MaxMembers
	// maxMemberships bounds the blobs that one node is a member of here. A node
	// exchanges a few dozen at a time, spread over all trackers.
	maxMemberships = 2048
	// maxSegments bounds the segments of the blobs that one node is a member of
	// here: 80 blobs of 100 GiB. About 32 MiB.
	maxSegments = 1 << 17
	// MaxMembers bounds one blob's members, and maxAllMemberships those of all blobs.
	maxAllMemberships = 1 << 16
	// maxUnits bounds the segments of all blobs under way, each counted once for
	// every member and unitsOfBlob times for itself, which is what it costs. About
	// 450 MiB.
	maxUnits    = 1 << 24
	unitsOfBlob = 8

	// MaxStreams is how many streams one connection to a tracker needs at most: its
	// node's memberships, and some for what else it asks.
	MaxStreams = maxMemberships + 256
	// maxSilent bounds the streams of one node that have not said what for, over
	// however many connections, and maxAllSilent those of all. A node says it as it
	// opens them, but a tracker may be slow to read it.
	maxSilent    = MaxStreams
	maxAllSilent = 4 * maxSilent

	// A member says a few things a second of a blob, and as many at once as the blob
	// has segments; a node looks at its blob at most 200 times a second.
	messagesPerSecond = 200
	messagesAtOnce    = 1024 // and two per segment
	// A node joins a blob again once a second at most, but for a few times at once.
	joinsPerSecond = 1
	joinsAtOnce    = 32

	// maxReturns bounds the limiters of joins, of all blobs: those of some seconds' joins
	// of a whole cluster. About 60 MiB, if each is of another blob and the names are as
	// long as may be.
	maxReturns = maxAllMemberships
	// tidyFrom is the least number of them that are looked through.
	tidyFrom = 64

	// maxNamed is how many that were named are remembered, so that each is named once
	// in nameAgain.
	maxNamed  = 4096
	nameAgain = time.Hour
)

// limits are the bounds on what all streams together hold; tests have smaller ones.
type limits struct {
	held, registered            int
	registrants                 int
	memberships, allMemberships int
	segments, units             int
	silent, allSilent           int
	returns                     int
}

var bounds = limits{
	held: maxHeld, registered: maxRegistered, registrants: maxRegistrants,
	memberships: maxMemberships, allMemberships: maxAllMemberships,
	segments: maxSegments, units: maxUnits,
	silent: maxSilent, allSilent: maxAllSilent,
	returns: maxReturns,
}

// Why a node is named that asks for more than the bounds.
const (
	manyBlobs    = "it registers more blobs than a node may"
	manyJoins    = "it is a member of more blobs at once than a node may"
	manySegments = "the blobs that it is a member of have more segments than a node's may"
	manyMessages = "it sends more messages than there is to say"
	manyReturns  = "it joins the blob again and again"
	manySilent   = "it opens more streams at once than it says what for"
)

// messageLimit is how many messages a member of a blob with so many segments may send.
func messageLimit(segments int) *rate.Limiter {
	return rate.NewLimiter(messagesPerSecond, messagesAtOnce+2*segments)
}

// returns is how often each name may join each blob. A name that leaves keeps its
// limiter, or leaving would be the way around it, but not for longer than that takes to
// be as good as a new one: joinsAtOnce seconds at joinsPerSecond. Twice as many are held
// as are not, or tidyFrom, and in all no more than the bound: where more than half of
// that are in use, all begin anew. A blob's go with its last member. It is safe for
// concurrent use.
type returns struct {
	mu     sync.Mutex
	of     map[*blob]map[string]*rate.Limiter // guarded by mu
	n      int                                // limiters; guarded by mu
	tidyAt int                                // so many are looked through; guarded by mu
}

// allow says whether a node has not joined the blob again and again, and counts that it
// does now. So many limiters are held at most.
func (r *returns) allow(b *blob, name string, most int) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	l := r.of[b][name]
	if l == nil {
		if r.n >= r.tidyAt {
			r.tidyLocked(most)
		}
		if r.of[b] == nil {
			r.of[b] = map[string]*rate.Limiter{}
		}
		l = rate.NewLimiter(joinsPerSecond, joinsAtOnce)
		r.of[b][name] = l
		r.n++
	}
	return l.Allow()
}

// tidyLocked makes room. r.mu must be held.
func (r *returns) tidyLocked(most int) {
	for b, byName := range r.of {
		for name, l := range byName {
			if l.Tokens() >= joinsAtOnce {
				delete(byName, name)
				r.n--
			}
		}
		if len(byName) == 0 {
			delete(r.of, b)
		}
	}
	if r.of == nil || r.n > most/2 {
		r.of, r.n = map[*blob]map[string]*rate.Limiter{}, 0
	}
	r.tidyAt = max(min(tidyFrom, most), 2*r.n)
}

// forget drops what there is of a blob.
func (r *returns) forget(b *blob) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.n -= len(r.of[b])
	delete(r.of, b)
}

// refuse ends the stream of a member that asks for more than it may. It is counted
// each time, and named in the log the first; d is "" if it is about no blob.
func (s *Server) refuse(name string, d digest.Digest, reason string) error {
	s.o.Counter.Broke()
	if s.named.first(name, reason) {
		attrs := []any{"peer", name, "reason", reason}
		if d != "" {
			attrs = append(attrs, "digest", d)
		}
		s.o.Log.Warn("member did not do as it said", attrs...)
	}
	return status.Errorf(codes.ResourceExhausted, "%s: %s", name, reason)
}

// greet counts a stream that has yet to send its first message; spoken, which may be
// called more than once, counts it no more. It says who calls. Where certificates prove no names, one node
// may have as many such streams as all.
func (s *Server) greet(ctx context.Context) (who caller, spoken func(), err error) {
	if s.o.PeerName != nil {
		who.name, who.known = s.o.PeerName(ctx)
	}
	name := who.name
	s.mu.Lock()
	over, full := name != "" && s.silent[name] >= s.limits.silent, s.allSilent >= s.limits.allSilent
	if !over && !full {
		s.silent[name]++
		s.allSilent++
	}
	s.mu.Unlock()
	switch {
	case over:
		return who, nil, s.refuse(name, "", manySilent)
	case full:
		s.full(name, "streams")
		return who, nil, status.Error(codes.ResourceExhausted, "too many streams here")
	}
	return who, sync.OnceFunc(func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.allSilent--
		if s.silent[name]--; s.silent[name] == 0 {
			delete(s.silent, name)
		}
	}), nil
}

// full notes that a node is refused because of what all nodes have here together,
// which is not its fault.
func (s *Server) full(name, what string) {
	s.o.Counter.Full()
	if s.named.first(name, what) {
		s.o.Log.Warn("tracker holds as much as it can, member refused", "peer", name, "what", what)
	}
}

// mentions remembers who has been named for what. It is safe for concurrent use.
type mentions struct {
	mu sync.Mutex
	at map[mention]time.Time // guarded by mu
}

type mention struct{ name, reason string }

// first says whether a name has not been mentioned for this for a while, and notes it.
func (m *mentions) first(name, reason string) bool {
	now := time.Now()
	m.mu.Lock()
	defer m.mu.Unlock()
	k := mention{name, reason}
	if at, ok := m.at[k]; ok && now.Sub(at) < nameAgain {
		return false
	}
	if m.at == nil || len(m.at) >= maxNamed {
		m.at = map[mention]time.Time{} // named twice rather than held for ever
	}
	m.at[k] = now
	return true
}
