package fanout

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"go.etcd.io/bbolt"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	imagewolfv1 "github.com/imagewolf/imagewolf/api/v1"
)

// pauses are those after a pull that failed; when all are used up it has failed
// for good.
var pauses = []time.Duration{2 * time.Second, 8 * time.Second, 30 * time.Second}

// callTimeout is how long a member may take to answer. It bounds how long a dead
// one holds up an answer about a request.
const callTimeout = time.Second

// errNotRunning is what callers are told between two runs.
var errNotRunning = status.Error(codes.Unavailable, "prefetches are not served at the moment: see the node's log")

// errCanceled ends a pull because the request was canceled.
var errCanceled = errors.New("canceled")

// Puller pulls one image on this node. Its methods are called concurrently.
type Puller interface {
	// Pull returns the digest of what it pulled and unpacked; with an error, that of
	// what the image's record points to since, "" if it was not touched. It calls
	// progress, which returns at once, as bytes come in. After an error that is
	// errdefs' InvalidArgument it is not called again, after NotFound once.
	Pull(ctx context.Context, r *imagewolfv1.PrefetchRequest, progress func(bytes, total int64)) (digest string, err error)
	// Record names the image record, with its namespace, that pulls of a request move;
	// "" where the name holds the digest, so that it is never moved.
	Record(r *imagewolfv1.PrefetchRequest) string
	// HasRepository says whether the node has an image of the same repository.
	HasRepository(ctx context.Context, namespace, image string) (bool, error)
}

// Member is one node of the cluster.
type Member struct {
	Name   string
	Labels map[string]string
}

// Cluster knows the other nodes. Its methods are called concurrently.
type Cluster interface {
	// Members returns the live nodes, this one among them. It waits a moment where
	// they are about to become known, and fails while they are not.
	Members(ctx context.Context) ([]Member, error)
	// Peer returns the way to another member, and an error for who is none now.
	Peer(name string) (imagewolfv1.PrefetcherClient, error)
}

// Counter counts what becomes of requests. Its methods are called concurrently.
type Counter interface {
	Requested()         // this node has taken a request
	Ended(state string) // this node's part ended: "done", "failed", "canceled" or "superseded"
	Retried()           // a pull failed and is tried again
}

// Options make a Fanout. All are required.
type Options struct {
	Self    string // this node's name in the cluster
	Path    string // of the file that requests are kept in; its directory exists
	Slots   int    // pulls at the same time, at least 1
	Puller  Puller
	Cluster Cluster
	Counter Counter
	Log     *slog.Logger
	// Guard runs what could panic over one request, and turns that into an error.
	Guard func(f func() error) error
}

// Fanout is one node's part in prefetches, and its answers about those of the
// cluster. It is safe for concurrent use; while Run does not run, all calls fail
// with Unavailable.
type Fanout struct {
	o      Options
	wake   chan struct{} // has room for one: there may be something to pull
	news   chan struct{} // has room for one: there may be somebody to tell
	follow chan struct{} // has room for one: there may be a node to follow
	finds  chan struct{} // has an entry for each request that members are asked for

	mu      sync.Mutex
	db      *bbolt.DB          // guarded by mu; nil while Run does not run
	records map[string]*record // guarded by mu: by id
	places  int                // guarded by mu: the selected nodes of them all
	pulling int                // guarded by mu: pulls that have not returned
	watches int                // guarded by mu
	scenes  map[string]*scene  // guarded by mu: requests that are watched, by id
}

// New returns a Fanout. It starts nothing and touches nothing.
func New(o Options) *Fanout {
	return &Fanout{o: o, wake: make(chan struct{}, 1), news: make(chan struct{}, 1), follow: make(chan struct{}, 1), finds: make(chan struct{}, maxFinds), scenes: map[string]*scene{}}
}

