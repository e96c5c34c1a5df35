// Package queue keeps the events that were taken until they are worked off. It
// survives restarts, and the end of the process at any moment: an event that
// Put has taken is handed out at least once, and again when the process ended
// before its being done was on disk. It is bounded, and says so when it is full.
//
// Events that come again within a while are known and kept once: by delivery,
// for senders send again what they got no answer to, and by content, for a push
// of an image with many platforms and tags tells of the same digest many times.
// The same digest with a tag that is new is not the same event, nor is a tag that
// is moved back to a digest that it had before. Of an event that led to nothing only
// the delivery is known: the push, told anew, may lead to something by then.
//
// Everything is in one bbolt file:
//
//	events   sequence (8 bytes)            JSON of record; the order is that of arrival
//	seen     hash (16 bytes)               when it was seen: nanoseconds since 1970 (8 bytes); of a tag, then its digest
//	seen_at  nanoseconds (8), hash (16)    a zero; for throwing away what is old
//	counts   "events", "seen_at", "history"  how many the bucket has (8 bytes)
//	history  sequence (8 bytes)            JSON of record; what was taken last, for the feed
//	feed     "id", "made"                  of the history: a random text, and nanoseconds (8 bytes)
//	positions  name of a feed              how far it was read, as its reader writes it
//
// What is in the history went there with the event, in one transaction. Numbers are big-endian. What is due, and how often it was tried, is in memory
// only: after a restart everything is due.
package queue

import (
	"container/heap"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"

	"github.com/imagewolf/imagewolf/config"
	"github.com/imagewolf/imagewolf/notifier/event"
)

// ErrFull is returned by Put when the events would be more than the queue may
// hold. Their sender is asked to send them again later.
var ErrFull = errors.New("the queue is full")

// errPanic is why an event is tried again whose work panicked; the panic is logged
// where it is contained.
var errPanic = errors.New("the work on it panicked")

// Why events lead to nothing in the queue, beside what decoders found.
const (
	Duplicate event.Kind = "duplicate" // taken before
	Full      event.Kind = "full"      // refused
	GaveUp    event.Kind = "gave_up"   // tried for long enough
)

const (
	firstRetry = time.Second // doubled with every try
	lastRetry  = 5 * time.Minute
	flushAfter = time.Second // how long it may take until on disk is what is done
	flushAt    = 256         // and how many that may be
	lockWait   = 500 * time.Millisecond
)

var (
	eventsBucket = []byte("events")
	seenBucket   = []byte("seen")
	seenAtBucket = []byte("seen_at")
	countsBucket = []byte("counts")
)

// Queue is a file of events. Put and Stats are safe for concurrent use, also
// with Run, of which there is one at a time.
type Queue struct {
	config  config.NotifierQueue
	history int                    // most events in the history
	keep    func(event.Event) bool // whether one goes there
	log     *slog.Logger
	db      *bbolt.DB
	puts    *commits
	wake    chan struct{} // of size 1: something new is due

	mu      sync.Mutex // guards what follows
	waiting due
	taken   uint64
	done    uint64
	panics  uint64
	nothing map[event.Kind]uint64
}

// record is an event as it is on disk.
type record struct {
	Event event.Event `json:"event"`
	Taken time.Time   `json:"taken"`
}

// Stats says what became of events since the queue was opened.
type Stats struct {
	Waiting int                   // now, those that were there at the start among them
	Taken   uint64                // kept
	Done    uint64                // worked off
	Panics  uint64                // contained: tries that ended in one, and what Panicked counted
	Nothing map[event.Kind]uint64 // led to nothing, by the reason
}

// Options are what a queue may be given beside its settings.
type Options struct {
	Log *slog.Logger // nil logs nothing
	// History is how many of the events that were taken are kept for After and
	// Newest; 0 keeps none, and throws away those that there are.
	History int
	// Record says whether an event goes into the history; nil: every one does.
	Record func(event.Event) bool
}

