package tracker

import (
	"context"
	"maps"
	"slices"
	"time"

	"google.golang.org/grpc/connectivity"

	api "github.com/imagewolf/imagewolf/api/v1"
)

// A blob's tracker changes when one dies, leaves or comes back, and not all nodes
// learn of it at the same time: for a moment its members are at two trackers, and
// neither is to send a second one to the registry. So a member goes only where it
// is answered, and says where it leaves from that it lives on; and who has just
// become a blob's tracker waits for those who were at the one before.

const (
	// resumeGrace is how long a tracker that has just taken over waits for
	// the fetcher that its first resumed member tells it may exist.
	resumeGrace = time.Second
	// takeoverGrace is how long a tracker whose predecessor has just gone, or has
	// yet to hear of it, waits for members that come over from there.
	takeoverGrace = 500 * time.Millisecond
	// reachTime is how long a better tracker is tried before its blobs' members
	// stay where they are, until the next occasion.
	reachTime = 5 * time.Second
	// maxMovers is how many fetchers of a blob are believed that they go on elsewhere:
	// names are free where certificates are the user's own.
	maxMovers = 4 * maxFetchers
	// goodbyeTime is how long a tracker that is left may take to hear of it.
	goodbyeTime = 250 * time.Millisecond
)

// Move removes a member that goes on at another tracker. If it is a fetcher, the
// others are expected to follow it: none of them takes its place before they had
// the time for that. A second time a member is not believed. Unknown names are
// ignored.
func (m *Machine) Move(now time.Time, name string) []Command {
	x := m.members[name]
	if x == nil {
		return nil
	}
	if x.class == fetcher && !m.movers[name] && len(m.movers) < maxMovers {
		m.movers[name] = true
		m.resumeUntil = later(m.resumeUntil, now.Add(m.stall))
	}
	return m.Leave(now, name)
}

// resumes notes that a member has joined which was at another tracker before.
func (m *Machine) resumes(now time.Time) {
	if !m.resumed {
		m.resumed = true
		m.resumeUntil = later(m.resumeUntil, now.Add(resumeGrace))
	}
}

// settled is when members have come over from another tracker, a fetcher perhaps among
// them, or have left for another; the zero time if there are none to wait for.
func (m *Machine) settled(now time.Time) time.Time {
	if now.Before(m.resumeUntil) && !m.everyone() {
		return later(m.resumeUntil, m.leftUntil)
	}
	return m.leftUntil
}

// Tracks says whether this is the blob's tracker now, or another is. When it has just
// become another, the members are on their way there: none of those that are still here is
// sent to the registry before they had a stall timeout for that.
func (m *Machine) Tracks(now time.Time, here bool) []Command {
	switch {
	case here:
		m.leftUntil = time.Time{}
	case m.here:
		m.leftUntil = now.Add(m.stall)
	}
	m.here = here
	m.decide(now)
	return m.take()
}

// everyone says that all nodes of the cluster are members.
func (m *Machine) everyone() bool { return m.count != nil && len(m.list) >= m.count() }

// TrackersChanged has the blobs with members here know whether this is still their
// tracker. To be called when membership has changed, and now and then.
func (s *Server) TrackersChanged() {
	s.mu.Lock()
	all := slices.Collect(maps.Values(s.blobs))
	s.mu.Unlock()
	for _, b := range all {
		b.handle(nil, func(m *Machine, now time.Time) []Command { return m.Tracks(now, b.tracked()) })
	}
}

// tracked says whether this is the blob's tracker.
func (b *blob) tracked() bool { return b.s.o.Tracks == nil || b.s.o.Tracks(b.digest) }

// TrackersChanged has the sessions that are not at their blob's best tracker any
// more end, with ErrMoved, once that one can be reached; those whose tracker is none
// any more end in any case. To be called when membership has changed, and now and
// then: it does not wait.
func (c *Client) TrackersChanged() {
	for _, s := range c.open() {
		if best, ok := c.better(s); ok && (!c.avoided(best) || !c.tracks(s)) {
			c.reach(best)
		}
	}
}

// better returns the best tracker of a session's blob, and whether the session has
// joined at another one.
func (c *Client) better(s *Session) (Peer, bool) {
	c.mu.Lock()
	joined := s.joined
	c.mu.Unlock()
	if !joined {
		return Peer{}, false
	}
	all := c.o.Trackers(s.digest)
	if len(all) == 0 {
		return Peer{}, false
	}
	return all[0], all[0] != s.tracker
}

// reach connects to a tracker in the background and then has all sessions move
// there that are to.
func (c *Client) reach(t Peer) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed || c.reaching[t.Address] {
		return
	}
	c.reaching[t.Address] = true
	c.joins.Add(1)
	go func() {
		defer c.joins.Done()
		c.o.Contain(func() {
			reached := c.connect(t)
			for _, s := range c.open() {
				if best, ok := c.better(s); ok && (reached && best == t || !c.tracks(s)) {
					s.move()
				}
			}
		})
	}()
}

// connect waits until there is a connection to a tracker, and says whether there is.
func (c *Client) connect(t Peer) bool {
	ctx, cancel := context.WithTimeout(c.ctx, reachTime)
	defer cancel()
	reached := c.conns.await(ctx, t.Address)
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.reaching, t.Address)
	if reached {
		delete(c.failed, t.Address)
	}
	return reached
}

// tracks says whether a session's tracker is one of its blob's.
func (c *Client) tracks(s *Session) bool {
	for _, t := range c.o.Trackers(s.digest) {
		if t == s.tracker {
			return true
		}
	}
	return false
}

// await connects to addr and waits for it until ctx ends.
func (c *conns) await(ctx context.Context, addr string) bool {
	cc, release, err := c.get(ctx, addr)
	if err != nil {
		return false // the next one who asks for it is told
	}
	defer release()
	for {
		state := cc.GetState()
		switch state {
		case connectivity.Ready:
			return true
		case connectivity.Shutdown:
			return false
		case connectivity.Idle:
			cc.Connect()
		}
		if !cc.WaitForStateChange(ctx, state) {
			return false
		}
	}
}

// move ends the session with ErrMoved once the tracker knows that this is no death,
// or takes too long to.
func (s *Session) move() {
	if s.Err() != nil {
		return
	}
	s.fail(ErrMoved)
	if !s.out.put(&api.MemberMessage{Message: &api.MemberMessage_Moved{Moved: &api.Moved{}}}) {
		s.cancel()
		return
	}
	time.AfterFunc(goodbyeTime, s.cancel)
}