// Run works off requests until ctx ends, which is no error, and leaves nothing
// running. It fails if the file of requests cannot be opened. It may be called
// again when it has returned, not before.
func (f *Fanout) Run(ctx context.Context) (err error) {
	db, records, err := openDB(f.o.Path, f.o.Self, f.o.Log)
	if err != nil {
		return err
	}
	places := 0
	for _, r := range records {
		places += len(r.start.Nodes)
		if err := f.name(r); err != nil {
			f.o.Log.Error("a prefetch is pulled without regard to others of its tag", "id", r.id(), "image", r.start.Request.Image, "err", err)
		}
	}
	f.mu.Lock()
	f.db, f.records, f.places = db, records, places
	f.mu.Unlock()
	ctx, cancel := context.WithCancel(ctx)
	var parts sync.WaitGroup
	defer func() {
		cancel()
		parts.Wait()
		f.mu.Lock()
		f.db, f.records = nil, nil
		f.mu.Unlock()
		err = errors.Join(err, db.Close())
	}()
	crashed := make(chan error, 2)
	for _, part := range []func(context.Context){f.tellAll, f.followAll} {
		parts.Go(func() {
			if err := f.o.Guard(func() error { part(ctx); return nil }); err != nil {
				crashed <- err
			}
		})
	}
	return f.schedule(ctx, crashed)
}

// schedule starts pulls as there is room, and returns when none runs any more.
func (f *Fanout) schedule(ctx context.Context, crashed <-chan error) error {
	var pulls sync.WaitGroup
	defer pulls.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // after a crash nothing else ends the pulls
	for {
		next, dirty := f.step(ctx, time.Now(), &pulls)
		if len(dirty) > 0 {
			if err := f.save(dirty...); err != nil {
				f.o.Log.Warn("the state of prefetches is not kept over a restart", "err", err)
			}
		}
		timer := time.NewTimer(time.Until(next))
		select {
		case <-ctx.Done():
		case err := <-crashed:
			timer.Stop()
			return err
		case <-f.wake:
		case <-timer.C:
		}
		timer.Stop()
		if ctx.Err() != nil {
			return nil
		}
	}
}

// step gives up what is out of time or superseded, forgets what is old and starts
// pulls while there is room. It returns when to look again at the latest, and the records
// that have changed.
func (f *Fanout) step(ctx context.Context, now time.Time, pulls *sync.WaitGroup) (next time.Time, dirty []*record) {
	f.mu.Lock()
	defer f.mu.Unlock()
	next = now.Add(time.Hour)
	at := func(t time.Time) {
		if t.Before(next) {
			next = t
		}
	}
	for _, r := range f.records {
		if r.state != nil && !ended(r.state.State) && r.endPull == nil {
			if d := r.deadline(); d.After(now) {
				at(d)
				if r.after.After(now) {
					at(r.after)
				}
			} else {
				r.state.TimedOut = true
				f.end(r, imagewolfv1.PrefetchState_PREFETCH_STATE_FAILED, outOfTime(r.start.Request, r.reason()), now)
				dirty = append(dirty, r)
			}
		}
		if r.finished() {
			if t := r.changed.Add(keepFor); t.After(now) {
				at(t)
			} else {
				f.forget(r)
				dirty = append(dirty, r)
			}
		}
	}
	for {
		// Those that end in one look are what others wait for by it, so: until none does.
		for over := f.supersede(now); len(over) > 0; over = f.supersede(now) {
			dirty = append(dirty, over...)
		}
		best := f.best(now)
		if best == nil {
			return next, dirty
		}
		f.begin(ctx, best, pulls)
	}
}

// best returns the record that is to be pulled next; nil if there is none, or no
// slot for it. f.mu must be held.
func (f *Fanout) best(now time.Time) (best *record) {
	if f.pulling >= f.o.Slots {
		return nil
	}
	for _, r := range f.records {
		if r.ready(now) && (best == nil || before(r, best) < 0) {
			best = r
		}
	}
	return best
}

// outOfTime says why a request that has waited too long has failed.
func outOfTime(r *imagewolfv1.PrefetchRequest, reason string) string {
	out := fmt.Sprintf("not done within the request's time of %s", timeout(r))
	if reason != "" {
		out += ": " + reason
	}
	return out
}

// ready says that the record can be pulled now. Fanout.mu must be held.
func (r *record) ready(now time.Time) bool {
	return r.state != nil && r.state.State == imagewolfv1.PrefetchState_PREFETCH_STATE_QUEUED &&
		r.endPull == nil && !r.waits && r.behind == "" && !r.after.After(now)
}