// Open opens the queue's file, or makes it, and fails when another process has
// it open.
func Open(c config.NotifierQueue, o Options) (*Queue, error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Record == nil {
		o.Record = func(event.Event) bool { return true }
	}
	db, err := bbolt.Open(c.File, 0o600, &bbolt.Options{Timeout: lockWait, FreelistType: bbolt.FreelistMapType})
	switch {
	case errors.Is(err, bolterrors.ErrTimeout):
		return nil, fmt.Errorf("queue.file: %s is in use by another process", c.File)
	case err != nil:
		return nil, fmt.Errorf("queue.file: %s: %w", c.File, err)
	}
	q := &Queue{
		config: c, history: o.History, keep: o.Record, log: o.Log, db: db, puts: newCommits(db.Update),
		wake: make(chan struct{}, 1), nothing: map[event.Kind]uint64{},
	}
	if err := db.Update(q.load); err != nil {
		return nil, errors.Join(fmt.Errorf("queue.file: %s: %w", c.File, err), db.Close())
	}
	return q, nil
}

// load makes the buckets and takes up what waits.
func (q *Queue) load(tx *bbolt.Tx) error {
	for _, name := range [][]byte{eventsBucket, seenBucket, seenAtBucket, countsBucket, positionsBucket} {
		if _, err := tx.CreateBucketIfNotExists(name); err != nil {
			return err
		}
	}
	if err := q.openHistory(tx); err != nil {
		return err
	}
	now := time.Now()
	return tx.Bucket(eventsBucket).ForEach(func(k, _ []byte) error {
		q.waiting = append(q.waiting, entry{at: now, seq: number(k)}) // sorted, so it is a heap
		return nil
	})
}

// Close closes the file, after Run has returned.
func (q *Queue) Close() error { return q.db.Close() }

// Stats returns what became of events.
func (q *Queue) Stats() Stats {
	q.mu.Lock()
	defer q.mu.Unlock()
	return Stats{Waiting: len(q.waiting), Taken: q.taken, Done: q.done, Panics: q.panics, Nothing: maps.Clone(q.nothing)}
}

// Count counts something that leads to nothing, of which there is nothing to
// keep.
func (q *Queue) Count(why event.Kind) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.nothing[why]++
}

// Panicked counts a panic of whoever puts events, that was contained there.
func (q *Queue) Panicked() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.panics++
}

