package proxy

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/content/testsuite"
	"github.com/containerd/containerd/v2/core/diff"
	diffproxy "github.com/containerd/containerd/v2/core/diff/proxy"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestContentSuiteOverLocalStore(t *testing.T) {
	testsuite.ContentSuite(t, "proxy", func(ctx context.Context, root string) (context.Context, content.Store, func() error, error) {
		conn, stop := start(t, Options{Store: localStore(t, root)})
		return ctx, client(conn), func() error { return errors.Join(conn.Close(), stop()) }, nil
	})
}

func (s *fakeStore) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	ra, err := s.Store.ReaderAt(ctx, desc)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.opens++
	return &countedReader{ra, s}, nil
}

type countedReader struct {
	content.ReaderAt
	s *fakeStore
}

func (r *countedReader) Close() error {
	r.s.mu.Lock()
	defer r.s.mu.Unlock()
	r.s.closed++
	return r.ReaderAt.Close()
}

func (s *fakeStore) counts() (opens, closed int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.opens, s.closed
}

func TestRead(t *testing.T) {
	const size = 100_000
	blob, d := randomBlob(t, size)
	fs := &fakeStore{Store: localStore(t, t.TempDir())}
	if err := content.WriteBlob(t.Context(), fs, "x", bytes.NewReader(blob), ocispec.Descriptor{Digest: d, Size: size}); err != nil {
		t.Fatal(err)
	}
	conn, stop := start(t, Options{Store: fs})
	api := contentapi.NewContentClient(conn)
	for name, tc := range map[string]struct {
		digest       string
		offset, size int64
		want         []byte
		replies      int
		code         codes.Code
	}{
		"all":              {offset: 0, size: 0, want: blob, replies: 4},
		"negative":         {offset: -5, size: -1, want: blob, replies: 4},
		"32 KiB":           {offset: 32768, size: 32768, want: blob[32768:65536], replies: 2},
		"a reply":          {offset: 1, size: maxReadReply, want: blob[1 : 1+maxReadReply], replies: 1},
		"past the end":     {offset: size - 10, size: 1 << 62, want: blob[size-10:], replies: 1},
		"overflowing":      {offset: size - 10, size: 1<<63 - 1, want: blob[size-10:], replies: 1},
		"at the end":       {offset: size, size: 10},
		"behind the end":   {offset: size + 1, size: 10, code: codes.OutOfRange},
		"no digest":        {digest: "nonsense", code: codes.InvalidArgument},
		"nothing there":    {digest: digest.FromString("nothing").String(), code: codes.NotFound},
		"wrong algorithm":  {digest: "md4:" + d.Encoded(), code: codes.InvalidArgument},
		"escape from blob": {digest: "sha256:../../../../etc/passwd", code: codes.InvalidArgument},
	} {
		t.Run(name, func(t *testing.T) {
			if tc.digest == "" {
				tc.digest = d.String()
			}
			s, err := api.Read(t.Context(), &contentapi.ReadContentRequest{Digest: tc.digest, Offset: tc.offset, Size: tc.size})
			if err != nil {
				t.Fatal(err)
			}
			var got []byte
			replies := 0
			for {
				resp, err := s.Recv()
				if errors.Is(err, io.EOF) {
					break
				}
				if err != nil {
					if status.Code(err) != tc.code {
						t.Fatalf("got %v, want %v", err, tc.code)
					}
					return
				}
				if resp.Offset != int64(len(got)) || len(resp.Data) > maxReadReply {
					t.Fatalf("reply of %d bytes at %d after %d bytes", len(resp.Data), resp.Offset, len(got))
				}
				got = append(got, resp.Data...)
				replies++
			}
			if tc.code != codes.OK || !bytes.Equal(got, tc.want) || replies != tc.replies {
				t.Fatalf("got %d bytes in %d replies, want %d in %d (%v)", len(got), replies, len(tc.want), tc.replies, tc.code)
			}
		})
	}
	if opens, _ := fs.counts(); opens != 1 {
		t.Errorf("%d opens for all reads, want 1", opens)
	}
	cs := client(conn)
	if err := cs.Delete(t.Context(), d); err != nil {
		t.Fatal(err)
	}
	if _, closed := fs.counts(); closed != 1 {
		t.Error("reader of a deleted blob still open")
	}
	s, err := api.Read(t.Context(), &contentapi.ReadContentRequest{Digest: d.String()})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Recv(); status.Code(err) != codes.NotFound {
		t.Errorf("read of a deleted blob: %v", err)
	}
	if err := stop(); err != nil {
		t.Fatal(err)
	}
}