// begin starts a pull. f.mu must be held.
func (f *Fanout) begin(ctx context.Context, r *record, pulls *sync.WaitGroup) {
	pull, end := context.WithCancelCause(ctx)
	r.endPull = end
	r.state.State, r.state.Reason = imagewolfv1.PrefetchState_PREFETCH_STATE_PULLING, ""
	f.pulling++
	pulls.Go(func() {
		defer end(nil)
		f.pull(pull, r)
	})
}

// end ends this node's part of a request. f.mu must be held.
func (f *Fanout) end(r *record, s imagewolfv1.PrefetchState, reason string, now time.Time) {
	f.endAs(stateNames[s], r, s, reason, now)
}

// endAs is end, and says as what it is counted. f.mu must be held.
func (f *Fanout) endAs(name string, r *record, s imagewolfv1.PrefetchState, reason string, now time.Time) {
	r.end(s, reason, now)
	f.o.Counter.Ended(name)
}

// stateNames are the ends of a request, as they are counted.
var stateNames = map[imagewolfv1.PrefetchState]string{
	imagewolfv1.PrefetchState_PREFETCH_STATE_DONE:     "done",
	imagewolfv1.PrefetchState_PREFETCH_STATE_FAILED:   "failed",
	imagewolfv1.PrefetchState_PREFETCH_STATE_CANCELED: "canceled",
}

// forget takes a record out of memory; saving it then takes it off the disk.
// f.mu must be held.
func (f *Fanout) forget(r *record) {
	delete(f.records, r.id())
	f.places -= len(r.start.Nodes)
}

// pull pulls a request's image and notes how that ended. ctx ends with Run, or
// with errCanceled as its cause.
func (f *Fanout) pull(ctx context.Context, r *record) {
	timed, cancel := context.WithDeadline(ctx, r.deadline())
	defer cancel()
	began := time.Now()
	var digest string
	err := f.o.Guard(func() (err error) {
		digest, err = f.o.Puller.Pull(timed, r.start.Request, func(bytes, total int64) {
			f.mu.Lock()
			defer f.mu.Unlock()
			if !ended(r.state.State) {
				r.state.Bytes, r.state.Total = max(0, bytes), max(0, total)
			}
		})
		return err
	})
	log := f.o.Log.With("id", r.id(), "image", r.start.Request.Image)
	if f.pulled(ctx, timed, r, began, digest, err) {
		if err := f.save(r); err != nil {
			log.Warn("the state of a prefetch is not kept over a restart", "err", err)
		}
	}
	switch {
	case err == nil:
		log.Info("prefetched", "digest", digest)
	case context.Cause(ctx) == nil:
		log.Warn("prefetch failed", "err", err)
	}
	f.signal()
}

// pulled notes how a pull that began then ended, and says whether that is to be kept.
func (f *Fanout) pulled(ctx, timed context.Context, r *record, began time.Time, digest string, err error) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.pulling--
	r.endPull = nil
	now := time.Now()
	moved := digest != "" // which others of the same tag are to know, whatever became of the pull
	if moved {
		r.state.Digest = digest
		if r.start.Request.Digest == "" {
			r.asked = began.UnixMilli()
		}
	}
	switch {
	case ended(r.state.State): // canceled meanwhile
		return moved
	case err == nil:
		f.end(r, imagewolfv1.PrefetchState_PREFETCH_STATE_DONE, "", now)
		return true
	case ctx.Err() != nil: // the node stops: it goes on when it is back
		r.state.State = imagewolfv1.PrefetchState_PREFETCH_STATE_QUEUED
		return moved
	case timed.Err() != nil:
		r.state.TimedOut = true
		f.end(r, imagewolfv1.PrefetchState_PREFETCH_STATE_FAILED, outOfTime(r.start.Request, r.failure), now)
		return true
	case r.tries >= triesFor(err):
		f.end(r, imagewolfv1.PrefetchState_PREFETCH_STATE_FAILED, err.Error(), now)
		return true
	}
	r.after = now.Add(pauses[r.tries])
	r.tries++
	f.o.Counter.Retried()
	r.state.State = imagewolfv1.PrefetchState_PREFETCH_STATE_QUEUED
	r.failure = fmt.Sprintf("tried again, after try %d failed: %v", r.tries, err)
	r.explain()
	return moved
}

