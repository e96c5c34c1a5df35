// Package differ unpacks image layers for containerd from blobs on the local
// disk: the diff plugin that goes with a content store in another process.
//
// Through a content store's socket containerd reads a layer 32 KiB at a time;
// here it is a file. Reading, inflating, hashing and unpacking run at the same
// time. It does not compute diffs, and leaves media types that are not plain
// image layers to containerd's own differs.
package differ

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// disableIgzip is the variable with which containerd itself is told not to run
// igzip.
const disableIgzip = "CONTAINERD_DISABLE_IGZIP"

// Blobs is where the layers are.
type Blobs interface {
	// Open opens a whole blob, as a file of the caller's own, at offset 0. The
	// caller closes it. The error is errdefs.ErrNotFound if there is none.
	Open(ctx context.Context, d digest.Digest) (*os.File, error)
}

// Dir is a content directory in containerd's layout, which keeps a blob in
// blobs/<algorithm>/<hex>.
type Dir string

// Open implements Blobs.
func (dir Dir) Open(_ context.Context, d digest.Digest) (*os.File, error) {
	if err := d.Validate(); err != nil {
		return nil, fmt.Errorf("blob %q: %w: %w", d, err, errdefs.ErrInvalidArgument)
	}
	f, err := os.Open(filepath.Join(string(dir), "blobs", d.Algorithm().String(), d.Encoded()))
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("blob %v: %w", d, errdefs.ErrNotFound)
	}
	return f, err
}

// Options says what a Differ works on.
type Options struct {
	// Blobs is where the layers are. Required.
	Blobs Blobs
	// ContainerdSocket is the path of containerd's own socket, to which layers
	// of other media types are handed on; "": they are ErrNotImplemented.
	// containerd's transfer service asks no other differ then, so the pull of
	// such an image fails.
	ContainerdSocket string
	// Log receives what is worth knowing about single layers, at debug level;
	// nil: slog.Default().
	Log *slog.Logger
	// Panicked is called when a panic over a layer was contained; may be nil.
	Panicked func()
}

// Differ is a diff.Applier. It is safe for concurrent use.
type Differ struct {
	blobs    Blobs
	delegate *delegate
	igzip    string // path of the program; "": not to be used
	blocks   sync.Pool
	log      *slog.Logger
	panicked func()
}

var _ diff.Applier = (*Differ)(nil)

// New returns a Differ. It starts nothing. igzip is used if it is in PATH now,
// unless CONTAINERD_DISABLE_IGZIP is true, as for containerd.
func New(o Options) *Differ {
	d := &Differ{blobs: o.Blobs, log: o.Log, igzip: findIgzip(), panicked: o.Panicked}
	if d.panicked == nil {
		d.panicked = func() {}
	}
	if d.log == nil {
		d.log = slog.Default()
	}
	if o.ContainerdSocket != "" {
		d.delegate = &delegate{socket: o.ContainerdSocket, busy: map[request]struct{}{}}
	}
	d.blocks.New = func() any { return &block{data: make([]byte, blockSize)} }
	return d
}

func findIgzip() string {
	if off, err := strconv.ParseBool(os.Getenv(disableIgzip)); err == nil && off {
		return ""
	}
	path, err := exec.LookPath("igzip")
	if err != nil {
		return ""
	}
	return path
}

// Apply unpacks the layer desc into mounts, and returns the descriptor of the
// uncompressed layer. What was unpacked before an error stays there; containerd
// removes the snapshot. Errors are errdefs.ErrNotFound for a blob that is not
// on the disk and errdefs.ErrNotImplemented for a media type or a kind of mount
// that is not for this differ.
// Nothing of it runs any more when Apply returns.
func (d *Differ) Apply(ctx context.Context, desc ocispec.Descriptor, mounts []mount.Mount, opts ...diff.ApplyOpt) (ocispec.Descriptor, error) {
	compressed, ok := layerTypes[desc.MediaType]
	if !ok || needsManager(mounts) {
		if d.delegate == nil {
			return ocispec.Descriptor{}, fmt.Errorf("layer %v: media type %q: %w", desc.Digest, desc.MediaType, errdefs.ErrNotImplemented)
		}
		return d.delegate.apply(ctx, desc, mounts, opts)
	}
	var config diff.ApplyConfig
	for _, o := range opts {
		if err := o(ctx, desc, &config); err != nil {
			return ocispec.Descriptor{}, fmt.Errorf("layer %v: apply option: %w", desc.Digest, err)
		}
	}
	start := time.Now()
	f, err := d.blobs.Open(ctx, desc.Digest)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("open layer: %w", err)
	}
	defer func() { _ = f.Close() }()
	_ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_SEQUENTIAL) // a hint

	if config.Progress != nil {
		config.Progress(0)
	}
	diffID, size, err := d.unpack(ctx, f, compressed, func(ctx context.Context, s *stream) error {
		return extract(ctx, mounts, s, config.SyncFs)
	})
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("layer %v: %w", desc.Digest, err)
	}
	if config.Progress != nil {
		config.Progress(desc.Size)
	}
	d.log.DebugContext(ctx, "layer unpacked", "digest", desc.Digest, "bytes", size, "took", time.Since(start))
	return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Size: size, Digest: diffID}, nil
}

// needsManager reports whether only containerd's mount manager can mount these:
// their types carry modifiers, as in "format/mkdir/overlay".
func needsManager(mounts []mount.Mount) bool {
	return slices.ContainsFunc(mounts, func(m mount.Mount) bool { return strings.Contains(m.Type, "/") })
}

// layerTypes are the media types unpacked here, with whether the layer may be
// compressed. By which algorithm its first bytes tell, as for containerd:
// images that say one and contain the other are about.
var layerTypes = map[string]bool{
	ocispec.MediaTypeImageLayer:                         false,
	ocispec.MediaTypeImageLayerGzip:                     true,
	ocispec.MediaTypeImageLayerZstd:                     true,
	nondistributable:                                    false,
	nondistributable + "+gzip":                          true,
	nondistributable + "+zstd":                          true,
	images.MediaTypeDockerSchema2Layer:                  true,
	images.MediaTypeDockerSchema2LayerGzip:              true,
	images.MediaTypeDockerSchema2LayerZstd:              true,
	images.MediaTypeDockerSchema2LayerForeign:           true,
	images.MediaTypeDockerSchema2LayerForeignGzip:       true,
	images.MediaTypeDockerSchema2LayerForeign + ".zstd": true,
}

// nondistributable is deprecated in the specification, so its package wants its
// constants not to be used; images with such layers exist all the same.
const nondistributable = "application/vnd.oci.image.layer.nondistributable.v1.tar"
