package cluster

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

const (
	handshakeTimeout = 5 * time.Second
	// portQueue is how many connections wait for a consumer to accept them.
	portQueue = 256
	// admitTimeout is how long one that has a certificate of the cluster may
	// wait to be known as a member: gossip of a node that has just started may
	// come later than the node itself.
	admitTimeout = 2 * time.Second
	// maxWaiting bounds those who wait for that.
	maxWaiting = maxHandshakes / 2
)

// DataPort lets members in at one port and hands their connections to the
// protocol that they asked for. The TLS handshake is done by then: every
// connection that Accept returns is a *tls.Conn from a member. A certificate of
// the cluster does not make one a member: Membership does.
type DataPort struct {
	listener net.Listener
	identity *Identity
	members  Membership
	log      *slog.Logger
	shakes   handshakes
	waiting  chan struct{} // one per peer that is not known as a member yet
	patience time.Duration // for one handshake
	grace    time.Duration // for a peer to become known
	grpc     *portListener
	torrent  *portListener
	refused  rate.Sometimes // keeps strangers from filling the log
	full     rate.Sometimes
	places   places
	contain  func(work func()) // see Contain
}

// NewDataPort takes over l once Run is called; until then it is the caller's
// to close. It starts nothing.
func NewDataPort(l net.Listener, id *Identity, members Membership, log *slog.Logger) *DataPort {
	return &DataPort{
		listener: l, identity: id, members: members, log: log,
		shakes:   handshakes{max: maxHandshakes},
		waiting:  make(chan struct{}, maxWaiting),
		patience: handshakeTimeout,
		grace:    admitTimeout,
		grpc:     newPortListener(l.Addr()),
		torrent:  newPortListener(l.Addr()),
		refused:  rate.Sometimes{First: 3, Interval: 10 * time.Second},
		full:     rate.Sometimes{First: 3, Interval: 10 * time.Second},
		places:   places{max: maxConns},
		contain:  func(work func()) { work() },
	}
}

// GRPC has the connections that are for gRPC. Its Accept ends with
// net.ErrClosed when it or the port is closed.
func (p *DataPort) GRPC() net.Listener { return p.grpc }

// BitTorrent has the peer connections; see GRPC.
func (p *DataPort) BitTorrent() net.Listener { return p.torrent }

// Contain has f run what a goroutine with a connection does, and keep its panic from
// ending the process: the connection is closed. It is to be called before Run.
func (p *DataPort) Contain(f func(work func())) { p.contain = f }

// Run accepts connections until ctx ends, which is no error. It closes the
// port, both listeners, and every connection that nobody has accepted yet;
// those accepted belong to who accepted them.
func (p *DataPort) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var shaking sync.WaitGroup
	defer p.closeQueues()
	defer shaking.Wait()
	defer cancel()
	// Closing it again when accepting failed by itself does no harm.
	closed := context.AfterFunc(ctx, func() { _ = p.listener.Close() })
	defer closed()

	var pause time.Duration
	for {
		conn, err := p.listener.Accept()
		switch {
		case err == nil:
			pause = 0
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("data port: %w", err)
		default: // out of file descriptors, most likely: it will pass
			pause = min(max(2*pause, 5*time.Millisecond), time.Second)
			p.log.Warn("data port cannot accept", "err", err, "retry", pause)
			select {
			case <-ctx.Done():
			case <-time.After(pause):
			}
			continue
		}
		proved, crowded := p.shakes.begin(conn)
		if crowded {
			p.full.Do(func() {
				p.log.Warn("data port: too many handshakes at once, the oldest of who has the most is dropped", "remote", conn.RemoteAddr())
			})
		}
		shaking.Go(func() {
			defer proved()
			admitted := false
			p.contain(func() { p.admit(ctx, conn, proved); admitted = true })
			if !admitted {
				_ = conn.Close()
			}
		})
	}
}

