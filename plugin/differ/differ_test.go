package differ

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/rand"
	"errors"
	"hash/crc32"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	"github.com/containerd/containerd/v2/contrib/diffservice"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
)

// applyAll unpacks the two layers, and returns the resulting trees and diff ids.
func applyAll(t *testing.T, a diff.Applier, descs []ocispec.Descriptor) (trees []map[string]string, applied []ocispec.Descriptor) {
	t.Helper()
	mounts, dirs := snapshots(t)
	for i, desc := range descs {
		d, err := a.Apply(t.Context(), desc, mounts[i], diff.WithSyncFs(true))
		if err != nil {
			t.Fatalf("layer %d: %v", i, err)
		}
		applied = append(applied, d)
		trees = append(trees, dump(t, dirs[i]))
	}
	return trees, applied
}

func TestSameTreeAsContainerd(t *testing.T) {
	plain := layers(t)
	test := func(name string, pack string) {
		t.Run(name, func(t *testing.T) {
			c := compressions[pack]
			b := newBlobs(t)
			var descs []ocispec.Descriptor
			for _, l := range plain {
				descs = append(descs, b.add(t, c.mediaType, c.compress(t, l)))
			}
			ours, applied := applyAll(t, New(Options{Blobs: b}), descs)
			theirs, want := applyAll(t, fileSystemApplier(b), descs)
			for i := range ours {
				sameTree(t, theirs[i], ours[i])
				if len(ours[i]) < 10 {
					t.Errorf("layer %d has only %d inodes", i, len(ours[i]))
				}
				if applied[i].Digest != want[i].Digest || applied[i].Size != want[i].Size || applied[i].MediaType != want[i].MediaType ||
					applied[i].Digest != digest.FromBytes(plain[i]) {
					t.Errorf("layer %d applied as %+v, want %+v", i, applied[i], want[i])
				}
			}
		})
	}
	t.Setenv(disableIgzip, "true")
	for pack := range compressions {
		test(pack, pack)
	}
	t.Setenv(disableIgzip, "")
	runs := realIgzip(t)
	for _, pack := range []string{"gzip", "members"} {
		before := runs()
		test(pack+" by igzip", pack)
		// The upper layer is too small for it.
		if got := runs() - before; got != 1 {
			t.Errorf("%s: igzip ran %d times, want 1", pack, got)
		}
	}
}

// bindTo is a bind mount of an empty directory.
func bindTo(t testing.TB) []mount.Mount {
	return []mount.Mount{{Type: "bind", Source: t.TempDir(), Options: []string{"rbind", "rw"}}}
}

// bigLayer is a gzip layer of more than igzipMin bytes, which gzip can shrink.
func bigLayer(t testing.TB) (plain, packed []byte) {
	t.Helper()
	var es []entry
	for i := range 8 {
		p := make([]byte, 256<<10)
		_, _ = rand.Read(p)
		es = append(es, file("random"+string(rune('a'+i)), 0o644, string(p)+strings.Repeat("x", 1<<20)))
	}
	plain = archiveOf(t, es...)
	return plain, gzipped(t, plain)
}

