package store

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// digestLag is how far the hasher may be behind for Digest to wait for it.
const digestLag = 1 << 20

// stream is one client's writer to an ingest. Its fields are guarded by in.mu.
type stream struct {
	in  *Ingest
	ref string

	waiting  bool // in Wait
	released bool // brings bytes by itself, from pos on
	closed   bool
	err      error // why it can go on no more
	pos      int64 // where Write goes on
	pending  int   // chunks queued or being written
	started  time.Time
	updated  time.Time
}

var (
	_ content.Writer = (*stream)(nil)
	_ Waiter         = (*stream)(nil)
	_ OwnedWriter    = (*stream)(nil)
)

// attach opens a stream. Store.mu must be held.
func (in *Ingest) attach(r *ref) *stream {
	in.mu.Lock()
	defer in.mu.Unlock()
	w := &stream{in: in, ref: r.name, started: r.started, updated: r.updated, pos: in.offsetLocked()}
	in.streams[w] = true
	in.hashLocked()
	in.changedLocked()
	return w
}

// Status returns at once. Offset is where the client has to go on: before the
// stream is released the prefix as it is now (the whole size only when the
// blob is whole), afterwards the stream's own position, whatever others have
// brought since: the client brings its bytes in order and counts on that.
func (w *stream) Status() (content.Status, error) {
	w.in.mu.Lock()
	defer w.in.mu.Unlock()
	if w.err != nil {
		return content.Status{}, w.err
	}
	at := w.pos
	if !w.released {
		at = w.in.offsetLocked()
		if !w.in.whole {
			// A client that writes without Wait goes on from what it was told.
			w.pos = at
		}
	}
	return content.Status{
		Ref: w.ref, Offset: at, Total: w.in.size, Expected: w.in.digest,
		StartedAt: w.started, UpdatedAt: w.updated,
	}, nil
}

// Wait implements Waiter.
func (w *stream) Wait(ctx context.Context) error {
	in := w.in
	in.mu.Lock()
	defer in.mu.Unlock()
	if w.closed || w.err != nil || w.released || in.whole {
		return w.usableLocked()
	}
	w.waiting = true
	in.waiters = append(in.waiters, w)
	in.startFillLocked()
	in.changedLocked()
	for !w.released {
		if err := w.usableLocked(); err != nil || in.whole {
			in.unwaitLocked(w)
			in.changedLocked()
			return err
		}
		if err := ctx.Err(); err != nil {
			in.unwaitLocked(w)
			in.changedLocked()
			return fmt.Errorf("wait for %s: %w", in.digest, err)
		}
		d, may := in.turnLocked(w)
		if may && d <= 0 {
			in.releaseLocked(w)
			return nil
		}
		in.sleepLocked(ctx, d, may)
	}
	return nil
}

// sleepLocked waits for the next change, the end of ctx or, if timed, d. mu
// must be held; it is let go of meanwhile.
func (in *Ingest) sleepLocked(ctx context.Context, d time.Duration, timed bool) {
	changed := in.watchLocked()
	in.mu.Unlock()
	defer in.mu.Lock()
	var after <-chan time.Time
	if timed {
		t := time.NewTimer(d)
		defer t.Stop()
		after = t.C
	}
	select {
	case <-changed:
	case <-after:
	case <-ctx.Done():
	}
}

