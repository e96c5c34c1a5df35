package store

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"os"
	"runtime/debug"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// Ingest is a blob on its way in: the one place where the streams of all
// clients and the Filler put its bytes. A Filler may use it from the start of
// Fill until Fill returns, from any number of goroutines.
type Ingest struct {
	store  *Store
	digest digest.Digest
	size   int64

	// wmu is held from the look at what is missing, through the writing, until
	// what was written is present, so that no byte changes once it is present.
	wmu sync.Mutex
	// saveMu lets one save run at a time. It is taken before all other locks.
	saveMu sync.Mutex

	mu      sync.Mutex
	cond    *sync.Cond    // mu; signalled at every change
	changed chan struct{} // guarded by mu; closed at the next change; nil if nobody watches
	file    *os.File      // guarded by mu; staging, later the blob; nil when closed or never needed

	present ranges // guarded by mu
	brought ranges // guarded by mu; what of it streams have brought, and not Fill
	synced  ranges // guarded by mu; what the sidecar may call synced
	savedAt int64  // guarded by mu; present.total when the sidecar was last written
	saving  bool   // guarded by mu
	unflown int64  // guarded by mu; bytes written since writeback was last started
	gen     int    // guarded by mu; how often the bytes were thrown away

	hash   hash.Hash // of the bytes before hashed; the hasher's while hashing, else guarded by mu
	hashed int64     // guarded by mu
	tail   []*chunk  // guarded by mu; just written, for the hasher to take instead of reading
	queue  []*chunk  // guarded by mu; to be written
	held   int64     // guarded by mu; bytes of memory in queue, tail and at work

	hashing, pumping, retiring bool  // guarded by mu; the goroutine of that job runs
	finishing                  bool  // guarded by mu; all is there and being checked, synced, renamed
	whole                      bool  // guarded by mu
	unwritable                 bool  // guarded by mu; its bytes could not be kept, which was counted
	forgot                     bool  // guarded by mu; Forget has thrown bytes away
	roomless                   bool  // guarded by mu; the disk was full: what is staged is not kept for later
	dead                       bool  // guarded by mu; gave way to one of another size: its staging is no longer its own
	failed                     int   // guarded by mu; State.Failed
	fault                      error // guarded by mu; why it last failed

	filling  bool               // guarded by mu
	endFill  context.CancelFunc // guarded by mu; set while filling
	streams  map[*stream]bool   // guarded by mu; open ones
	waiters  []*stream          // guarded by mu; streams in Wait, longest first
	progress time.Time          // guarded by mu; when a byte last became present or a stream was released
}

// State is what an Ingest has come to.
type State struct {
	Prefix  int64 // contiguous bytes from 0 on
	Present int64 // bytes in all
	Brought int64 // of these, bytes that streams have brought, and not Fill
	Waiting int   // streams blocked in Wait
	Writing int   // streams released to the registry and still open
	Whole   bool  // all is there, has the digest, is synced and in blobs/
	Failed  int   // times the assembled bytes did not have the digest; Fill's are thrown away each time
}

func newIngest(s *Store, d digest.Digest, size int64, f *os.File, whole bool) *Ingest {
	in := &Ingest{
		store: s, digest: d, size: size, file: f, whole: whole,
		hash: sha256.New(), streams: map[*stream]bool{},
	}
	in.cond = sync.NewCond(&in.mu)
	if whole {
		in.present.add(0, size)
	}
	return in
}

// Digest returns the blob's digest.
func (in *Ingest) Digest() digest.Digest { return in.digest }

// Size returns the blob's size in bytes; at least 1.
func (in *Ingest) Size() int64 { return in.size }

// Watch returns the state now and a channel that is closed at its next change.
func (in *Ingest) Watch() (State, <-chan struct{}) {
	in.mu.Lock()
	defer in.mu.Unlock()
	return State{
		Prefix: in.present.prefix(), Present: in.present.total, Brought: in.brought.total,
		Waiting: len(in.waiters), Writing: in.writingLocked(),
		Whole: in.whole, Failed: in.failed,
	}, in.watchLocked()
}

func (in *Ingest) watchLocked() <-chan struct{} {
	if in.changed == nil {
		in.changed = make(chan struct{})
	}
	return in.changed
}

// changedLocked wakes everyone who waits for a change. mu must be held.
func (in *Ingest) changedLocked() {
	in.cond.Broadcast()
	if in.changed != nil {
		close(in.changed)
		in.changed = nil
	}
}

