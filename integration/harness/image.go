package harness

import (
	"archive/tar"
	"bufio"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

//go:embed hello/main.go
var helloSource []byte

// Compression is how a layer is packed.
type Compression int

// The compressions that containerd unpacks.
const (
	Gzip Compression = iota
	Zstd
	Plain
)

// Content writes a layer's files.
type Content func(tw *tar.Writer) error

// Layer is a layer in a file of the Env. It implements v1.Layer.
type Layer struct {
	path           string
	digest, diffID v1.Hash
	size           int64
	mediaType      types.MediaType
}

var _ v1.Layer = (*Layer)(nil)

// Seal gives the layer, packed with Gzip, the media type Sealed.
func (l *Layer) Seal() { l.mediaType = Sealed }

// NewLayer packs content into a layer.
func NewLayer(e *Env, compression Compression, content Content) (_ *Layer, err error) {
	dir, err := e.Dir("layers")
	if err != nil {
		return nil, err
	}
	f, err := os.CreateTemp(dir, "layer")
	if err != nil {
		return nil, fmt.Errorf("layer: %w", err)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	packed, plain := sha256.New(), sha256.New()
	out := bufio.NewWriterSize(io.MultiWriter(f, packed), 1<<20)
	l := &Layer{path: f.Name()}
	var pack io.WriteCloser
	switch compression {
	case Gzip:
		l.mediaType = types.OCILayer
		pack, err = gzip.NewWriterLevel(out, gzip.BestSpeed)
	case Zstd:
		l.mediaType = types.OCILayerZStd
		pack, err = zstd.NewWriter(out, zstd.WithEncoderLevel(zstd.SpeedFastest))
	default:
		l.mediaType = types.OCIUncompressedLayer
		pack = nopCloser{out}
	}
	if err != nil {
		return nil, fmt.Errorf("layer: %w", err)
	}
	tw := tar.NewWriter(io.MultiWriter(pack, plain))
	if err := errors.Join(content(tw), tw.Close(), pack.Close(), out.Flush()); err != nil {
		return nil, fmt.Errorf("layer: %w", err)
	}
	if l.size, err = f.Seek(0, io.SeekCurrent); err != nil {
		return nil, fmt.Errorf("layer: %w", err)
	}
	l.digest, l.diffID = hashOf(packed), hashOf(plain)
	return l, nil
}

type nopCloser struct{ io.Writer }

// Close implements io.Closer.
func (nopCloser) Close() error { return nil }

func hashOf(h hash.Hash) v1.Hash {
	return v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(h.Sum(nil))}
}

// Digest implements v1.Layer.
func (l *Layer) Digest() (v1.Hash, error) { return l.digest, nil }

// DiffID implements v1.Layer.
func (l *Layer) DiffID() (v1.Hash, error) { return l.diffID, nil }

// Size implements v1.Layer.
func (l *Layer) Size() (int64, error) { return l.size, nil }

// MediaType implements v1.Layer.
func (l *Layer) MediaType() (types.MediaType, error) { return l.mediaType, nil }

// Compressed implements v1.Layer.
func (l *Layer) Compressed() (io.ReadCloser, error) { return os.Open(l.path) }

// Uncompressed implements v1.Layer; nothing that pushes an image asks for it.
func (l *Layer) Uncompressed() (io.ReadCloser, error) { return nil, errors.ErrUnsupported }

// Random returns one file of n random bytes, which no compression makes
// smaller. Each call of it returns other bytes.
func Random(n int64) Content {
	return func(tw *tar.Writer) error {
		var seed [32]byte
		for i := range seed {
			seed[i] = byte(rand.Uint32())
		}
		src := rand.NewChaCha8(seed)
		name := fmt.Sprintf("random-%x", seed[:4])
		if err := tw.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: n, ModTime: time.Unix(0, 0)}); err != nil {
			return err
		}
		_, err := io.CopyN(tw, src, n)
		return err
	}
}

// Join returns the files of several contents.
func Join(contents ...Content) Content {
	return func(tw *tar.Writer) error {
		for _, c := range contents {
			if err := c(tw); err != nil {
				return err
			}
		}
		return nil
	}
}

