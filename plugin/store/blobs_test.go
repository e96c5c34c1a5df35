package store

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Everything that can be done to a blob, in both states it can be in.
func TestSoftDelete(t *testing.T) {
	ctx := context.Background()
	for _, tc := range []struct {
		name    string
		quota   int64
		hidden  bool
		do      func(s *Store, d digest.Digest) error
		want    error
		visible bool
		file    bool
	}{
		{"delete visible", 1 << 30, false, func(s *Store, d digest.Digest) error { return s.Delete(ctx, d) }, nil, false, true},
		{"delete hidden", 1 << 30, true, func(s *Store, d digest.Digest) error { return s.Delete(ctx, d) }, nil, false, true},
		{"delete without quota", 0, false, func(s *Store, d digest.Digest) error { return s.Delete(ctx, d) }, nil, false, false},
		{"info visible", 1 << 30, false, func(s *Store, d digest.Digest) error { _, err := s.Info(ctx, d); return err }, nil, true, true},
		{"info hidden", 1 << 30, true, func(s *Store, d digest.Digest) error { _, err := s.Info(ctx, d); return err }, nil, true, true},
		{"read hidden", 1 << 30, true, func(s *Store, d digest.Digest) error {
			r, err := s.ReaderAt(ctx, ocispec.Descriptor{Digest: d})
			if err != nil {
				return err
			}
			return r.Close()
		}, nil, false, true},
		{"seed hidden", 1 << 30, true, func(s *Store, d digest.Digest) error {
			r, err := s.OpenBlob(d)
			if err != nil {
				return err
			}
			return r.Close()
		}, nil, false, true},
		{"update hidden", 1 << 30, true, func(s *Store, d digest.Digest) error {
			_, err := s.Update(ctx, content.Info{Digest: d, Labels: map[string]string{"a": "b"}})
			return err
		}, nil, true, true},
		{"local commit of hidden", 1 << 30, true, func(s *Store, _ digest.Digest) error {
			b, _ := random(1000, 1)
			w, err := s.Writer(ctx, content.WithRef("plain"))
			if err != nil {
				return err
			}
			if _, err := w.Write(b); err != nil {
				return err
			}
			if err := w.(content.Syncer).Sync(); err != nil {
				return err
			}
			return w.Commit(ctx, 0, "")
		}, errdefs.ErrAlreadyExists, true, true},
		{"evict visible", 0, false, func(s *Store, _ digest.Digest) error { s.evictHidden(s.quota); return nil }, nil, true, true},
		{"evict within quota", 1000, true, func(s *Store, _ digest.Digest) error { s.evictHidden(s.quota); return nil }, nil, false, true},
		{"evict beyond quota", 999, true, func(s *Store, _ digest.Digest) error { s.evictHidden(s.quota); return nil }, nil, false, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := open(t, Options{SeedQuota: tc.quota, Filler: &filler{}})
			b, _ := random(1000, 1)
			d := put(t, s, b)
			s.blobs[d].hidden = tc.hidden
			if err := tc.do(s, d); !errors.Is(err, tc.want) {
				t.Fatalf("error %v", err)
			}
			if got := visible(t, s)[d]; got != tc.visible {
				t.Errorf("visible: %v", got)
			}
			if got := exists(t, s.blobPath(d)); got != tc.file {
				t.Errorf("file there: %v", got)
			}
			if tc.file {
				return
			}
			_, err := s.Info(ctx, d)
			wantErr(t, err, errdefs.ErrNotFound)
			_, err = s.OpenBlob(d)
			wantErr(t, err, errdefs.ErrNotFound)
			wantErr(t, s.Delete(ctx, d), errdefs.ErrNotFound)
		})
	}
}

func TestBadDigests(t *testing.T) {
	s := open(t, Options{})
	ctx := t.Context()
	for _, d := range []digest.Digest{"", "sha256:../../../etc/passwd", "x", "sha256:abc"} {
		_, err := s.Info(ctx, d)
		wantErr(t, err, errdefs.ErrInvalidArgument)
		_, err = s.Update(ctx, content.Info{Digest: d})
		wantErr(t, err, errdefs.ErrInvalidArgument)
		_, err = s.OpenBlob(d)
		wantErr(t, err, errdefs.ErrInvalidArgument)
		_, err = s.ReaderAt(ctx, ocispec.Descriptor{Digest: d})
		wantErr(t, err, errdefs.ErrInvalidArgument)
		wantErr(t, s.Delete(ctx, d), errdefs.ErrInvalidArgument)
	}
	_, err := s.Writer(ctx)
	wantErr(t, err, errdefs.ErrInvalidArgument)
}

