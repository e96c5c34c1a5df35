package tracker

import (
	"cmp"
	"container/heap"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	api "github.com/imagewolf/imagewolf/api/v1"
)

const (
	// helloTimeout is how long a stream may stay without its first message.
	helloTimeout = 10 * time.Second
	// queueSlack is how many messages beyond one per segment may wait for a
	// slow member before its stream is closed.
	queueSlack = 1024
)

// ServerOptions is what a Server needs.
type ServerOptions struct {
	// StallTimeout: see MachineOptions.
	StallTimeout time.Duration
	// MaxWait: see MachineOptions.
	MaxWait time.Duration
	// Members is how many nodes the cluster has now; nil if unknown.
	Members func() int
	// TakesOver says whether this node has just become the blob's tracker, or
	// stands in for one that others may still be at; nil: never.
	TakesOver func(d digest.Digest) bool
	// Tracks says whether this node is the blob's tracker; nil: always.
	Tracks func(d digest.Digest) bool
	// Layout cuts a blob of the given size (bytes) into segments. Required.
	Layout func(size int64) Layout
	// PeerName is the name that the caller of an RPC has proven; a stream
	// that gives another is refused. Nil, or false: not known, any name goes.
	PeerName func(ctx context.Context) (string, bool)
	// Log is required.
	Log *slog.Logger
	// Counter hears what is to be counted; nil: nobody does.
	Counter Counter
	// Contain runs what a goroutine of a stream does, and keeps its panic from
	// ending the process: the stream ends with Internal. nil: nothing does.
	Contain func(f func())
}

// Counter hears what an operator counts. Its methods are called with locks held,
// from any goroutine, and must return at once.
type Counter interface {
	// ShutOut counts a member that is shut out of a blob for its piece hashes.
	ShutOut()
	// Broke counts a member or seeder that did not do as it had said, or asked for more
	// than a node may, whether it is shut out for that or not.
	Broke()
	// Full counts what a member was refused because all together have too much.
	Full()
	// Mismatched counts a member's report that the bytes of a blob were wrong.
	Mismatched()
	// Panicked counts a machine that panicked and was dropped.
	Panicked()
}

// noCounter is a Counter for those who have none.
type noCounter struct{}

func (noCounter) ShutOut()    {}
func (noCounter) Broke()      {}
func (noCounter) Full()       {}
func (noCounter) Mismatched() {}
func (noCounter) Panicked()   {}

// Server is the gRPC service imagewolf.v1.Tracker: one Machine per blob, and
// who holds which whole blobs. It is safe for concurrent use.
type Server struct {
	o ServerOptions

	// streams counts goroutines that outlive their handler for a moment; Run
	// waits for them.
	streams sync.WaitGroup
	closed  chan struct{}                   // closed when Run ends
	ends    atomic.Pointer[<-chan struct{}] // Run's ctx.Done()
	timers  timers

	limits  limits
	named   mentions
	returns returns

	// Lock order: a blob's mu, then mu. The rest is guarded by mu.
	mu          sync.Mutex
	done        bool // closed is closed
	blobs       map[digest.Digest]*blob
	joined      map[string]memberships // by the member's name
	members     int                    // memberships of all
	units       int                    // see maxUnits
	registrants map[string]*registrant // by the node's name
	registered  int                    // registrations of all
	silent      map[string]int         // streams without a first message by their node's name, "" if not known
	allSilent   int                    // those of all
}

// NewServer returns a server that answers as soon as it is registered with a
// gRPC server; what depends on time needs Run.
func NewServer(o ServerOptions) *Server {
	o.StallTimeout = cmp.Or(o.StallTimeout, DefaultStallTimeout)
	if o.Counter == nil {
		o.Counter = noCounter{}
	}
	if o.Contain == nil {
		o.Contain = func(f func()) { f() }
	}
	return &Server{
		o:           o,
		closed:      make(chan struct{}),
		timers:      timers{changed: make(chan struct{}, 1)},
		limits:      bounds,
		blobs:       map[digest.Digest]*blob{},
		joined:      map[string]memberships{},
		registrants: map[string]*registrant{},
		silent:      map[string]int{},
	}
}

// Load is how many blobs have members or seeders here now, and how many members
// they have together.
func (s *Server) Load() (blobs, members int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.blobs), s.members
}

// Register adds the service to a gRPC server.
func (s *Server) Register(r grpc.ServiceRegistrar) { api.RegisterTrackerServer(r, service{s: s}) }