func TestBrokenLayers(t *testing.T) {
	plain, packed := bigLayer(t)
	crc := bytes.Clone(packed)
	crc[len(crc)-6] ^= 1
	middle := bytes.Clone(packed)
	middle[len(middle)/2] ^= 0x55
	z := compressions["zstd"].compress(t, plain)
	for name, tc := range map[string]struct {
		mediaType string
		blob      []byte
	}{
		"gzip checksum":   {ocispec.MediaTypeImageLayerGzip, crc},
		"gzip middle":     {ocispec.MediaTypeImageLayerGzip, middle},
		"gzip cut":        {ocispec.MediaTypeImageLayerGzip, packed[:len(packed)*2/3]},
		"gzip no trailer": {ocispec.MediaTypeImageLayerGzip, packed[:len(packed)-8]},
		"gzip garbage":    {ocispec.MediaTypeImageLayerGzip, append(bytes.Clone(packed), "garbage"...)},
		"gzip head only":  {ocispec.MediaTypeImageLayerGzip, packed[:5]},
		"zstd cut":        {ocispec.MediaTypeImageLayerZstd, z[:len(z)/2]},
		"tar cut":         {ocispec.MediaTypeImageLayer, plain[:len(plain)/2]},
		"gzip as tar":     {ocispec.MediaTypeImageLayer, packed},
		"no tar":          {ocispec.MediaTypeImageLayerGzip, bytes.Repeat([]byte("no"), 10_000)},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv(disableIgzip, "true")
			b := newBlobs(t)
			desc := b.add(t, tc.mediaType, tc.blob)
			if d, err := New(Options{Blobs: b}).Apply(t.Context(), desc, bindTo(t)); err == nil {
				t.Errorf("applied as %v", d)
			} else if !strings.Contains(err.Error(), desc.Digest.String()) {
				t.Errorf("does not say which layer: %v", err)
			}
		})
	}
	for name, blob := range map[string][]byte{
		"checksum": crc, "cut": packed[:len(packed)*2/3], "no trailer": packed[:len(packed)-8],
	} {
		t.Run(name+" by igzip", func(t *testing.T) {
			runs := realIgzip(t)
			b := newBlobs(t)
			_, err := New(Options{Blobs: b}).Apply(t.Context(), b.add(t, ocispec.MediaTypeImageLayerGzip, blob), bindTo(t))
			if err == nil || !strings.Contains(err.Error(), "igzip") || runs() != 1 {
				t.Errorf("igzip ran %d times: %v", runs(), err)
			}
		})
	}
	t.Run("igzip fails at the end", func(t *testing.T) {
		asIgzip(t, "gzip -d -c; echo bad checksum >&2; exit 3\n")
		b := newBlobs(t)
		_, err := New(Options{Blobs: b}).Apply(t.Context(), b.add(t, ocispec.MediaTypeImageLayerGzip, packed), bindTo(t))
		if err == nil || !strings.Contains(err.Error(), "bad checksum") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("igzip cannot start", func(t *testing.T) {
		b := newBlobs(t)
		d := New(Options{Blobs: b})
		d.igzip = filepath.Join(t.TempDir(), "igzip")
		if _, err := d.Apply(t.Context(), b.add(t, ocispec.MediaTypeImageLayerGzip, packed), bindTo(t)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("got %v", err)
		}
	})
}

func TestEmptyLayer(t *testing.T) {
	b := newBlobs(t)
	d, err := New(Options{Blobs: b}).Apply(t.Context(), b.add(t, ocispec.MediaTypeImageLayerGzip, gzipped(t, nil)), bindTo(t))
	if err != nil || d.Size != 0 || d.Digest != digest.FromString("") {
		t.Errorf("applied as %+v, %v", d, err)
	}
}

func TestMissingBlob(t *testing.T) {
	d := New(Options{Blobs: newBlobs(t)})
	for dgst, is := range map[digest.Digest]func(error) bool{
		digest.FromString("x"):          errdefs.IsNotFound,
		"sha256:../../../../etc/passwd": errdefs.IsInvalidArgument,
	} {
		if _, err := d.Apply(t.Context(), ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: dgst}, bindTo(t)); !is(err) {
			t.Errorf("%s: %v", dgst, err)
		}
	}
}

func TestCancel(t *testing.T) {
	_, packed := bigLayer(t)
	t.Run("before", func(t *testing.T) {
		b := newBlobs(t)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := New(Options{Blobs: b}).Apply(ctx, b.add(t, ocispec.MediaTypeImageLayerGzip, packed), bindTo(t)); !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("while igzip hangs", func(t *testing.T) {
		started := filepath.Join(t.TempDir(), "started")
		asIgzip(t, "echo $$ > "+started+".tmp; mv "+started+".tmp "+started+"; exec sleep 1000\n")
		b := newBlobs(t)
		ctx, cancel := context.WithCancel(t.Context())
		d := New(Options{Blobs: b})
		desc := b.add(t, ocispec.MediaTypeImageLayerGzip, packed)
		ended := make(chan error, 1)
		go func() {
			_, err := d.Apply(ctx, desc, bindTo(t))
			ended <- err
		}()
		var pid []byte
		for len(pid) == 0 {
			pid, _ = os.ReadFile(started)
		}
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
		if _, err := os.Stat("/proc/" + strings.TrimSpace(string(pid))); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("igzip is still there: %v", err)
		}
	})
	t.Run("while the reader is slow", func(t *testing.T) {
		b := newBlobs(t)
		f, err := b.Open(t.Context(), b.add(t, ocispec.MediaTypeImageLayerGzip, packed).Digest)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = f.Close() }()
		ctx, cancel := context.WithCancel(t.Context())
		_, _, err = New(Options{Blobs: b}).unpack(ctx, f, true, func(_ context.Context, s *stream) error {
			if _, err := s.Read(make([]byte, 10)); err != nil {
				return err
			}
			cancel()
			_, err := io.Copy(io.Discard, s)
			return err
		})
		if !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
	})
}

func TestPanicOfDecoder(t *testing.T) {
	counted := 0
	d := New(Options{Blobs: newBlobs(t), Panicked: func() { counted++ }})
	d.blocks.New = func() any { panic("out of blocks") }
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	_, _, err = d.unpack(t.Context(), f, false, func(context.Context, *stream) error { return nil })
	if err == nil || !strings.Contains(err.Error(), "out of blocks") || counted != 1 {
		t.Errorf("got %v, %d counted", err, counted)
	}
}

