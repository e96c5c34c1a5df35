// Package verify checks who signed an image, before anyone pulls it. What is
// checked is a digest: that of the image's manifest, or of its index where it
// has several platforms. Whoever signed the index has signed all that it names.
package verify

import (
	"context"
	"errors"
	"fmt"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2/registry/remote"

	"github.com/imagewolf/imagewolf/config"
	"github.com/imagewolf/imagewolf/notifier/registry"
)

// maxSignatures is how many signatures of one image are looked at.
const maxSignatures = 50

// Errors of images that are not signed as they should be. Any other error says
// that it could not be found out, and may pass.
var (
	// ErrUnsigned is returned when there is no signature of the wanted kind.
	ErrUnsigned = errors.New("not signed")
	// ErrUntrusted is returned when none of the signatures is a good one.
	ErrUntrusted = errors.New("not signed by anyone trusted")
)

// Registry is what is asked for signatures; it holds all answers to bounds.
type Registry interface {
	Images
	Remoter
}

// Images are the parts of images at a registry.
type Images interface {
	Resolve(ctx context.Context, repo registry.Repo, tag string) (digest.Digest, error)
	Manifest(ctx context.Context, repo registry.Repo, d digest.Digest) (*registry.Manifest, error)
	Blob(ctx context.Context, repo registry.Repo, desc ocispec.Descriptor) ([]byte, error)
	Referrers(ctx context.Context, repo registry.Repo, d digest.Digest, artifactTypes ...string) ([]ocispec.Descriptor, error)
}

// Remoter makes the client that notation's library wants.
type Remoter interface {
	Remote(repo registry.Repo) (*remote.Repository, error)
}

// Verifier checks one digest, and is safe for concurrent use. It returns nil
// when the digest is signed as it should be, and else an error that is
// ErrUnsigned, ErrUntrusted, or of the way to the registry.
type Verifier interface {
	Verify(ctx context.Context, repo registry.Repo, d digest.Digest) error
}

// New returns the verifier of a table [verify.NAME]; it reads the files that the
// table names, once.
func New(c config.Verify, from Registry) (Verifier, error) {
	switch c.Type {
	case "cosign":
		return newCosign(c.Keys, from)
	case "notation":
		return newNotation(c.TrustPolicy, c.TrustStore, from)
	}
	return nil, fmt.Errorf("type: %q is none of %q", c.Type, config.VerifyTypes)
}
