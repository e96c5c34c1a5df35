package verify_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log"
	"log/slog"
	"net/http/httptest"
	"strings"
	"testing"

	memory "github.com/google/go-containerregistry/pkg/registry"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2"
	"oras.land/oras-go/v2/content"
	"oras.land/oras-go/v2/content/oci"
	"oras.land/oras-go/v2/registry/remote"

	"github.com/imagewolf/imagewolf/config"
	"github.com/imagewolf/imagewolf/notifier/registry"
	"github.com/imagewolf/imagewolf/notifier/verify"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// shelf is a repository with what testdata/signed.tar has in it.
type shelf struct {
	*remote.Repository
	t *testing.T
}

// serve pushes what testdata/signed.tar has to a registry of its own.
func serve(t *testing.T, referrers bool) shelf {
	t.Helper()
	s := httptest.NewServer(memory.New(memory.WithReferrersSupport(referrers), memory.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(s.Close)
	store, err := oci.NewFromTar(t.Context(), "testdata/signed.tar")
	must(t, err)
	to, err := remote.NewRepository(s.Listener.Addr().String() + "/app")
	must(t, err)
	to.PlainHTTP, to.SkipReferrersGC = true, true
	// In the order of the alphabet: images come before what is named by their digests.
	must(t, store.Tags(t.Context(), "", func(tags []string) error {
		for _, tag := range tags {
			if _, err := oras.Copy(t.Context(), store, tag, to, tag, oras.DefaultCopyOptions); err != nil {
				return err
			}
		}
		return nil
	}))
	return shelf{to, t}
}

func (s shelf) image(tag string) ocispec.Descriptor {
	s.t.Helper()
	d, err := s.Resolve(s.t.Context(), tag)
	must(s.t, err)
	return d
}

// move puts the signatures of one image beside another.
func (s shelf) move(from, to ocispec.Descriptor) {
	s.t.Helper()
	ctx, tag := s.t.Context(), func(d ocispec.Descriptor) string {
		return strings.ReplaceAll(d.Digest.String(), ":", "-") + ".sig"
	}
	moved := 0
	if sig, err := s.Resolve(ctx, tag(from)); err == nil {
		must(s.t, s.Tag(ctx, sig, tag(to)))
		moved++
	}
	must(s.t, s.Referrers(ctx, from, "", func(page []ocispec.Descriptor) error {
		for _, d := range page {
			b, err := content.FetchAll(ctx, s, d)
			if err != nil {
				return err
			}
			var m ocispec.Manifest
			if err := json.Unmarshal(b, &m); err != nil {
				return err
			}
			m.Subject = &to
			if b, err = json.Marshal(m); err != nil {
				return err
			}
			if err := s.Push(ctx, content.NewDescriptorFromBytes(d.MediaType, b), bytes.NewReader(b)); err != nil {
				return err
			}
			moved++
		}
		return nil
	}))
	if moved == 0 {
		s.t.Fatalf("%s has no signature", from.Digest)
	}
}

// TestWhatTheToolsSign: what cosign and notation themselves have signed is taken, of
// those that signed it, and only for what they signed.
func TestWhatTheToolsSign(t *testing.T) {
	for name, c := range map[string]struct{ ours, theirs config.Verify }{
		"cosign":   {keyOf("cosign"), keyOf("other")},
		"notation": {storeOf("truststore"), storeOf("othertruststore")},
	} {
		for _, way := range ways[name] {
			for api, referrers := range map[string]bool{"with the referrers API": true, "without": false} {
				t.Run(way+" "+api, func(t *testing.T) { signedBy(way, c.ours, c.theirs, serve(t, referrers)) })
			}
		}
	}
}

// ways are how each tool was told to sign, as testdata/README.md says.
var ways = map[string][]string{
	"cosign":   {"cosign2", "cosign2-referrers", "cosign2-bundle", "cosign3", "cosign3-old"},
	"notation": {"notation-jws", "notation-cose"},
}

func keyOf(name string) config.Verify {
	return config.Verify{Type: "cosign", Keys: []string{"testdata/" + name + ".pub"}}
}

func storeOf(dir string) config.Verify {
	return config.Verify{Type: "notation", TrustPolicy: "testdata/trustpolicy.json", TrustStore: "testdata/" + dir}
}

// check has an image verified.
func (s shelf) check(what string, c config.Verify, d ocispec.Descriptor, want error) {
	s.t.Helper()
	from, err := registry.New(config.NotifierRegistry{PlainHTTP: []string{s.Reference.Registry}}, slog.New(slog.DiscardHandler))
	must(s.t, err)
	v, err := verify.New(c, from)
	must(s.t, err)
	err = v.Verify(context.Background(), registry.Repo{Host: s.Reference.Registry, Path: s.Reference.Repository}, d.Digest)
	if !errors.Is(err, want) {
		s.t.Errorf("%s: got %v, want %v", what, err, want)
	}
}

func signedBy(way string, ours, theirs config.Verify, s shelf) {
	image, index, part := s.image(way+"-amd64"), s.image(way+"-index"), s.image(way+"-arm64")
	unsigned := s.image("unsigned-amd64")
	s.check("an image", ours, image, nil)
	s.check("an index", ours, index, nil)
	s.check("an image of which only the index is signed", ours, part, verify.ErrUnsigned)
	s.check("unsigned", ours, unsigned, verify.ErrUnsigned)
	s.check("by another key", theirs, image, verify.ErrUntrusted)
	s.check("an index by another key", theirs, index, verify.ErrUntrusted)
	s.move(image, unsigned)
	s.check("a signature of another image", ours, unsigned, verify.ErrUntrusted)
	s.move(index, part)
	s.check("a signature of its index", ours, part, verify.ErrUntrusted)
}

// TestKeysOfOtherKinds: cosign signs as the kind of the key wants.
func TestKeysOfOtherKinds(t *testing.T) {
	for api, referrers := range map[string]bool{"with the referrers API": true, "without": false} {
		t.Run(api, func(t *testing.T) {
			s := serve(t, referrers)
			for _, version := range []string{"cosign2", "cosign3"} {
				for _, key := range []string{"p384", "rsa", "ed"} {
					s.check(version+" "+key, keyOf(key), s.image(version+"-keys"), nil)
				}
				s.check(version, keyOf("other"), s.image(version+"-keys"), verify.ErrUntrusted)
			}
		})
	}
}

// TestWhatTheToolsAttest: what cosign says of an image is no signature of it.
func TestWhatTheToolsAttest(t *testing.T) {
	s := serve(t, true)
	s.check("attested", keyOf("cosign"), s.image("attested-amd64"), verify.ErrUnsigned)
}