// Run owns the timers. When ctx ends it ends all streams with Unavailable,
// waits for them and returns nil; after that the server refuses everything.
// Connections are not to be closed before ctx has ended: the members that are
// cut off first would be replaced by those that are still there. It may be
// called once.
func (s *Server) Run(ctx context.Context) error {
	ends := ctx.Done()
	s.ends.Store(&ends)
	for {
		wait, due := s.timers.pop(time.Now())
		for _, b := range due {
			b.handle(nil, func(m *Machine, now time.Time) []Command { return m.Tick(now) })
		}
		if len(due) > 0 {
			continue
		}
		var timer <-chan time.Time
		if wait > 0 {
			timer = time.After(wait)
		}
		select {
		case <-ctx.Done():
			s.mu.Lock()
			s.done = true
			close(s.closed)
			s.mu.Unlock()
			s.streams.Wait()
			return nil
		case <-s.timers.changed:
		case <-timer:
		}
	}
}

// ending says whether Run's context has ended, from that very moment on.
func (s *Server) ending() bool {
	ends := s.ends.Load()
	if ends == nil {
		return false // Run has not begun
	}
	select {
	case <-*ends:
		return true
	default:
		return false
	}
}

// enter counts a goroutine of a stream; false once the server is closed.
func (s *Server) enter(n int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.done {
		return false
	}
	s.streams.Add(n)
	return true
}

// caller is the name that the caller of an RPC has proven, if known.
type caller struct {
	name  string
	known bool
}

// check refuses a caller that is not who it says.
func (c caller) check(self *api.Peer) error {
	if c.known && c.name != self.GetName() {
		return status.Errorf(codes.PermissionDenied, "caller is %q, not %q", c.name, self.GetName())
	}
	return nil
}

// blob is one blob's members and seeders at this tracker.
type blob struct {
	s      *Server
	digest digest.Digest

	mu       sync.Mutex
	dead     bool                   // no longer in the server's map; guarded by mu
	machine  *Machine               // nil while there are no members; guarded by mu
	units    int                    // of the machine, see maxUnits; guarded by mu
	members  map[string]*joinStream // nil before the first; guarded by mu
	seeders  seeders                // guarded by mu
	schedule time.Time              // the timer that is set; guarded by mu
}

// with calls f with the blob locked, and forgets the blob afterwards if
// nothing is left of it.
func (s *Server) with(d digest.Digest, f func(b *blob) error) error {
	for {
		s.mu.Lock()
		b := s.blobs[d]
		if b == nil {
			b = &blob{s: s, digest: d}
			s.blobs[d] = b
		}
		s.mu.Unlock()
		if gone, err := b.with(f); !gone {
			return err
		}
	}
}

// with is Server.with for a blob that may have been dropped: then f is not called.
func (b *blob) with(f func(b *blob) error) (gone bool, err error) {
	b.mu.Lock()
	defer b.mu.Unlock() // also if f panics
	if b.dead {
		return true, nil
	}
	err = f(b)
	b.reap()
	return false, err
}

// reap drops the machine without members, and the blob without anybody. b.mu
// must be held.
func (b *blob) reap() {
	if len(b.members) > 0 {
		return
	}
	b.close()
	if b.seeders.len() > 0 {
		return
	}
	b.dead = true
	b.s.mu.Lock()
	delete(b.s.blobs, b.digest)
	b.s.mu.Unlock()
}

// close drops the machine. b.mu must be held.
func (b *blob) close() {
	b.machine, b.members = nil, nil
	b.s.returns.forget(b)
	b.s.mu.Lock()
	defer b.s.mu.Unlock()
	b.s.units -= b.units
	b.units = 0
}

// handle lets the machine, if there is one, handle an event. One that comes
// from a member counts only while from is that member's stream.
func (b *blob) handle(from *joinStream, event func(m *Machine, now time.Time) []Command) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.machine == nil || (from != nil && b.members[from.name] != from) {
		return
	}
	_ = b.run(func(m *Machine, now time.Time) ([]Command, error) { return event(m, now), nil })
	b.reap()
}

// run is handle with b.mu held and a machine there. A machine that panics is
// dropped with all its members: they join again, and start afresh.
func (b *blob) run(event func(m *Machine, now time.Time) ([]Command, error)) error {
	if b.s.ending() {
		// Streams are being ended one by one: the fetcher's is not to be
		// taken for a death that the others have to hear of.
		return status.Error(codes.Unavailable, "tracker is closing")
	}
	out, err := b.guard(event)
	var p *panicError
	if errors.As(err, &p) {
		b.s.o.Counter.Panicked()
		b.s.o.Log.Error("tracker failed; dropping its members", "digest", b.digest, "panic", p.value, "stack", p.stack)
		for name, st := range b.members {
			st.end(status.Errorf(codes.Internal, "tracker of %s failed", b.digest))
			delete(b.members, name)
		}
		b.close()
		return status.Errorf(codes.Internal, "tracker of %s failed", b.digest)
	}
	for _, c := range out {
		b.dispatch(c)
	}
	if next := b.machine.Next(); !next.IsZero() && (b.schedule.IsZero() || next.Before(b.schedule)) {
		b.schedule = next
		b.s.timers.set(next, b)
	}
	return err
}

