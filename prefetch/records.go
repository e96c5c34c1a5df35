package prefetch

import (
	"cmp"
	"context"
	"fmt"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
)

// CRI's images are in this namespace and have this label. (containerd keeps the
// names in packages of its own.)
const (
	criNamespace  = "k8s.io"
	criLabel      = "io.cri-containerd.image"
	criLabelValue = "managed"
)

// labelsIn returns the labels of image records in a namespace.
func labelsIn(namespace string) map[string]string {
	if namespace != criNamespace {
		return nil
	}
	return map[string]string{criLabel: criLabelValue}
}

// nativeFirst sorts images of this node's platform to the front.
func nativeFirst(a, b containerd.Image) int { return cmp.Compare(foreign(a), foreign(b)) }

func foreign(i containerd.Image) int {
	if i.Platform() == nil || i.Platform().Match(platforms.DefaultSpec()) {
		return 0
	}
	return 1
}

// record makes the records by which CRI finds an image, in its namespace, beside
// the one that the pull made: by digest, and by id, which is the digest of the
// config of the node's platform. CRI takes them in when it hears of them from containerd.
func (j *job) record(ctx context.Context, pulled []containerd.Image) error {
	if j.namespace != criNamespace {
		return nil
	}
	image := pulled[0]
	config, err := image.Config(ctx)
	if err != nil {
		return fmt.Errorf("config: %w", err)
	}
	target := image.Target()
	// The id first: CRI takes a record for an image that has its id's.
	for _, name := range []string{config.Digest.String(), j.target.repo + "@" + target.Digest.String(), j.target.name} {
		err := put(ctx, j.client.ImageService(), images.Image{Name: name, Target: target, Labels: labelsIn(j.namespace)})
		if err != nil {
			return fmt.Errorf("image record %s: %w", name, err)
		}
	}
	return nil
}

// put creates a record, or has an existing one point to the image and lets its
// other labels be.
func put(ctx context.Context, store images.Store, image images.Image) error {
	for {
		_, err := store.Create(ctx, image)
		if !errdefs.IsAlreadyExists(err) {
			return err
		}
		_, err = store.Update(ctx, image, "target", "labels."+criLabel)
		if !errdefs.IsNotFound(err) { // removed meanwhile
			return err
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
}
