package verify

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/notaryproject/notation-go"
	notationregistry "github.com/notaryproject/notation-go/registry"
	"github.com/notaryproject/notation-go/verifier"
	"github.com/notaryproject/notation-go/verifier/trustpolicy"
	"github.com/notaryproject/notation-go/verifier/truststore"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/imagewolf/imagewolf/notifier/registry"
)

type notationVerifier struct {
	policy   *trustpolicy.Document
	verifier notation.Verifier
	from     Remoter
}

func newNotation(policyFile, storeDir string, from Remoter) (*notationVerifier, error) {
	b, err := os.ReadFile(policyFile)
	if err != nil {
		return nil, fmt.Errorf("trust_policy: %w", err)
	}
	policy := &trustpolicy.Document{}
	if err := json.Unmarshal(b, policy); err != nil {
		return nil, fmt.Errorf("trust_policy: %s: %w", policyFile, err)
	}
	store := truststore.NewX509TrustStore(storeFS{os.DirFS(storeDir), storeDir})
	v, err := verifier.New(policy, store, nil)
	if err != nil {
		return nil, fmt.Errorf("trust_policy: %s: %w", policyFile, err)
	}
	for _, p := range policy.TrustPolicies {
		for _, named := range p.TrustStores {
			kind, name, _ := strings.Cut(named, ":")
			if _, err := store.GetCertificates(context.Background(), truststore.Type(kind), name); err != nil {
				return nil, fmt.Errorf("trust_store: %s, which policy %q names: %w", named, p.Name, err)
			}
		}
	}
	return &notationVerifier{policy: policy, verifier: v, from: from}, nil
}

// storeFS is a trust store that is where its directory is, and not where
// notation would look for it.
type storeFS struct {
	fs.FS
	dir string
}

// SysPath implements dir.SysFS.
func (s storeFS) SysPath(items ...string) (string, error) {
	return filepath.Join(s.dir, strings.TrimPrefix(filepath.Join(items...), "truststore")), nil
}

// Verify implements Verifier.
func (v *notationVerifier) Verify(ctx context.Context, repo registry.Repo, d digest.Digest) error {
	ref := repo.String() + "@" + d.String()
	policy, err := v.policy.GetApplicableTrustPolicy(ref)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUntrusted, err)
	}
	level, err := policy.SignatureVerification.GetVerificationLevel()
	if err != nil {
		return fmt.Errorf("%w: trust policy %q: %w", ErrUntrusted, policy.Name, err)
	}
	if level.Enforcement[trustpolicy.TypeAuthenticity] != trustpolicy.ActionEnforce {
		return fmt.Errorf("%w: trust policy %q is of level %q, which lets anyone sign", ErrUntrusted, policy.Name, level.Name)
	}
	remote, err := v.from.Remote(repo)
	if err != nil {
		return err
	}
	seen := &watched{Repository: notationregistry.NewRepository(remote)}
	_, _, err = notation.Verify(ctx, v.verifier, seen, notation.VerifyOptions{ArtifactReference: ref, MaxSignatureAttempts: maxSignatures})
	switch {
	case err == nil:
		return nil
	case seen.err != nil:
		return seen.err
	case ctx.Err() != nil:
		return ctx.Err()
	case seen.signatures == 0:
		return fmt.Errorf("%w with notation: no signature of %s", ErrUnsigned, d)
	}
	return fmt.Errorf("%w: %w", ErrUntrusted, err)
}

// watched remembers what the library's errors do not tell: whether it was the
// registry that failed, and whether there were signatures at all.
type watched struct {
	notationregistry.Repository
	signatures int
	err        error
}

// Resolve implements notationregistry.Repository.
func (w *watched) Resolve(ctx context.Context, reference string) (ocispec.Descriptor, error) {
	d, err := w.Repository.Resolve(ctx, reference)
	w.err = err
	return d, err
}

// ListSignatures implements notationregistry.Repository.
func (w *watched) ListSignatures(ctx context.Context, desc ocispec.Descriptor, fn func([]ocispec.Descriptor) error) error {
	var stop error
	err := w.Repository.ListSignatures(ctx, desc, func(page []ocispec.Descriptor) error {
		w.signatures += len(page)
		stop = fn(page)
		return stop
	})
	if err != nil && !errors.Is(err, stop) && w.err == nil {
		w.err = err
	}
	return err
}

// FetchSignatureBlob implements notationregistry.Repository. A signature that
// cannot be read is a bad one; one that could not be fetched may be good.
func (w *watched) FetchSignatureBlob(ctx context.Context, desc ocispec.Descriptor) ([]byte, ocispec.Descriptor, error) {
	b, d, err := w.Repository.FetchSignatureBlob(ctx, desc)
	if registry.Passing(err) {
		w.err = err
	}
	return b, d, err
}
