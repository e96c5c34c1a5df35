package swarm

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/xtaci/smux"
)

const (
	// frameSize is how much of one peer connection goes over a trunk before it
	// is the next one's turn, in bytes. Small, so that a request does not wait
	// long behind other segments' pieces; a frame costs two goroutine switches.
	frameSize = 32<<10 - 8
	// streamBuffer is how much a peer connection may have received and not
	// read, and trunkBuffer the same for all of one trunk, in bytes.
	streamBuffer = 512 << 10
	trunkBuffer  = 16 << 20
	// maxStreams bounds the peer connections on one trunk. A node needs one per
	// segment that it has under way, of all blobs, and per segment that it is the
	// source of.
	maxStreams = 4096
	// trunkIdle is how long a trunk without peer connections is kept.
	trunkIdle = time.Minute
)

// trunkConfig is the same at both ends: version 2 is the one in which a peer
// connection that is not read does not hold up the others.
var trunkConfig = smux.Config{
	Version: 2, KeepAliveDisabled: true, // TCP's own keep-alive is on
	MaxFrameSize: frameSize, MaxReceiveBuffer: trunkBuffer, MaxStreamBuffer: streamBuffer,
}

// trunk is one authenticated connection to or from a node, and carries all peer
// connections that its dialer makes to that node. A segment has connections of
// its own, and a blob up to hundreds of segments; were each a TLS connection,
// handshakes would cost more than the bytes.
type trunk struct {
	addr  string        // "" of one that was accepted
	ready chan struct{} // closed when the fields below are set

	session *smux.Session
	conn    net.Conn
	err     error // why it could not be dialed

	used time.Time // when it last had a peer connection; guarded by Swarm.mu
}

// peerStream is one peer connection on a trunk.
type peerStream struct {
	*smux.Stream
	trunk *trunk
}

// PeerName implements peerNamer: who the trunk is with.
func (p peerStream) PeerName() string { return peerName(p.trunk.conn) }