type panicError struct {
	value any
	stack string
}

func (p *panicError) Error() string { return fmt.Sprintf("panic: %v", p.value) }

func (b *blob) guard(event func(m *Machine, now time.Time) ([]Command, error)) (out []Command, err error) {
	defer func() {
		if v := recover(); v != nil {
			out, err = nil, &panicError{value: v, stack: string(debug.Stack())}
		}
	}()
	now := time.Now()
	if !now.Before(b.schedule) {
		b.schedule = time.Time{} // that timer has gone off
	}
	return event(b.machine, now)
}

// dispatch queues one command; b.mu must be held. It never blocks: a member
// that does not read is let go.
func (b *blob) dispatch(c Command) {
	if c.Reason != "" {
		b.s.blame(b.digest, c)
		return
	}
	if c.Serve {
		if r := b.seeders.get(c.To); r.stream != nil && !r.stream.out.put(&api.RegisterCommand{Serve: b.digest.String()}) {
			r.stream.end(status.Errorf(codes.ResourceExhausted, "%s does not read", c.To))
		}
		return
	}
	if st := b.members[c.To]; st != nil && !st.out.put(c.Msg) {
		st.end(status.Errorf(codes.ResourceExhausted, "%s does not read", c.To))
	}
}

// blame names in the log a node that did not do as it had said, and says whether
// it was shut out of the blob for that.
func (s *Server) blame(d digest.Digest, c Command) {
	text := "member did not do as it said"
	if c.Outcast {
		text = "member shut out of blob"
	}
	if c.Reason == wrongHashes || c.Reason == otherHashes {
		s.o.Counter.ShutOut()
	} else {
		s.o.Counter.Broke()
	}
	s.o.Log.Warn(text, "peer", c.To, "digest", d, "reason", c.Reason)
}

// open makes a machine for members that say the blob has this size, the first of
// which has this name, and tells it of the seeders that agree. b.mu must be held.
func (b *blob) open(name string, size int64) error {
	units := unitsOfBlob * b.s.o.Layout(size).Segments
	b.s.mu.Lock()
	full := b.s.units+units > b.s.limits.units
	if !full {
		b.s.units += units
		b.units = units
	}
	b.s.mu.Unlock()
	if full {
		b.s.full(name, "segments")
		return status.Errorf(codes.ResourceExhausted, "too many segments here")
	}
	if err := b.run(func(*Machine, time.Time) ([]Command, error) {
		b.machine = NewMachine(b.digest, size, MachineOptions{
			StallTimeout: b.s.o.StallTimeout, MaxWait: b.s.o.MaxWait, Members: b.s.o.Members, Layout: b.s.o.Layout,
			TakesOver: b.s.o.TakesOver != nil && b.s.o.TakesOver(b.digest), Elsewhere: !b.tracked(),
		})
		return nil, nil
	}); err != nil {
		return err
	}
	for name, r := range b.seeders.all {
		if r.size != size {
			continue
		}
		if err := b.run(func(m *Machine, now time.Time) ([]Command, error) {
			return m.SeederAdded(now, name, r.stream.zone), nil
		}); err != nil {
			return err
		}
	}
	return nil
}

// timers is when which blob's machine is to be ticked.
type timers struct {
	changed chan struct{} // has room for one: an earlier time was set

	mu   sync.Mutex
	heap timerHeap // guarded by mu
}

func (t *timers) set(at time.Time, b *blob) {
	t.mu.Lock()
	first := len(t.heap) == 0 || at.Before(t.heap[0].at)
	heap.Push(&t.heap, timer{at, b})
	t.mu.Unlock()
	if first {
		select {
		case t.changed <- struct{}{}:
		default:
		}
	}
}

// pop takes the blobs that are due; if there are none it says how long until
// the next, 0 for never.
func (t *timers) pop(now time.Time) (wait time.Duration, due []*blob) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for len(t.heap) > 0 {
		if wait := t.heap[0].at.Sub(now); wait > 0 {
			return wait, due
		}
		due = append(due, heap.Pop(&t.heap).(timer).b) //nolint:errcheck // nothing else is pushed
	}
	return 0, due
}

type timer struct {
	at time.Time
	b  *blob
}

type timerHeap []timer

func (h timerHeap) Len() int           { return len(h) }
func (h timerHeap) Less(i, j int) bool { return h[i].at.Before(h[j].at) }
func (h timerHeap) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }

// Push is part of heap.Interface.
func (h *timerHeap) Push(x any) { *h = append(*h, x.(timer)) } //nolint:errcheck // nothing else is pushed

// Pop is part of heap.Interface.
func (h *timerHeap) Pop() any {
	old := *h
	last := old[len(old)-1]
	old[len(old)-1] = timer{}
	*h = old[:len(old)-1]
	return last
}