func TestEvictionOrder(t *testing.T) {
	f := &filler{}
	s := open(t, Options{SeedQuota: 2500, Filler: f})
	var ds []digest.Digest
	for i := range byte(5) {
		b, _ := random(1000, i+1)
		ds = append(ds, put(t, s, b))
	}
	for _, i := range []int{3, 0, 2, 4} { // 1 stays visible
		if err := s.Delete(t.Context(), ds[i]); err != nil {
			t.Fatal(err)
		}
	}
	if blob, err := s.OpenBlob(ds[3]); err != nil { // now the one used last
		t.Fatal(err)
	} else {
		defer func() { _ = blob.Close() }()
	}
	if !s.evictHidden(s.quota) {
		t.Fatal("not done")
	}
	for i, want := range []bool{false, true, false, true, true} {
		if got := exists(t, s.blobPath(ds[i])); got != want {
			t.Errorf("blob %d there: %v", i, got)
		}
	}
	s.quota = 0
	blob, err := s.OpenBlob(ds[3])
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = blob.Close() }()
	s.evictHidden(s.quota)
	if exists(t, s.blobPath(ds[3])) {
		t.Error("not evicted")
	}
	b, _ := random(1000, 4)
	got := make([]byte, 1000)
	if _, err := blob.ReadAt(got, 0); err != nil || !bytes.Equal(got, b) || blob.Size() != 1000 {
		t.Errorf("an open blob is not readable after its eviction: %v", err)
	}
}

// A blob that a client has filled but not committed is not evicted.
// Where nothing new can be made, as without inodes, what is there can still be removed.
func TestRemovalNeedsNoRoom(t *testing.T) {
	s := open(t, Options{Filler: &filler{}, SeedQuota: 10_000})
	b, _ := random(1000, 1)
	hidden := put(t, s, b)
	if err := s.Delete(t.Context(), hidden); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(s.stagingDir()); err != nil {
		t.Fatal(err)
	}
	if s.evictHidden(0); exists(t, s.blobPath(hidden)) {
		t.Error("it is still there")
	}
	if err := os.Mkdir(s.stagingDir(), 0o700); err != nil {
		t.Fatal(err)
	}
}

