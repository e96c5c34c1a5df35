package store

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestOneStreamPerRef(t *testing.T) {
	s := open(t, Options{})
	_, d := random(size, 1)
	ref := refFor("a", d)
	w := writer(t, s, ref, size)
	_, err := s.Writer(t.Context(), content.WithRef(ref), content.WithDescriptor(ocispec.Descriptor{Size: size}))
	wantErr(t, err, errdefs.ErrUnavailable)
	if !strings.Contains(err.Error(), "locked for") {
		t.Error(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	writer(t, s, ref, size)
}

func TestSizeConflict(t *testing.T) {
	s := open(t, Options{})
	b, d := random(size, 1)
	w := writer(t, s, refFor("a", d), size)
	other := func() (content.Writer, error) {
		return s.Writer(t.Context(), content.WithRef(refFor("b", d)), content.WithDescriptor(ocispec.Descriptor{Size: 5}))
	}
	_, err := other()
	wantErr(t, err, errdefs.ErrFailedPrecondition)
	write(t, w, b)
	commit(t, w, size, d)
	_, err = other()
	wantErr(t, err, errdefs.ErrFailedPrecondition)
}

// The swarm works at it with nobody waiting: another size must not end that.
func TestSizeConflictWithFill(t *testing.T) {
	s := open(t, Options{Filler: &filler{fill: func(ctx context.Context, _ *Ingest) { <-ctx.Done() }}})
	_, d := random(size, 1)
	w := writer(t, s, refFor("a", d), size)
	done := waitAsync(t, w)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	wantErr(t, <-done, errdefs.ErrFailedPrecondition)
	_, err := s.Writer(t.Context(), content.WithRef(refFor("b", d)), content.WithDescriptor(ocispec.Descriptor{Size: 5}))
	wantErr(t, err, errdefs.ErrFailedPrecondition)
}

func TestSharedByNamespaces(t *testing.T) {
	s := open(t, Options{})
	b, d := random(size, 1)
	w1, w2 := writer(t, s, refFor("a", d), size), writer(t, s, refFor("b", d), size)
	wait(t, w1)
	done := waitAsync(t, w2)
	write(t, w1, b)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if got := offset(t, w2); got != size {
		t.Fatalf("offset %d", got)
	}
	commit(t, w1, size, d)
	commit(t, w2, size, d)
}

// A blob that is there already: the descriptor's digest is refused as the local
// store does, the ref's is whole from the start.
func TestWriterOnBlobThatIsHere(t *testing.T) {
	s := open(t, Options{SeedQuota: 1 << 30})
	b, _ := random(size, 1)
	d := put(t, s, b)
	for range 2 {
		if err := s.Delete(t.Context(), d); err != nil {
			t.Fatal(err)
		}
		_, err := s.Writer(t.Context(), content.WithRef("x"), content.WithDescriptor(ocispec.Descriptor{Size: size, Digest: d}))
		wantErr(t, err, errdefs.ErrAlreadyExists)
		if !visible(t, s)[d] {
			t.Error("hidden after ErrAlreadyExists")
		}
		if err := s.Delete(t.Context(), d); err != nil {
			t.Fatal(err)
		}
		_, err = s.Writer(t.Context(), content.WithRef("x"), content.WithDescriptor(ocispec.Descriptor{Digest: d}))
		wantErr(t, err, errdefs.ErrAlreadyExists)
		if !visible(t, s)[d] {
			t.Error("hidden after ErrAlreadyExists")
		}
		if err := s.Delete(t.Context(), d); err != nil {
			t.Fatal(err)
		}
		w := writer(t, s, refFor("b", d), size)
		wait(t, w)
		if got := offset(t, w); got != size {
			t.Fatalf("offset %d", got)
		}
		commit(t, w, size, d)
		if !visible(t, s)[d] {
			t.Error("hidden after the commit")
		}
	}
}

func TestWriterThatDiesHandsOver(t *testing.T) {
	s := open(t, Options{Filler: &filler{}})
	b, d := random(size, 1)
	w1, w2, w3 := writer(t, s, refFor("a", d), size), writer(t, s, refFor("b", d), size), writer(t, s, refFor("c", d), size)
	wait(t, w1)
	done2 := waitAsync(t, w2)
	done3 := waitAsync(t, w3)
	write(t, w1, b[:100_000])
	if err := w1.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-done2; err != nil {
		t.Fatal(err)
	}
	if got := offset(t, w2); got != 100_000 {
		t.Fatalf("offset %d", got)
	}
	if st, _ := w3.(*stream).in.Watch(); st.Waiting != 1 || st.Writing != 1 {
		t.Fatalf("state %+v", st)
	}
	write(t, w2, b[100_000:])
	if err := <-done3; err != nil {
		t.Fatal(err)
	}
	commit(t, w3, size, d)
	commit(t, w2, size, d)
}

func TestWriterThatStallsIsOvertaken(t *testing.T) {
	b, d := random(size, 1)
	root := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := open(t, Options{Root: root, MaxWait: 30 * time.Second})
		w1, w2, w3 := writer(t, s, refFor("a", d), size), writer(t, s, refFor("b", d), size), writer(t, s, refFor("c", d), size)
		wait(t, w1)
		start := time.Now()
		done := waitAsync(t, w2)
		time.Sleep(20 * time.Second)
		write(t, w1, b[:1000]) // puts it off
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		if got := time.Since(start); got != 50*time.Second {
			t.Errorf("released after %s", got)
		}
		done = waitAsync(t, w3)
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		if got := time.Since(start); got != 80*time.Second {
			t.Errorf("the next one released after %s", got)
		}
		write(t, w2, b[1000:])
		commit(t, w2, size, d)
	})
}

func TestWaitEnds(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	f := &filler{fill: func(ctx context.Context, _ *Ingest) { <-ctx.Done() }}
	s := open(t, Options{Filler: f})
	b, d := random(size, 1)
	ref := refFor("a", d)

	w := writer(t, s, ref, size)
	cancel()
	if err := w.(Waiter).Wait(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("ctx: %v", err)
	}
	if _, err := w.Write(b[:1]); err != nil {
		t.Errorf("write after a wait that ended: %v", err)
	}

	w2 := writer(t, s, refFor("b", d), size)
	done := waitAsync(t, w2)
	if _, err := w2.Write(b[:1]); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("write while waiting: %v", err)
	}
	if err := s.Abort(t.Context(), refFor("b", d)); err != nil {
		t.Fatal(err)
	}
	wantErr(t, <-done, errdefs.ErrAborted)

	w3 := writer(t, s, refFor("c", d), size)
	done = waitAsync(t, w3)
	if err := w3.Close(); err != nil {
		t.Fatal(err)
	}
	wantErr(t, <-done, errdefs.ErrFailedPrecondition)

	w4 := writer(t, s, refFor("d", d), size)
	done = waitAsync(t, w4)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	wantErr(t, <-done, errdefs.ErrUnavailable)
	_, err := s.Writer(t.Context(), content.WithRef(refFor("e", d)), content.WithDescriptor(ocispec.Descriptor{Size: size}))
	wantErr(t, err, errdefs.ErrUnavailable)
}
