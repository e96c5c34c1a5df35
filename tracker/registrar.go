package tracker

import (
	"context"
	"errors"
	"io"
	"maps"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	api "github.com/imagewolf/imagewolf/api/v1"
)

const (
	// registerBatch is how many blobs one message carries.
	registerBatch = 1000
	// Pauses between attempts to reach a tracker.
	registerRetry    = 500 * time.Millisecond
	registerRetryMax = 10 * time.Second
	// registerAgain is when a tracker is told again of everything that had no room for
	// some of it.
	registerAgain = time.Minute
)

// Registrar tells the trackers of the blobs that this node holds that it does,
// over one stream per tracker. Only a blob's best tracker is told: the next
// one is when membership changes, which is also when it takes over. Its
// methods are safe for concurrent use and do not block.
type Registrar struct {
	c     *Client
	serve func(d digest.Digest)
	wake  chan struct{} // has room for one: the blobs or the trackers changed

	mu    sync.Mutex
	held  map[digest.Digest]int64 // what the node holds: sizes; guarded by mu
	dirty map[digest.Digest]bool  // to be looked at by Run; guarded by mu
	all   bool                    // everything is dirty; guarded by mu
}

// NewRegistrar returns a Registrar that holds nothing. A tracker that wants a
// blob served has serve called, which must not block.
func NewRegistrar(c *Client, serve func(d digest.Digest)) *Registrar {
	return &Registrar{
		c: c, serve: serve, wake: make(chan struct{}, 1),
		held: map[digest.Digest]int64{}, dirty: map[digest.Digest]bool{},
	}
}

// Add says that the node holds a blob of size bytes.
func (r *Registrar) Add(d digest.Digest, size int64) {
	r.change(func() { r.held[d], r.dirty[d] = size, true })
}

// Remove takes back Add.
func (r *Registrar) Remove(d digest.Digest) {
	r.change(func() {
		delete(r.held, d)
		r.dirty[d] = true
	})
}

// TrackersChanged makes every blob known to the tracker it has now. To be
// called when membership has changed.
func (r *Registrar) TrackersChanged() {
	r.change(func() { r.all = true })
}

func (r *Registrar) change(f func()) {
	r.mu.Lock()
	f()
	r.mu.Unlock()
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// Run keeps the streams until ctx ends; it returns nil then. It may be called
// once.
func (r *Registrar) Run(ctx context.Context) error {
	links := map[Peer]*link{}
	at := map[digest.Digest]*link{} // where each blob is registered
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-r.wake:
		}
		for d, size := range r.changes(at) {
			var to *link
			if size > 0 {
				if best := r.c.o.Trackers(d); len(best) > 0 {
					to = links[best[0]]
					if to == nil {
						to = newLink(ctx, r, best[0])
						links[best[0]] = to
						wg.Go(func() { r.c.o.Contain(to.run) })
					}
				}
			}
			if old := at[d]; old != nil && old != to {
				old.set(d, 0)
				delete(at, d)
			}
			if to != nil {
				to.set(d, size)
				at[d] = to
			}
		}
		for t, l := range links {
			if l.idle() {
				l.cancel()
				delete(links, t)
			}
		}
	}
}

// changes takes what has to be looked at: the size of each blob, 0 if it is
// not held.
func (r *Registrar) changes(at map[digest.Digest]*link) map[digest.Digest]int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make(map[digest.Digest]int64, len(r.dirty))
	if r.all {
		maps.Copy(out, r.held)
		for d := range at {
			out[d] = r.held[d]
		}
	}
	for d := range r.dirty {
		out[d] = r.held[d]
	}
	r.dirty, r.all = map[digest.Digest]bool{}, false
	return out
}

// holds says whether the node holds a blob.
func (r *Registrar) holds(d digest.Digest) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.held[d] > 0
}

// link is the stream to one tracker.
type link struct {
	r       *Registrar
	tracker Peer
	ctx     context.Context
	cancel  context.CancelFunc
	wake    chan struct{} // has room for one: todo is not empty
	full    chan struct{} // has room for one: the tracker has refused some
	most    int           // blobs that are registered here at most

	mu   sync.Mutex
	want map[digest.Digest]int64 // what the tracker is to know; guarded by mu
	todo map[digest.Digest]bool  // what it does not know yet; guarded by mu
}