// Program returns the static program hello as /hello.
func Program(e *Env) Content {
	return func(tw *tar.Writer) error {
		path, err := buildHello(e)
		if err != nil {
			return err
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if err := tw.WriteHeader(&tar.Header{Name: "hello", Mode: 0o755, Size: int64(len(data)), ModTime: time.Unix(0, 0)}); err != nil {
			return err
		}
		_, err = tw.Write(data)
		return err
	}
}

// helloOnce: one build per process is enough, whatever the number of images.
var helloOnce sync.Mutex

func buildHello(e *Env) (string, error) {
	helloOnce.Lock()
	defer helloOnce.Unlock()
	dir, err := e.Dir("hello")
	if err != nil {
		return "", err
	}
	bin := filepath.Join(dir, "hello")
	if _, err := os.Stat(bin); err == nil {
		return bin, nil
	}
	src := filepath.Join(dir, "main.go")
	if err := os.WriteFile(src, helloSource, 0o644); err != nil {
		return "", fmt.Errorf("entrypoint: %w", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	if _, err := run(ctx, nil, []string{"CGO_ENABLED=0"}, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", bin, src); err != nil {
		return "", fmt.Errorf("entrypoint: %w", err)
	}
	return bin, nil
}

// Files iterates over real files of this machine, to be cut into layers.
type Files struct {
	paths []string
	next  int
}

// RealFiles lists the regular files and symlinks below the directories, those
// that are there; in the order of their names, so that a machine gives the same
// layers each time.
func RealFiles(dirs ...string) (*Files, error) {
	f := &Files{}
	for _, dir := range dirs {
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			switch {
			case errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission):
				return nil // not there, or just removed
			case err != nil:
				return err
			case d.Type().IsRegular() || d.Type()&fs.ModeSymlink != 0:
				f.paths = append(f.paths, path)
			}
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("files for an image: %w", err)
		}
	}
	return f, nil
}

// Take returns the next files as content, until n bytes of them are written or
// none are left. Contents of one Files must be written one after the other.
func (f *Files) Take(n int64) Content {
	return func(tw *tar.Writer) error {
		for left := n; left > 0 && f.next < len(f.paths); f.next++ {
			size, err := addFile(tw, f.paths[f.next])
			if err != nil {
				return err
			}
			left -= size
		}
		return nil
	}
}

// Empty reports whether no files are left.
func (f *Files) Empty() bool { return f.next >= len(f.paths) }

// addFile writes one file with its owner, mode and time, and returns its size.
// One that cannot be opened any more is left out.
func addFile(tw *tar.Writer, path string) (int64, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return 0, nil //nolint:nilerr // removed since it was listed
	}
	link := ""
	if info.Mode()&fs.ModeSymlink != 0 {
		if link, err = os.Readlink(path); err != nil {
			return 0, nil //nolint:nilerr // as above
		}
	}
	h, err := tar.FileInfoHeader(info, link)
	if err != nil {
		return 0, err
	}
	h.Name = strings.TrimPrefix(path, "/")
	if link != "" {
		return 0, tw.WriteHeader(h)
	}
	file, err := os.Open(path)
	if err != nil {
		return 0, nil //nolint:nilerr // as above
	}
	defer file.Close() //nolint:errcheck // opened for reading
	if err := tw.WriteHeader(h); err != nil {
		return 0, err
	}
	// A file that shrinks meanwhile makes the layer fail, which is right.
	return io.CopyN(tw, file, h.Size)
}

// Image is an image that has been pushed.
type Image struct {
	// Ref is its name, registry host included.
	Ref string
	// Manifest is its manifest's digest.
	Manifest string
	// Config is its config's digest.
	Config string
	// Layers are its layers, lowest first.
	Layers []*Layer
	// Blobs maps every digest of it, manifest and config included, to its size.
	Blobs map[string]int64
}

// Bytes returns the bytes of all its blobs: what one pull of it moves.
func (i *Image) Bytes() int64 {
	var n int64
	for _, size := range i.Blobs {
		n += size
	}
	return n
}

// Layer returns the digest of a layer.
func (i *Image) Layer(n int) string { return i.Layers[n].digest.String() }

// Push makes an OCI image of the layers, with /hello as its entrypoint, and
// pushes it to the registry as repo:latest. The requests are not counted.
func (r *Registry) Push(ctx context.Context, repo string, layers ...*Layer) (*Image, error) {
	img := mutate.MediaType(empty.Image, types.OCIManifestSchema1)
	img = mutate.ConfigMediaType(img, types.OCIConfigJSON)
	img, err := mutate.ConfigFile(img, &v1.ConfigFile{
		Architecture: runtime.GOARCH, OS: "linux",
		Config: v1.Config{Entrypoint: []string{"/hello"}, Env: []string{"PATH=/"}},
		RootFS: v1.RootFS{Type: "layers"},
	})
	if err != nil {
		return nil, fmt.Errorf("image: %w", err)
	}
	for _, l := range layers {
		if img, err = mutate.Append(img, mutate.Addendum{Layer: l, MediaType: l.mediaType}); err != nil {
			return nil, fmt.Errorf("image: %w", err)
		}
	}
	ref, err := name.ParseReference(r.Host+"/"+repo+":latest", name.Insecure)
	if err != nil {
		return nil, fmt.Errorf("image: %w", err)
	}
	r.mu.Lock()
	before := len(r.requests)
	auth := authn.Anonymous
	if r.user != "" {
		auth = &authn.Basic{Username: r.user, Password: r.password}
	}
	r.mu.Unlock()
	if r.login != nil {
		auth = r.login
	}
	if err := remote.Write(ref, img, remote.WithContext(ctx), remote.WithAuth(auth)); err != nil {
		return nil, fmt.Errorf("push: %w", err)
	}
	r.mu.Lock()
	r.requests = r.requests[:min(before, len(r.requests))]
	r.mu.Unlock()
	out := &Image{Ref: ref.Name(), Layers: layers, Blobs: map[string]int64{}}
	return out, out.fill(img)
}

// fill notes the blobs of an image.
func (i *Image) fill(img v1.Image) error {
	m, err := img.Manifest()
	if err != nil {
		return fmt.Errorf("image: %w", err)
	}
	d, err := img.Digest()
	if err != nil {
		return fmt.Errorf("image: %w", err)
	}
	size, err := img.Size()
	if err != nil {
		return fmt.Errorf("image: %w", err)
	}
	i.Manifest, i.Config = d.String(), m.Config.Digest.String()
	i.Blobs[i.Manifest], i.Blobs[i.Config] = size, m.Config.Size
	for _, l := range m.Layers {
		i.Blobs[l.Digest.String()] = l.Size
	}
	return nil
}
