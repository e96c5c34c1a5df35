package node

import (
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/imagewolf/imagewolf/cluster"
)

// officeNew is how long a tracker is new in office: by then all nodes know of the
// change of members that made it one, and have moved.
const officeNew = 2 * time.Second

// office knows which nodes tracked until a moment ago. Safe for concurrent use.
type office struct {
	mu    sync.Mutex
	terms []term // oldest first, the last is now's; guarded by mu
}

// term is a time during which the same nodes tracked.
type term struct {
	trackers []cluster.Member // none while this node was alone
	until    time.Time        // its end; not of the last
}

// note says which nodes track from now on.
func (o *office) note(now time.Time, trackers []cluster.Member) {
	if len(trackers) < 2 {
		trackers = nil // who is alone tracks for nobody else
	}
	same := func(a, b cluster.Member) bool { return a.Name == b.Name && a.Slow == b.Slow }
	o.mu.Lock()
	defer o.mu.Unlock()
	if n := len(o.terms); n == 0 {
		o.terms = []term{{until: now}} // the node has just started
	} else if slices.EqualFunc(o.terms[n-1].trackers, trackers, same) {
		return
	} else {
		o.terms[n-1].until = now
	}
	o.terms = slices.DeleteFunc(o.terms, func(t term) bool { return now.Sub(t.until) > officeNew })
	o.terms = append(o.terms, term{trackers: trackers})
}

// isNew says whether a node tracks a blob only since a moment ago, or stands in for
// another that does.
func (o *office) isNew(now time.Time, d digest.Digest, name string) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	for i, t := range o.terms {
		if i < len(o.terms)-1 && now.Sub(t.until) > officeNew {
			continue
		}
		if first, ok := cluster.TrackerOf(d, t.trackers); !ok || first.Name != name {
			return true
		}
	}
	return false
}
