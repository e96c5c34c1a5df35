package verify

import (
	"bytes"
	"context"
	"crypto"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	protobundle "github.com/sigstore/protobuf-specs/gen/pb-go/bundle/v1"
	"github.com/sigstore/sigstore/pkg/cryptoutils"
	"github.com/sigstore/sigstore/pkg/signature"
	"github.com/sigstore/sigstore/pkg/signature/dsse"
	"github.com/sigstore/sigstore/pkg/signature/options"
	"github.com/sigstore/sigstore/pkg/signature/payload"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/imagewolf/imagewolf/notifier/registry"
)

// What cosign writes, and where. Up to version 2 a signature is a layer of an
// image with a tag made of the signed digest, or, if it was told so, of one that
// refers to the signed image; from version 3 on it is a bundle that refers to it.
const (
	signatureType  = "application/vnd.dev.cosign.artifact.sig.v1+json" // of an image of signatures that refers
	simpleSigning  = "application/vnd.dev.cosign.simplesigning.v1+json"
	signatureKey   = "dev.cosignproject.cosign/signature" // annotation of such a layer
	bundleType     = "application/vnd.dev.sigstore.bundle.v0.3+json"
	statementType  = "application/vnd.in-toto+json"
	statements     = "https://in-toto.io/Statement/" // of any version
	statementV1    = statements + "v1"
	signedByCosign = "https://sigstore.dev/cosign/sign/v1" // predicate: a signature, not a claim about the image
)

// key is one public key, and how signatures of it are checked.
type key struct {
	file      string
	verifiers []signature.Verifier // of one key: cosign's ways, by its version and the key's kind
}

type cosign struct {
	keys []key
	from Images
}

func newCosign(files []string, from Images) (*cosign, error) {
	c := &cosign{from: from}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			return nil, fmt.Errorf("keys: %w", err)
		}
		public, err := cryptoutils.UnmarshalPEMToPublicKey(b)
		if err != nil {
			return nil, fmt.Errorf("keys: %s holds no public key (PEM): %w", file, err)
		}
		k := key{file: file}
		sha256, err := signature.LoadVerifier(public, crypto.SHA256)
		if err != nil {
			return nil, fmt.Errorf("keys: %s: %w", file, err)
		}
		k.verifiers = append(k.verifiers, sha256)
		// Cosign signs with Ed25519ph, and before 2.2 with Ed25519 itself.
		if usual, err := signature.LoadDefaultVerifier(public, options.WithED25519ph()); err == nil {
			k.verifiers = append(k.verifiers, usual)
		}
		c.keys = append(c.keys, k)
	}
	if len(c.keys) == 0 {
		return nil, errors.New("keys: there is none")
	}
	return c, nil
}

// Verify implements Verifier.
func (c *cosign) Verify(ctx context.Context, repo registry.Repo, d digest.Digest) error {
	seen := 0
	var why error
	for _, look := range []func(context.Context, registry.Repo, digest.Digest) (int, error){c.tagged, c.referring} {
		n, err := look(ctx, repo, d)
		switch {
		case err == nil && n > 0:
			return nil
		case err != nil && !errors.Is(err, ErrUntrusted) && !errors.Is(err, registry.ErrInvalid):
			return err
		case err != nil:
			why = errors.Join(why, err)
			n = max(n, 1)
		}
		seen += n
	}
	if seen == 0 {
		return fmt.Errorf("%w with cosign: no signature of %s", ErrUnsigned, d)
	}
	if errors.Is(why, ErrUntrusted) {
		return why
	}
	return fmt.Errorf("%w: %w", ErrUntrusted, why)
}

// tagged looks at the signatures of cosign up to version 2, and returns how many
// there are; without an error one of them is good.
func (c *cosign) tagged(ctx context.Context, repo registry.Repo, d digest.Digest) (int, error) {
	at, err := c.from.Resolve(ctx, repo, strings.ReplaceAll(d.String(), ":", "-")+".sig")
	if errors.Is(err, registry.ErrNotFound) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	m, err := c.from.Manifest(ctx, repo, at)
	if err != nil {
		return 0, gone(err)
	}
	return c.layers(ctx, repo, m, at, d)
}