// writingLocked counts the streams that bring the registry's bytes. mu must be
// held.
func (in *Ingest) writingLocked() int {
	n := 0
	for w := range in.streams {
		if w.released && w.err == nil {
			n++
		}
	}
	return n
}

func (in *Ingest) isWhole() bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.whole
}

func (in *Ingest) inUse() bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.inUseLocked()
}

func (in *Ingest) inUseLocked() bool { return len(in.streams) > 0 || in.filling }

// ReadAt reads the blob's file, whether the bytes are present or not.
func (in *Ingest) ReadAt(p []byte, off int64) (int, error) {
	in.mu.Lock()
	f := in.file
	in.mu.Unlock()
	if f == nil {
		return 0, fmt.Errorf("read ingest %s: %w", in.digest, os.ErrClosed)
	}
	return f.ReadAt(p, off)
}

// rangeErr refuses ranges that do not lie within the blob: peers name them.
func (in *Ingest) rangeErr(off, n int64) error {
	if off < 0 || n < 0 || off > in.size || n > in.size-off {
		return fmt.Errorf("%d bytes at %d of ingest %s of %d bytes: %w", n, off, in.digest, in.size, errdefs.ErrOutOfRange)
	}
	return nil
}

// View is the ingest as it is until its bytes are thrown away: from then on its
// methods fail with ErrAborted, so that whoever exchanged those bytes neither
// hands on nor brings back what was wrong. Like the Ingest it may be used from
// any number of goroutines until Fill returns.
type View struct {
	in  *Ingest
	gen int
}

// View returns a view of the bytes as they are now.
func (in *Ingest) View() View {
	in.mu.Lock()
	defer in.mu.Unlock()
	return View{in, in.gen}
}

// staleLocked says that a view's bytes are no more. in.mu must be held.
func (v View) staleLocked() error {
	if v.gen != v.in.gen || v.in.dead {
		return fmt.Errorf("ingest %s: its bytes were thrown away: %w", v.in.digest, errdefs.ErrAborted)
	}
	return nil
}

// ReadAt is [Ingest.ReadAt].
func (v View) ReadAt(p []byte, off int64) (int, error) {
	n, err := v.in.ReadAt(p, off)
	v.in.mu.Lock()
	defer v.in.mu.Unlock()
	if stale := v.staleLocked(); stale != nil { // and was perhaps before it was read
		return 0, stale
	}
	return n, err
}

// WriteAt is [Ingest.WriteAt].
func (v View) WriteAt(p []byte, off int64) (int, error) { return v.in.writeAt(p, off, v.staleLocked) }

// MarkPresent is [Ingest.MarkPresent].
func (v View) MarkPresent(off, n int64) error { return v.in.markPresent(off, n, v.staleLocked) }

// Present is [Ingest.Present], and false once the bytes are thrown away.
func (v View) Present(off, n int64) bool {
	v.in.mu.Lock()
	stale := v.staleLocked()
	v.in.mu.Unlock()
	return stale == nil && v.in.Present(off, n)
}

// Forget throws away what did not come from streams, because it is known to be
// wrong; streams that were released behind it wait at their end until Fill has
// brought it again. It does nothing once every byte is present: then it is the
// digest that decides.
func (in *Ingest) Forget() {
	in.discard(func() (keep ranges, may bool) {
		if in.completeLocked() || in.brought.total == in.present.total {
			return ranges{}, false
		}
		in.forgot, in.progress = true, time.Now()
		return in.brought.clone(), true
	})
}

// deadLocked says that the ingest gave way to another. mu must be held.
func (in *Ingest) deadLocked() error {
	if in.dead {
		return fmt.Errorf("ingest %s: %w", in.digest, errdefs.ErrAborted)
	}
	return nil
}

// WriteAt writes bytes that nobody has verified. They are not present until
// MarkPresent says so. Bytes that are present already are left alone, silently.
func (in *Ingest) WriteAt(p []byte, off int64) (int, error) { return in.writeAt(p, off, in.deadLocked) }

