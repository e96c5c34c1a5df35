package store

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
)

const (
	sidecarVersion = 1
	sidecarSuffix  = ".json"
	// sidecarEvery is how many new bytes are worth writing the sidecar again.
	sidecarEvery = 16 << 20
	// sidecarLimit bounds what is read of a sidecar: a span takes 40 bytes at
	// most, and there are not more spans than pieces and writers.
	sidecarLimit = 16 << 20
)

// sidecar says which ranges of a staging file can be believed.
type sidecar struct {
	Version int          `json:"version"`
	Size    int64        `json:"size"`
	Boot    string       `json:"boot"`    // kernel's boot id at the time of writing
	Present [][2]int64   `json:"present"` // in the page cache at least: good as long as Boot is
	Synced  [][2]int64   `json:"synced"`  // on the disk: always good
	Refs    []sidecarRef `json:"refs"`
}

type sidecarRef struct {
	Name    string    `json:"name"`
	Started time.Time `json:"started"`
	Updated time.Time `json:"updated"`
}

// pairs turns ranges into what a sidecar holds.
func pairs(r ranges) [][2]int64 {
	out := make([][2]int64, 0, len(r.spans))
	for _, s := range r.spans {
		out = append(out, [2]int64{s.lo, s.hi})
	}
	return out
}

// unpair is the reverse of pairs. Every span must lie within size.
func unpair(list [][2]int64, size int64) (ranges, error) {
	var r ranges
	for _, p := range list {
		if p[0] < 0 || p[0] >= p[1] || p[1] > size {
			return ranges{}, fmt.Errorf("range %d-%d of %d bytes", p[0], p[1], size)
		}
		r.add(p[0], p[1])
	}
	return r, nil
}

// decodeSidecar reads a sidecar and checks that it can be meant.
func decodeSidecar(b []byte) (sc sidecar, present, synced ranges, err error) {
	if err = json.Unmarshal(b, &sc); err != nil {
		return sidecar{}, ranges{}, ranges{}, err
	}
	if sc.Version != sidecarVersion || sc.Size <= 0 {
		return sidecar{}, ranges{}, ranges{}, fmt.Errorf("version %d, size %d", sc.Version, sc.Size)
	}
	if present, err = unpair(sc.Present, sc.Size); err == nil {
		synced, err = unpair(sc.Synced, sc.Size)
	}
	if err != nil {
		return sidecar{}, ranges{}, ranges{}, err
	}
	return sc, present, synced, nil
}

// loadSidecar returns the sidecar of a digest and those ranges of it that the
// data file, being as long as it is, still has in this life of the kernel.
func (s *Store) loadSidecar(d digest.Digest) (sc sidecar, good, synced ranges, err error) {
	path := s.stagingPath(d)
	fi, err := os.Stat(path + sidecarSuffix)
	if err != nil {
		return sc, good, synced, err
	}
	if fi.Size() > sidecarLimit {
		return sc, good, synced, fmt.Errorf("sidecar has %d bytes", fi.Size())
	}
	b, err := os.ReadFile(path + sidecarSuffix)
	if err != nil {
		return sc, good, synced, err
	}
	sc, present, synced, err := decodeSidecar(b)
	if err != nil {
		return sc, good, synced, fmt.Errorf("sidecar of %s: %w", d, err)
	}
	good = synced.clone()
	if s.bootID != "" && sc.Boot == s.bootID {
		good = present
	}
	fi, err = os.Stat(path)
	if err != nil {
		return sc, ranges{}, ranges{}, err
	}
	if n := len(good.spans); n > 0 && good.spans[n-1].hi > fi.Size() {
		return sc, ranges{}, ranges{}, fmt.Errorf("staging of %s is too short", d)
	}
	return sc, good, synced, nil
}

// scanStaging learns which refs have begun something and removes leftovers. It
// runs before anything else.
func (s *Store) scanStaging() error {
	files, err := readDir(s.stagingDir())
	if err != nil {
		return err
	}
	keep := map[string]bool{}
	for _, f := range files {
		hex, ok := strings.CutSuffix(f.Name(), sidecarSuffix)
		d := digest.NewDigestFromEncoded(digest.SHA256, hex)
		if !ok || d.Validate() != nil || s.blobs[d] != nil {
			continue
		}
		sc, good, _, err := s.loadSidecar(d)
		if err != nil {
			s.log.Info("unfinished blob cannot be resumed", "digest", d, "err", err)
			continue
		}
		keep[hex], keep[f.Name()] = true, true
		for _, r := range sc.Refs {
			s.refs[r.Name] = &ref{
				name: r.Name, digest: d, size: sc.Size,
				started: r.Started, updated: past(time.Now(), r.Updated), present: good.total,
			}
		}
	}
	for _, f := range files {
		if keep[f.Name()] {
			continue
		}
		if err := os.RemoveAll(filepath.Join(s.stagingDir(), f.Name())); err != nil {
			return fmt.Errorf("clean staging: %w", err)
		}
	}
	return nil
}

// emptyStaging removes all that is unfinished. It runs before anything else.
func (s *Store) emptyStaging() error {
	files, err := readDir(s.stagingDir())
	for _, f := range files {
		err = errors.Join(err, os.RemoveAll(filepath.Join(s.stagingDir(), f.Name())))
	}
	if err != nil {
		return fmt.Errorf("empty staging: %w", err)
	}
	return nil
}

