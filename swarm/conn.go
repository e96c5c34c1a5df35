package swarm

import (
	"context"
	"errors"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

const (
	// throttleStep is the most bytes that one read or write takes out of a
	// limit at once.
	throttleStep = 64 << 10
	// freeBytes is how many bytes of each direction of a connection pass a
	// limit uncharged, so that a limit that is used up fails no handshake.
	freeBytes = 1 << 10
	// minDialRetry and maxDialRetry bound how long an address that could not
	// be reached is left alone, for all segments together.
	minDialRetry = 200 * time.Millisecond
	maxDialRetry = 2 * time.Second
	// maxDialFailures is how many unreachable addresses are remembered.
	maxDialFailures = 1024
)

// newLimiter returns a limit of n bytes per second, nil for none.
func newLimiter(n int64) *rate.Limiter {
	if n <= 0 {
		return nil
	}
	return rate.NewLimiter(rate.Limit(n), max(int(min(n/20, 16<<20)), 2*throttleStep))
}

// conn is a peer connection as the torrent client gets it. The limits are kept
// here rather than in the client: there a used-up download limit keeps all
// torrents, also those that only seed, from taking new connections.
type conn struct {
	net.Conn
	swarm *Swarm
	face  *face

	ctx    context.Context // ends with Close, to wake what waits for a limit
	cancel context.CancelFunc
	once   sync.Once

	read, written int64 // uncharged so far; each is used by one goroutine at a time
}

func (s *Swarm) newConn(c net.Conn, f *face) *conn {
	w := &conn{Conn: c, swarm: s, face: f}
	w.ctx, w.cancel = context.WithCancel(context.Background())
	if f.addr == "" { // it came in: its face is nobody else's
		f.conn = w // before the swarm, which may be ending, can close it
	}
	s.mu.Lock()
	s.conns[w] = struct{}{}
	stopping := s.stopping
	s.mu.Unlock()
	if stopping {
		_ = w.Close()
	}
	return w
}

// RemoteAddr returns the made-up address of the peer.
func (c *conn) RemoteAddr() net.Addr { return c.face }

// Read charges what it has read, so that the next read comes later.
func (c *conn) Read(p []byte) (int, error) {
	limit := c.swarm.download
	if limit == nil {
		return c.Conn.Read(p)
	}
	n, err := c.Conn.Read(p[:min(len(p), throttleStep)])
	if c.read < freeBytes {
		c.read += int64(n)
		return n, err
	}
	if werr := limit.WaitN(c.ctx, n); werr != nil && err == nil {
		err = net.ErrClosed
	}
	return n, err
}

// Write waits for the upload limit. After Close nothing is sent any more.
func (c *conn) Write(p []byte) (n int, err error) {
	if c.ctx.Err() != nil {
		return 0, net.ErrClosed
	}
	limit := c.swarm.upload
	if limit == nil {
		return c.Conn.Write(p)
	}
	for n < len(p) && err == nil {
		step := p[n:min(len(p), n+throttleStep)]
		if c.written < freeBytes {
			c.written += int64(len(step))
		} else if limit.WaitN(c.ctx, len(step)) != nil {
			return n, net.ErrClosed
		}
		var m int
		m, err = c.Conn.Write(step)
		n += m
	}
	return n, err
}

// SetDeadline never fails: the client panics if it does, which a connection
// that is being closed at the same time would make it do.
func (c *conn) SetDeadline(t time.Time) error {
	_ = c.Conn.SetDeadline(t) // a closed connection fails at the next read
	return nil
}

// Close closes the connection. It may be called more than once, and does not
// wait: the client calls it with its lock held, and the goodbye stands in line
// behind what is being sent.
func (c *conn) Close() error {
	err := net.ErrClosed
	c.once.Do(func() {
		err = nil
		c.cancel()
		if c.face.conn == c {
			c.face.gone.Store(true)
		}
		c.swarm.mu.Lock()
		delete(c.swarm.conns, c)
		c.swarm.mu.Unlock()
		c.swarm.spawn(func() { _ = c.Conn.Close() }) // a trunk that is gone tells nobody
	})
	return err
}

// hangUp closes all connections over which the blob is exchanged. It does not
// need the client, so it may be called from its callbacks; a connection's
// requests are answered only after it is known whose it is.
func (s *Swarm) hangUp(b *Blob) {
	var conns []*conn
	s.mu.Lock()
	for c := range s.conns {
		if c.face.blob.Load() == b {
			conns = append(conns, c)
		}
	}
	s.mu.Unlock()
	for _, c := range conns {
		_ = c.Close() // nobody is left to be told
	}
}

// deadConn is what a dial that failed returns. A dial error would make the
// client remember the address for ever, to reach it through other peers.
type deadConn struct {
	face *face
	err  error
}

func (c deadConn) Read([]byte) (int, error)         { return 0, c.err }
func (c deadConn) Write([]byte) (int, error)        { return 0, c.err }
func (c deadConn) Close() error                     { return nil }
func (c deadConn) LocalAddr() net.Addr              { return &net.TCPAddr{} }
func (c deadConn) RemoteAddr() net.Addr             { return c.face }
func (c deadConn) SetDeadline(time.Time) error      { return nil }
func (c deadConn) SetReadDeadline(time.Time) error  { return nil }
func (c deadConn) SetWriteDeadline(time.Time) error { return nil }

var errNotPeer = errors.New("not a peer that was handed in")

// dialer dials faces for the torrent client.
type dialer struct{ s *Swarm }

// DialerNetwork implements the client's dialer.
func (dialer) DialerNetwork() string { return "tcp" }

// Dial connects to the peer behind a face, and to nothing else: an address
// that was not handed in is not dialed whatever the client has heard of it.
func (d dialer) Dial(ctx context.Context, text string) (net.Conn, error) {
	s := d.s
	f := s.faceAt(text)
	if f == nil || f.addr == "" {
		return deadConn{&face{text: text}, errNotPeer}, nil
	}
	if !s.mayDial(f.addr, time.Now()) {
		return deadConn{f, os.ErrDeadlineExceeded}, nil
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(s.ctx, cancel)()
	c, err := s.openStream(ctx, f.addr)
	s.dialed(f.addr, err, time.Now())
	if err != nil {
		s.opts.Log.Debug("peer not reached", "address", f.addr, "err", err)
		return deadConn{f, err}, nil
	}
	return s.newConn(c, f), nil
}

// unreachable is an address that could not be dialed.
type unreachable struct {
	wait  time.Duration
	until time.Time
	since time.Time // when it could not be dialed first
}

// mayDial reports whether it is time to dial addr (again).
func (s *Swarm) mayDial(addr string, now time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	u, ok := s.unreachable[addr]
	return !ok || !now.Before(u.until)
}

// dialed notes how a dial ended.
func (s *Swarm) dialed(addr string, err error, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err == nil {
		delete(s.unreachable, addr)
		return
	}
	u := s.unreachable[addr]
	if u.since.IsZero() {
		u.since = now
	}
	u.wait = min(max(2*u.wait, minDialRetry), maxDialRetry)
	u.until = now.Add(u.wait)
	if len(s.unreachable) >= maxDialFailures {
		clear(s.unreachable) // costs a dial each, no more
	}
	s.unreachable[addr] = u
}