// writeAt is WriteAt unless refuse, called with mu held, says no.
func (in *Ingest) writeAt(p []byte, off int64, refuse func() error) (int, error) {
	if err := in.rangeErr(off, int64(len(p))); err != nil {
		return 0, err
	}
	in.wmu.Lock()
	defer in.wmu.Unlock()
	in.mu.Lock()
	gaps, f, err := in.present.gaps(off, off+int64(len(p))), in.file, refuse()
	in.mu.Unlock()
	if err != nil {
		return 0, fmt.Errorf("write: %w", err)
	}
	if len(gaps) == 0 {
		return len(p), nil
	}
	if f == nil {
		return 0, fmt.Errorf("write ingest %s: %w", in.digest, os.ErrClosed)
	}
	for _, g := range gaps {
		if n, err := f.WriteAt(p[g.lo-off:g.hi-off], g.lo); err != nil {
			in.mu.Lock()
			in.failedLocked(err)
			in.mu.Unlock()
			return int(g.lo-off) + n, fmt.Errorf("write ingest %s: %w", in.digest, err)
		}
	}
	return len(p), nil
}

// failedLocked notes that the bytes could not be kept. mu must be held.
func (in *Ingest) failedLocked(err error) {
	if !in.unwritable {
		in.unwritable = true
		in.store.counter.Failed()
	}
	if isFull(err) {
		in.roomless = true
		wake(in.store.full)
	}
}

// isFull reports whether an error says that there is no room on the disk.
func isFull(err error) bool { return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) }

// MarkPresent says that the bytes of a range have been written and are good.
func (in *Ingest) MarkPresent(off, n int64) error { return in.markPresent(off, n, in.deadLocked) }

// markPresent is MarkPresent unless refuse, called with mu held, says no.
func (in *Ingest) markPresent(off, n int64, refuse func() error) error {
	if err := in.rangeErr(off, n); err != nil {
		return err
	}
	in.wmu.Lock()
	in.mu.Lock()
	err := refuse()
	if err == nil && in.file == nil && !in.whole {
		err = fmt.Errorf("ingest %s: %w", in.digest, errdefs.ErrAborted)
	}
	if err != nil {
		in.mu.Unlock()
		in.wmu.Unlock()
		return err
	}
	before := in.present.total
	in.addLocked(off, off+n)
	if in.present.total != before {
		in.changedLocked()
	}
	in.mu.Unlock()
	in.wmu.Unlock()
	in.afterWrite()
	return nil
}

// Present reports whether every byte of a range is present.
func (in *Ingest) Present(off, n int64) bool {
	if in.rangeErr(off, n) != nil {
		return false
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.present.has(off, off+n)
}

// Fetch releases the stream that has waited longest to the registry: it goes
// on at the prefix as it is now. It reports false if none waits, or if every
// byte is there already and being checked.
func (in *Ingest) Fetch() bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	if len(in.waiters) == 0 || in.completeLocked() {
		return false
	}
	in.releaseLocked(in.waiters[0])
	return true
}

// completeLocked reports whether every byte is there, checked or not. mu must
// be held.
func (in *Ingest) completeLocked() bool { return in.present.total == in.size }

// offsetLocked is where a stream that is not released yet would go on. It is
// never the whole size before the blob is whole: who sees that commits. mu
// must be held.
func (in *Ingest) offsetLocked() int64 {
	if in.whole {
		return in.size
	}
	return min(in.present.prefix(), in.size-1)
}

// releaseLocked sends a stream to the registry. mu must be held.
func (in *Ingest) releaseLocked(w *stream) {
	in.unwaitLocked(w)
	w.released, w.pos = true, in.offsetLocked()
	in.progress = time.Now()
	in.changedLocked()
}

// unwaitLocked takes a stream from among those that wait. mu must be held.
func (in *Ingest) unwaitLocked(w *stream) {
	for i, x := range in.waiters {
		if x == w {
			in.waiters = append(in.waiters[:i], in.waiters[i+1:]...)
			break
		}
	}
	w.waiting = false
}

// turnLocked says in how long the stream, which waits, may go to the registry
// by itself, because no Fill decides it. mu must be held.
func (in *Ingest) turnLocked(w *stream) (time.Duration, bool) {
	if in.filling || in.waiters[0] != w || in.completeLocked() {
		return 0, false
	}
	if in.writingLocked() == 0 {
		return 0, true
	}
	return time.Until(in.progress.Add(in.store.maxWait)), true
}