// openStaging makes an ingest that goes on where the staging of the digest
// left off. mu must be held.
func (s *Store) openStaging(d digest.Digest, size int64) (*Ingest, error) {
	sc, good, synced, err := s.loadSidecar(d)
	resume := err == nil && sc.Size == size
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		s.log.Info("unfinished blob cannot be resumed", "digest", d, "err", err)
	}
	if !resume {
		// Data first: a sidecar without it is worth nothing, and is harmless.
		s.dropStaging(d)
	}
	f, err := os.OpenFile(s.stagingPath(d), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, fmt.Errorf("open staging of %s: %w", d, err)
	}
	in := newIngest(s, d, size, f, false)
	if resume {
		in.present, in.synced, in.savedAt = good, synced, good.total
	}
	return in, nil
}

// dropStaging removes what there is of a blob in staging. mu must be held, so
// that nobody begins anew meanwhile.
func (s *Store) dropStaging(d digest.Digest) {
	path := s.stagingPath(d)
	err := s.trash(path)
	if err != nil && errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	if e := os.Remove(path + sidecarSuffix); e != nil && !errors.Is(e, fs.ErrNotExist) {
		err = errors.Join(err, e)
	}
	if err != nil {
		s.log.Warn("staging not removed", "digest", d, "err", err)
	}
}

// staged is a sidecar as sweep saw it, and since when the staging has rested, by a
// clock that nobody sets.
type staged struct {
	written time.Time // the file's time
	since   time.Time
}

// restsSinceLocked returns since when a sidecar has not been written. What the
// file itself says is believed only of the time before the first sweep, and never
// that it is to come: the machine's clock may have been set. mu must be held.
func (s *Store) restsSinceLocked(d digest.Digest, written time.Time) time.Time {
	now := time.Now()
	old, seen := s.staged[d]
	switch {
	case seen && old.written.Equal(written):
		return old.since
	case !seen && !s.swept:
		now = past(now, written)
	}
	s.staged[d] = staged{written: written, since: now}
	return now
}

// past returns an earlier moment by the clock of now, which is what nobody sets
// later on; now for a moment that is yet to come.
func past(now, at time.Time) time.Time { return now.Add(-max(0, now.Sub(at))) }

// sweep removes what no client has come back for.
func (s *Store) sweep(now time.Time) {
	files, err := readDir(s.stagingDir())
	if err != nil {
		s.log.Warn("abandoned staging not looked for", "err", err)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	gone := maps.Clone(s.staged)
	for _, f := range files {
		hex, ok := strings.CutSuffix(f.Name(), sidecarSuffix)
		d := digest.NewDigestFromEncoded(digest.SHA256, hex)
		fi, err := f.Info()
		if !ok || err != nil {
			continue
		}
		delete(gone, d)
		since := s.restsSinceLocked(d, fi.ModTime())
		if s.ingests[d] != nil {
			continue
		}
		limit := unclaimedAfter
		if s.claimedLocked(d) {
			limit = abandonedAfter
		}
		if now.Sub(since) < limit {
			continue
		}
		s.log.Info("abandoned blob removed", "digest", d)
		s.dropStaging(d)
		delete(s.staged, d)
	}
	for d := range gone {
		delete(s.staged, d)
	}
	s.swept = true
	for name, r := range s.refs {
		if s.ingests[r.digest] == nil && now.Sub(r.updated) >= abandonedAfter {
			delete(s.refs, name)
			wake(s.evict)
		}
	}
}

// save writes the sidecar. With sync the data is synced first, so that what is
// there now also outlives the machine. One save runs at a time; mu and in.mu
// must not be held.
func (in *Ingest) save(sync bool) error {
	in.saveMu.Lock()
	defer in.saveMu.Unlock()
	in.mu.Lock()
	if !in.savableLocked() {
		in.mu.Unlock()
		return nil
	}
	gen, present, f := in.gen, in.present.clone(), in.file
	in.mu.Unlock()
	if sync {
		if err := f.Sync(); err != nil {
			return fmt.Errorf("sync staging of %s: %w", in.digest, err)
		}
	}
	in.mu.Lock()
	if sync && gen == in.gen {
		in.synced = present.clone()
	}
	sc := sidecar{
		Version: sidecarVersion, Size: in.size, Boot: in.store.bootID,
		Present: pairs(present), Synced: pairs(in.synced),
	}
	in.mu.Unlock()
	sc.Refs = in.store.refsOf(in.digest)
	b, err := json.Marshal(sc)
	if err != nil {
		return fmt.Errorf("sidecar of %s: %w", in.digest, err)
	}
	f, err = os.CreateTemp(in.store.stagingDir(), "*.tmp")
	if err != nil {
		return fmt.Errorf("sidecar of %s: %w", in.digest, err)
	}
	_, err = f.Write(b)
	if sync && err == nil {
		err = f.Sync()
	}
	err = errors.Join(err, f.Close())
	// Under the lock: what throws the bytes away removes the sidecar after
	// this rename, or keeps it from happening.
	in.mu.Lock()
	defer in.mu.Unlock()
	if err == nil && in.gen == gen && in.savableLocked() {
		err = os.Rename(f.Name(), in.store.stagingPath(in.digest)+sidecarSuffix)
		in.savedAt = max(in.savedAt, present.total)
		if err == nil {
			return nil
		}
	}
	if err = errors.Join(err, os.Remove(f.Name())); err != nil {
		return fmt.Errorf("sidecar of %s: %w", in.digest, err)
	}
	return nil
}

// savableLocked reports whether the staging is the ingest's and may be gone on
// with. in.mu must be held.
func (in *Ingest) savableLocked() bool {
	return in.file != nil && !in.dead && !in.whole && !in.finishing
}

// refsOf returns the refs of a digest as a sidecar holds them.
func (s *Store) refsOf(d digest.Digest) []sidecarRef {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []sidecarRef
	for _, r := range s.refs {
		if r.digest == d {
			out = append(out, sidecarRef{Name: r.name, Started: r.started, Updated: r.updated})
		}
	}
	return out
}
