package store

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/filters"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// errClosed is what streams and Writer return once Close was called.
var errClosed = fmt.Errorf("content store is closed: %w", errdefs.ErrUnavailable)

// Info describes a blob and makes it visible: containerd asks when it is about
// to refer to it.
func (s *Store) Info(ctx context.Context, d digest.Digest) (content.Info, error) {
	if err := d.Validate(); err != nil {
		return content.Info{}, fmt.Errorf("info of %q: %w: %w", d, err, errdefs.ErrInvalidArgument)
	}
	if !s.show(d) {
		return content.Info{}, fmt.Errorf("content %s: %w", d, errdefs.ErrNotFound)
	}
	return s.local.Info(ctx, d)
}

// Update changes labels, as containerd's local store does. They reach the disk
// a few seconds later.
func (s *Store) Update(ctx context.Context, info content.Info, fieldpaths ...string) (content.Info, error) {
	if err := info.Digest.Validate(); err != nil {
		return content.Info{}, fmt.Errorf("update of %q: %w: %w", info.Digest, err, errdefs.ErrInvalidArgument)
	}
	s.show(info.Digest)
	return s.local.Update(ctx, info, fieldpaths...)
}

// Walk calls fn for every visible blob that matches one of the filters. fn may
// call the store.
func (s *Store) Walk(ctx context.Context, fn content.WalkFunc, fs ...string) error {
	filter, err := filters.ParseAll(fs...)
	if err != nil {
		return err
	}
	s.mu.Lock()
	list := make([]digest.Digest, 0, len(s.blobs))
	for d, b := range s.blobs {
		if !b.hidden {
			list = append(list, d)
		}
	}
	s.mu.Unlock()
	slices.Sort(list)
	for _, d := range list {
		if err := ctx.Err(); err != nil {
			return err
		}
		info, err := s.local.Info(ctx, d)
		if errdefs.IsNotFound(err) {
			continue // gone in the meantime
		}
		if err != nil {
			return err
		}
		if !filter.Match(content.AdaptInfo(info)) {
			continue
		}
		if err := fn(info); err != nil {
			return err
		}
	}
	return nil
}

// Delete hides a blob: containerd has done with it, other nodes have not.
// Without a quota for hidden blobs it removes it.
func (s *Store) Delete(_ context.Context, d digest.Digest) error {
	if err := d.Validate(); err != nil {
		return fmt.Errorf("delete %q: %w: %w", d, err, errdefs.ErrInvalidArgument)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	b := s.lookupLocked(d)
	if b == nil {
		return fmt.Errorf("content %s: %w", d, errdefs.ErrNotFound)
	}
	if s.quota <= 0 && !s.claimedLocked(d) {
		return s.removeLocked(d)
	}
	if !b.hidden {
		b.hidden, b.used = true, s.nowLocked()
		s.dirty[d] = struct{}{}
		wake(s.evict)
	}
	return nil
}

// ReaderAt opens a blob, visible or hidden, and counts as its use.
func (s *Store) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	r, err := s.local.ReaderAt(ctx, desc)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	if b := s.blobs[desc.Digest]; b != nil {
		s.useLocked(desc.Digest, b)
	}
	s.mu.Unlock()
	return r, nil
}

// Status describes the ingest of a ref. Its Offset is the bytes that are
// there, in whatever order they came, and so moves while the swarm works; it
// equals Total only when the blob is whole.
func (s *Store) Status(ctx context.Context, name string) (content.Status, error) {
	s.mu.Lock()
	if r := s.refs[name]; r != nil {
		defer s.mu.Unlock()
		return r.status(s.ingests[r.digest]), nil
	}
	s.mu.Unlock()
	return s.local.Status(ctx, name)
}

// ListStatuses describes the ingests that were opened by a ref. What only the
// swarm works at is not among them: containerd aborts what it does not know.
func (s *Store) ListStatuses(ctx context.Context, fs ...string) ([]content.Status, error) {
	filter, err := filters.ParseAll(fs...)
	if err != nil {
		return nil, err
	}
	list, err := s.local.ListStatuses(ctx, fs...)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	// A ref that was begun before ImageWolf came is in both.
	list = slices.DeleteFunc(list, func(st content.Status) bool { return s.refs[st.Ref] != nil })
	for name, r := range s.refs {
		match := filter.Match(filters.AdapterFunc(func(field []string) (string, bool) {
			return name, len(field) > 0 && field[0] == "ref"
		}))
		if match {
			list = append(list, r.status(s.ingests[r.digest]))
		}
	}
	return list, nil
}

