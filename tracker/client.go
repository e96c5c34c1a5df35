package tracker

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/status"

	api "github.com/imagewolf/imagewolf/api/v1"
)

const (
	// failureMemory is how long a tracker that did not answer in time is tried
	// after all others. Gossip takes about as long to find out for itself. One
	// that refuses is tried every time: it costs nothing, and the moment it is
	// back all members of a blob have to meet there again.
	failureMemory = 5 * time.Second
	// minAttempt is the least time that one tracker is given to answer.
	minAttempt = 50 * time.Millisecond
	// maxAttempt is the most that one without a connection is given, and what it has
	// when there is no deadline.
	maxAttempt = 2 * time.Second
	// sessionQueue is how many messages may wait for a tracker that does not
	// read before the session is given up.
	sessionQueue = 8192
	// received is how many messages may wait for the session's user.
	received = 64
)

// ErrClosed is the error of what is asked of a closed Client or Session.
var ErrClosed = errors.New("closed")

// ErrMoved ends a session whose blob has another tracker now: join again,
// with resumed set.
var ErrMoved = errors.New("blob has another tracker")

// ErrNoTracker is returned by Join when no tracker of the blob answers.
var ErrNoTracker = errors.New("no tracker answers")

// Peer is a node of the cluster.
type Peer struct {
	Name    string // the node's name in the cluster
	Address string // host:port of its data port
}

// ClientOptions is what a Client needs.
type ClientOptions struct {
	Self Peer
	Zone string
	// Dial makes a connection to a node's data port. It may be lazy, as
	// grpc.NewClient is; the Client keeps and closes what it returns.
	Dial func(ctx context.Context, addr string) (*grpc.ClientConn, error)
	// Trackers are the nodes that may be a blob's tracker, best first.
	Trackers func(d digest.Digest) []Peer
	// Reach is how long Join looks for a tracker that can be reached, and Answer
	// how long after its begin one that there is a connection to may answer: it lives,
	// and who does without it goes to the registry beside the fetcher. Where such a one
	// has used up Reach, the others have it anew, so that Join takes Answer and Reach
	// at most. 0: for as long as Join's context.
	Reach, Answer time.Duration
	Log           *slog.Logger
	// Contain runs what a goroutine of the client or its Registrar does, and keeps
	// its panic from ending the process; nil: nothing does.
	Contain func(f func())
}

// Client joins blobs at their trackers. It is safe for concurrent use.
type Client struct {
	o     ClientOptions
	conns *conns
	joins sync.WaitGroup // calls of Join, and what reach does
	ctx   context.Context
	stop  context.CancelFunc // ends what reach does

	mu       sync.Mutex
	closed   bool                  // guarded by mu
	sessions map[*Session]struct{} // guarded by mu
	reaching map[string]bool       // trackers that are being connected to, by address; guarded by mu
	failed   map[string]time.Time  // tracker address -> until when it is avoided; guarded by mu
}

// NewClient returns a Client without connections. Close it.
func NewClient(o ClientOptions) *Client {
	if o.Contain == nil {
		o.Contain = func(f func()) { f() }
	}
	ctx, stop := context.WithCancel(context.Background())
	return &Client{
		o:   o,
		ctx: ctx, stop: stop,
		conns:    &conns{dial: o.Dial, byAddr: map[string]*conn{}},
		sessions: map[*Session]struct{}{},
		reaching: map[string]bool{},
		failed:   map[string]time.Time{},
	}
}

// Close ends all sessions, waits for them and closes all connections.
// Registrars of this client must have returned from Run before.
func (c *Client) Close() error {
	c.mu.Lock()
	c.closed = true
	for s := range c.sessions {
		s.cancel()
	}
	c.mu.Unlock()
	c.stop()
	c.joins.Wait()
	for _, s := range c.open() {
		s.Close()
	}
	return c.conns.close()
}

// open is all sessions now.
func (c *Client) open() []*Session {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Collect(maps.Keys(c.sessions))
}

