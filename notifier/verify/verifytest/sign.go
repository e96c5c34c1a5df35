// Package verifytest signs images as cosign and notation do, and holds the tests
// that every registry must pass whose images are to be verified.
package verifytest

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/notaryproject/notation-core-go/signature/jws"
	"github.com/notaryproject/notation-go"
	notationregistry "github.com/notaryproject/notation-go/registry"
	"github.com/notaryproject/notation-go/signer"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/sigstore/sigstore/pkg/cryptoutils"
	"github.com/sigstore/sigstore/pkg/signature"
	"github.com/sigstore/sigstore/pkg/signature/dsse"
	"github.com/sigstore/sigstore/pkg/signature/payload"
	"oras.land/oras-go/v2"
	"oras.land/oras-go/v2/content"
	"oras.land/oras-go/v2/registry/remote"
)

const (
	bundleType    = "application/vnd.dev.sigstore.bundle.v0.3+json"
	signPredicate = "https://sigstore.dev/cosign/sign/v1"
	sbomPredicate = "https://spdx.dev/Document"
)

// images pushes to one repository.
type images struct {
	t  *testing.T
	at *remote.Repository
}

func newImages(t *testing.T, host, path string) images {
	t.Helper()
	at, err := remote.NewRepository(host + "/" + path)
	must(t, err)
	at.PlainHTTP, at.SkipReferrersGC = true, true
	return images{t, at}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// image pushes an image that has the text in it.
func (i images) image(text string, tags ...string) ocispec.Descriptor {
	i.t.Helper()
	config := i.blob(ocispec.MediaTypeImageConfig, `{"architecture":"amd64","os":"linux","config":{"Labels":{"text":"`+text+`"}}}`)
	layer := i.blob(ocispec.MediaTypeImageLayer, text)
	return i.manifest(ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: config, Layers: []ocispec.Descriptor{layer},
	}, tags...)
}

// index pushes an index of images.
func (i images) index(of []ocispec.Descriptor, tags ...string) ocispec.Descriptor {
	i.t.Helper()
	return i.manifest(ocispec.MediaTypeImageIndex, ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: of,
	}, tags...)
}

func (i images) blob(mediaType, text string) ocispec.Descriptor {
	i.t.Helper()
	d, err := oras.PushBytes(context.Background(), i.at.Blobs(), mediaType, []byte(text))
	must(i.t, err)
	return d
}

func (i images) manifest(mediaType string, m any, tags ...string) ocispec.Descriptor {
	i.t.Helper()
	b, err := json.Marshal(m)
	must(i.t, err)
	d := content.NewDescriptorFromBytes(mediaType, b)
	must(i.t, i.at.Push(context.Background(), d, bytes.NewReader(b)))
	for _, tag := range tags {
		must(i.t, i.at.Manifests().PushReference(context.Background(), d, bytes.NewReader(b), tag))
	}
	return d
}

// refer pushes a manifest with one layer that refers to the subject.
func (i images) refer(subject ocispec.Descriptor, artifactType, text string) {
	i.t.Helper()
	config := i.blob(artifactType, "{}") // of that type too, for registries that look only there
	_, err := oras.PackManifest(context.Background(), i.at, oras.PackManifestVersion1_1, artifactType, oras.PackManifestOptions{
		Subject: &subject, ConfigDescriptor: &config, Layers: []ocispec.Descriptor{i.blob(artifactType, text)},
		ManifestAnnotations: map[string]string{ocispec.AnnotationCreated: fmt.Sprintf("2026-01-01T00:00:00.%09dZ", len(text))},
	})
	must(i.t, err)
}

// key is a key of cosign's.
type key struct {
	t      *testing.T
	file   string // of the public key
	signer signature.SignerVerifier
}

func newKey(t *testing.T) key {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	sv, err := signature.LoadECDSASignerVerifier(private, crypto.SHA256)
	must(t, err)
	public, err := cryptoutils.MarshalPublicKeyToPEM(private.Public())
	must(t, err)
	return key{t, write(t, "cosign.pub", public), sv}
}

func write(t *testing.T, name string, b []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	must(t, os.WriteFile(path, b, 0o600))
	return path
}

// simple returns a signature of the old kind, as a layer.
func (k key) simple(i images, of digest.Digest) ocispec.Descriptor {
	k.t.Helper()
	b, err := json.Marshal(payload.SimpleContainerImage{Critical: payload.Critical{
		Identity: payload.Identity{DockerReference: i.at.Reference.Registry + "/" + i.at.Reference.Repository},
		Image:    payload.Image{DockerManifestDigest: of.String()}, Type: payload.CosignSignatureType,
	}})
	must(k.t, err)
	sig, err := k.signer.SignMessage(bytes.NewReader(b))
	must(k.t, err)
	d := i.blob("application/vnd.dev.cosign.simplesigning.v1+json", string(b))
	d.Annotations = map[string]string{"dev.cosignproject.cosign/signature": base64.StdEncoding.EncodeToString(sig)}
	return d
}

