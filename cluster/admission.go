package cluster

import (
	"context"
	"net"
	"slices"
	"sync"
	"time"
)

const (
	// goneMemory is how long a member that is gone is still let in. Where a
	// network is split, nodes that gossip takes for dead are well and connected.
	goneMemory = time.Hour
	// maxGone bounds how many of those are remembered, the latest.
	maxGone = 4096
	// introducedMemory is how long a node is let in because it has introduced
	// itself: by then gossip has told of it, or it does so again.
	introducedMemory = time.Minute
	// maxIntroduced bounds the keys that are known by that alone.
	maxIntroduced = 4096
)

// Membership says who is a member, by the fingerprint of a certificate's public
// key. *Cluster is one.
type Membership interface {
	// Admits reports whether the key is that of a member.
	Admits(key string) bool
	// Await waits until it is. It returns false when ctx ends before.
	Await(ctx context.Context, key string) bool
	// Connected is told of a member's connection, which stays its user's.
	Connected(conn net.Conn)
}

// admission knows the keys of those who are let in. The zero value knows none.
type admission struct {
	mu         sync.Mutex
	members    map[string]*holder   // guarded by mu: by name, live and gone
	holders    map[string]int       // guarded by mu: how many of members have a key
	gone       []parting            // guarded by mu: the oldest first
	introduced map[string]time.Time // guarded by mu: by key, until when
	changed    chan struct{}        // guarded by mu: closed when a key is new; nil while nobody waits
}

// holder is a node that has keys.
type holder struct {
	keys []string
	gone time.Time // when it was lost; zero while it is live
}

// parting is that a node was lost. It counts if the node has not come back.
type parting struct {
	name string
	at   time.Time
}

// set says which keys a live node has: those that it had before, and maybe in
// another life, are no longer let in.
func (a *admission) set(name string, keys []string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.members == nil {
		a.members, a.holders = map[string]*holder{}, map[string]int{}
	}
	h := a.members[name]
	if h != nil && h.gone.IsZero() && slices.Equal(h.keys, keys) {
		return
	}
	a.drop(name)
	a.members[name] = &holder{keys: slices.Clone(keys)}
	for _, k := range keys {
		a.holders[k]++
		delete(a.introduced, k)
	}
	a.publish()
}

// lose says that a node is gone.
func (a *admission) lose(name string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := time.Now()
	h := a.members[name]
	if h == nil || !h.gone.IsZero() {
		return
	}
	h.gone = now
	a.gone = append(a.gone, parting{name, now})
	a.forget(now)
}

// introduce lets keys in for a while.
func (a *admission) introduce(keys []string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := time.Now()
	for _, k := range keys {
		if a.holders[k] > 0 {
			continue
		}
		if len(a.introduced) >= maxIntroduced {
			for old, until := range a.introduced {
				if now.After(until) {
					delete(a.introduced, old)
				}
			}
		}
		if a.introduced == nil {
			a.introduced = map[string]time.Time{}
		}
		if len(a.introduced) < maxIntroduced {
			a.introduced[k] = now.Add(introducedMemory)
		}
	}
	a.publish()
}

// reset forgets everyone.
func (a *admission) reset() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.members, a.holders, a.gone, a.introduced = nil, nil, nil, nil
}

// admits reports whether a key is let in. a.mu must be held.
func (a *admission) admits(key string) bool {
	now := time.Now()
	a.forget(now)
	return a.holders[key] > 0 || now.Before(a.introduced[key])
}

// look is admits, and returns a channel that is closed when that may have
// changed.
func (a *admission) look(key string) (bool, <-chan struct{}) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.changed == nil {
		a.changed = make(chan struct{})
	}
	return a.admits(key), a.changed
}

// forget drops those who have been gone for too long, or are too many. a.mu must
// be held.
func (a *admission) forget(now time.Time) {
	for len(a.gone) > 0 && (len(a.gone) > maxGone || now.Sub(a.gone[0].at) > goneMemory) {
		p := a.gone[0]
		a.gone = a.gone[1:]
		if h := a.members[p.name]; h != nil && h.gone.Equal(p.at) {
			a.drop(p.name)
		}
	}
}

// drop forgets one node. a.mu must be held.
func (a *admission) drop(name string) {
	h := a.members[name]
	if h == nil {
		return
	}
	delete(a.members, name)
	for _, k := range h.keys {
		if a.holders[k]--; a.holders[k] == 0 {
			delete(a.holders, k)
		}
	}
}

// publish wakes those who wait. a.mu must be held.
func (a *admission) publish() {
	if a.changed != nil {
		close(a.changed)
		a.changed = nil
	}
}

// Admits implements Membership: this node itself, live members, those that were
// lost within the last hour, and those that have introduced themselves.
func (c *Cluster) Admits(key string) bool {
	ok, _ := c.admits(key)
	return ok
}

// Await implements Membership.
func (c *Cluster) Await(ctx context.Context, key string) bool {
	for {
		ok, changed := c.admits(key)
		if ok {
			return true
		}
		select {
		case <-ctx.Done():
			return false
		case <-changed:
		}
	}
}

func (c *Cluster) admits(key string) (bool, <-chan struct{}) {
	ok, changed := c.admission.look(key)
	return ok || slices.Contains(c.o.Identity.creds.keys(), key), changed
}