// Put keeps the result's events, but for those that are known, and counts what
// leads to nothing. When it returns nil they are on disk; on an error, such as
// ErrFull, none is kept.
func (q *Queue) Put(_ context.Context, r event.Result) error {
	var kept []entry
	var again []event.Event
	var full bool
	if len(r.Events) > 0 {
		err := q.puts.commit(func(tx *bbolt.Tx) error {
			var err error
			kept, again, full, err = q.put(tx, r.Events, time.Now())
			return err
		})
		if err != nil {
			return fmt.Errorf("queue.file: %w", err)
		}
	}
	for _, e := range again {
		q.log.Debug("an event leads to nothing", "kind", string(Duplicate), "image", e.Image(), "receiver", e.Source, "delivery", e.DeliveryID)
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if full {
		q.nothing[Full] += uint64(len(r.Events))
		return fmt.Errorf("%w: %d events wait (queue.max_events)", ErrFull, len(q.waiting))
	}
	for _, i := range r.Ignored {
		q.nothing[i.Kind] += 1 + uint64(max(0, i.More))
	}
	if n := len(r.Events) - len(kept); n > 0 {
		q.nothing[Duplicate] += uint64(n)
	}
	q.taken += uint64(len(kept))
	for _, e := range kept {
		heap.Push(&q.waiting, e)
	}
	if len(kept) > 0 {
		q.signal()
	}
	return nil
}

func (q *Queue) signal() {
	select {
	case q.wake <- struct{}{}:
	default: // Run has not looked yet
	}
}

// put writes those events that are not known, if all of them have room. An
// error undoes the transaction, which is others' too: being full is none.
func (q *Queue) put(tx *bbolt.Tx, events []event.Event, now time.Time) (kept []entry, again []event.Event, full bool, err error) {
	s := q.memory(tx, now)
	if err := s.prune(len(events)); err != nil {
		return nil, nil, false, err
	}
	var fresh []event.Event
	here := map[key]mark{} // known from this delivery
	for _, e := range events {
		known, marks := keys(e)
		if slices.ContainsFunc(known[:], func(k mark) bool {
			if last, told := here[k.key]; told {
				return last == k
			}
			return s.knows(k)
		}) {
			again = append(again, e)
			continue
		}
		fresh = append(fresh, e)
		for _, k := range marks {
			here[k.key] = k
		}
	}
	if len(fresh) > 0 && count(tx, eventsBucket)+len(fresh) > q.config.MaxEvents {
		return nil, nil, true, nil
	}
	b := tx.Bucket(eventsBucket)
	for _, e := range fresh {
		seq, err := b.NextSequence()
		if err != nil {
			return nil, nil, false, err
		}
		v, err := json.Marshal(record{Event: e, Taken: now})
		if err != nil {
			return nil, nil, false, err
		}
		if err := b.Put(bytesOf(seq), v); err != nil {
			return nil, nil, false, err
		}
		kept = append(kept, entry{at: now, seq: seq})
		_, marks := keys(e)
		if err := s.mark(marks); err != nil {
			return nil, nil, false, err
		}
	}
	if err := q.record(tx, fresh, now); err != nil {
		return nil, nil, false, err
	}
	return kept, again, false, add(tx, eventsBucket, len(fresh))
}

// Run hands the events to work, as many at the same time as the settings say
// (queue.workers), in the order in which they came. One whose work fails or panics is
// tried again after a second, then after twice as long and so on, up to five
// minutes, until retry_for has passed since it was taken; others go on
// meanwhile. One whose work returns event.ErrNothing is over, and what it pushed is
// taken when another delivery tells of it. Run returns nil when the context has ended and work has returned,
// and an error when the file cannot be written.
func (q *Queue) Run(ctx context.Context, work func(context.Context, event.Event) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	r := &run{queue: q, work: work, tried: make(chan attempt), flushed: time.Now()}
	err := r.loop(ctx)
	cancel()
	for r.running > 0 {
		err = errors.Join(err, r.take(<-r.tried))
	}
	return errors.Join(err, q.remove(r.done...))
}

// run is one call of Run; its loop owns it.
type run struct {
	queue   *Queue
	work    func(context.Context, event.Event) error
	running int
	tried   chan attempt
	done    []ending // worked off, and not yet so on disk
	flushed time.Time
}

// attempt is what became of work on one event.
type attempt struct {
	over *ending // nil: it is not, or is removed already
	err  error
}

// ending is an event that is over and can be removed.
type ending struct {
	seq    uint64
	taken  time.Time
	forget []mark // by what it is not to be known any more
}

func (r *run) loop(ctx context.Context) error {
	for ctx.Err() == nil {
		var e *entry
		var wait time.Duration
		free := r.running < max(1, r.queue.config.Workers)
		if free {
			e, wait = r.queue.next()
		}
		idle := e == nil && r.running == 0
		if len(r.done) > 0 && (idle || len(r.done) >= flushAt || time.Since(r.flushed) >= flushAfter) {
			if err := r.queue.remove(r.done...); err != nil {
				return err
			}
			r.done, r.flushed = r.done[:0], time.Now()
		}
		if e != nil {
			r.running++
			go func() { r.tried <- r.queue.try(ctx, *e, r.work) }()
			continue
		}
		if err := r.wait(ctx, free, wait); err != nil {
			return err
		}
	}
	return nil
}

// wait returns when an attempt has ended, or when something may be due: if no
// more can be begun, that is of no interest.
func (r *run) wait(ctx context.Context, free bool, until time.Duration) error {
	wake := r.queue.wake
	if !free {
		wake, until = nil, 0
	}
	if len(r.done) > 0 && (until == 0 || until > flushAfter) {
		until = flushAfter
	}
	var timer <-chan time.Time
	if until > 0 {
		t := time.NewTimer(until)
		defer t.Stop()
		timer = t.C
	}
	select {
	case <-ctx.Done():
	case <-wake:
	case <-timer:
	case a := <-r.tried:
		return r.take(a)
	}
	return nil
}

func (r *run) take(a attempt) error {
	r.running--
	if a.over != nil {
		r.done = append(r.done, *a.over)
	}
	return a.err
}

// next takes the entry that is due out of the waiting ones, or says how long
// there will be none; 0 is until something comes.
func (q *Queue) next() (*entry, time.Duration) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.waiting) == 0 {
		return nil, 0
	}
	if wait := time.Until(q.waiting[0].at); wait > 0 {
		return nil, wait
	}
	e, _ := heap.Pop(&q.waiting).(entry) // the heap has nothing else
	return &e, 0
}

