package prefetch

import (
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

// target is what a request means.
type target struct {
	name string        // of the image's record
	ask  string        // reference that the registry is asked for: name, or by digest
	want digest.Digest // "": whatever the tag says
	host string        // as image names have it
	path string        // of the repository at the host
	repo string        // host and path
}

// String is what messages call it.
func (t target) String() string {
	if t.want != "" && t.ask != t.name {
		return t.name + "@" + t.want.String()
	}
	return t.name
}

// parse reads a request as kubelet would read the image's name: no tag means
// latest, and beside a digest a tag in the name says nothing. With a digest of
// its own, a request that names a tag means the tag, pinned; one that names none
// means the digest alone.
func parse(r Request) (target, error) {
	raw, err := reference.ParseNormalizedNamed(r.Image)
	if err != nil {
		return target{}, fmt.Errorf("image %q: %w", r.Image, err)
	}
	t := target{host: reference.Domain(raw), path: reference.Path(raw), repo: raw.Name(), want: r.Digest}
	if t.want != "" {
		if err := t.want.Validate(); err != nil {
			return target{}, fmt.Errorf("image %s: digest %q: %w", r.Image, r.Digest, err)
		}
	}
	canonical, pinned := raw.(reference.Canonical)
	if pinned {
		if t.want != "" && t.want != canonical.Digest() {
			return target{}, fmt.Errorf("image %s: its name has another digest than the request (%s): %w", r.Image, t.want, errdefs.ErrInvalidArgument)
		}
		t.want = canonical.Digest()
	}
	tagged, hasTag := raw.(reference.Tagged)
	switch {
	case pinned, t.want != "" && !hasTag:
		t.name = t.repo + "@" + t.want.String()
	case hasTag:
		t.name = t.repo + ":" + tagged.Tag()
	default:
		t.name = t.repo + ":latest"
	}
	t.ask = t.name
	if t.want != "" {
		t.ask = t.repo + "@" + t.want.String()
	}
	return t, nil
}