// Join makes this node a member of a blob, at its best
// tracker that answers before ctx ends and within Reach or Answer (see
// [ClientOptions]); ctx does not bound the session. Digest, self and zone of hello are filled in.
// The error is ErrNoTracker when none answers, or the refusal of the one that did
// (as a gRPC status). The caller must Close the session.
//
// hello is called anew for each tracker that is tried. waiting, unless nil, is called now
// and then with a session whose tracker has yet to answer, so that it need not wait for
// what there is to tell: on a line that is full one way, the answer takes seconds.
// Recv of such a session is not to be used, and it is over if Join does not return it.
// Both are called from the goroutine of Join.
func (c *Client) Join(ctx context.Context, d digest.Digest, hello func() *api.Hello, waiting func(*Session)) (*Session, error) {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return nil, ErrClosed
	}
	c.joins.Add(1)
	c.mu.Unlock()
	defer c.joins.Done()

	ranked := c.o.Trackers(d)
	trackers := c.inOrder(ranked)
	failure := ErrNoTracker
	answer, cancel := within(ctx, c.o.Answer)
	defer cancel()
	reach, cancel := within(ctx, c.o.Reach)
	defer func() { cancel() }()
	var late []Peer // those that there was no connection to in time
	for i, t := range trackers {
		connected := c.conns.ready(t.Address)
		patient := connected && answer.Err() == nil
		window, limit := answer, time.Duration(0)
		if !patient {
			window, limit = reach, share(reach, len(trackers)-i-1)
		}
		if window.Err() != nil {
			continue
		}
		h := hello()
		h.Digest, h.Zone, h.Self = d.String(), c.o.Zone, &api.Peer{Name: c.o.Self.Name, Address: c.o.Self.Address}
		s, err := c.try(window, t, h, limit, waiting)
		if err == nil {
			for _, l := range late {
				c.reach(l)
			}
			// Those that had joined are told to move when the order changes.
			if now := c.o.Trackers(d); len(now) > 0 && now[0] != ranked[0] {
				c.reach(now[0])
			}
			return s, nil
		}
		if errors.Is(err, ErrClosed) || refused(err) {
			return nil, fmt.Errorf("join %s at %s: %w", d, t.Name, err)
		}
		failure = fmt.Errorf("%w; %s: %w", failure, t.Name, err)
		if errors.Is(err, context.DeadlineExceeded) {
			c.avoid(t)
			if !connected {
				late = append(late, t)
			}
		}
		if patient && reach.Err() != nil {
			// That was not the time of those that come after it: all members wait
			// for the same one, and are to meet at the next.
			cancel()
			reach, cancel = within(ctx, c.o.Reach)
		}
	}
	return nil, fmt.Errorf("join %s: %w", d, failure)
}

// within bounds ctx by d; 0 does not.
func within(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	if d == 0 {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, d)
}

// inOrder is a blob's trackers, best first, those that were silent a moment
// ago last.
func (c *Client) inOrder(all []Peer) []Peer {
	good, bad := make([]Peer, 0, len(all)), []Peer(nil)
	for _, t := range all {
		if c.avoided(t) {
			bad = append(bad, t)
		} else {
			good = append(good, t)
		}
	}
	return append(good, bad...)
}

func (c *Client) avoid(t Peer) {
	now := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	for addr, until := range c.failed {
		if now.After(until) {
			delete(c.failed, addr)
		}
	}
	c.failed[t.Address] = now.Add(failureMemory)
}

func (c *Client) avoided(t Peer) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return time.Now().Before(c.failed[t.Address])
}

// refused says whether a tracker has answered, with no. Another tracker would
// say the same.
func refused(err error) bool {
	switch status.Code(err) {
	case codes.FailedPrecondition, codes.PermissionDenied, codes.InvalidArgument, codes.Unauthenticated, codes.ResourceExhausted:
		return true
	}
	return false
}

// share is how long one tracker is tried in a window for several: half of what is
// left while there are others to try, so that one that swallows packets does not use
// up all of it. One that is connected has a window of its own: it is alive, if slow,
// and a member that goes to another tracker meanwhile finds nobody there and is sent
// to the registry beside the fetcher.
func share(window context.Context, others int) time.Duration {
	if deadline, ok := window.Deadline(); ok && others > 0 {
		return min(maxAttempt, max(time.Until(deadline)/2, minAttempt))
	}
	return maxAttempt
}

// try joins at one tracker, before ctx ends and within limit, 0 for none.
func (c *Client) try(ctx context.Context, t Peer, hello *api.Hello, limit time.Duration, waiting func(*Session)) (*Session, error) {
	first, cancel := within(ctx, limit)
	defer cancel()
	s, err := c.newSession(first, t, digest.Digest(hello.GetDigest()))
	if err != nil {
		return nil, err
	}
	// Until the first answer the attempt's time bounds the stream, too.
	stop := context.AfterFunc(first, s.cancel)
	err = s.start(first, hello, waiting)
	if err == nil && !stop() {
		err = fmt.Errorf("no answer in time: %w", context.Cause(first))
	}
	if err != nil {
		s.Close()
		return nil, err
	}
	c.mu.Lock()
	s.joined = true
	delete(c.failed, t.Address)
	c.mu.Unlock()
	return s, nil
}

