package store

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// fullDisk swaps the staging file of an ingest for one whose disk is full.
func fullDisk(t *testing.T, in *Ingest) (restore func()) {
	t.Helper()
	full, err := os.OpenFile("/dev/full", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	in.mu.Lock()
	good := in.file
	in.file = full
	in.mu.Unlock()
	return func() {
		in.mu.Lock()
		in.file = good
		in.mu.Unlock()
		if err := full.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestDiskFull(t *testing.T) {
	b, d := random(size, 1)
	for _, tc := range []struct {
		name string
		end  func(w content.Writer) error
	}{
		{"next write", func(w content.Writer) error {
			w.(*stream).in.mu.Lock()
			w.(*stream).drainLocked()
			w.(*stream).in.mu.Unlock()
			_, err := w.Write(b[1000:2000])
			return err
		}},
		{"last write", func(w content.Writer) error { _, err := w.Write(b[1000:]); return err }},
		{"commit", func(w content.Writer) error {
			w.(*stream).in.mu.Lock()
			w.(*stream).drainLocked()
			w.(*stream).in.mu.Unlock()
			return w.Commit(context.Background(), size, d)
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := open(t, Options{})
			ref := refFor("a", d)
			w := writer(t, s, ref, size)
			wait(t, w)
			in := w.(*stream).in
			other := writer(t, s, refFor("b", d), size)
			done := waitAsync(t, other)
			restore := fullDisk(t, in)
			if _, err := in.WriteAt(b[5000:6000], 5000); !errors.Is(err, syscall.ENOSPC) {
				t.Errorf("peer's write: %v", err)
			}
			write(t, w, b[:1000]) // only queued: says nothing yet
			if err := tc.end(w); !errors.Is(err, syscall.ENOSPC) {
				t.Errorf("error %v", err)
			}
			if err := <-done; err != nil { // the other stream takes over
				t.Error(err)
			}
			restore()
			if err := w.Close(); err != nil {
				t.Error(err)
			}
			w = writer(t, s, ref, size)
			done = waitAsync(t, w)
			write(t, other, b)
			if err := <-done; err != nil {
				t.Error(err)
			}
			commit(t, w, size, d)
			commit(t, other, size, d)
		})
	}
}

// What the failed pull has staged, and what is kept for others, makes room for
// the next.
func TestFullDiskIsGivenBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := open(t, Options{SeedQuota: 1 << 20})
		kept, _ := random(1000, 2)
		hidden := put(t, s, kept)
		if err := s.Delete(t.Context(), hidden); err != nil {
			t.Fatal(err)
		}
		defer runStore(t, s)()
		b, d := random(size, 1)
		w := writer(t, s, refFor("a", d), size)
		wait(t, w)
		write(t, w, b[:1000])
		in := w.(*stream).in
		in.mu.Lock()
		w.(*stream).drainLocked()
		in.mu.Unlock()
		restore := fullDisk(t, in)
		if _, err := in.WriteAt(b[5000:6000], 5000); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("peer's write: %v", err)
		}
		restore()
		if err := w.Close(); err != nil {
			t.Error(err)
		}
		synctest.Wait()
		for what, path := range map[string]string{
			"staging": s.stagingPath(d), "sidecar": s.stagingPath(d) + sidecarSuffix, "hidden blob": s.blobPath(hidden),
		} {
			if exists(t, path) {
				t.Errorf("%s is still there", what)
			}
		}
	})
}