// TestTempMounts: mounts that are not the same as a directory are mounted for
// the time of unpacking.
func TestTempMounts(t *testing.T) {
	layer := layers(t)[0]
	// Each gives the mounts, with what they are made of below root.
	for name, mounts := range map[string]func(root string) []mount.Mount{
		"another option": func(root string) []mount.Mount {
			return []mount.Mount{{Type: "bind", Source: root + "/a", Options: []string{"rbind", "rw", "nodev"}}}
		},
		"two": func(root string) []mount.Mount {
			return []mount.Mount{
				{Type: "bind", Source: root + "/a", Options: []string{"rbind", "rw"}},
				{Type: "bind", Source: root + "/b", Target: "/dir", Options: []string{"rbind", "rw"}},
			}
		},
		"overlay on an overlay": func(root string) []mount.Mount {
			return []mount.Mount{
				{Type: "bind", Source: root + "/a", Options: []string{"rbind", "rw"}},
				{Type: "overlay", Source: "overlay", Target: "/dir", Options: []string{
					"lowerdir=" + root + "/low", "upperdir=" + root + "/b", "workdir=" + root + "/work"}},
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBlobs(t)
			desc := b.add(t, ocispec.MediaTypeImageLayer, layer)
			apply := func(a diff.Applier) map[string]string {
				root := t.TempDir()
				for _, d := range []string{"a/dir", "b", "low", "work"} {
					if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
						t.Fatal(err)
					}
				}
				got, err := a.Apply(t.Context(), desc, mounts(root), diff.WithSyncFs(true))
				if err != nil || got.Digest != digest.FromBytes(layer) {
					t.Fatalf("applied as %+v, %v", got, err)
				}
				noMounts(t, root)
				tree := dump(t, root)
				if _, there := tree["a/setuid"]; !there {
					t.Error("the layer is not where the mount leads")
				}
				if _, there := tree["b/big"]; there != (len(mounts(root)) > 1) {
					t.Errorf("in the second mount: %t", there)
				}
				return tree
			}
			sameTree(t, apply(fileSystemApplier(b)), apply(New(Options{Blobs: b})))
		})
	}
	t.Run("read-only", func(t *testing.T) {
		b := newBlobs(t)
		desc, root := b.add(t, ocispec.MediaTypeImageLayer, layer), t.TempDir()
		m := []mount.Mount{{Type: "bind", Source: root, Options: []string{"rbind", "ro"}}}
		if _, err := New(Options{Blobs: b}).Apply(t.Context(), desc, m); !errors.Is(err, unix.EROFS) {
			t.Errorf("got %v", err)
		}
		noMounts(t, root)
		if tree := dump(t, root); len(tree) != 1 {
			t.Errorf("%d files written", len(tree)-1)
		}
	})
}