// newSession makes a session without a stream.
func (c *Client) newSession(ctx context.Context, t Peer, d digest.Digest) (*Session, error) {
	conn, release, err := c.conns.get(ctx, t.Address)
	if err != nil {
		return nil, err
	}
	s := &Session{
		c: c, tracker: t, digest: d, conn: conn, release: release,
		out:   newOutbox[*api.MemberMessage](sessionQueue),
		recv:  make(chan *api.TrackerMessage, received),
		begun: make(chan struct{}), over: make(chan struct{}),
	}
	s.ctx, s.cancel = context.WithCancel(context.WithoutCancel(ctx))
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		s.cancel()
		release()
		return nil, ErrClosed
	}
	c.sessions[s] = struct{}{}
	return s, nil
}

// conns caches connections by address. One that nobody uses is closed after a
// minute.
type conns struct {
	dial func(ctx context.Context, addr string) (*grpc.ClientConn, error)

	mu     sync.Mutex
	closed bool             // guarded by mu
	byAddr map[string]*conn // guarded by mu
}

type conn struct {
	cc       *grpc.ClientConn
	uses     int         // guarded by conns.mu
	idle     *time.Timer // while uses is 0; guarded by conns.mu
	replaced bool        // closed by its last user; guarded by conns.mu
}

// connIdle is how long a connection without streams is kept.
const connIdle = time.Minute

// get returns the connection to addr and how to give it back, once. One that
// could not be made is replaced: gRPC answers with that failure until it has
// tried again by itself, and the other end may have come back since.
func (c *conns) get(ctx context.Context, addr string) (*grpc.ClientConn, func(), error) {
	c.mu.Lock()
	k := c.byAddr[addr]
	if k != nil && k.cc.GetState() == connectivity.TransientFailure {
		c.replaceLocked(addr, k)
		k = nil
	}
	if c.closed {
		c.mu.Unlock()
		return nil, nil, ErrClosed
	}
	if k == nil {
		c.mu.Unlock()
		cc, err := c.dial(ctx, addr) // may take its time
		if err != nil {
			return nil, nil, err
		}
		c.mu.Lock()
		switch k = c.byAddr[addr]; {
		case c.closed:
			c.mu.Unlock()
			return nil, nil, cmp.Or(cc.Close(), ErrClosed)
		case k != nil: // another was faster
			defer func() { _ = cc.Close() }()
		default:
			k = &conn{cc: cc}
			c.byAddr[addr] = k
		}
	}
	defer c.mu.Unlock()
	k.uses++
	k.rest(nil)
	return k.cc, sync.OnceFunc(func() { c.put(addr, k) }), nil
}

// rest sets the timer that closes a connection which nobody uses. conns.mu must
// be held.
func (k *conn) rest(t *time.Timer) {
	if k.idle != nil {
		k.idle.Stop()
	}
	k.idle = t
}

// replaceLocked forgets a connection, which its last user closes. c.mu must be
// held.
func (c *conns) replaceLocked(addr string, k *conn) {
	delete(c.byAddr, addr)
	k.rest(nil)
	if k.replaced = true; k.uses == 0 {
		_ = k.cc.Close() // only says that it was closed before
	}
}

// current says whether cc is the connection to addr.
func (c *conns) current(addr string, cc *grpc.ClientConn) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	k := c.byAddr[addr]
	return k != nil && k.cc == cc
}

// ready says whether there is a connection to addr that works.
func (c *conns) ready(addr string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	k := c.byAddr[addr]
	return k != nil && k.cc.GetState() == connectivity.Ready
}

func (c *conns) put(addr string, k *conn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	k.uses--
	switch {
	case k.uses > 0:
		return
	case k.replaced:
		_ = k.cc.Close()
		return
	case c.closed:
		return
	}
	var t *time.Timer
	t = time.AfterFunc(connIdle, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if k.idle == t && !c.closed {
			delete(c.byAddr, addr)
			_ = k.cc.Close()
		}
	})
	k.rest(t)
}

func (c *conns) close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil
	}
	c.closed = true
	var errs []error
	for _, k := range c.byAddr {
		k.rest(nil)
		errs = append(errs, k.cc.Close())
	}
	return errors.Join(errs...)
}
