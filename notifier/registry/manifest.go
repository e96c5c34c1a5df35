package registry

import (
	"encoding/json"
	"fmt"
	"mime"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// maxParts bounds the layers of an image and the manifests of an index.
const maxParts = 2000

// Manifest is an image's manifest or index, of OCI or of Docker.
type Manifest struct {
	Digest       digest.Digest
	Size         int64
	MediaType    string
	ArtifactType string
	Config       ocispec.Descriptor   // zero in an index
	Layers       []ocispec.Descriptor // of an image
	Manifests    []ocispec.Descriptor // of an index
}

// Index tells an index from an image.
func (m *Manifest) Index() bool {
	return m.MediaType == ocispec.MediaTypeImageIndex || m.MediaType == dockerList
}

// Media types of Docker's that OCI has its own of.
const (
	dockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	dockerList     = "application/vnd.docker.distribution.manifest.list.v2+json"
	dockerConfig   = "application/vnd.docker.container.image.v1+json"
)

// Decode reads a manifest that a registry said is of the given media type. Its
// error is ErrInvalid: for one that is of no known type, that says of itself
// that it is of another, or that is an image and an index at once.
func Decode(contentType string, b []byte) (*Manifest, error) {
	var doc struct {
		MediaType    string               `json:"mediaType"`
		ArtifactType string               `json:"artifactType"`
		Config       *ocispec.Descriptor  `json:"config"`
		Layers       []ocispec.Descriptor `json:"layers"`
		Manifests    []ocispec.Descriptor `json:"manifests"`
	}
	if err := json.Unmarshal(b, &doc); err != nil {
		return nil, fmt.Errorf("%w: not the JSON of a manifest: %w", ErrInvalid, err)
	}
	bare, _, err := mime.ParseMediaType(contentType)
	if err != nil {
		return nil, fmt.Errorf("%w: media type %.80q: %w", ErrInvalid, contentType, err)
	}
	if doc.MediaType != "" && doc.MediaType != bare {
		return nil, fmt.Errorf("%w: the registry calls it %q, and it itself %.80q", ErrInvalid, bare, doc.MediaType)
	}
	m := &Manifest{MediaType: bare, ArtifactType: doc.ArtifactType, Layers: doc.Layers, Manifests: doc.Manifests}
	switch bare {
	case ocispec.MediaTypeImageManifest, dockerManifest:
		if doc.Config == nil || len(doc.Manifests) > 0 {
			return nil, fmt.Errorf("%w: a manifest without config, or with others in it", ErrInvalid)
		}
		m.Config = *doc.Config
	case ocispec.MediaTypeImageIndex, dockerList:
		if doc.Config != nil || len(doc.Layers) > 0 {
			return nil, fmt.Errorf("%w: an index with config or layers", ErrInvalid)
		}
	default:
		return nil, fmt.Errorf("%w: of media type %.80q", ErrInvalid, bare)
	}
	if len(m.Layers) > maxParts || len(m.Manifests) > maxParts {
		return nil, fmt.Errorf("%w: of more than %d parts", ErrInvalid, maxParts)
	}
	for _, d := range append(append([]ocispec.Descriptor{}, m.Layers...), m.Manifests...) {
		if err := d.Digest.Validate(); err != nil || d.Size < 0 {
			return nil, fmt.Errorf("%w: a part with the digest %.80q and %d bytes", ErrInvalid, d.Digest, d.Size)
		}
	}
	if !m.Index() {
		if err := m.Config.Digest.Validate(); err != nil || m.Config.Size < 0 {
			return nil, fmt.Errorf("%w: a config with the digest %.80q and %d bytes", ErrInvalid, m.Config.Digest, m.Config.Size)
		}
	}
	return m, nil
}

// Labels reads the labels of an image's config; one that is not of a container
// image has none.
func Labels(mediaType string, b []byte) (map[string]string, error) {
	if mediaType != ocispec.MediaTypeImageConfig && mediaType != dockerConfig {
		return nil, nil
	}
	var doc struct {
		Config struct {
			Labels map[string]string `json:"Labels"`
		} `json:"config"`
	}
	if err := json.Unmarshal(b, &doc); err != nil {
		return nil, fmt.Errorf("%w: a config that cannot be read: %w", ErrInvalid, err)
	}
	return doc.Config.Labels, nil
}