func newLink(ctx context.Context, r *Registrar, t Peer) *link {
	l := &link{
		r: r, tracker: t, wake: make(chan struct{}, 1), full: make(chan struct{}, 1), most: maxOffered,
		want: map[digest.Digest]int64{}, todo: map[digest.Digest]bool{},
	}
	l.ctx, l.cancel = context.WithCancel(ctx)
	return l
}

// set makes a blob known, or unknown with size 0. One that would be too many for the
// tracker is not made known; the next time it is set, there may be room.
func (l *link) set(d digest.Digest, size int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if have, ok := l.want[d]; have == size || size > 0 && !ok && len(l.want) >= l.most {
		return
	}
	if size > 0 {
		l.want[d] = size
	} else {
		delete(l.want, d)
	}
	l.todo[d] = true
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// idle says whether the tracker has nothing to know any more.
func (l *link) idle() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.want) == 0
}

// run keeps the stream open, and opens it again, until the link is canceled.
func (l *link) run() {
	defer l.cancel()
	pause := registerRetry
	for l.ctx.Err() == nil {
		opened := time.Now()
		err := l.stream()
		if l.ctx.Err() != nil {
			return
		}
		l.r.c.o.Log.Debug("registration ended", "tracker", l.tracker.Name, "error", err)
		if time.Since(opened) > registerRetryMax {
			pause = registerRetry
		}
		select {
		case <-time.After(pause):
		case <-l.ctx.Done():
		}
		pause = min(2*pause, registerRetryMax)
	}
}

// listen does what the tracker asks for until the stream ends.
func (l *link) listen(stream api.Tracker_RegisterClient) error {
	for {
		cmd, err := stream.Recv()
		if err != nil {
			return err
		}
		if n := cmd.GetRefused(); n > 0 {
			l.r.c.o.Log.Debug("tracker has no room for registrations", "tracker", l.tracker.Name, "blobs", n)
			select {
			case l.full <- struct{}{}:
			default:
			}
		}
		if d := digest.Digest(cmd.GetServe()); l.r.holds(d) {
			l.r.serve(d)
		}
	}
}

// stream registers everything that is wanted over a new stream, and then what
// changes, until the stream breaks.
func (l *link) stream() error {
	conn, release, err := l.r.c.conns.get(l.ctx, l.tracker.Address)
	if err != nil {
		return err
	}
	defer release()
	ctx, cancel := context.WithCancel(l.ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	stream, err := api.NewTrackerClient(conn).Register(ctx)
	if err != nil {
		return err
	}
	broken := make(chan error, 1)
	wg.Go(func() {
		err := errors.New("receiving has failed") // unless listen returns
		l.r.c.o.Contain(func() { err = l.listen(stream) })
		broken <- err
	})
	l.again()
	self := &api.Peer{Name: l.r.c.o.Self.Name, Address: l.r.c.o.Self.Address}
	msg := &api.RegisterMessage{Self: self, Zone: l.r.c.o.Zone}
	var again <-chan time.Time // nil while nothing was refused
	for {
		for more := true; more; {
			more = l.batch(msg)
			if err := stream.Send(msg); err != nil {
				if !errors.Is(err, io.EOF) {
					return err
				}
				return <-broken // has the reason
			}
			msg = &api.RegisterMessage{}
		}
		select {
		case <-l.wake:
		case <-l.full:
			if again == nil {
				again = time.After(registerAgain)
			}
		case <-again:
			again = nil
			l.again()
		case err := <-broken:
			return err
		}
	}
}

// again makes everything that is wanted to do.
func (l *link) again() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for d := range l.want { // what is no longer wanted stays to be taken back
		l.todo[d] = true
	}
}

// batch moves up to a message's worth from todo into msg and says whether
// there is more.
func (l *link) batch(msg *api.RegisterMessage) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := 0
	for d := range l.todo {
		if n == registerBatch {
			return true
		}
		n++
		if size := l.want[d]; size > 0 {
			msg.Added = append(msg.Added, &api.Held{Digest: d.String(), Size: size})
		} else {
			msg.Removed = append(msg.Removed, d.String())
		}
		delete(l.todo, d)
	}
	return false
}