// admit checks who is there, calls proved once that is clear, and hands the connection on.
func (p *DataPort) admit(ctx context.Context, tcp net.Conn, proved func()) {
	Tune(tcp, deadAfter)
	raw := &placedConn{Conn: tcp}
	conn := tls.Server(raw, p.identity.ServerTLS(ProtoGRPC, ProtoBitTorrent))
	shake, cancel := context.WithTimeout(ctx, p.patience)
	defer cancel()
	if err := conn.HandshakeContext(shake); err != nil {
		_ = raw.Close()
		if ctx.Err() == nil && !errors.Is(err, io.EOF) { // a mere knock is some load balancer's
			p.refused.Do(func() {
				p.log.Warn("data port: refused", "remote", raw.RemoteAddr(), "err", err)
			})
		}
		return
	}
	proved()
	peer := conn.ConnectionState().PeerCertificates[0]
	if !p.member(ctx, fingerprint(peer)) {
		_ = raw.Close() // the peer is told nothing at all
		if ctx.Err() == nil {
			p.refused.Do(func() {
				p.log.Warn("data port: refused one that has a certificate of the cluster and is no member",
					"remote", raw.RemoteAddr(), "name", peer.Subject.CommonName)
			})
		}
		return
	}
	if !p.places.take(fingerprint(peer), raw) {
		_ = raw.Close()
		p.full.Do(func() {
			p.log.Warn("data port: member has too many connections, one more dropped",
				"name", peer.Subject.CommonName, "remote", raw.RemoteAddr(), "most", p.places.max)
		})
		return
	}
	p.members.Connected(tcp)
	queue := p.torrent
	if conn.ConnectionState().NegotiatedProtocol == ProtoGRPC {
		tune(tcp, heldAfter, heldProbes)
		queue = p.grpc
	}
	if !queue.offer(conn) {
		_ = raw.Close()
		if ctx.Err() == nil {
			p.full.Do(func() {
				p.log.Warn("data port: nobody accepts, connection dropped",
					"protocol", conn.ConnectionState().NegotiatedProtocol, "remote", raw.RemoteAddr())
			})
		}
	}
}

// member reports whether the key is that of a member, or is soon.
func (p *DataPort) member(ctx context.Context, key string) bool {
	if p.members.Admits(key) {
		return true
	}
	select {
	case p.waiting <- struct{}{}:
		defer func() { <-p.waiting }()
	default:
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, p.grace)
	defer cancel()
	return p.members.Await(ctx, key)
}

func (p *DataPort) closeQueues() {
	_ = p.grpc.Close()    // always nil
	_ = p.torrent.Close() // always nil
}

// portListener is a queue of connections that looks like a listener.
type portListener struct {
	addr  net.Addr
	queue chan *tls.Conn
	done  chan struct{}

	mu     sync.Mutex
	closed bool // guarded by mu; with it nothing enters the queue any more
}

var _ net.Listener = (*portListener)(nil)

func newPortListener(addr net.Addr) *portListener {
	return &portListener{addr: addr, queue: make(chan *tls.Conn, portQueue), done: make(chan struct{})}
}

// offer never waits; false means that the connection is still the caller's.
func (l *portListener) offer(conn *tls.Conn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return false
	}
	select {
	case l.queue <- conn:
		return true
	default:
		return false
	}
}

// Accept implements net.Listener.
func (l *portListener) Accept() (net.Conn, error) {
	select {
	case conn := <-l.queue:
		return conn, nil
	case <-l.done:
		return nil, &net.OpError{Op: "accept", Net: "tcp", Addr: l.addr, Err: net.ErrClosed}
	}
}

// Close implements net.Listener: it ends this protocol, not the port. The
// connections that wait to be accepted are dropped. It never fails.
func (l *portListener) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil
	}
	l.closed = true
	close(l.done)
	for {
		select {
		case conn := <-l.queue:
			_ = conn.NetConn().Close() // no goodbye: that could wait for the peer
		default:
			return nil
		}
	}
}

// Addr implements net.Listener: the data port's address.
func (l *portListener) Addr() net.Addr { return l.addr }