// startFillLocked runs Fill unless it runs. mu must be held.
func (in *Ingest) startFillLocked() {
	f := in.store.filler
	if f == nil || in.filling || in.whole || in.dead {
		return
	}
	ctx, cancel := context.WithCancel(in.store.ctx)
	in.filling, in.endFill = true, cancel
	started := in.store.spawn(func() {
		defer cancel()
		in.fill(ctx, f)
		in.mu.Lock()
		in.filling, in.endFill = false, nil
		in.changedLocked()
		in.mu.Unlock()
		in.store.settle(in)
	})
	if !started {
		in.filling, in.endFill = false, nil
		cancel()
	}
}

// fill calls Fill. A panic in it must not take the content store down.
func (in *Ingest) fill(ctx context.Context, f Filler) {
	defer func() {
		if r := recover(); r != nil {
			in.store.panicked()
			in.store.log.Error("panic while filling a blob: going on without peers",
				"digest", in.digest, "panic", r, "stack", string(debug.Stack()))
		}
	}()
	f.Fill(ctx, in)
}

// kill takes its staging away from an ingest that no stream uses. It reports
// false if there is one, or if it is too late because the blob is complete.
func (in *Ingest) kill() bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	if len(in.streams) > 0 || in.whole || in.finishing {
		return false
	}
	in.dead = true
	if in.endFill != nil {
		in.endFill()
	}
	in.changedLocked()
	return true
}

// failStreams ends every open stream with an error.
func (in *Ingest) failStreams(err error) {
	in.mu.Lock()
	defer in.mu.Unlock()
	for w := range in.streams {
		w.failLocked(err)
	}
	in.changedLocked()
}

// settle drops from memory an ingest that neither a stream nor Fill uses.
func (s *Store) settle(in *Ingest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.settleLocked(in)
}

// settleLocked is settle with mu held. An unfinished ingest is kept on disk
// first, in a goroutine; until that is through it can be used again.
func (s *Store) settleLocked(in *Ingest) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.roomless && len(in.streams) == 0 && in.filling {
		in.endFill() // it would fill a full disk, for nobody
	}
	if in.inUseLocked() {
		return
	}
	if in.whole || in.dead {
		s.dropLocked(in)
		return
	}
	if !in.retiring {
		in.retiring = s.spawn(func() { s.retire(in) })
	}
}

// retire keeps an unused ingest on disk and drops it from memory, unless it
// has come to use again.
func (s *Store) retire(in *Ingest) {
	for {
		in.mu.Lock()
		for in.busyLocked() && !in.inUseLocked() {
			in.cond.Wait()
		}
		keep := !in.roomless
		in.mu.Unlock()
		if !keep {
			// It is given back when the ingest is dropped.
		} else if err := in.save(true); err != nil {
			s.log.Warn("unfinished blob may have to start anew", "digest", in.digest, "err", err)
			in.mu.Lock()
			in.failedLocked(err) // on a full disk what cannot be gone on with is not to stay
			in.mu.Unlock()
		}
		if s.retired(in) {
			return
		}
	}
}

// retired drops an ingest that was kept on disk. It reports false if it has
// changed again since.
func (s *Store) retired(in *Ingest) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	in.mu.Lock()
	defer in.mu.Unlock()
	switch {
	case in.inUseLocked():
		in.retiring = false // whoever uses it settles it again
	case in.busyLocked():
		return false
	default:
		in.retiring = false
		s.dropLocked(in)
		if in.roomless {
			s.dropStaging(in.digest)
		}
	}
	return true
}

// busyLocked reports whether a goroutine works at the file. mu must be held.
func (in *Ingest) busyLocked() bool { return in.hashing || in.pumping }

// dropLocked closes an ingest and takes it from memory. mu and in.mu must be
// held.
func (s *Store) dropLocked(in *Ingest) {
	if s.ingests[in.digest] == in {
		for _, r := range s.refs {
			if r.digest == in.digest {
				r.whole, r.present = in.whole, in.present.total
			}
		}
		delete(s.ingests, in.digest)
	}
	in.closeLocked()
	wake(s.evict)
}

func (in *Ingest) closeLocked() {
	if in.file == nil {
		return
	}
	if err := in.file.Close(); err != nil {
		in.store.log.Warn("staging not closed", "digest", in.digest, "err", err)
	}
	in.file = nil
}

// park keeps the ingest on disk for the next start. Nothing else uses it any
// more.
func (in *Ingest) park() error {
	err := in.save(true)
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.file != nil {
		err = errors.Join(err, in.file.Close())
		in.file = nil
	}
	return err
}
