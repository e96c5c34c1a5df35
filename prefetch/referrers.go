package prefetch

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// maxReferrers is how many referrers of one image are pulled.
	maxReferrers = 64
	// maxReferrerBlobs and maxReferrerBytes bound the blobs of all of them together.
	maxReferrerBlobs = 512
	maxReferrerBytes = 64 << 20
	// gcReferrer starts the label by which containerd's garbage collection keeps
	// one blob for as long as another: what follows only tells labels apart.
	gcReferrer = "containerd.io/gc.ref.content.referrer."
)

// errBudget says that referrers are too many or too large.
var errBudget = errors.New("too much")

// budget is what may still be pulled of referrers.
type budget struct {
	blobs, bytes int64
}

// take takes a blob out of the budget.
func (b *budget) take(size int64) error {
	if b.blobs--; b.blobs < 0 || size < 0 || size > b.bytes {
		return errBudget
	}
	b.bytes -= size
	return nil
}

// referrers pulls what refers to the image and to its manifests of the platforms
// that were pulled: by the registry's API for it or, where there is none, by the
// tag that clients then push. Each lives as long as what it refers to. What
// refers to a referrer is not looked for. One that is beyond the bounds is left out and logged.
func (j *job) referrers(ctx context.Context, pulled []containerd.Image) error {
	fetcher, err := j.registry.resolver(ctx).Fetcher(ctx, j.target.name)
	if err != nil {
		return fmt.Errorf("referrers: %w", err)
	}
	finder, ok := fetcher.(remotes.ReferrersFetcher)
	if !ok {
		return fmt.Errorf("referrers: %T finds none: %w", fetcher, errdefs.ErrNotImplemented)
	}
	subjects, err := subjectsOf(ctx, pulled)
	if err != nil {
		return fmt.Errorf("referrers: %w", err)
	}
	left := &budget{blobs: maxReferrerBlobs, bytes: maxReferrerBytes}
	count := 0
	for _, subject := range subjects {
		found, err := finder.FetchReferrers(ctx, subject)
		if err != nil {
			return fmt.Errorf("referrers of %s: %w", subject, err)
		}
		for _, desc := range found {
			err := errBudget
			if count++; count <= maxReferrers {
				err = j.referrer(ctx, fetcher, subject, desc, left)
			}
			if errors.Is(err, errBudget) {
				j.log.Warn("a referrer is left out: an image's may be so many and so large",
					"image", j.target.name, "subject", subject, "referrer", desc.Digest,
					"most", maxReferrers, "most_blobs", maxReferrerBlobs, "most_bytes", maxReferrerBytes)
				continue
			}
			if err != nil {
				return fmt.Errorf("referrer %s: %w", desc.Digest, err)
			}
		}
	}
	return nil
}

// subjectsOf returns the digests of the image's index, if it has one, and of the
// manifests for the platforms.
func subjectsOf(ctx context.Context, pulled []containerd.Image) ([]digest.Digest, error) {
	var out []digest.Digest
	seen := map[digest.Digest]bool{}
	for _, i := range pulled {
		found := []ocispec.Descriptor{i.Target()}
		if images.IsIndexType(i.Target().MediaType) {
			manifest, err := manifestOf(ctx, i)
			if err != nil {
				return nil, err
			}
			found = append(found, manifest)
		}
		for _, d := range found {
			if !seen[d.Digest] {
				seen[d.Digest] = true
				out = append(out, d.Digest)
			}
		}
	}
	return out, nil
}

// manifestOf returns the manifest of an index that was pulled: of those for the
// platform the best, as the pull chose it.
func manifestOf(ctx context.Context, i containerd.Image) (ocispec.Descriptor, error) {
	children := images.LimitManifests(
		images.FilterPlatforms(images.ChildrenHandler(i.ContentStore()), i.Platform()), i.Platform(), 1)
	found, err := children(ctx, i.Target())
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	return found[0], nil
}

// referrer pulls one referrer with all it consists of and ties it to its subject.
func (j *job) referrer(ctx context.Context, fetcher remotes.Fetcher, subject digest.Digest, desc ocispec.Descriptor, left *budget) error {
	store := j.client.ContentStore()
	bounded := images.HandlerFunc(func(_ context.Context, d ocispec.Descriptor) ([]ocispec.Descriptor, error) {
		if err := d.Digest.Validate(); err != nil {
			return nil, fmt.Errorf("%q: %w", d.Digest, err)
		}
		return nil, left.take(d.Size)
	})
	err := walk(ctx, desc, images.Handlers(bounded, remotes.FetchHandler(store, fetcher),
		images.SetChildrenLabels(store, images.ChildrenHandler(store))))
	if err != nil {
		return err
	}
	sum, err := hex.DecodeString(desc.Digest.Encoded())
	if err != nil {
		return err
	}
	label := gcReferrer + hex.EncodeToString(sum[:8])
	_, err = store.Update(ctx, content.Info{Digest: subject, Labels: map[string]string{label: desc.Digest.String()}}, "labels."+label)
	return err
}

// walk handles a blob and all below it, one after the other: the budget is one,
// and referrers are small.
func walk(ctx context.Context, desc ocispec.Descriptor, h images.Handler) error {
	children, err := h.Handle(ctx, desc)
	if errors.Is(err, images.ErrSkipDesc) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, c := range children {
		if err := walk(ctx, c, h); err != nil {
			return err
		}
	}
	return nil
}