type fakeProvider struct{ open, opens int }

type fakeReader struct {
	content.ReaderAt
	p *fakeProvider
}

func (r fakeReader) Close() error { r.p.open--; return nil }

func (p *fakeProvider) ReaderAt(context.Context, ocispec.Descriptor) (content.ReaderAt, error) {
	p.open++
	p.opens++
	return fakeReader{p: p}, nil
}

func TestReaderCacheBounds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &fakeProvider{}
		c := newReaderCache(p)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go c.run(ctx)
		get := func(i int) *cachedReader {
			r, err := c.acquire(ctx, digest.FromBytes([]byte{byte(i)}))
			if err != nil {
				t.Fatal(err)
			}
			return r
		}
		busy := get(0)
		for i := 1; i < 3*maxIdleReaders; i++ {
			c.release(get(i))
		}
		if p.open != maxIdleReaders {
			t.Errorf("%d readers open, want %d", p.open, maxIdleReaders)
		}
		if again := get(0); again != busy {
			t.Error("a reader in use was evicted")
		}
		c.release(busy)
		time.Sleep(2 * readerIdle)
		synctest.Wait()
		if p.open != 1 {
			t.Errorf("%d readers open after a while, want the busy one", p.open)
		}
		c.drop(busy.digest)
		if p.open != 1 {
			t.Error("a reader in use was closed")
		}
		c.release(busy)
		if p.open != 0 {
			t.Error("a dropped reader was left open")
		}
		c.release(get(1))
		cancel()
		synctest.Wait()
		if p.open != 0 {
			t.Error("a reader was left open at the end")
		}
	})
}

// droppingProvider is one whose blobs are deleted while they are opened.
type droppingProvider struct {
	fakeProvider
	c *readerCache
}

func (p *droppingProvider) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	p.c.drop(desc.Digest)
	return p.fakeProvider.ReaderAt(ctx, desc)
}

func TestReaderOfBlobDeletedWhileOpened(t *testing.T) {
	p := &droppingProvider{}
	p.c = newReaderCache(p)
	for range 2 {
		r, err := p.c.acquire(t.Context(), digest.FromString("x"))
		if err != nil {
			t.Fatal(err)
		}
		p.c.release(r)
	}
	if p.opens != 2 || p.open != 0 {
		t.Errorf("opened %d times, %d still open", p.opens, p.open)
	}
}

// TestDrain: a server that is to stop goes on for blobs that are being written, and for
// as long as it is needed for something else, but not for ever.
func TestDrain(t *testing.T) {
	for _, c := range []struct {
		name          string
		works, needed time.Duration
		want          time.Duration
	}{
		{"nothing to do", 0, 0, 0},
		{"a call", time.Second, 0, time.Second + lull},
		{"needed", 0, lull + 1, 2 * lull},
		{"a call, and needed afterwards", time.Second, 2 * time.Second, 2 * time.Second},
		{"needed for ever", 0, time.Hour, stopGrace},
		{"a call for ever", time.Hour, 0, stopGrace},
	} {
		synctest.Test(t, func(t *testing.T) {
			began := time.Now()
			s := New(Options{Needed: func() bool { return time.Since(began) < c.needed }})
			if c.works > 0 {
				defer time.AfterFunc(c.works, s.work.begin()).Stop()
			}
			s.drain()
			if took := time.Since(began); took != c.want {
				t.Errorf("%s: it took %v, want %v", c.name, took, c.want)
			}
		})
	}
}

// TestDrainEnds: what says whether the server is needed may hang.
func TestDrainEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began, hang := time.Now(), make(chan struct{})
		defer close(hang)
		New(Options{Needed: func() bool { <-hang; return true }}).drain()
		if took := time.Since(began); took != stopGrace {
			t.Errorf("it took %v, want %v", took, stopGrace)
		}
	})
}

type panicStore struct{ content.Store }