func TestEvictionSparesWhatWillBeCommitted(t *testing.T) {
	s := open(t, Options{Filler: &filler{}})
	b, d := random(1000, 1)
	ref := refFor("a", d)
	w := writer(t, s, ref, 1000)
	write(t, w, b)
	s.evictHidden(s.quota)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	s.evictHidden(s.quota)
	if st, err := s.Status(t.Context(), ref); err != nil || st.Offset != 1000 {
		t.Fatalf("status %+v: %v", st, err)
	}
	w = writer(t, s, ref, 1000)
	if got := offset(t, w); got != 1000 {
		t.Fatalf("offset %d", got)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.Abort(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	s.evictHidden(s.quota)
	if exists(t, s.blobPath(d)) {
		t.Error("not evicted after the abort")
	}
}

// Between being chosen for eviction and being evicted a blob may have been
// adopted, or claimed by a stream.
func TestEvictionLooksAgain(t *testing.T) {
	s := open(t, Options{Filler: &filler{}})
	b, _ := random(1000, 1)
	d := put(t, s, b)
	evict := func(want bool) {
		t.Helper()
		if removed, ok := s.evictOne(d); removed != want || !ok {
			t.Errorf("evicted: %v, %v", removed, ok)
		}
	}
	evict(false) // visible
	s.blobs[d].hidden = true
	w := writer(t, s, refFor("a", d), 1000)
	evict(false) // about to be committed
	if err := errors.Join(w.Close(), s.Abort(t.Context(), refFor("a", d))); err != nil {
		t.Fatal(err)
	}
	evict(true)
	evict(false) // gone
}

// Eviction waits for the local store, never the other way round.
func TestEvictionYieldsToLocalCommit(t *testing.T) {
	s := open(t, Options{Filler: &filler{}})
	b, _ := random(1000, 1)
	d := put(t, s, b)
	s.blobs[d].hidden = true
	s.commits.RLock()
	if s.evictHidden(s.quota) || !exists(t, s.blobPath(d)) {
		t.Error("evicted during a commit")
	}
	s.commits.RUnlock()
	if !s.evictHidden(s.quota) || exists(t, s.blobPath(d)) {
		t.Error("not evicted after it")
	}
}

// Whoever gets an answer from Info can rely on the blob.
func TestEvictionRacesWithInfo(t *testing.T) {
	s := open(t, Options{Filler: &filler{}})
	defer runStore(t, s)()
	b, _ := random(100, 1)
	found := 0
	for range 200 {
		d := put(t, s, b)
		var wg sync.WaitGroup
		wg.Go(func() {
			s.mu.Lock()
			s.blobs[d].hidden = true
			s.mu.Unlock()
			s.evictHidden(s.quota)
		})
		_, err := s.Info(t.Context(), d)
		wg.Wait()
		switch {
		case err == nil:
			found++
			// Info may have come before it was hidden; then it is fair game.
			_, err := s.Info(t.Context(), d)
			if there := exists(t, s.blobPath(d)); there != (err == nil) {
				t.Fatalf("file there: %v, info: %v", there, err)
			}
			if s.evictHidden(s.quota); err == nil && !exists(t, s.blobPath(d)) {
				t.Fatal("evicted after Info")
			}
		case !errdefs.IsNotFound(err):
			t.Fatal(err)
		}
		if err := s.Delete(t.Context(), d); err != nil && !errdefs.IsNotFound(err) {
			t.Fatal(err)
		}
	}
	t.Logf("found %d of 200", found)
}

func TestFillerHears(t *testing.T) {
	root := t.TempDir()
	s := open(t, Options{Root: root})
	b, _ := random(100, 1)
	d1 := put(t, s, b)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	f := &filler{hear: make(chan struct{}, 8)}
	s = open(t, Options{Root: root, Filler: f})
	stop := runStore(t, s)
	<-f.hear
	b2, _ := random(100, 2)
	d2 := put(t, s, b2)
	if err := s.Delete(t.Context(), d1); err != nil {
		t.Fatal(err)
	}
	if err := s.Delete(t.Context(), d2); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		<-f.hear
	}
	stop()
	short := func(d digest.Digest) string { return d.Encoded()[:8] }
	want := []string{"+" + short(d1), "+" + short(d2), "-" + short(d1), "-" + short(d2)}
	if !slices.Equal(f.log, want) {
		t.Errorf("heard %v, want %v", f.log, want)
	}
}

// A directory that containerd's own store has filled is taken as it is.
func TestAdoptsWhatIsThere(t *testing.T) {
	root := t.TempDir()
	b, d := random(100, 1)
	b512 := digest.SHA512.FromBytes(b)
	for name, data := range map[string][]byte{
		"sha256/" + d.Encoded(): b, "sha512/" + b512.Encoded(): b, "sha256/not-a-digest": nil, "md5/x": nil,
	} {
		path := filepath.Join(root, "blobs", name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, data, 0o444)); err != nil {
			t.Fatal(err)
		}
	}
	s, err := Open(Options{Root: root})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	if v := visible(t, s); len(v) != 2 || !v[d] || !v[b512] {
		t.Errorf("visible: %v", v)
	}
	// Also while it runs, files are the truth.
	b2, d2 := random(100, 2)
	if err := os.WriteFile(s.blobPath(d2), b2, 0o444); err != nil {
		t.Fatal(err)
	}
	if info, err := s.Info(t.Context(), d2); err != nil || info.Size != 100 || !visible(t, s)[d2] {
		t.Errorf("%+v: %v", info, err)
	}
	if err := os.Remove(s.blobPath(d2)); err != nil {
		t.Fatal(err)
	}
	_, err = s.Info(t.Context(), d2)
	wantErr(t, err, errdefs.ErrNotFound)
	w := writer(t, s, refFor("a", d2), 100)
	write(t, w, b2)
	commit(t, w, 100, d2)
}