// The blob cannot be moved into its place.
func TestFinishFails(t *testing.T) {
	s := open(t, Options{})
	b, d := random(size, 1)
	ref := refFor("a", d)
	blobs := filepath.Join(s.root, "blobs")
	if err := os.WriteFile(blobs, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	w := writer(t, s, ref, size)
	if _, err := w.Write(b); !errors.Is(err, syscall.ENOTDIR) {
		t.Fatalf("error %v", err)
	}
	if st, _ := w.(*stream).in.Watch(); st.Whole || st.Failed != 0 {
		t.Errorf("state %+v", st)
	}
	if err := errors.Join(w.Close(), os.Remove(blobs)); err != nil {
		t.Fatal(err)
	}
	w = writer(t, s, ref, size)
	write(t, w, b[offset(t, w):])
	commit(t, w, size, d)
}

// The staging file was cut off behind the store's back.
func TestReadBackFails(t *testing.T) {
	s := open(t, Options{})
	b, d := random(size, 1)
	w := writer(t, s, refFor("a", d), size)
	in := w.(*stream).in
	peer(t, in, b, 1000, size)
	if err := os.Truncate(s.stagingPath(d), 0); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(b); err == nil {
		t.Fatal("no error")
	}
	if st, _ := in.Watch(); st.Present != 0 || st.Failed != 0 {
		t.Errorf("state %+v", st)
	}
}

// What containerd calls inside its database transactions must not wait while
// data is written, synced or hashed, or the sidecar is saved.
func TestMetadataCallsDoNotWait(t *testing.T) {
	s := open(t, Options{SeedQuota: 1 << 30})
	b, d := random(size, 1)
	b2, d2 := random(size, 2)
	w := writer(t, s, refFor("a", d), size)
	whole := writer(t, s, refFor("a", d2), size)
	write(t, whole, b2)
	in := w.(*stream).in

	in.wmu.Lock()
	in.saveMu.Lock()
	write(t, w, b[:1000])
	if _, err := s.Info(t.Context(), d2); err != nil {
		t.Error(err)
	}
	if got := offset(t, w); got != 1000 {
		t.Errorf("offset %d", got)
	}
	if _, err := s.Status(t.Context(), refFor("a", d)); err != nil {
		t.Error(err)
	}
	if list, err := s.ListStatuses(t.Context()); err != nil || len(list) != 2 {
		t.Error(list, err)
	}
	other := writer(t, s, refFor("b", d), size)
	if got := offset(t, other); got != 0 {
		t.Errorf("offset %d", got)
	}
	other.Digest()
	commit(t, whole, size, d2)
	if err := s.Delete(t.Context(), d2); err != nil {
		t.Error(err)
	}
	if err := s.Abort(t.Context(), refFor("b", d)); err != nil {
		t.Error(err)
	}
	in.saveMu.Unlock()
	in.wmu.Unlock()
	write(t, w, b[1000:])
	commit(t, w, size, d)
}

// A slow hasher and a slow disk must not let memory grow.
func TestQueueIsBounded(t *testing.T) {
	s := open(t, Options{})
	const n = 32 << 20
	b, d := random(n, 1)
	w := writer(t, s, refFor("a", d), n)
	in := w.(*stream).in
	in.wmu.Lock()
	var at int
	done := make(chan error)
	go func() {
		for ; at < n; at += 1 << 20 {
			if _, err := w.Write(b[at : at+1<<20]); err != nil {
				done <- err
				return
			}
		}
		done <- nil
	}()
	for full := false; !full; {
		in.mu.Lock()
		full = in.held >= queueLimit
		if in.held > queueLimit+bigChunk {
			t.Errorf("%d bytes held", in.held)
		}
		in.mu.Unlock()
	}
	in.wmu.Unlock()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	commit(t, w, n, d)
}

// Many clients, peers that bring good and bad bytes, aborts, deletions and
// eviction, all at once. Whoever commits must find the blob whole, and nothing
// may hang.
func TestStress(t *testing.T) {
	const blobs, clients, rounds, n = 4, 6, 12, 200_000
	data, ds := make([][]byte, blobs), make([]digest.Digest, blobs)
	for i := range blobs {
		data[i], ds[i] = random(n, byte(i+1))
	}
	var peace atomic.Bool
	f := &filler{fill: func(ctx context.Context, in *Ingest) {
		if peace.Load() {
			return
		}
		var b []byte
		for i := range ds {
			if ds[i] == in.Digest() {
				b = data[i]
			}
		}
		for rand.IntN(30) > 0 && ctx.Err() == nil {
			lo := rand.Int64N(n)
			hi := min(n, lo+rand.Int64N(n/4))
			p := b[lo:hi]
			if rand.IntN(40) == 0 {
				p = make([]byte, hi-lo)
			}
			if _, err := in.WriteAt(p, lo); err != nil && !errors.Is(err, errdefs.ErrAborted) {
				t.Error(err)
			}
			if err := in.MarkPresent(lo, hi-lo); err != nil && !errors.Is(err, errdefs.ErrAborted) {
				t.Error(err)
			}
			if st, _ := in.Watch(); st.Failed > 0 || rand.IntN(8) == 0 {
				in.Fetch()
			}
		}
	}}
	s := open(t, Options{Filler: f, SeedQuota: 2 * n, MaxWait: 20 * time.Millisecond})
	stop := runStore(t, s)
	defer stop()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var mu sync.Mutex
	tally := map[string]int{}
	count := func(what string) { mu.Lock(); tally[what]++; mu.Unlock() }
	var wg sync.WaitGroup
	for c := range clients {
		wg.Go(func() {
			for range rounds {
				i := rand.IntN(blobs)
				err := client(ctx, s, fmt.Sprintf("ns%d", c), data[i], ds[i])
				if err != nil {
					count("failed")
				} else {
					count("pulled")
				}
				if ctx.Err() != nil {
					t.Errorf("hung: %v", err)
					return
				}
			}
		})
	}
	wg.Wait()
	t.Logf("%v", tally)
	if tally["pulled"] == 0 {
		t.Error("nothing was pulled")
	}
	// In peace, every blob can be had.
	peace.Store(true)
	for i := range blobs {
		for try := 0; ; try++ {
			err := client(ctx, s, "last", data[i], ds[i])
			if err == nil {
				break
			}
			if try > 50 {
				t.Fatal(err)
			}
		}
	}
}

// client pulls a blob as containerd does, and sometimes misbehaves.
func client(ctx context.Context, s *Store, ns string, b []byte, d digest.Digest) error {
	ref, n := refFor(ns, d), int64(len(b))
	switch rand.IntN(8) {
	case 0:
		if err := s.Delete(ctx, d); err != nil && !errdefs.IsNotFound(err) {
			return err
		}
	case 1:
		if err := s.Abort(ctx, ref); err != nil {
			return err
		}
	}
	if _, err := s.Info(ctx, d); err == nil {
		_, err := content.ReadBlob(ctx, s, ocispec.Descriptor{Digest: d, Size: n})
		if errdefs.IsNotFound(err) {
			return nil // another client has deleted it
		}
		return err
	}
	w, err := s.Writer(ctx, content.WithRef(ref), content.WithDescriptor(ocispec.Descriptor{Size: n}))
	if err != nil {
		return err
	}
	defer func() { _ = w.Close() }()
	if err := w.(Waiter).Wait(ctx); err != nil {
		return err
	}
	st, err := w.Status()
	if err != nil {
		return err
	}
	if _, err := s.ListStatuses(ctx); err != nil {
		return err
	}
	for at := st.Offset; at < n; {
		end := min(n, at+1+rand.Int64N(50_000))
		if _, err := w.Write(b[at:end]); err != nil {
			return err
		}
		if at = end; rand.IntN(20) == 0 {
			return errors.New("client went away")
		}
	}
	return w.Commit(ctx, n, d)
}

// There is no room to move a blob into its place: what is staged is given back,
// and so is what was kept for others.
func TestNoRoomToFinish(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := open(t, Options{SeedQuota: 1 << 20})
		kept, _ := random(1000, 2)
		hidden := put(t, s, kept)
		if err := s.Delete(t.Context(), hidden); err != nil {
			t.Fatal(err)
		}
		defer runStore(t, s)()
		_, d := random(size, 1)
		w := writer(t, s, refFor("a", d), size)
		in := w.(*stream).in
		peer(t, in, make([]byte, size), 0, size/2)
		synctest.Wait()
		in.mu.Lock()
		in.finishing = true
		in.mu.Unlock()
		in.spoil(fmt.Errorf("finish: %w", syscall.ENOSPC), false)
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if exists(t, s.stagingPath(d)) || exists(t, s.blobPath(hidden)) {
			t.Error("still there")
		}
	})
}