func (panicStore) Info(context.Context, digest.Digest) (content.Info, error) { panic("in Info") }
func (panicStore) ReaderAt(context.Context, ocispec.Descriptor) (content.ReaderAt, error) {
	panic("in ReaderAt")
}

func TestPanicsStayInTheirCall(t *testing.T) {
	blob, d := randomBlob(t, 100)
	cs := panicStore{localStore(t, t.TempDir())}
	var counted atomic.Int32
	conn, _ := start(t, Options{Store: cs, Panicked: func() { counted.Add(1) }})
	if _, err := contentapi.NewContentClient(conn).Info(t.Context(), &contentapi.InfoRequest{Digest: d.String()}); status.Code(err) != codes.Internal {
		t.Errorf("unary: %v", err)
	}
	s, err := contentapi.NewContentClient(conn).Read(t.Context(), &contentapi.ReadContentRequest{Digest: d.String()})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Recv(); status.Code(err) != codes.Internal {
		t.Errorf("stream: %v", err)
	}
	w, err := client(conn).Writer(t.Context(), content.WithRef("r"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(blob); err != nil {
		t.Fatal(err)
	}
	if err := w.Commit(t.Context(), 100, d); err != nil {
		t.Errorf("server is dead after a panic: %v", err)
	}
	if got := counted.Load(); got != 2 {
		t.Errorf("%d panics counted, want 2", got)
	}
}

type fakeApplier struct{ desc ocispec.Descriptor }

func (a *fakeApplier) Apply(_ context.Context, desc ocispec.Descriptor, _ []mount.Mount, _ ...diff.ApplyOpt) (ocispec.Descriptor, error) {
	a.desc = desc
	return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromString("x"), Size: 7}, nil
}

func TestDiffService(t *testing.T) {
	a := &fakeApplier{}
	conn, _ := start(t, Options{Store: localStore(t, t.TempDir()), Applier: a})
	remote := diffproxy.NewDiffApplier(diffapi.NewDiffClient(conn))
	want := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: digest.FromString("layer"), Size: 3}
	got, err := remote.(diff.Applier).Apply(t.Context(), want, nil)
	if err != nil || got.Size != 7 || a.desc.Digest != want.Digest {
		t.Errorf("applied %v as %v: %v", a.desc, got, err)
	}
	if _, err := remote.(diff.Comparer).Compare(t.Context(), nil, nil); !errdefs.IsNotImplemented(err) {
		t.Errorf("compare: %v", err)
	}
}

func TestListen(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "sub", "s.sock")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v, %v", fi.Mode(), err)
	}
	if fi, err := os.Stat(filepath.Dir(path)); err != nil || fi.Mode().Perm() != 0o711 {
		t.Errorf("directory: %v, %v", fi.Mode(), err)
	}
	if _, err := Listen(path); err == nil {
		t.Error("took over a socket that is in use")
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if l, err = Listen(path); err != nil {
		t.Errorf("stale socket: %v", err)
	} else {
		_ = l.Close()
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(file); err == nil {
		t.Error("replaced a file that is no socket")
	}
	if p, err := os.ReadFile(file); err != nil || string(p) != "precious" {
		t.Errorf("file is now %q, %v", p, err)
	}
}

func TestChooseActivated(t *testing.T) {
	dir := t.TempDir()
	open := func(network, addr string) net.Listener {
		l, err := net.Listen(network, addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = l.Close() })
		return l
	}
	closed := func(l net.Listener) bool { return errors.Is(l.Close(), net.ErrClosed) }
	a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")

	all := []net.Listener{nil, open("tcp", "127.0.0.1:0"), open("unix", a), open("unix", b)}
	l, err := choose(slices.Clone(all), b)
	if err != nil || l != all[3] || !closed(all[1]) || !closed(all[2]) || closed(l) {
		t.Errorf("by path: %v, %v", l, err)
	}
	all = []net.Listener{open("tcp", "127.0.0.1:0"), open("unix", b)}
	if l, err = choose(slices.Clone(all), a); err != nil || l != all[1] || !closed(all[0]) {
		t.Errorf("any: %v, %v", l, err)
	}
	all = []net.Listener{open("tcp", "127.0.0.1:0")}
	if l, err = choose(slices.Clone(all), a); err == nil || l != nil || !closed(all[0]) {
		t.Errorf("none: %v, %v", l, err)
	}
}