// try has one event worked on, and puts it back if that fails.
func (q *Queue) try(ctx context.Context, e entry, work func(context.Context, event.Event) error) attempt {
	var r record
	err := q.db.View(func(tx *bbolt.Tx) error {
		return json.Unmarshal(tx.Bucket(eventsBucket).Get(bytesOf(e.seq)), &r)
	})
	if err != nil {
		q.log.Error("an event in the queue cannot be read", "sequence", e.seq, "error", err)
		q.ended(event.Unreadable)
		return attempt{over: &ending{seq: e.seq}}
	}
	over := &ending{seq: e.seq, taken: r.Taken}
	err = q.work(ctx, r.Event, work)
	switch {
	case err == nil:
		q.ended("")
		return attempt{over: over}
	case errors.Is(err, event.ErrNothing):
		q.ended("")
		known, marks := keys(r.Event)
		over.forget = slices.DeleteFunc(marks, func(k mark) bool { return k == known[0] })
		return attempt{over: over}
	case ctx.Err() != nil: // it had no chance
	case time.Since(r.Taken) >= q.config.RetryFor.Duration():
		q.log.Warn("an event is given up", "image", r.Event.Image(), "receiver", r.Event.Source, "tries", e.tries+1, "error", err)
		q.ended(GaveUp)
		_, over.forget = keys(r.Event)
		return attempt{err: q.remove(*over)}
	default:
		e.at = time.Now().Add(backoff(e.tries))
		e.tries++
		q.log.Info("an event is tried again later", "image", r.Event.Image(), "receiver", r.Event.Source, "tries", e.tries, "error", err)
	}
	q.mu.Lock()
	heap.Push(&q.waiting, e)
	q.mu.Unlock()
	return attempt{}
}

// work has an event worked on, and makes a panic an error: what images and their
// signatures hold is foreign, and an event that ended the process would do so again
// after every start.
func (q *Queue) work(ctx context.Context, e event.Event, work func(context.Context, event.Event) error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			q.log.Error("panic over an event", "image", e.Image(), "receiver", e.Source, "err", fmt.Sprintf("%v\n%s", p, debug.Stack()))
			q.Panicked()
			err = errPanic
		}
	}()
	return work(ctx, e)
}

func backoff(tries int) time.Duration {
	return min(firstRetry<<min(tries, 20), lastRetry)
}

func (q *Queue) ended(why event.Kind) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if why == "" {
		q.done++
		return
	}
	q.nothing[why]++
}

// remove deletes events, and what makes them known where that is to be forgotten.
func (q *Queue) remove(over ...ending) error {
	if len(over) == 0 {
		return nil
	}
	err := q.db.Update(func(tx *bbolt.Tx) error {
		b, s := tx.Bucket(eventsBucket), q.memory(tx, time.Now())
		for _, o := range over {
			if err := errors.Join(b.Delete(bytesOf(o.seq)), s.forget(o.forget, o.taken)); err != nil {
				return err
			}
		}
		return add(tx, eventsBucket, -len(over))
	})
	if err != nil {
		return fmt.Errorf("queue.file: %w", err)
	}
	return nil
}

// entry is an event that waits, by its sequence.
type entry struct {
	at    time.Time
	seq   uint64
	tries int
}

// due is a heap of entries: the one that is due first is on top.
type due []entry

func (d due) Len() int { return len(d) }

func (d due) Less(i, j int) bool {
	if !d[i].at.Equal(d[j].at) {
		return d[i].at.Before(d[j].at)
	}
	return d[i].seq < d[j].seq
}

func (d due) Swap(i, j int) { d[i], d[j] = d[j], d[i] }

// Push implements heap.Interface.
func (d *due) Push(x any) {
	e, _ := x.(entry) // nothing else is pushed
	*d = append(*d, e)
}

// Pop implements heap.Interface.
func (d *due) Pop() any {
	last := len(*d) - 1
	e := (*d)[last]
	*d = (*d)[:last]
	return e
}