// layers looks at the signatures of the old kind that are layers of a manifest, as
// tagged does.
func (c *cosign) layers(ctx context.Context, repo registry.Repo, m *registry.Manifest, at, d digest.Digest) (int, error) {
	n := 0
	var why error
	for _, l := range m.Layers {
		if l.MediaType != simpleSigning {
			continue
		}
		if n++; n > maxSignatures {
			return n, fmt.Errorf("%w: more than %d signatures", ErrUntrusted, maxSignatures)
		}
		sig, err := base64.StdEncoding.DecodeString(l.Annotations[signatureKey])
		if err != nil {
			why = errors.Join(why, fmt.Errorf("signature in %s: %w", at, err))
			continue
		}
		b, err := c.from.Blob(ctx, repo, l)
		if err != nil {
			if err = gone(err); !errors.Is(err, registry.ErrInvalid) {
				return n, err
			}
			why = errors.Join(why, err)
			continue
		}
		if err := c.simple(b, sig, d); err != nil {
			why = errors.Join(why, err)
			continue
		}
		return n, nil
	}
	if n > 0 {
		return n, fmt.Errorf("%w: %w", ErrUntrusted, why)
	}
	return 0, nil
}

// simple checks one signature of the old kind.
func (c *cosign) simple(signed, sig []byte, d digest.Digest) error {
	if !c.anyKey(func(v signature.Verifier) error {
		return v.VerifySignature(bytes.NewReader(sig), bytes.NewReader(signed))
	}) {
		return errors.New("a signature of none of the keys")
	}
	var p payload.SimpleContainerImage
	if err := json.Unmarshal(signed, &p); err != nil {
		return fmt.Errorf("what was signed: %w", err)
	}
	if p.Critical.Type != payload.CosignSignatureType {
		return fmt.Errorf("what was signed is no image but %.80q", p.Critical.Type)
	}
	if got := p.Critical.Image.DockerManifestDigest; got != d.String() {
		return fmt.Errorf("what was signed is %.80q", got)
	}
	return nil
}

// referring looks at the signatures that refer to the image, as tagged does.
//
// Where a registry has no API for referrers, cosign writes their list, and calls a
// bundle in it by the type of its config, which is the empty one. So what a referrer
// is, its manifest tells.
func (c *cosign) referring(ctx context.Context, repo registry.Repo, d digest.Digest) (int, error) {
	refs, err := c.from.Referrers(ctx, repo, d, bundleType, signatureType, ocispec.MediaTypeEmptyJSON, "")
	if errors.Is(err, registry.ErrNotFound) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	n := 0
	var why error
	for _, ref := range refs {
		if n >= maxSignatures {
			return n, fmt.Errorf("%w: more than %d signatures", ErrUntrusted, maxSignatures)
		}
		found, err := c.referrer(ctx, repo, ref, d)
		n += found
		switch {
		case err == nil && found > 0:
			return n, nil
		case err == nil:
		case errors.Is(err, ErrUntrusted) || errors.Is(err, registry.ErrInvalid):
			why = errors.Join(why, err)
		default:
			return n, err
		}
	}
	if n > 0 {
		return n, fmt.Errorf("%w: %w", ErrUntrusted, why)
	}
	return 0, nil
}

