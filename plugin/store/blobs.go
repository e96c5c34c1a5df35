package store

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// usedStep is how much the last use must have moved on to be worth a write.
const usedStep = time.Minute

// blob is what the store knows of a committed blob. Guarded by Store.mu.
type blob struct {
	size   int64
	hidden bool
	used   time.Time // last use, or when it was hidden
	kept   time.Time // used, as state.db has it
	labels map[string]string
}

// scanBlobs learns what is in blobs/. It runs before anything else.
func (s *Store) scanBlobs(states map[digest.Digest]blobState) error {
	algorithms, err := readDir(filepath.Join(s.root, "blobs"))
	if err != nil {
		return err
	}
	for _, a := range algorithms {
		if !a.IsDir() || !digest.Algorithm(a.Name()).Available() {
			continue
		}
		files, err := readDir(filepath.Join(s.root, "blobs", a.Name()))
		if err != nil {
			return err
		}
		for _, f := range files {
			d := digest.NewDigestFromEncoded(digest.Algorithm(a.Name()), f.Name())
			if d.Validate() != nil || !f.Type().IsRegular() {
				continue
			}
			fi, err := f.Info()
			if err != nil {
				return fmt.Errorf("look at %s: %w", d, err)
			}
			b := s.addLocked(d, fi)
			if st, ok := states[d]; ok {
				b.used, b.kept, b.labels = st.Used, st.Used, st.Labels
				delete(s.dirty, d)
				delete(states, d)
			}
			if b.used.After(s.latest) {
				s.latest = b.used
			}
		}
	}
	for d := range states {
		s.dirty[d] = struct{}{} // not here any more
	}
	return nil
}

// readDir lists a directory; one that does not exist is empty.
func readDir(path string) ([]fs.DirEntry, error) {
	list, err := os.ReadDir(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return list, err
}

// addLocked takes a blob whose file is there into the books, as visible.
// mu must be held.
func (s *Store) addLocked(d digest.Digest, fi fs.FileInfo) *blob {
	b := &blob{size: fi.Size(), used: fi.ModTime()}
	s.blobs[d] = b
	s.dirty[d] = struct{}{}
	s.announceLocked(d, b.size, false)
	return b
}

// lookupLocked returns the blob if its file is there, or nil. The file is the
// truth: others may have put it there or taken it away. mu must be held.
func (s *Store) lookupLocked(d digest.Digest) *blob {
	fi, err := os.Stat(s.blobPath(d))
	if err != nil {
		if s.blobs[d] != nil && errors.Is(err, fs.ErrNotExist) {
			s.forgetLocked(d)
		}
		return nil
	}
	if b := s.blobs[d]; b != nil {
		return b
	}
	return s.addLocked(d, fi)
}

// forgetLocked takes a blob whose file has gone out of the books. mu must be
// held.
func (s *Store) forgetLocked(d digest.Digest) {
	delete(s.blobs, d)
	s.dirty[d] = struct{}{}
	s.announceLocked(d, 0, true)
	if in := s.ingests[d]; in != nil && in.isWhole() {
		// A Fill that seeds it keeps it readable; a new stream must begin anew.
		delete(s.ingests, d)
	}
	for name, r := range s.refs {
		if r.digest == d && r.whole && r.stream == nil {
			delete(s.refs, name)
		}
	}
}

// showLocked makes a blob visible. mu must be held.
func (s *Store) showLocked(d digest.Digest, b *blob) {
	b.hidden = false
	s.useLocked(d, b)
}

// useLocked notes that a blob was used. mu must be held.
func (s *Store) useLocked(d digest.Digest, b *blob) {
	now := s.nowLocked()
	// A clock that is behind says nothing of how much later it is.
	if b.used = now; now.Sub(b.kept) >= usedStep || now.After(time.Now()) {
		s.dirty[d] = struct{}{}
	}
}

// nowLocked is the time, but later than every use of a blob so far: if the
// machine's clock is set back, even over a restart, the blobs used after that are
// still those used last. mu must be held.
func (s *Store) nowLocked() time.Time {
	now := time.Now().Round(0) // as it is kept
	if !now.After(s.latest) {
		now = s.latest.Add(1)
	}
	s.latest = now
	return now
}

// show makes a blob visible and reports whether it is there.
func (s *Store) show(d digest.Digest) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	b := s.lookupLocked(d)
	if b == nil {
		return false
	}
	s.showLocked(d, b)
	return true
}

// landed takes a blob that an ingest has completed into the books: hidden,
// until a stream commits it.
func (s *Store) landed(d digest.Digest, size int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.blobs[d] != nil {
		return
	}
	s.blobs[d] = &blob{size: size, hidden: true, used: s.nowLocked()}
	s.dirty[d] = struct{}{}
	s.announceLocked(d, size, false)
	wake(s.evict)
}

