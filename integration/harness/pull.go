package harness

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	"google.golang.org/grpc/metadata"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Pull pulls an image with `ctr images pull`, which unpacks it as well: through
// the transfer service on 2.x, through the client on 1.7. Flags go before the
// image's name (--local, --user name:password).
func (c *Containerd) Pull(ctx context.Context, ns, ref string, flags ...string) error {
	args := append([]string{"images", "pull", "--hosts-dir", c.hostsDir()}, flags...)
	_, err := c.Ctr(ctx, ns, append(args, ref)...)
	return err
}

// Fetch gets an image's blobs with `ctr content fetch` and does not unpack them.
// It is ctr itself that talks to the registry.
func (c *Containerd) Fetch(ctx context.Context, ns, ref string) error {
	// With --debug there is no progress bar, which asks containerd, and so the store, for
	// all ingests ten times a second.
	_, err := c.Ctr(ctx, ns, "--debug", "content", "fetch", "--hosts-dir", c.hostsDir(), ref)
	return err
}

// PullCRI pulls an image through CRI's ImageService, as kubelet does, into the
// namespace k8s.io.
func (c *Containerd) PullCRI(ctx context.Context, ref string) error {
	client, err := c.images(ctx)
	if err != nil {
		return err
	}
	if _, err := client.PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: ref}}); err != nil {
		return fmt.Errorf("PullImage: %w", err)
	}
	return nil
}

// ImageCRI returns what CRI knows of an image, by any name of it; nil for nothing.
func (c *Containerd) ImageCRI(ctx context.Context, name string) (*cri.Image, error) {
	client, err := c.images(ctx)
	if err != nil {
		return nil, err
	}
	resp, err := client.ImageStatus(ctx, &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: name}})
	if err != nil {
		return nil, fmt.Errorf("ImageStatus: %w", err)
	}
	return resp.Image, nil
}

// images returns CRI's ImageService once it is ready: it needs a moment after
// containerd serves.
func (c *Containerd) images(ctx context.Context) (cri.ImageServiceClient, error) {
	client := cri.NewImageServiceClient(c.conn)
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	err := Poll(ctx, 100*time.Millisecond, func() error {
		_, err := client.ImageFsInfo(ctx, &cri.ImageFsInfoRequest{})
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("CRI does not get ready: %w", err)
	}
	return client, nil
}

// RemoveCRI removes an image through CRI.
func (c *Containerd) RemoveCRI(ctx context.Context, ref string) error {
	_, err := cri.NewImageServiceClient(c.conn).RemoveImage(ctx, &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: ref}})
	if err != nil {
		return fmt.Errorf("RemoveImage: %w", err)
	}
	return nil
}

// Remove removes an image and collects garbage before it returns.
func (c *Containerd) Remove(ctx context.Context, ns, ref string) error {
	_, err := c.Ctr(ctx, ns, "images", "rm", "--sync", ref)
	return err
}

// CollectGarbage has containerd collect garbage and waits until it has. The
// command is ctr's for something else (it takes the layers' labels off, too), so
// it is run in a namespace where nothing is.
func (c *Containerd) CollectGarbage(ctx context.Context) error {
	_, err := c.Ctr(ctx, "empty", "content", "prune", "references")
	return err
}

// Complete fails unless containerd finds the image complete and unpacked.
func (c *Containerd) Complete(ctx context.Context, ns, ref string) error {
	out, err := c.Ctr(ctx, ns, "images", "check", "name=="+ref)
	if err != nil {
		return err
	}
	for line := range strings.Lines(out) {
		f := strings.Fields(line)
		if len(f) > 3 && f[0] == ref {
			if strings.Contains(line, " complete ") && strings.HasSuffix(strings.TrimSpace(line), "true") {
				return nil
			}
			return fmt.Errorf("image on %s: %s", c.name, strings.TrimSpace(line))
		}
	}
	return fmt.Errorf("image on %s: no %s in %q", c.name, ref, out)
}

// BlobPath is where a blob is on disk.
func (c *Containerd) BlobPath(digest string) string {
	return filepath.Join(c.ContentDir(), "blobs", "sha256", strings.TrimPrefix(digest, "sha256:"))
}

// Rehash reads every given blob from disk and fails unless each has its size
// and digest.
func (c *Containerd) Rehash(blobs map[string]int64) error {
	var errs []error
	for digest, size := range blobs {
		if err := c.rehash(digest, size); err != nil {
			errs = append(errs, fmt.Errorf("blob %s on %s: %w", digest, c.name, err))
		}
	}
	return errors.Join(errs...)
}

func (c *Containerd) rehash(digest string, size int64) error {
	f, err := os.Open(c.BlobPath(digest))
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // opened for reading
	h := sha256.New()
	n, err := io.Copy(h, f)
	if err != nil {
		return err
	}
	if got := fmt.Sprintf("sha256:%x", h.Sum(nil)); n != size || got != digest {
		return fmt.Errorf("%d bytes of digest %s, want %d", n, got, size)
	}
	return nil
}

// Readable reads every given blob through containerd and fails unless each is
// whole.
func (c *Containerd) Readable(ctx context.Context, ns string, blobs map[string]int64) error {
	var errs []error
	for digest, size := range blobs {
		out, err := c.Ctr(ctx, ns, "content", "get", digest)
		if err == nil && (int64(len(out)) != size || fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(out))) != digest) {
			err = fmt.Errorf("%d other bytes, want %d", len(out), size)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("read blob %s on %s: %w", digest, c.name, err))
		}
	}
	return errors.Join(errs...)
}

// Run runs the image's entrypoint in a container and returns what it prints.
// The machine must have runc.
func (c *Containerd) Run(ctx context.Context, ns, ref string) (string, error) {
	return c.Ctr(ctx, ns, "run", "--rm", ref, fmt.Sprintf("run%d", time.Now().UnixNano()))
}

// Transfer is how far a blob has come.
type Transfer struct {
	Ref           string
	Offset, Total int64
}

// Active returns the ingests under way in a namespace, by digest where the ref
// has one.
func (c *Containerd) Active(ctx context.Context, ns string) (map[string]Transfer, error) {
	ctx = metadata.AppendToOutgoingContext(ctx, "containerd-namespace", ns)
	resp, err := contentapi.NewContentClient(c.conn).ListStatuses(ctx, &contentapi.ListStatusesRequest{})
	if err != nil {
		return nil, fmt.Errorf("active ingests on %s: %w", c.name, err)
	}
	out := map[string]Transfer{}
	for _, s := range resp.Statuses {
		key := digestAtEnd.FindString(s.Ref)
		if key == "" {
			key = s.Ref
		}
		out[key] = Transfer{Ref: s.Ref, Offset: s.Offset, Total: s.Total}
	}
	return out, nil
}

// Blobs returns the digests and sizes of the blobs that containerd knows in a
// namespace.
func (c *Containerd) Blobs(ctx context.Context, ns string) (map[string]int64, error) {
	ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(ctx, "containerd-namespace", ns))
	defer cancel()
	stream, err := contentapi.NewContentClient(c.conn).List(ctx, &contentapi.ListContentRequest{})
	if err != nil {
		return nil, fmt.Errorf("blobs on %s: %w", c.name, err)
	}
	out := map[string]int64{}
	for {
		msg, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return nil, fmt.Errorf("blobs on %s: %w", c.name, err)
		}
		for _, i := range msg.Info {
			out[i.Digest] = i.Size
		}
	}
}