func TestStateDB(t *testing.T) {
	root := t.TempDir()
	b, d := random(100, 1)
	s := open(t, Options{Root: root, SeedQuota: 1 << 20})
	w := writer(t, s, refFor("a", d), 100)
	write(t, w, b)
	if err := w.Commit(t.Context(), 100, d, content.WithLabels(map[string]string{"k": "v"})); err != nil {
		t.Fatal(err)
	}
	_, err := s.Pieces(d)
	wantErr(t, err, errdefs.ErrNotFound)
	_, missing := random(100, 2)
	wantErr(t, s.SetPieces(missing, []byte("x")), errdefs.ErrNotFound)
	if err := s.SetPieces(d, []byte("hashes")); err != nil {
		t.Fatal(err)
	}
	if err := s.Delete(t.Context(), d); err != nil {
		t.Fatal(err)
	}
	used := s.blobs[d].used
	if _, err := Open(Options{Root: root}); err == nil || !strings.Contains(err.Error(), "timeout") {
		t.Errorf("second store on the root: %v", err)
	}
	if err := errors.Join(s.Close(), s.Close()); err != nil {
		t.Fatal(err)
	}

	// Whatever was hidden may have been adopted while the store did not run.
	s = open(t, Options{Root: root, Filler: &filler{}})
	if !visible(t, s)[d] || !s.blobs[d].used.Equal(used) {
		t.Errorf("after a restart: %+v", s.blobs[d])
	}
	if info, err := s.Info(t.Context(), d); err != nil || info.Labels["k"] != "v" {
		t.Errorf("info %+v: %v", info, err)
	}
	if p, err := s.Pieces(d); err != nil || string(p) != "hashes" {
		t.Errorf("pieces %q: %v", p, err)
	}
	if err := errors.Join(s.Delete(t.Context(), d), s.flush()); err != nil {
		t.Fatal(err)
	}
	_, err = s.Pieces(d)
	wantErr(t, err, errdefs.ErrNotFound)
}

func TestStateDBDamaged(t *testing.T) {
	root := t.TempDir()
	s := open(t, Options{Root: root})
	b, _ := random(100, 1)
	d := put(t, s, b)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	path := root + "/imagewolf/state.db"
	if err := os.WriteFile(path, bytes.Repeat([]byte("junk"), 10_000), 0o600); err != nil {
		t.Fatal(err)
	}
	s = open(t, Options{Root: root})
	if !visible(t, s)[d] || !exists(t, path+".bad") {
		t.Error("not started afresh")
	}
}

func TestRunKeepsState(t *testing.T) {
	s := open(t, Options{Filler: &filler{}, SeedQuota: 100})
	stop := runStore(t, s)
	b, _ := random(101, 1)
	d := put(t, s, b)
	if err := s.Delete(t.Context(), d); err != nil {
		t.Fatal(err)
	}
	limit := time.Now().Add(20 * time.Second)
	for exists(t, s.blobPath(d)) {
		if time.Now().After(limit) {
			t.Fatal("not evicted")
		}
	}
	stop()
}

// The machine's clock is set back while the store runs, or while it does not: the
// blobs used after that are still those used last.
func TestEvictionWhenTheClockIsSetBack(t *testing.T) {
	root := t.TempDir()
	s := open(t, Options{Root: root, SeedQuota: 1 << 20})
	var ds []digest.Digest
	for i := range byte(4) {
		b, _ := random(1000, i+1)
		ds = append(ds, put(t, s, b))
		if err := s.Delete(t.Context(), ds[i]); err != nil {
			t.Fatal(err)
		}
	}
	// What was used so far was used a day ahead of what the clock says now.
	s.mu.Lock()
	for _, d := range ds {
		s.blobs[d].used = s.blobs[d].used.Add(24 * time.Hour)
		s.dirty[d] = struct{}{}
	}
	s.latest = s.latest.Add(24 * time.Hour)
	s.mu.Unlock()
	use := func(d digest.Digest) {
		t.Helper()
		blob, err := s.OpenBlob(d)
		if err == nil {
			err = blob.Close()
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	use(ds[1])
	if err := errors.Join(s.flush(), s.Close()); err != nil {
		t.Fatal(err)
	}
	s = open(t, Options{Root: root, SeedQuota: 2000})
	use(ds[0])
	for _, d := range ds { // the next start found them visible
		s.blobs[d].hidden = true
	}
	if !s.evictHidden(s.quota) {
		t.Fatal("not done")
	}
	for i, want := range []bool{true, true, false, false} {
		if got := exists(t, s.blobPath(ds[i])); got != want {
			t.Errorf("blob %d there: %v", i, got)
		}
	}
	if err := s.flush(); err != nil {
		t.Fatal(err)
	}
	if b := s.blobs[ds[0]]; !b.kept.Equal(b.used) {
		t.Error("a use under a clock that is behind is not kept")
	}
}
