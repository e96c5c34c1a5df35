package integration

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/opencontainers/go-digest"

	"github.com/imagewolf/imagewolf/config"
	"github.com/imagewolf/imagewolf/integration/harness"
	"github.com/imagewolf/imagewolf/notifier/event"
	"github.com/imagewolf/imagewolf/notifier/rules"
	"github.com/imagewolf/imagewolf/notifier/verify/verifytest"
)

// TestSignaturesAtARealRegistry: what the notifier takes for signed, at a real
// registry.
func TestSignaturesAtARealRegistry(t *testing.T) {
	registry.Behave(harness.Behavior{})
	verifytest.Suite(t, registry.Host)
}

// pushed pushes a small image, and returns the event of it.
func pushed(t *testing.T, repo, tag string) event.Event {
	t.Helper()
	img, err := random.Image(1000, 1)
	must(t, err)
	ref, err := name.NewTag(registry.Host+"/"+repo+":"+tag, name.Insecure)
	must(t, err)
	must(t, remote.Write(ref, img))
	d, err := img.Digest()
	must(t, err)
	return event.Event{Kind: event.Pushed, Registry: registry.Host, Repository: repo, Tag: tag, Digest: digest.Digest(d.String())}
}

// TestRulesAtARealRegistry: a tag that moves after the decision moves nothing,
// an event that comes late leads to nothing, and a burst of events has the
// registry asked no more than is needed.
func TestRulesAtARealRegistry(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	registry.Behave(harness.Behavior{})
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	der, err := x509.MarshalPKIXPublicKey(private.Public())
	must(t, err)
	key := filepath.Join(t.TempDir(), "key.pub")
	must(t, os.WriteFile(key, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), 0o600))

	c := config.DefaultNotifier()
	c.AllowRegistries, c.Registry.PlainHTTP = []string{registry.Host}, []string{registry.Host}
	c.Verify["release"] = config.Verify{Type: "cosign", Keys: []string{key}}
	c.Rule = []config.Rule{
		{Name: "signed", Images: []string{"**/signed"}, Verify: "release"},
		{Name: "labelled", Images: []string{"**/labelled"}, Labels: "!none"},
		{Name: "rest", Images: []string{"**"}},
	}
	r, err := rules.New(c, rules.Options{})
	must(t, err)
	decide := func(e event.Event, want event.Kind) rules.Decision {
		t.Helper()
		d, err := r.Decide(ctx, e)
		must(t, err)
		if d.Kind != want {
			t.Errorf("%s is %s (%s), want %s", e.Image(), d.Kind, d.Reason, want)
		}
		return d
	}

	first := pushed(t, "rules/app", "latest")
	if d := decide(first, rules.Requested); d.Request.GetDigest() != first.Digest.String() {
		t.Errorf("pulled is %s, pushed was %s", d.Request.GetDigest(), first.Digest)
	}
	second := pushed(t, "rules/app", "latest")
	decide(first, rules.Superseded)
	decide(second, rules.Requested)
	decide(pushed(t, "rules/signed", "1"), rules.Unsigned)

	labelled := pushed(t, "rules/labelled", "1")
	labelled.Digest = "" // as of a registry that does not tell it
	registry.Reset()
	for range 50 {
		if d := decide(labelled, rules.Requested); d.Request.GetDigest() == "" {
			t.Error("what was looked at is not what is pulled")
		}
		decide(event.Event{Kind: event.Pushed, Registry: registry.Host, Repository: "rules/labelled", Digest: second.Digest}, rules.NoMatch)
	}
	asked := map[string]int{}
	for _, q := range registry.Requests(func(harness.Request) bool { return true }) {
		asked[q.Method]++
	}
	if asked["HEAD"] != 50 || asked["GET"] != 2 {
		t.Errorf("for 50 events of a tag and 50 without one the registry was asked %v times, want 50 tags, a manifest and a config", asked)
	}
}
