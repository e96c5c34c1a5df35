package prefetch

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// pulls is a Foreground to be set.
type pulls struct {
	busy  atomic.Bool
	wants atomic.Value // digest.Digest
}

func (p *pulls) Busy() bool { return p.busy.Load() }

func (p *pulls) Wants(d digest.Digest) bool {
	w, _ := p.wants.Load().(digest.Digest)
	return w == d
}

func described(data []byte) ocispec.Descriptor {
	return ocispec.Descriptor{Digest: digest.FromBytes(data), Size: int64(len(data))}
}

func openWriter(ctx context.Context, j *job, data []byte) (content.Writer, error) {
	desc := described(data)
	return j.client.ContentStore().Writer(ctx, content.WithRef("layer-"+desc.Digest.String()), content.WithDescriptor(desc))
}

// bring writes a blob in pieces, as containerd's copy does.
func bring(t *testing.T, j *job, data []byte) {
	t.Helper()
	w, err := openWriter(t.Context(), j, data)
	if err != nil {
		t.Fatal(err)
	}
	if err := content.Copy(t.Context(), w, bytes.NewReader(data), int64(len(data)), digest.FromBytes(data)); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
}

func writeAll(t *testing.T, w io.Writer, data []byte) {
	t.Helper()
	if n, err := w.Write(data); n != len(data) || err != nil {
		t.Fatal(n, err)
	}
}

func TestForegroundGoesFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		front := &pulls{}
		j, _ := newJob(t, Request{Image: "r.example.com/app:1"}, Options{Foreground: front})
		front.busy.Store(true)
		began, opened := time.Now(), make(chan time.Duration, 1)
		blob := []byte("a blob")
		go func() {
			bring(t, j, blob)
			opened <- time.Since(began)
		}()
		time.Sleep(10*time.Second + time.Millisecond)
		front.busy.Store(false) // between two blobs
		time.Sleep(busyLook)
		front.busy.Store(true)
		time.Sleep(10 * time.Second)
		front.busy.Store(false)
		if took := <-opened; took < 20*time.Second || took > 22*time.Second {
			t.Errorf("it began after %v", took)
		}

		// What somebody else wants, too, does not wait; nor does what is here.
		front.busy.Store(true)
		wanted := []byte("wanted")
		front.wants.Store(digest.FromBytes(wanted))
		began = time.Now()
		bring(t, j, wanted)
		if _, err := openWriter(t.Context(), j, blob); !errdefs.IsAlreadyExists(err) {
			t.Error(err)
		}
		if took := time.Since(began); took > busyLook {
			t.Errorf("it waited %v", took)
		}

		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Minute, errors.New("enough"))
		defer cancel()
		if _, err := openWriter(ctx, j, []byte("another")); err == nil || !strings.Contains(err.Error(), "gave way") || !strings.Contains(err.Error(), "enough") {
			t.Error(err)
		}
		if !j.slots.TryAcquire(blobsAtOnce) {
			t.Error("a slot is not given back")
		}
	})
}

func TestBandwidthLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const limit = 1 << 20
		front := &pulls{}
		j, _ := newJob(t, Request{Image: "r.example.com/app:1"}, Options{BandwidthLimit: limit, Foreground: front})
		takes := func(what string, low, high time.Duration, f func()) {
			t.Helper()
			began := time.Now()
			f()
			if took := time.Since(began); took < low || took > high {
				t.Errorf("%s took %v, want %v to %v", what, took, low, high)
			}
		}
		blob := func(b byte) []byte { return bytes.Repeat([]byte{b}, 4*limit) }
		takes("a blob from the registry", 3*time.Second, 5*time.Second, func() { bring(t, j, blob('a')) })

		// From other nodes: it comes as it comes, and the next one waits.
		takes("a blob from others", 0, 200*time.Millisecond, func() {
			w, err := openWriter(t.Context(), j, blob('b'))
			if err != nil {
				t.Fatal(err)
			}
			inner := w.(*writer).Writer
			if err := content.Copy(t.Context(), inner, bytes.NewReader(blob('b')), 4*limit, digest.FromBytes(blob('b'))); !errdefs.IsAlreadyExists(err) && err != nil {
				t.Fatal(err)
			}
			w.(*writer).committed = true
			w.Close()
		})
		takes("the beginning of the one after it", 3*time.Second, 5*time.Second, func() {
			w, err := openWriter(t.Context(), j, []byte("small"))
			if err != nil {
				t.Fatal(err)
			}
			w.Close()
		})

		front.wants.Store(digest.FromBytes(blob('c')))
		takes("a blob that somebody waits for", 0, 200*time.Millisecond, func() { bring(t, j, blob('c')) })

		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		w, err := openWriter(ctx, j, blob('d'))
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		if err := content.Copy(ctx, w, bytes.NewReader(blob('d')), 4*limit, digest.FromBytes(blob('d'))); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
	})
}

func TestFewBlobsAtOnce(t *testing.T) {
	j, _ := newJob(t, Request{Image: "r.example.com/app:1"}, Options{})
	var open []content.Writer
	for i := range blobsAtOnce {
		w, err := openWriter(t.Context(), j, []byte{byte(i), 1})
		if err != nil {
			t.Fatal(err)
		}
		open = append(open, w)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := openWriter(ctx, j, []byte("one more")); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	for _, w := range open {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
		w.Close() // once more does not give back more
	}
	bring(t, j, []byte("one more"))
	if !j.slots.TryAcquire(blobsAtOnce) || j.slots.TryAcquire(1) {
		t.Error("slots are not what they were")
	}
}

// The reports rise with what has been written, and count a blob that was here.
func TestMeter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j, store := newJob(t, Request{Image: "r.example.com/app:1"}, Options{})
		a, b := bytes.Repeat([]byte("a"), 100), bytes.Repeat([]byte("b"), 10)
		j.meter.add(described(a))
		j.meter.add(described(b))
		j.meter.add(described(b))
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		var got []Progress
		done := make(chan struct{})
		go func() {
			defer close(done)
			j.meter.run(ctx, store, func(p Progress) { got = append(got, p) })
		}()
		time.Sleep(2 * lookEvery)
		w, err := openWriter(t.Context(), j, a)
		if err != nil {
			t.Fatal(err)
		}
		writeAll(t, w, a[:40])
		time.Sleep(2 * lookEvery)
		writeAll(t, w, a[40:])
		if err := w.Commit(t.Context(), 100, digest.FromBytes(a)); err != nil {
			t.Fatal(err)
		}
		w.Close()
		time.Sleep(2 * lookEvery)
		if err := content.WriteBlob(t.Context(), store, "somebody else's", bytes.NewReader(b), described(b)); err != nil {
			t.Fatal(err)
		}
		if _, err := openWriter(t.Context(), j, b); !errdefs.IsAlreadyExists(err) {
			t.Fatal(err)
		}
		time.Sleep(2 * lookEvery)
		cancel()
		<-done
		want := []Progress{{0, 110}, {40, 110}, {100, 110}, {110, 110}}
		if len(got) != len(want) {
			t.Fatalf("%v, want %v", got, want)
		}
		for i := range want {
			if got[i] != want[i] {
				t.Errorf("%v, want %v", got, want)
			}
		}
		if j.meter.total() != 110 {
			t.Error(j.meter.total())
		}
	})
}
