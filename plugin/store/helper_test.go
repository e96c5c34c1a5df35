package store

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// random returns n bytes that are the same for the same seed.
func random(n int, seed byte) ([]byte, digest.Digest) {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{seed}).Read(b)
	return b, digest.FromBytes(b)
}

func refFor(ns string, d digest.Digest) string { return ns + "/1/layer-" + d.String() }

// open opens a store that is closed, and whose directory is checked, when the
// test ends.
func open(t testing.TB, o Options) *Store {
	t.Helper()
	if o.Root == "" {
		o.Root = t.TempDir()
	}
	if o.bootID == "" {
		o.bootID = "boot"
	}
	s, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
		checkRoot(t, o.Root)
	})
	return s
}

// checkRoot re-hashes every blob and looks for what should not be in staging.
func checkRoot(t testing.TB, root string) {
	t.Helper()
	blobs, err := readDir(filepath.Join(root, "blobs", "sha256"))
	if err != nil {
		t.Error(err)
	}
	for _, f := range blobs {
		b, err := os.ReadFile(filepath.Join(root, "blobs", "sha256", f.Name()))
		if err != nil {
			t.Error(err)
		}
		if got := digest.FromBytes(b).Encoded(); got != f.Name() {
			t.Errorf("blob %s has digest %s", f.Name(), got)
		}
	}
	staging := filepath.Join(root, "imagewolf", "staging")
	files, err := readDir(staging)
	if err != nil {
		t.Error(err)
	}
	for _, f := range files {
		hex := strings.TrimSuffix(f.Name(), sidecarSuffix)
		b, err := os.ReadFile(filepath.Join(staging, hex+sidecarSuffix))
		if err != nil {
			t.Errorf("left in staging: %s: %v", f.Name(), err)
			continue
		}
		if _, _, _, err := decodeSidecar(b); err != nil {
			t.Errorf("sidecar of %s: %v", hex, err)
		}
		if _, err := os.Stat(filepath.Join(staging, hex)); err != nil {
			t.Errorf("sidecar without data: %v", err)
		}
	}
}

// filler is a Filler whose Fill the test gives, and which notes what it hears.
type filler struct {
	fill func(ctx context.Context, in *Ingest)
	mu   sync.Mutex
	log  []string
	hear chan struct{}
}

func (f *filler) Fill(ctx context.Context, in *Ingest) {
	if f.fill != nil {
		f.fill(ctx, in)
	}
}

func (f *filler) note(s string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.log = append(f.log, s)
	if f.hear != nil {
		f.hear <- struct{}{}
	}
}

func (f *filler) Added(d digest.Digest, _ int64) { f.note("+" + d.Encoded()[:8]) }
func (f *filler) Removed(d digest.Digest)        { f.note("-" + d.Encoded()[:8]) }

// writer opens a stream the way containerd's proxy does.
func writer(t testing.TB, s *Store, ref string, size int) content.Writer {
	t.Helper()
	w, err := s.Writer(t.Context(), content.WithRef(ref), content.WithDescriptor(ocispec.Descriptor{Size: int64(size)}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.Close(); err != nil {
			t.Errorf("close writer: %v", err)
		}
	})
	return w
}

func write(t testing.TB, w io.Writer, p []byte) {
	t.Helper()
	if n, err := w.Write(p); err != nil || n != len(p) {
		t.Fatalf("wrote %d of %d: %v", n, len(p), err)
	}
}

func offset(t testing.TB, w content.Writer) int64 {
	t.Helper()
	st, err := w.Status()
	if err != nil {
		t.Fatal(err)
	}
	return st.Offset
}

func wait(t testing.TB, w content.Writer) {
	t.Helper()
	if err := w.(Waiter).Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// waitAsync calls Wait in a goroutine and returns once it waits.
func waitAsync(t testing.TB, w content.Writer) <-chan error {
	t.Helper()
	done := make(chan error, 1)
	in := w.(*stream).in
	before, _ := in.Watch()
	go func() { done <- w.(Waiter).Wait(t.Context()) }()
	until(t, in, func(st State) bool { return st.Waiting > before.Waiting || st.Whole })
	return done
}

// until blocks until the ingest's state is as wanted.
func until(t testing.TB, in *Ingest, ok func(State) bool) State {
	t.Helper()
	limit := time.After(20 * time.Second)
	for {
		st, changed := in.Watch()
		if ok(st) {
			return st
		}
		select {
		case <-changed:
		case <-limit:
			t.Fatalf("state stays %+v", st)
		}
	}
}

func commit(t testing.TB, w content.Writer, size int, d digest.Digest) {
	t.Helper()
	if err := w.Commit(t.Context(), int64(size), d); err != nil {
		t.Fatal(err)
	}
}

// put commits a blob through a stream.
func put(t testing.TB, s *Store, b []byte) digest.Digest {
	t.Helper()
	d := digest.FromBytes(b)
	w := writer(t, s, refFor("put", d), len(b))
	write(t, w, b)
	commit(t, w, len(b), d)
	return d
}

// peer brings a range as the swarm does.
func peer(t testing.TB, in *Ingest, b []byte, lo, hi int) {
	t.Helper()
	if _, err := in.WriteAt(b[lo:hi], int64(lo)); err != nil {
		t.Error(err)
	}
	if err := in.MarkPresent(int64(lo), int64(hi-lo)); err != nil {
		t.Error(err)
	}
}

func wantErr(t testing.TB, err, kind error) {
	t.Helper()
	if !errors.Is(err, kind) {
		t.Fatalf("got error %v, want %v", err, kind)
	}
}

func exists(t testing.TB, path string) bool {
	t.Helper()
	_, err := os.Stat(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return err == nil
}

// crash returns a copy of the store's directory as a kill would leave it.
func crash(t testing.TB, s *Store) string {
	t.Helper()
	root := t.TempDir()
	if err := os.CopyFS(root, os.DirFS(s.root)); err != nil {
		t.Fatal(err)
	}
	return root
}

func visible(t testing.TB, s *Store) map[digest.Digest]bool {
	t.Helper()
	out := map[digest.Digest]bool{}
	err := s.Walk(t.Context(), func(info content.Info) error {
		out[info.Digest] = true
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}