func TestMountsThatAreMounted(t *testing.T) {
	for name, tc := range map[string]struct {
		m    mount.Mount
		want bool
	}{
		"writable":  {mount.Mount{Type: "bind", Options: []string{"rbind", "rw"}}, true},
		"read-only": {mount.Mount{Type: "bind", Options: []string{"rbind", "ro"}}, false},
		"mapped":    {mount.Mount{Type: "bind", Options: []string{"rbind", "uidmap=0:1:1"}}, false},
		"sub":       {mount.Mount{Type: "bind", Target: "/x"}, false},
		"other":     {mount.Mount{Type: "ext4"}, false},
	} {
		if got := plainBind(tc.m); got != tc.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

func TestWorthIgzip(t *testing.T) {
	_, packed := bigLayer(t)
	random := make([]byte, 2<<20)
	_, _ = rand.Read(random)
	named := func(p []byte) []byte { // with name, comment, extra field and header checksum
		head := append(bytes.Clone(p[:10]), "\x03\x00abcname\x00comment\x00hc"...)
		head[3] = 1<<1 | 1<<2 | 1<<3 | 1<<4
		return append(head, p[10:]...)
	}
	for name, tc := range map[string]struct {
		blob []byte
		want bool
	}{
		"deflate":      {packed, true},
		"named":        {named(packed), true},
		"random":       {gzipped(t, random), false},
		"random named": {named(gzipped(t, random)), false},
		"small":        {gzipped(t, []byte("small")), false},
	} {
		path := filepath.Join(t.TempDir(), "f")
		if err := os.WriteFile(path, tc.blob, 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		if got := worthIgzip(f, tc.blob[:min(len(tc.blob), 4096)]); got != tc.want {
			t.Errorf("%s: %v", name, got)
		}
		_ = f.Close()
	}
}

// FuzzStored compares with where the standard library finds the first block.
func FuzzStored(f *testing.F) {
	all := "\x1f\x8b\x08\x1e\x00\x00\x00\x00\x00\x03\x03\x00abcname\x00comment\x00"
	sum := crc32.ChecksumIEEE([]byte(all))
	all += string([]byte{byte(sum), byte(sum >> 8)})
	for _, head := range []string{all + "\x01", all + "\x04", all, "\x1f\x8b\x08\x04\x00\x00\x00\x00\x00\x03\x03\x00abc\x01"} {
		f.Add([]byte(head))
	}
	f.Add([]byte("\x1f\x8b\x08\x08\x00\x00\x00\x00\x00\x03name\x00\x01"))
	f.Add([]byte("\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03\x04"))
	f.Fuzz(func(t *testing.T, head []byte) {
		got, rest := stored(head), bytes.NewReader(head)
		if _, err := gzip.NewReader(rest); err != nil {
			return // no header, or one that ends too soon
		}
		first, err := rest.ReadByte()
		if want := err == nil && first&0b110 == 0; got != want {
			t.Errorf("stored: %v, want %v", got, want)
		}
	})
}

const encrypted = ocispec.MediaTypeImageLayerGzip + "+encrypted"

func TestUnknownTypeWithoutContainerd(t *testing.T) {
	d := New(Options{Blobs: newBlobs(t)})
	for _, mediaType := range []string{encrypted, "application/vnd.erofs.layer.v1", ""} {
		if _, err := d.Apply(t.Context(), ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromString("x")}, bindTo(t)); !errdefs.IsNotImplemented(err) {
			t.Errorf("%q: %v", mediaType, err)
		}
	}
	special := []mount.Mount{{Type: "format/mkdir/overlay"}}
	if _, err := d.Apply(t.Context(), ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromString("x")}, special); !errdefs.IsNotImplemented(err) {
		t.Errorf("special mount: %v", err)
	}
}

// chain is containerd's diff service: it asks ours first, and then answers
// itself.
type chain struct {
	first     diff.Applier
	asked     atomic.Int32
	namespace atomic.Value
	fail      error
}

func (c *chain) Apply(ctx context.Context, desc ocispec.Descriptor, mounts []mount.Mount, opts ...diff.ApplyOpt) (ocispec.Descriptor, error) {
	ns, _ := namespaces.Namespace(ctx)
	c.namespace.Store(ns)
	c.asked.Add(1)
	if c.fail != nil {
		return ocispec.Descriptor{}, c.fail
	}
	d, err := c.first.Apply(ctx, desc, mounts, opts...)
	if !errdefs.IsNotImplemented(err) {
		return d, errors.New("our differ did not decline")
	}
	return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromString("decrypted"), Size: 9}, nil
}

func TestDelegate(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "containerd.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	d := New(Options{Blobs: newBlobs(t), ContainerdSocket: socket})
	c := &chain{first: d}
	srv := grpc.NewServer()
	diffapi.RegisterDiffServer(srv, diffservice.FromApplierAndComparer(c, nil))
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	t.Cleanup(func() {
		srv.Stop()
		<-served
	})
	ctx := namespaces.WithNamespace(t.Context(), "k8s.io")
	desc := ocispec.Descriptor{MediaType: encrypted, Digest: digest.FromString("x"), Size: 1}
	for i := range 2 {
		got, err := d.Apply(ctx, desc, []mount.Mount{{Type: "bind", Source: "/nowhere"}})
		if err != nil || got.Size != 9 {
			t.Fatalf("%d: %+v, %v", i, got, err)
		}
	}
	if n := c.asked.Load(); n != 2 || c.namespace.Load() != "k8s.io" {
		t.Errorf("asked %d times, namespace %v", n, c.namespace.Load())
	}
	c.fail = errdefs.ErrNotFound
	if _, err := d.Apply(ctx, desc, bindTo(t)); !errdefs.IsNotFound(err) {
		t.Errorf("containerd's error came as %v", err)
	}
	if len(d.delegate.busy) != 0 {
		t.Errorf("left behind: %v", d.delegate.busy)
	}
}

func TestDelegateIsGone(t *testing.T) {
	d := New(Options{Blobs: newBlobs(t), ContainerdSocket: filepath.Join(t.TempDir(), "none.sock")})
	desc := ocispec.Descriptor{MediaType: encrypted, Digest: digest.FromString("x"), Size: 1}
	if _, err := d.Apply(t.Context(), desc, bindTo(t)); !errdefs.IsUnavailable(err) {
		t.Errorf("got %v", err)
	}
}