// referrer looks at one manifest that refers to the image, and returns how many
// signatures it holds; without an error one of them is good.
func (c *cosign) referrer(ctx context.Context, repo registry.Repo, ref ocispec.Descriptor, d digest.Digest) (int, error) {
	if err := ref.Digest.Validate(); err != nil {
		return 1, fmt.Errorf("%w: a referrer with the digest %.80q", ErrUntrusted, ref.Digest)
	}
	m, err := c.from.Manifest(ctx, repo, ref.Digest)
	switch said := ref.ArtifactType == bundleType || ref.ArtifactType == signatureType; {
	case !said && (errors.Is(err, registry.ErrInvalid) || errors.Is(err, registry.ErrNotFound)):
		return 0, nil // not there, or nothing that cosign writes
	case err != nil:
		return 1, gone(err)
	case m.ArtifactType == signatureType || m.Config.MediaType == signatureType:
		return c.layers(ctx, repo, m, ref.Digest, d)
	case len(m.Layers) == 1 && m.Layers[0].MediaType == bundleType:
	case ref.ArtifactType == bundleType:
		return 1, fmt.Errorf("%w: %s is not one bundle", ErrUntrusted, ref.Digest)
	default:
		return 0, nil
	}
	b, err := c.from.Blob(ctx, repo, m.Layers[0])
	if err != nil {
		return 1, gone(err)
	}
	err = c.statement(b, d)
	switch {
	case errors.Is(err, errClaim):
		return 0, nil
	case err != nil:
		return 1, fmt.Errorf("%w: bundle %s: %w", ErrUntrusted, ref.Digest, err)
	}
	return 1, nil
}

// errClaim is the error of what is signed and says something about the image,
// such as an SBOM: it is no signature of the image.
var errClaim = errors.New("a claim about the image, not its signature")

// statement checks one bundle: an envelope around a statement that names the
// signed digest. Entries of transparency logs in it are not looked at.
func (c *cosign) statement(bundle []byte, d digest.Digest) error {
	var doc protobundle.Bundle
	if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(bundle, &doc); err != nil {
		return fmt.Errorf("not the JSON of a bundle: %w", err)
	}
	e := doc.GetDsseEnvelope()
	if e == nil {
		return errors.New("no DSSE envelope in it")
	}
	type sig struct {
		KeyID string `json:"keyid"`
		Sig   []byte `json:"sig"`
	}
	envelope := struct {
		PayloadType string `json:"payloadType"`
		Payload     []byte `json:"payload"`
		Signatures  []sig  `json:"signatures"`
	}{PayloadType: e.GetPayloadType(), Payload: e.GetPayload()}
	for _, s := range e.GetSignatures() {
		envelope.Signatures = append(envelope.Signatures, sig{s.GetKeyid(), s.GetSig()})
	}
	raw, err := json.Marshal(envelope)
	if err != nil {
		return err
	}
	var signed []byte
	if !c.anyKey(func(v signature.Verifier) error {
		return dsse.WrapVerifier(v, dsse.WithExpectedPayloadType(statementType), dsse.WithDecodedPayload(&signed)).
			VerifySignature(bytes.NewReader(raw), nil)
	}) {
		return errors.New("a signature of none of the keys")
	}
	return checkStatement(signed, d)
}

// checkStatement looks at what was signed.
func checkStatement(signed []byte, d digest.Digest) error {
	var s struct {
		Type          string `json:"_type"`
		PredicateType string `json:"predicateType"`
		Subject       []struct {
			Digest map[string]string `json:"digest"`
		} `json:"subject"`
	}
	if err := json.Unmarshal(signed, &s); err != nil {
		return fmt.Errorf("what was signed: %w", err)
	}
	if strings.HasPrefix(s.Type, statements) && s.PredicateType != signedByCosign { // cosign attests with v0.1
		return fmt.Errorf("%w: %.80q", errClaim, s.PredicateType)
	}
	if s.Type != statementV1 {
		return fmt.Errorf("what was signed is no statement of in-toto but %.80q", s.Type)
	}
	for _, sub := range s.Subject {
		if got := sub.Digest[d.Algorithm().String()]; got != "" && got == d.Encoded() {
			return nil
		}
	}
	return fmt.Errorf("what was signed is another image than %s", d)
}

func (c *cosign) anyKey(good func(signature.Verifier) error) bool {
	for _, k := range c.keys {
		for _, v := range k.verifiers {
			if good(v) == nil {
				return true
			}
		}
	}
	return false
}

// gone turns what is not there, though it was named a moment ago, into something
// that is wrong.
func gone(err error) error {
	if errors.Is(err, registry.ErrNotFound) {
		return fmt.Errorf("%w: %w", registry.ErrInvalid, err)
	}
	return err
}