// openStream makes a peer connection to the node at addr, over the trunk that
// there is or a new one.
func (s *Swarm) openStream(ctx context.Context, addr string) (net.Conn, error) {
	t := s.trunkTo(addr)
	select {
	case <-t.ready:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if t.err != nil {
		return nil, t.err
	}
	type opened struct {
		stream *smux.Stream
		err    error
	}
	done := make(chan opened, 1)
	s.spawn(func() { // it has no context, and waits for what is being sent
		st, err := t.session.OpenStream()
		done <- opened{st, err}
	})
	select {
	case o := <-done:
		if o.err != nil {
			s.endTrunk(t)
			return nil, fmt.Errorf("connect to %s: %w", addr, o.err)
		}
		return peerStream{o.stream, t}, nil
	case <-ctx.Done():
		s.spawn(func() {
			if o := <-done; o.err == nil {
				_ = o.stream.Close() // nobody has seen it
			}
		})
		return nil, context.Cause(ctx)
	}
}

// trunkTo returns the trunk to addr, which may not be ready yet.
func (s *Swarm) trunkTo(addr string) *trunk {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.trunks[addr]
	if t != nil {
		t.used = time.Now()
		return t
	}
	t = &trunk{addr: addr, ready: make(chan struct{}), used: time.Now()}
	if s.stopping {
		t.err = errClosed
		close(t.ready)
		return t
	}
	s.trunks[addr] = t
	s.spawnLocked(func() { s.dialTrunk(t) })
	return t
}

// dialTrunk makes a trunk ready, and keeps watch until it ends.
func (s *Swarm) dialTrunk(t *trunk) {
	ctx, cancel := context.WithTimeout(s.ctx, dialTimeout)
	defer cancel()
	t.conn, t.err = s.opts.Dial(ctx, t.addr)
	if t.err == nil {
		s.learn(peerName(t.conn), t.addr)
		if t.session, t.err = smux.Client(t.conn, &trunkConfig); t.err != nil {
			_ = t.conn.Close() // nothing was sent over it
		}
	}
	failed := t.err != nil
	close(t.ready)
	if failed {
		s.endTrunk(t)
		return
	}
	for {
		st, err := t.session.AcceptStream()
		if err != nil {
			s.endTrunk(t)
			return
		}
		_ = st.Close() // a trunk is for its dialer's connections
	}
}

// acceptTrunks takes trunks from other nodes until the listener is closed.
func (s *Swarm) acceptTrunks() {
	wait := 5 * time.Millisecond
	for {
		c, err := s.opts.Listener.Accept()
		switch {
		case err == nil:
			wait = 5 * time.Millisecond
			s.spawn(func() { s.serveTrunk(c) })
			continue
		case errors.Is(err, net.ErrClosed):
			return
		}
		s.opts.Log.Warn("peer connection not accepted", "err", err)
		select {
		case <-s.ctx.Done():
			return
		case <-time.After(wait):
			wait = min(2*wait, time.Second)
		}
	}
}

// serveTrunk hands the peer connections of a trunk to the torrent client.
func (s *Swarm) serveTrunk(c net.Conn) {
	session, err := smux.Server(c, &trunkConfig)
	if err != nil {
		s.opts.Log.Error("peer connection not served", "err", err)
		_ = c.Close() // nothing was sent over it
		return
	}
	t := &trunk{session: session, conn: c}
	s.mu.Lock()
	s.accepted[t] = struct{}{}
	stopping := s.stopping
	s.mu.Unlock()
	defer s.endTrunk(t)
	for !stopping {
		st, err := session.AcceptStream()
		if err != nil {
			return
		}
		if session.NumStreams() > maxStreams {
			s.opts.Log.Warn("a node has too many peer connections: refusing one", "peer", s.identify(c))
			_ = st.Close() // it is told so by this
			continue
		}
		f := s.newFace("", s.identify(c))
		conn := s.newConn(peerStream{st, t}, f)
		select {
		case s.incoming <- conn:
		case <-s.ctx.Done():
			_ = conn.Close() // the swarm is ending
			return
		}
	}
}

// endTrunk closes a trunk and all that goes over it.
func (s *Swarm) endTrunk(t *trunk) {
	s.mu.Lock()
	if s.trunks[t.addr] == t {
		delete(s.trunks, t.addr)
	}
	delete(s.accepted, t)
	s.mu.Unlock()
	if t.session != nil {
		_ = t.session.Close() // it may have ended by itself
	}
}

// sweepTrunks closes those that this node has dialed and has no use for.
func (s *Swarm) sweepTrunks(now time.Time) {
	var idle []*trunk
	s.mu.Lock()
	for _, t := range s.trunks {
		select {
		case <-t.ready:
		default:
			continue
		}
		switch {
		case t.session == nil: // could not be dialed, and is about to go
		case t.session.NumStreams() > 0:
			t.used = now
		case now.Sub(t.used) >= trunkIdle:
			idle = append(idle, t)
		}
	}
	s.mu.Unlock()
	for _, t := range idle {
		s.spawn(func() { s.endTrunk(t) })
	}
}

// stopTrunks closes all trunks, and waits for everything that was spawned.
func (s *Swarm) stopTrunks() {
	var all []*trunk
	s.mu.Lock()
	s.ended = true
	for _, t := range s.trunks {
		all = append(all, t)
	}
	for t := range s.accepted {
		all = append(all, t)
	}
	s.mu.Unlock()
	for _, t := range all {
		if t.addr != "" {
			<-t.ready // its dial has ended with ctx
		}
		s.endTrunk(t)
	}
	s.work.Wait()
}

// spawn runs f in a goroutine that Run waits for before it returns; when it
// waits already, f runs here and now.
func (s *Swarm) spawn(f func()) {
	s.mu.Lock()
	spawned := s.spawnLocked(f)
	s.mu.Unlock()
	if !spawned {
		f()
	}
}

// spawnLocked is spawn with mu held. It reports false if f was not run.
func (s *Swarm) spawnLocked(f func()) bool {
	if s.ended {
		return false
	}
	s.work.Go(func() { s.opts.Contain(f) })
	return true
}

// listener hands the peer connections that come in to the torrent client.
type listener struct {
	net.Listener
	s *Swarm
}

// Accept returns an error only when the swarm is ending: the client, which
// calls it, would try again without a pause.
func (l listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.s.incoming:
		return c, nil
	case <-l.s.ctx.Done():
		return nil, fmt.Errorf("accept: %w", net.ErrClosed)
	}
}