// Abort forgets a ref. A stream that is open on it fails from here on. With
// the last ref of a blob that is not whole go its bytes, and its Fill is told
// to end.
func (s *Store) Abort(ctx context.Context, name string) error {
	s.mu.Lock()
	r := s.refs[name]
	if r != nil {
		s.abortLocked(r)
	}
	s.mu.Unlock()
	err := s.local.Abort(ctx, name)
	if r != nil && errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

// abortLocked forgets a ref. mu must be held. What has come of the blob stays
// for a while, even without a ref: containerd aborts the ingests of a pull that
// failed, and the next try of the same pull goes on where it ended; and other
// nodes may be taking it from here. See sweep.
func (s *Store) abortLocked(r *ref) {
	delete(s.refs, r.name)
	wake(s.evict) // the ref may have kept a hidden blob
	if w := r.stream; w != nil {
		w.abandon(fmt.Errorf("ref %s was aborted: %w", r.name, errdefs.ErrAborted))
		s.settleLocked(w.in)
	}
}

// Writer opens or resumes the ingest of a ref. If digest and size are known
// the writer is a stream of the blob's shared Ingest, with the abilities
// [Waiter] and [OwnedWriter]; else it is the local store's. A ref that is open
// already is ErrUnavailable. A blob that is here already is ErrAlreadyExists
// if the descriptor names it and the ref is new; if only the ref does, the stream is whole from
// the start instead, because containerd takes ErrAlreadyExists for "this
// namespace has it" when it has not said which digest it expects.
func (s *Store) Writer(ctx context.Context, opts ...content.WriterOpt) (content.Writer, error) {
	var o content.WriterOpts
	for _, opt := range opts {
		if err := opt(&o); err != nil {
			return nil, err
		}
	}
	if o.Ref == "" {
		return nil, fmt.Errorf("ref must not be empty: %w", errdefs.ErrInvalidArgument)
	}
	if d, ok := known(o); ok {
		w, err := s.openStream(o.Ref, d, o.Desc.Size, o.Desc.Digest != "")
		if err != nil {
			return nil, err
		}
		return w, nil
	}
	if d := o.Desc.Digest; d != "" && d.Validate() == nil && s.show(d) {
		return nil, fmt.Errorf("content %s: %w", d, errdefs.ErrAlreadyExists)
	}
	w, err := s.local.Writer(ctx, opts...)
	if err != nil {
		return nil, err
	}
	return &plainWriter{Writer: w, store: s}, nil
}

// openStream opens a stream of the digest's ingest.
func (s *Store) openStream(name string, d digest.Digest, size int64, explicit bool) (*stream, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, errClosed
	}
	r := s.refs[name]
	if r != nil && r.stream != nil {
		return nil, fmt.Errorf("ref %s locked for %s (since %s): %w",
			name, time.Since(r.since), r.since, errdefs.ErrUnavailable)
	}
	if r != nil && (r.digest != d || r.size != size) {
		s.abortLocked(r) // the name is used for something else now
		r = nil
	}
	in, err := s.ingestLocked(d, size)
	if err != nil {
		return nil, err
	}
	if b := s.blobs[d]; b != nil && r == nil && explicit && in.isWhole() {
		s.showLocked(d, b)
		return nil, fmt.Errorf("content %s: %w", d, errdefs.ErrAlreadyExists)
	}
	s.ingests[d] = in
	if r == nil {
		now := time.Now()
		r = &ref{name: name, digest: d, size: size, started: now, updated: now}
		s.refs[name] = r
	}
	r.stream, r.since, r.whole = in.attach(r), time.Now(), false
	return r.stream, nil
}

// ingestLocked returns the ingest of a digest: the live one, or a new one that
// goes on where the staging left off, or one that is whole from the start and
// not among s.ingests. mu must be held.
func (s *Store) ingestLocked(d digest.Digest, size int64) (*Ingest, error) {
	b := s.lookupLocked(d) // first: it may find that a whole one has gone
	if in := s.ingests[d]; in != nil {
		if in.size == size {
			return in, nil
		}
		if in.inUse() || !in.kill() {
			return nil, fmt.Errorf("content %s is being written with size %d, not %d: %w",
				d, in.size, size, errdefs.ErrFailedPrecondition)
		}
		delete(s.ingests, d)
		s.dropStaging(d)
	}
	if b != nil {
		if b.size != size {
			return nil, fmt.Errorf("content %s has size %d, not %d: %w", d, b.size, size, errdefs.ErrFailedPrecondition)
		}
		return newIngest(s, d, size, nil, true), nil
	}
	return s.openStaging(d, size)
}

// plainWriter is the local store's writer. The local store must not find a
// blob already there just as it is being evicted, and its blobs are ours.
type plainWriter struct {
	content.Writer
	store *Store
}

// Commit commits and takes the blob into the books.
func (w *plainWriter) Commit(ctx context.Context, size int64, expected digest.Digest, opts ...content.Opt) error {
	w.store.commits.RLock()
	defer w.store.commits.RUnlock()
	err := w.Writer.Commit(ctx, size, expected, opts...)
	if err == nil || errdefs.IsAlreadyExists(err) {
		if expected == "" {
			expected = w.Digest()
		}
		w.store.show(expected)
	}
	return err
}

// Sync syncs what was written, for containerd's content.Syncer.
func (w *plainWriter) Sync() error {
	if sy, ok := w.Writer.(content.Syncer); ok {
		return sy.Sync()
	}
	return fmt.Errorf("sync: %w", errors.ErrUnsupported)
}