// usableLocked says why the stream can go on no more. in.mu must be held.
func (w *stream) usableLocked() error {
	if w.err != nil {
		return w.err
	}
	if w.closed {
		return fmt.Errorf("writer of ref %s is closed: %w", w.ref, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// failLocked ends the stream with an error; the first one counts. in.mu must
// be held, and the caller must tell of the change.
func (w *stream) failLocked(err error) {
	if w.err == nil {
		w.err = err
	}
}

// Write queues a copy of p to be written and hashed and returns, unless too
// much is queued. An error of an earlier Write may surface here. The Write
// that brings the last byte waits until the blob is checked, synced and in its
// place, so that Commit has nothing left to wait for.
func (w *stream) Write(p []byte) (int, error) {
	w.in.mu.Lock()
	defer w.in.mu.Unlock()
	if err := w.beginLocked(len(p)); err != nil {
		return 0, err
	}
	n := 0
	for n < len(p) {
		m, err := w.appendLocked(p[n:])
		n += m
		if err != nil {
			return n, err
		}
	}
	return n, w.endLocked()
}

// WriteOwned implements OwnedWriter.
func (w *stream) WriteOwned(p []byte, free func()) (int, error) {
	in := w.in
	in.mu.Lock()
	defer in.mu.Unlock()
	if err := w.beginLocked(len(p)); err != nil {
		return 0, err
	}
	end := w.pos + int64(len(p))
	if len(p) > 0 && !in.present.has(w.pos, end) {
		if err := w.roomLocked(); err != nil {
			return 0, err
		}
		c := &chunk{stream: w, gen: in.gen, off: w.pos, buf: p[:len(p):len(p)], free: free}
		in.queueLocked(c)
	} else if free != nil {
		free()
	}
	w.pos = end
	return len(p), w.endLocked()
}

// beginLocked checks that n bytes may be written. in.mu must be held.
func (w *stream) beginLocked(n int) error {
	if err := w.usableLocked(); err != nil {
		return err
	}
	if w.waiting {
		return fmt.Errorf("ref %s is written while it waits: %w", w.ref, errdefs.ErrFailedPrecondition)
	}
	if int64(n) > w.in.size-w.pos {
		return fmt.Errorf("%d bytes at %d of ref %s go beyond its %d bytes: %w",
			n, w.pos, w.ref, w.in.size, errdefs.ErrFailedPrecondition)
	}
	w.in.store.counter.Fetched(n)
	if w.released || n == 0 {
		return nil
	}
	if w.pos > w.in.offsetLocked() {
		// The bytes before it were wrong and are gone since Status told it.
		w.failLocked(fmt.Errorf("ref %s: the first %d bytes were thrown away: %w", w.ref, w.pos, errdefs.ErrFailedPrecondition))
		return w.err
	}
	w.released, w.in.progress = true, time.Now()
	w.in.changedLocked()
	return nil
}

// roomLocked waits until more may be queued. in.mu must be held; it is let go
// of meanwhile.
func (w *stream) roomLocked() error {
	for w.in.held >= queueLimit {
		if err := w.usableLocked(); err != nil {
			return err
		}
		w.in.cond.Wait()
	}
	return w.usableLocked()
}

// appendLocked queues a copy of the beginning of p, or skips what is present.
// in.mu must be held.
func (w *stream) appendLocked(p []byte) (int, error) {
	in := w.in
	c := w.tailLocked()
	if c == nil {
		gaps := in.present.gaps(w.pos, w.pos+int64(len(p)))
		if len(gaps) == 0 {
			w.pos += int64(len(p))
			return len(p), nil
		}
		if skip := gaps[0].lo - w.pos; skip > 0 {
			w.pos += skip
			return int(skip), nil
		}
		if err := w.roomLocked(); err != nil {
			return 0, err
		}
		c = &chunk{stream: w, gen: in.gen, off: w.pos}
		switch left := in.size - w.pos; {
		case left < smallChunk:
			c.buf = make([]byte, 0, left)
		case len(p) < smallChunk:
			c.buf, c.free = smallPool.get()
		default:
			c.buf, c.free = bigPool.get()
		}
		n := min(len(p), cap(c.buf))
		c.buf = append(c.buf, p[:n]...)
		w.pos += int64(n)
		in.queueLocked(c)
		return n, w.err
	}
	n := min(len(p), cap(c.buf)-len(c.buf))
	c.buf = append(c.buf, p[:n]...)
	w.pos += int64(n)
	return n, nil
}

// tailLocked returns the last queued chunk if more can be put into it. in.mu
// must be held.
func (w *stream) tailLocked() *chunk {
	q := w.in.queue
	if len(q) == 0 {
		return nil
	}
	c := q[len(q)-1]
	full := len(c.buf) == cap(c.buf)
	if c.stream != w || full || c.gen != w.in.gen || c.off+int64(len(c.buf)) != w.pos {
		return nil
	}
	return c
}

// endLocked ends a Write. in.mu must be held.
func (w *stream) endLocked() error {
	w.updated = time.Now()
	for w.pos == w.in.size && !w.in.whole {
		if err := w.usableLocked(); err != nil {
			return err
		}
		if w.pending > 0 || w.in.completeLocked() {
			w.in.cond.Wait()
			continue
		}
		// Every stream begins where nothing is missing before it; but what was
		// there may have been wrong, and may come again.
		left := w.in.repairLocked()
		if left <= 0 {
			w.failLocked(cmp.Or(w.in.fault,
				fmt.Errorf("ref %s: bytes before the last are missing: %w", w.ref, errdefs.ErrFailedPrecondition)))
			return w.err
		}
		w.in.sleepLocked(context.Background(), left, true)
	}
	return w.err
}

// repairLocked says for how long the bytes that were wrong and are missing now
// are to be waited for; 0 if nobody brings them. mu must be held.
func (in *Ingest) repairLocked() time.Duration {
	if (in.failed == 0 && !in.forgot) || !in.filling {
		return 0
	}
	return time.Until(in.progress.Add(in.store.maxWait))
}

// Digest returns the digest of the bytes before the stream's position; it
// waits for the hasher if that is nearly there and nobody else adds to what it
// has to do. Else it returns "": there is no quick answer.
func (w *stream) Digest() digest.Digest {
	in := w.in
	in.mu.Lock()
	defer in.mu.Unlock()
	for {
		switch {
		case in.whole:
			return in.digest
		case w.pending == 0 && !in.hashing && in.hashed == in.present.prefix():
			return digest.NewDigest(digest.SHA256, in.hash)
		case w.err != nil || in.filling || len(in.streams) > 1 || w.pos-in.hashed > digestLag || in.present.prefix()-in.hashed > digestLag,
			w.pending == 0 && !in.hashing:
			return ""
		}
		in.cond.Wait()
	}
}

// Truncate goes back to offset 0, the only size there is. If nobody else uses
// the ingest its bytes are thrown away; else what is present stays and the
// stream's bytes are only used where they are missing.
func (w *stream) Truncate(size int64) error {
	if size != 0 {
		return fmt.Errorf("truncate ref %s to %d: %w", w.ref, size, errdefs.ErrNotImplemented)
	}
	in := w.in
	in.mu.Lock()
	w.drainLocked()
	err := w.usableLocked()
	if err == nil && w.waiting {
		err = fmt.Errorf("ref %s is truncated while it waits: %w", w.ref, errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		in.mu.Unlock()
		return err
	}
	w.pos, w.released, w.updated = 0, true, time.Now()
	in.changedLocked()
	in.mu.Unlock()
	in.discard(func() (keep ranges, may bool) {
		// A second stream may have been told how far the bytes reach.
		return ranges{}, len(in.streams) == 1 && !in.filling && !in.completeLocked()
	})
	return nil
}

// Commit makes the blob visible, which must be whole, and closes the stream,
// also on errors. If the blob is whole there is nothing to wait for.
func (w *stream) Commit(_ context.Context, size int64, expected digest.Digest, opts ...content.Opt) error {
	var info content.Info
	for _, opt := range opts {
		if err := opt(&info); err != nil {
			return w.leave(err, false)
		}
	}
	w.in.mu.Lock()
	err := w.committableLocked(size, expected)
	w.drainLocked()
	w.in.mu.Unlock()
	if err == nil {
		err = w.in.store.commit(w.in.digest, info.Labels)
	}
	return w.leave(err, err == nil)
}

// committableLocked says why the stream cannot be committed. in.mu must be
// held.
func (w *stream) committableLocked(size int64, expected digest.Digest) error {
	in := w.in
	if err := w.usableLocked(); err != nil {
		return err
	}
	have := w.pos
	if !w.released {
		have = in.offsetLocked()
	}
	want := in.size
	if size > 0 {
		want = size
	}
	if have != want || want != in.size {
		return fmt.Errorf("ref %s: unexpected commit size %d, expected %d: %w", w.ref, have, want, errdefs.ErrFailedPrecondition)
	}
	if expected != "" && expected != in.digest {
		return fmt.Errorf("ref %s: unexpected commit digest %s, expected %s: %w", w.ref, in.digest, expected, errdefs.ErrFailedPrecondition)
	}
	if !in.whole {
		return fmt.Errorf("ref %s: blob %s is not checked yet: %w", w.ref, in.digest, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// commit makes a blob that is whole visible.
func (s *Store) commit(d digest.Digest, set map[string]string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	b := s.lookupLocked(d)
	if b == nil {
		return fmt.Errorf("content %s was deleted before its commit: %w", d, errdefs.ErrFailedPrecondition)
	}
	if b.hidden {
		// containerd takes the file's time for the time of the commit.
		now := time.Now()
		if err := os.Chtimes(s.blobPath(d), now, now); err != nil {
			s.log.Warn("commit time not set", "digest", d, "err", err)
		}
	}
	s.showLocked(d, b)
	if set != nil {
		b.labels = set
		s.dirty[d] = struct{}{}
	}
	return nil
}

// Close lets go of the ref, once what was written is in the file. The ingest
// can be gone on with by a new writer.
func (w *stream) Close() error {
	w.in.mu.Lock()
	w.drainLocked()
	closed := w.closed
	w.in.mu.Unlock()
	if closed {
		return nil
	}
	return w.leave(nil, false)
}

// drainLocked waits until what the stream has written is in the file, so that
// the next stream of its ref goes on from there. in.mu must be held; it is let
// go of meanwhile.
func (w *stream) drainLocked() {
	for w.pending > 0 {
		w.in.cond.Wait()
	}
}

// leave closes the stream and forgets its ref if that is committed. It returns
// err.
func (w *stream) leave(err error, committed bool) error {
	s := w.in.store
	s.mu.Lock()
	defer s.mu.Unlock()
	if !w.abandon(nil) {
		return err
	}
	// After an abort the ref may be another stream's already.
	if r := s.refs[w.ref]; r != nil && r.stream == w {
		w.in.mu.Lock()
		r.stream, r.updated = nil, w.updated
		r.whole, r.present = w.in.whole, w.in.present.total
		w.in.mu.Unlock()
		if committed {
			delete(s.refs, w.ref)
			wake(s.evict)
		}
	}
	s.settleLocked(w.in)
	return err
}

// abandon takes the stream from its ingest, so that another takes over. It
// reports false if that was done before.
func (w *stream) abandon(err error) bool {
	w.in.mu.Lock()
	defer w.in.mu.Unlock()
	if w.closed {
		return false
	}
	if err != nil {
		w.failLocked(err)
	}
	w.closed = true
	delete(w.in.streams, w)
	w.in.changedLocked()
	return true
}