// removeLocked removes a blob for good. mu must be held.
func (s *Store) removeLocked(d digest.Digest) error {
	if err := s.trash(s.blobPath(d)); err != nil {
		return err
	}
	s.forgetLocked(d)
	return nil
}

// claimedLocked reports whether a stream, or a client that may come back as
// one, has not committed this blob yet. mu must be held.
func (s *Store) claimedLocked(d digest.Digest) bool {
	for _, r := range s.refs {
		if r.digest == d {
			return true
		}
	}
	return false
}

// evictHidden removes hidden blobs, least recently used first, until those
// that are left are within a quota of so many bytes. It reports false if it must be tried
// again because the local store is committing.
func (s *Store) evictHidden(quota int64) bool {
	type candidate struct {
		digest digest.Digest
		used   time.Time
		size   int64
	}
	var hidden int64
	var list []candidate
	s.mu.Lock()
	claimed := map[digest.Digest]bool{}
	for _, r := range s.refs {
		claimed[r.digest] = true
	}
	for d, b := range s.blobs {
		if b.hidden && !claimed[d] {
			hidden += b.size
			list = append(list, candidate{d, b.used, b.size})
		}
	}
	s.mu.Unlock()
	slices.SortFunc(list, func(a, b candidate) int {
		return cmp.Or(a.used.Compare(b.used), cmp.Compare(a.digest, b.digest))
	})
	for _, c := range list {
		if hidden <= quota {
			return true
		}
		removed, ok := s.evictOne(c.digest)
		if !ok {
			return false
		}
		if removed {
			hidden -= c.size
			s.log.Debug("blob evicted", "digest", c.digest, "size", c.size)
		}
	}
	return true
}

// evictOne removes a blob if it still may be: between the choice and now
// containerd may have adopted it, which happens under the same lock.
func (s *Store) evictOne(d digest.Digest) (removed, ok bool) {
	// Waiting for the local store would make its next commit wait for us.
	if !s.commits.TryLock() {
		return false, false
	}
	defer s.commits.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	b := s.blobs[d]
	if b == nil || !b.hidden || s.claimedLocked(d) {
		return false, true
	}
	if err := s.removeLocked(d); err != nil {
		s.log.Warn("blob not evicted", "digest", d, "err", err)
		return false, true
	}
	return true, true
}

// OpenBlob opens a blob, visible or hidden, for seeding and counts as its use.
// The error is ErrNotFound if it is not here. The caller must close it.
func (s *Store) OpenBlob(d digest.Digest) (Blob, error) {
	if err := d.Validate(); err != nil {
		return nil, fmt.Errorf("open blob %q: %w: %w", d, err, errdefs.ErrInvalidArgument)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	b := s.lookupLocked(d)
	if b == nil {
		return nil, fmt.Errorf("content %s: %w", d, errdefs.ErrNotFound)
	}
	f, err := os.Open(s.blobPath(d))
	if err != nil {
		return nil, fmt.Errorf("open blob %s: %w", d, err)
	}
	s.useLocked(d, b)
	return &openBlob{File: f, size: b.size}, nil
}

type openBlob struct {
	*os.File
	size int64
}

// Size returns the blob's size in bytes.
func (b *openBlob) Size() int64 { return b.size }

// labels is the local store's LabelStore, kept with the blobs.
type labels struct{ s *Store }

// Get returns a copy of the blob's labels.
func (l labels) Get(d digest.Digest) (map[string]string, error) {
	l.s.mu.Lock()
	defer l.s.mu.Unlock()
	if b := l.s.blobs[d]; b != nil {
		return maps.Clone(b.labels), nil
	}
	return nil, nil
}

// Set replaces the blob's labels.
func (l labels) Set(d digest.Digest, set map[string]string) error {
	_, err := l.change(d, func(map[string]string) map[string]string { return maps.Clone(set) })
	return err
}

// Update sets the given labels; an empty value removes one.
func (l labels) Update(d digest.Digest, set map[string]string) (map[string]string, error) {
	return l.change(d, func(now map[string]string) map[string]string {
		now = maps.Clone(now)
		for k, v := range set {
			if v == "" {
				delete(now, k)
				continue
			}
			if now == nil {
				now = map[string]string{}
			}
			now[k] = v
		}
		return now
	})
}

func (l labels) change(d digest.Digest, f func(map[string]string) map[string]string) (map[string]string, error) {
	l.s.mu.Lock()
	defer l.s.mu.Unlock()
	b := l.s.lookupLocked(d)
	if b == nil {
		return nil, fmt.Errorf("content %s: %w", d, errdefs.ErrNotFound)
	}
	b.labels = f(b.labels)
	l.s.dirty[d] = struct{}{}
	return maps.Clone(b.labels), nil
}
