package rules

import (
	"context"
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/imagewolf/imagewolf/config"
	"github.com/imagewolf/imagewolf/notifier/event"
	"github.com/imagewolf/imagewolf/notifier/registry"
	"github.com/imagewolf/imagewolf/notifier/verify"
)

// byRepository is a verifier that trusts one repository only, as policies may.
type byRepository struct{ good string }

func (b byRepository) Verify(_ context.Context, repo registry.Repo, _ digest.Digest) error {
	if repo.Path == b.good {
		return nil
	}
	return verify.ErrUntrusted
}

// What was found good is remembered: for that digest, in that repository, by that
// table, and for nothing else.
func TestAGoodSignatureIsGoodForNothingElse(t *testing.T) {
	c := config.DefaultNotifier()
	c.AllowRegistries, c.Registry.CheckTags = []string{host}, false
	for _, name := range []string{"ours", "theirs", "place"} {
		c.Verify[name] = config.Verify{Type: "cosign"} // of no patience
	}
	c.Rule = []config.Rule{
		{Name: "theirs", Images: []string{"**:theirs-*"}, Verify: "theirs"},
		{Name: "place", Images: []string{"**:place-*"}, Verify: "place"},
		{Name: "ours", Images: []string{"**"}, Verify: "ours"},
	}
	r, err := New(c, Options{Registry: newFake(), Verifiers: map[string]Verifier{
		"ours":   &signed{good: map[digest.Digest]bool{index: true}, err: verify.ErrUnsigned},
		"theirs": &signed{err: verify.ErrUntrusted},
		"place":  byRepository{"apps/web"},
	}})
	if err != nil {
		t.Fatal(err)
	}
	elsewhere := push("place-1", index)
	elsewhere.Repository = "apps/other"
	for _, step := range []struct {
		event event.Event
		want  event.Kind
	}{
		{push("1", index), Requested}, {push("1", arm), Unsigned}, {push("theirs-1", index), Untrusted},
		{push("place-1", index), Requested}, {elsewhere, Untrusted}, {push("place-1", arm), Requested},
		{push("1", index), Requested},
	} {
		if d, err := r.Decide(t.Context(), step.event); err != nil || d.Kind != step.want {
			t.Errorf("%s: %s (%s), %v; want %s", step.event.Image(), d.Kind, d.Reason, err, step.want)
		}
	}
}

// hanging is a registry that does not answer.
type hanging struct{ Registry }

func (hanging) Resolve(ctx context.Context, _ registry.Repo, _ string) (digest.Digest, error) {
	<-ctx.Done()
	return "", ctx.Err()
}

func TestARegistryThatHangsHoldsNothingUpForLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := config.DefaultNotifier()
		c.AllowRegistries = []string{host}
		c.Rule = []config.Rule{{Name: "all", Images: []string{"**"}}}
		r, err := New(c, Options{Registry: hanging{}})
		if err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		if d, err := r.Decide(t.Context(), push("1", index)); !errors.Is(err, context.DeadlineExceeded) || d.Request != nil {
			t.Errorf("%+v, %v", d, err)
		}
		if took := time.Since(began); took != c.Registry.Timeout.Duration() {
			t.Errorf("it took %v", took)
		}
	})
}

// An index in an index in an index has no labels, and the registry is not asked for
// all that is in it.
func TestIndexesInIndexesAreNotFollowedForEver(t *testing.T) {
	f := newFake()
	f.manifests[index] = &registry.Manifest{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{{Digest: index}}}
	r := newRules(t, f, &signed{}, config.Rule{Images: []string{"**"}, Labels: "tier"})
	if d, err := r.Decide(t.Context(), push("1", index)); err != nil || d.Kind != NoMatch {
		t.Errorf("%+v, %v", d, err)
	}
	if len(f.asked) > 5 {
		t.Errorf("the registry was asked %q", f.asked)
	}
}

// What builders put beside images into an index has no labels of the image.
func TestLabelsAreNotThoseOfAnAttestation(t *testing.T) {
	for _, attestation := range []ocispec.Descriptor{
		{Digest: chart, Platform: &ocispec.Platform{OS: "unknown", Architecture: "unknown"}},
		{Digest: chart, Platform: &ocispec.Platform{OS: "linux", Architecture: "amd64"}, Annotations: map[string]string{"vnd.docker.reference.type": "attestation-manifest"}},
	} {
		f := newFake()
		f.manifests[index] = &registry.Manifest{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{
			attestation, {Digest: arm, Platform: &ocispec.Platform{OS: "linux", Architecture: "arm64"}},
		}}
		r := newRules(t, f, &signed{}, config.Rule{Images: []string{"**"}, Labels: "tier=arm"})
		if d, err := r.Decide(t.Context(), push("1", index)); err != nil || d.Kind != Requested {
			t.Errorf("%+v, %v", d, err)
		}
	}
}

// What the event says need not be asked for.
func TestTheMediaTypeOfTheEventIsEnough(t *testing.T) {
	f := newFake()
	r := newRules(t, f, &signed{}, config.Rule{Images: []string{"**"}, MediaTypes: []string{"application/vnd.oci.image.index.*"}})
	e := push("1", index)
	e.MediaType = ocispec.MediaTypeImageIndex
	if d, err := r.Decide(t.Context(), e); err != nil || d.Kind != Requested || !slices.Equal(f.asked, []string{"tag"}) {
		t.Errorf("%+v, %v, asked %q", d, err, f.asked)
	}
}