// beside puts signatures of the old kind where those of the image are looked for.
func (i images) beside(of digest.Digest, signatures ...ocispec.Descriptor) {
	i.t.Helper()
	i.manifest(ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: i.blob(ocispec.MediaTypeImageConfig, `{}`), Layers: signatures,
	}, strings.ReplaceAll(of.String(), ":", "-")+".sig")
}

// bundle returns a signature of the new kind.
func (k key) bundle(of digest.Digest, predicate string) string {
	k.t.Helper()
	statement, err := json.Marshal(map[string]any{
		"_type": "https://in-toto.io/Statement/v1", "predicateType": predicate, "predicate": map[string]any{},
		"subject": []any{map[string]any{"digest": map[string]string{of.Algorithm().String(): of.Encoded()}}},
	})
	must(k.t, err)
	envelope, err := dsse.WrapSigner(k.signer, "application/vnd.in-toto+json").SignMessage(bytes.NewReader(statement))
	must(k.t, err)
	return `{"mediaType":"` + bundleType + `","verificationMaterial":{"publicKey":{"hint":"x"}},"dsseEnvelope":` + string(envelope) + `}`
}

// authority issues certificates for notation.
type authority struct {
	t           *testing.T
	store       string // directory of the trust store
	signer      notation.Signer
	certificate []byte
}

func newAuthority(t *testing.T) authority {
	t.Helper()
	rootKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	leafKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	issue := func(c, by *x509.Certificate, public crypto.PublicKey) *x509.Certificate {
		c.SerialNumber, c.NotBefore, c.NotAfter, c.BasicConstraintsValid = big.NewInt(time.Now().UnixNano()), time.Now().Add(-time.Hour), time.Now().Add(24*time.Hour), true
		der, err := x509.CreateCertificate(rand.Reader, c, by, public, rootKey)
		must(t, err)
		out, err := x509.ParseCertificate(der)
		must(t, err)
		return out
	}
	name := func(s string) pkix.Name {
		return pkix.Name{CommonName: s, Organization: []string{"acme"}, Country: []string{"DE"}, Province: []string{"x"}}
	}
	root := &x509.Certificate{Subject: name("root"), IsCA: true, KeyUsage: x509.KeyUsageCertSign, MaxPathLen: 1}
	root = issue(root, root, rootKey.Public())
	leaf := issue(&x509.Certificate{
		Subject: name("leaf"), KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning},
	}, root, leafKey.Public())
	s, err := signer.NewGenericSigner(leafKey, []*x509.Certificate{leaf, root})
	must(t, err)
	a := authority{t: t, store: t.TempDir(), signer: s, certificate: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root.Raw})}
	dir := filepath.Join(a.store, "x509", "ca", "acme")
	must(t, os.MkdirAll(dir, 0o700))
	must(t, os.WriteFile(filepath.Join(dir, "root.pem"), a.certificate, 0o600))
	return a
}

func (a authority) sign(i images, d digest.Digest) {
	a.t.Helper()
	_, err := notation.Sign(context.Background(), a.signer, notationregistry.NewRepository(i.at), notation.SignOptions{
		SignerSignOptions: notation.SignerSignOptions{SignatureMediaType: jws.MediaTypeEnvelope},
		ArtifactReference: i.at.Reference.Registry + "/" + i.at.Reference.Repository + "@" + d.String(),
	})
	must(a.t, err)
}

// envelope returns a signature of another image.
func (a authority) envelope(of ocispec.Descriptor) string {
	a.t.Helper()
	b, _, err := a.signer.Sign(context.Background(), of, notation.SignerSignOptions{SignatureMediaType: jws.MediaTypeEnvelope})
	must(a.t, err)
	return string(b)
}

// envelopeBeside puts a signature beside an image.
func (a authority) envelopeBeside(i images, of ocispec.Descriptor, envelope string) {
	a.t.Helper()
	_, _, err := notationregistry.NewRepository(i.at).PushSignature(context.Background(), jws.MediaTypeEnvelope, []byte(envelope), of, map[string]string{})
	must(a.t, err)
}

// policy writes a trust policy.
func policy(t *testing.T, level, scope string) string {
	t.Helper()
	stores := `"trustStores":["ca:acme"],"trustedIdentities":["*"]`
	if level == "skip" {
		stores = `"trustStores":[],"trustedIdentities":[]`
	}
	return write(t, "trustpolicy.json", []byte(`{"version":"1.0","trustPolicies":[{"name":"p","registryScopes":["`+scope+
		`"],"signatureVerification":{"level":"`+level+`"},`+stores+`}]}`))
}
