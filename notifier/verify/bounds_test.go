package verify

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	notationregistry "github.com/notaryproject/notation-go/registry"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/sigstore/sigstore/pkg/cryptoutils"
	"github.com/sigstore/sigstore/pkg/signature"

	"github.com/imagewolf/imagewolf/notifier/registry"
)

// signatures is a registry with what was signed, by tag or as bundles.
type signatures struct {
	tagged, bundles []ocispec.Descriptor
	blobs           map[digest.Digest][]byte
	read            int
}

func (s *signatures) Resolve(context.Context, registry.Repo, string) (digest.Digest, error) {
	if s.tagged == nil {
		return "", registry.ErrNotFound
	}
	return "sha256:tagged", nil
}

func (s *signatures) Manifest(_ context.Context, _ registry.Repo, d digest.Digest) (*registry.Manifest, error) {
	if d == "sha256:tagged" {
		return &registry.Manifest{Layers: s.tagged}, nil
	}
	return &registry.Manifest{Layers: []ocispec.Descriptor{{MediaType: bundleType, Digest: d}}}, nil
}

func (s *signatures) Blob(_ context.Context, _ registry.Repo, desc ocispec.Descriptor) ([]byte, error) {
	s.read++
	return s.blobs[desc.Digest], nil
}

func (s *signatures) Referrers(context.Context, registry.Repo, digest.Digest, ...string) ([]ocispec.Descriptor, error) {
	return s.bundles, nil
}

// Whoever may push beside an image cannot keep the notifier busy for ever.
func TestSomeSignaturesOnlyAreLookedAt(t *testing.T) {
	_, c := signer(t)
	var many []ocispec.Descriptor
	for i := range 10 * maxSignatures {
		many = append(many, ocispec.Descriptor{
			MediaType: simpleSigning, Digest: digest.FromString(fmt.Sprint(i)),
			Annotations: map[string]string{signatureKey: base64.StdEncoding.EncodeToString([]byte("x"))},
		})
	}
	for name, from := range map[string]*signatures{"tagged": {tagged: many}, "bundles": {bundles: many}} {
		c.from = from
		err := c.Verify(t.Context(), registry.Repo{}, digest.FromString("image"))
		if !errors.Is(err, ErrUntrusted) || !strings.Contains(err.Error(), "more than 50 signatures") || from.read != maxSignatures {
			t.Errorf("%s: %d were read: %v", name, from.read, err)
		}
	}
}

// What is beside a signature in the same manifest is none.
func TestOtherLayersAreNoSignatures(t *testing.T) {
	_, c := signer(t)
	c.from = &signatures{tagged: []ocispec.Descriptor{{MediaType: "text/plain"}}}
	if err := c.Verify(t.Context(), registry.Repo{}, digest.FromString("image")); !errors.Is(err, ErrUnsigned) {
		t.Errorf("got %v", err)
	}
}

// Cosign up to version 2 hashes with SHA-256 whatever the key is, version 3 as the
// key's kind suggests.
func TestALongerKeyIsTakenWithEitherHash(t *testing.T) {
	private, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	public, err := cryptoutils.MarshalPublicKeyToPEM(private.Public())
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "key.pub")
	if err := os.WriteFile(file, public, 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := newCosign([]string{file}, nil)
	if err != nil {
		t.Fatal(err)
	}
	d := digest.FromString("image")
	text := `{"critical":{"type":"cosign container image signature","image":{"docker-manifest-digest":"` + d.String() + `"}}}`
	for _, hash := range []crypto.Hash{crypto.SHA256, crypto.SHA384} {
		s, err := signature.LoadECDSASigner(private, hash)
		if err != nil {
			t.Fatal(err)
		}
		sig, err := s.SignMessage(strings.NewReader(text))
		if err != nil {
			t.Fatal(err)
		}
		check(t, hash.String(), c.simple([]byte(text), sig, d), "")
	}
}

// oneSignature is a registry with a signature of notation's that cannot be had.
type oneSignature struct {
	notationregistry.Repository
	why error
}

func (o oneSignature) FetchSignatureBlob(context.Context, ocispec.Descriptor) ([]byte, ocispec.Descriptor, error) {
	return nil, ocispec.Descriptor{}, o.why
}

// A signature that the registry cannot give out now may be a good one; one that it
// does not have is none, or whoever pushes such a thing would have the image tried
// again and again.
func TestASignatureThatIsGoneIsABadOne(t *testing.T) {
	for why, passes := range map[error]bool{
		errors.New("not as large as it says"): false, fmt.Errorf("it: %w", registry.ErrNotFound): false,
		context.DeadlineExceeded: true, &url.Error{Op: "Get", URL: "x", Err: errors.New("refused")}: true,
	} {
		w := &watched{Repository: oneSignature{why: why}}
		if _, _, err := w.FetchSignatureBlob(t.Context(), ocispec.Descriptor{}); !errors.Is(err, why) || (w.err != nil) != passes {
			t.Errorf("%v: it is tried again: %t", why, w.err != nil)
		}
	}
}