// signal has schedule look again.
func (f *Fanout) signal() { poke(f.wake) }

// poke says that there is something new to whoever listens.
func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default: // it is told already
	}
}

// add remembers a request that is new; of one that is known it returns the
// record, and false. It is on disk when add returns.
func (f *Fanout) add(start *imagewolfv1.StartRequest, untold ...string) (r *record, isNew bool, err error) {
	now := time.Now()
	r = newRecord(start, now.Add(-time.Duration(start.Age)*time.Millisecond), f.o.Self)
	for _, n := range untold {
		r.untold[n] = true
	}
	if r.canceled && r.state != nil {
		r.end(imagewolfv1.PrefetchState_PREFETCH_STATE_CANCELED, "", now)
	}
	if err := f.name(r); err != nil {
		return nil, false, status.Errorf(codes.Internal, "request %s: which image record it moves: %v", r.id(), err)
	}
	f.mu.Lock()
	if f.db == nil {
		f.mu.Unlock()
		return nil, false, errNotRunning
	}
	if known := f.records[r.id()]; known != nil {
		f.mu.Unlock()
		return known, false, nil
	}
	dropped, err := f.makeRoom(len(start.Nodes))
	if err != nil {
		f.mu.Unlock()
		return nil, false, err
	}
	f.records[r.id()] = r
	f.places += len(start.Nodes)
	f.mu.Unlock()
	if err := f.save(append(dropped, r)...); err != nil {
		f.mu.Lock()
		if f.records[r.id()] == r {
			f.forget(r)
		}
		f.mu.Unlock()
		return nil, false, status.Errorf(codes.Internal, "request %s is not kept: %v", r.id(), err)
	}
	for _, c := range []chan struct{}{f.wake, f.follow} {
		poke(c)
	}
	return r, true, nil
}

// name asks which image record a request moves. f.mu must not be held, for what is
// asked could panic, and the record known to nobody else.
func (f *Fanout) name(r *record) error {
	return f.o.Guard(func() error { r.name = f.o.Puller.Record(r.start.Request); return nil })
}

// makeRoom forgets the oldest requests that have ended, as many as there must be for
// one more with so many nodes. Its error is ResourceExhausted, and then it forgets
// none. f.mu must be held.
func (f *Fanout) makeRoom(nodes int) (dropped []*record, err error) {
	requests, places := len(f.records)+1, f.places+nodes
	if requests <= maxRequests && places <= maxPlaces {
		return nil, nil
	}
	var old []*record
	for _, r := range f.records {
		if r.finished() {
			old = append(old, r)
		}
	}
	slices.SortFunc(old, func(a, b *record) int { return a.changed.Compare(b.changed) })
	for _, r := range old {
		if requests <= maxRequests && places <= maxPlaces {
			break
		}
		requests--
		places -= len(r.start.Nodes)
		dropped = append(dropped, r)
	}
	switch {
	case requests > maxRequests:
		return nil, status.Errorf(codes.ResourceExhausted, "node %s has %d requests that have not ended: wait until some have, or cancel some", f.o.Self, requests-1)
	case places > maxPlaces:
		return nil, status.Errorf(codes.ResourceExhausted,
			"the requests on node %s that have not ended are of %d nodes, and this one of %d, together more than %d: wait until some have, cancel some, or select fewer nodes",
			f.o.Self, places-nodes, nodes, maxPlaces)
	}
	for _, r := range dropped {
		f.forget(r)
	}
	return dropped, nil
}

// cancel ends this node's part of a request. f.mu must be held.
func (f *Fanout) cancel(r *record, now time.Time) {
	r.canceled = true
	if r.state != nil && !ended(r.state.State) {
		f.end(r, imagewolfv1.PrefetchState_PREFETCH_STATE_CANCELED, "", now)
	}
	if r.endPull != nil {
		r.endPull(errCanceled)
	}
}

// Load returns how many requests wait on this node, and how many it pulls.
func (f *Fanout) Load() (queued, pulling int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, r := range f.records {
		if r.state != nil && r.state.State == imagewolfv1.PrefetchState_PREFETCH_STATE_QUEUED {
			queued++
		}
	}
	return queued, f.pulling
}
