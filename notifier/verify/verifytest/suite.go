package verifytest

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/imagewolf/imagewolf/config"
	"github.com/imagewolf/imagewolf/notifier/registry"
	"github.com/imagewolf/imagewolf/notifier/verify"
)

// suite is one run over one registry.
type suite struct {
	host string
	from *registry.Registry
}

// Suite signs images at a registry that speaks plain HTTP, and sees which of
// them are taken.
func Suite(t *testing.T, host string) {
	from, err := registry.New(config.NotifierRegistry{PlainHTTP: []string{host}}, slog.New(slog.DiscardHandler))
	must(t, err)
	s := suite{host, from}
	t.Run("cosign by tag", func(t *testing.T) { s.cosign(t, "tag", byTag) })
	t.Run("cosign by bundle", func(t *testing.T) { s.cosign(t, "bundle", byBundle) })
	t.Run("attestations", s.attestations)
	t.Run("notation", s.notation)
	t.Run("policies", s.policies)
	t.Run("no verdict", s.noVerdict)
}

// byTag and byBundle put signatures, of the given digests, beside an image; a
// digest may be "tampered".
func byTag(i images, of ocispec.Descriptor, signs []signs) {
	var layers []ocispec.Descriptor
	for _, s := range signs {
		l := s.key.simple(i, s.digest)
		if s.tampered {
			l.Annotations["dev.cosignproject.cosign/signature"] = s.key.simple(i, digest.FromString("x")).Annotations["dev.cosignproject.cosign/signature"]
		}
		layers = append(layers, l)
	}
	i.beside(of.Digest, layers...)
}

func byBundle(i images, of ocispec.Descriptor, signs []signs) {
	for _, s := range signs {
		b := s.key.bundle(s.digest, signPredicate)
		if s.tampered {
			_, other, _ := strings.Cut(s.key.bundle(digest.FromString("x"), signPredicate), `"payload":"`)
			before, after, _ := strings.Cut(b, `"payload":"`)
			b = before + `"payload":"` + other[:strings.IndexByte(other, '"')] + after[strings.IndexByte(after, '"'):]
		}
		i.refer(of, bundleType, b)
	}
}

type signs struct {
	key      key
	digest   digest.Digest
	tampered bool
}

func (s suite) check(t *testing.T, v verify.Verifier, i images, d digest.Digest, want error) {
	t.Helper()
	err := v.Verify(context.Background(), registry.Repo{Host: s.host, Path: i.at.Reference.Repository}, d)
	if !errors.Is(err, want) {
		t.Errorf("%s: got %v, want %v", d, err, want)
	}
}

func (s suite) cosign(t *testing.T, kind string, put func(images, ocispec.Descriptor, []signs)) {
	ours, second, theirs := newKey(t), newKey(t), newKey(t)
	v, err := verify.New(config.Verify{Type: "cosign", Keys: []string{ours.file, second.file}}, s.from)
	must(t, err)
	i := newImages(t, s.host, "cosign/"+kind)
	other := digest.FromString("another image")
	for name, c := range map[string]struct {
		signs func(d digest.Digest) []signs
		want  error
	}{
		"unsigned":       {nil, verify.ErrUnsigned},
		"signed":         {func(d digest.Digest) []signs { return []signs{{ours, d, false}} }, nil},
		"second key":     {func(d digest.Digest) []signs { return []signs{{second, d, false}} }, nil},
		"wrong key":      {func(d digest.Digest) []signs { return []signs{{theirs, d, false}} }, verify.ErrUntrusted},
		"another digest": {func(digest.Digest) []signs { return []signs{{ours, other, false}} }, verify.ErrUntrusted},
		"tampered":       {func(d digest.Digest) []signs { return []signs{{ours, d, true}} }, verify.ErrUntrusted},
		"one is good": {func(d digest.Digest) []signs {
			return []signs{{theirs, d, false}, {ours, other, false}, {ours, d, false}}
		}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			i := i
			i.t = t
			d := i.image(kind + name)
			if c.signs != nil {
				put(i, d, c.signs(d.Digest))
			}
			s.check(t, v, i, d.Digest, c.want)
		})
	}
	t.Run("index", func(t *testing.T) {
		i := i
		i.t = t
		child := i.image(kind + "child")
		index := i.index([]ocispec.Descriptor{child}, "index")
		put(i, index, []signs{{ours, index.Digest, false}})
		s.check(t, v, i, index.Digest, nil)
		s.check(t, v, i, child.Digest, verify.ErrUnsigned)
	})
}

// attestations are signed too, and say something else.
func (s suite) attestations(t *testing.T) {
	ours := newKey(t)
	v, err := verify.New(config.Verify{Type: "cosign", Keys: []string{ours.file}}, s.from)
	must(t, err)
	i := newImages(t, s.host, "cosign/attested")
	d := i.image("attested")
	i.refer(d, bundleType, ours.bundle(d.Digest, sbomPredicate))
	s.check(t, v, i, d.Digest, verify.ErrUnsigned)
	i.refer(d, bundleType, "no bundle")
	s.check(t, v, i, d.Digest, verify.ErrUntrusted)
	i.refer(d, bundleType, ours.bundle(d.Digest, signPredicate))
	s.check(t, v, i, d.Digest, nil)
}

func (s suite) notation(t *testing.T) {
	ours, theirs := newAuthority(t), newAuthority(t)
	v, err := verify.New(config.Verify{Type: "notation", TrustPolicy: policy(t, "strict", "*"), TrustStore: ours.store}, s.from)
	must(t, err)
	i := newImages(t, s.host, "notation/app")
	for name, c := range map[string]struct {
		sign func(images, ocispec.Descriptor)
		want error
	}{
		"unsigned":        {func(images, ocispec.Descriptor) {}, verify.ErrUnsigned},
		"signed":          {func(i images, d ocispec.Descriptor) { ours.sign(i, d.Digest) }, nil},
		"wrong authority": {func(i images, d ocispec.Descriptor) { theirs.sign(i, d.Digest) }, verify.ErrUntrusted},
		"another digest":  {func(i images, d ocispec.Descriptor) { ours.envelopeBeside(i, d, ours.envelope(i.image("another"))) }, verify.ErrUntrusted},
		"tampered": {func(i images, d ocispec.Descriptor) {
			e, x := ours.envelope(d), ours.envelope(i.image("another"))
			ours.envelopeBeside(i, d, e[:strings.Index(e, `"signature":"`)]+x[strings.Index(x, `"signature":"`):])
		}, verify.ErrUntrusted},
		"garbage":     {func(i images, d ocispec.Descriptor) { ours.envelopeBeside(i, d, "{}") }, verify.ErrUntrusted},
		"one is good": {func(i images, d ocispec.Descriptor) { theirs.sign(i, d.Digest); ours.sign(i, d.Digest) }, nil},
	} {
		t.Run(name, func(t *testing.T) {
			i := i
			i.t = t
			d := i.image("notation " + name)
			c.sign(i, d)
			s.check(t, v, i, d.Digest, c.want)
		})
	}
	child := i.image("notation child")
	index := i.index([]ocispec.Descriptor{child})
	ours.sign(i, index.Digest)
	s.check(t, v, i, index.Digest, nil)
	s.check(t, v, i, child.Digest, verify.ErrUnsigned)
}

// policies that let anyone sign, or say nothing of the repository, let nobody
// through.
func (s suite) policies(t *testing.T) {
	ours := newAuthority(t)
	i := newImages(t, s.host, "notation/policies")
	d := i.image("policies")
	ours.sign(i, d.Digest)
	for _, c := range []struct {
		level, scope string
		want         error
	}{
		{"strict", s.host + "/notation/policies", nil},
		{"permissive", "*", nil},
		{"audit", "*", verify.ErrUntrusted},
		{"skip", "*", verify.ErrUntrusted},
		{"strict", s.host + "/notation/other", verify.ErrUntrusted},
	} {
		v, err := verify.New(config.Verify{Type: "notation", TrustPolicy: policy(t, c.level, c.scope), TrustStore: ours.store}, s.from)
		must(t, err)
		s.check(t, v, i, d.Digest, c.want)
	}
	must(t, os.RemoveAll(ours.store))
	if _, err := verify.New(config.Verify{Type: "notation", TrustPolicy: policy(t, "strict", "*"), TrustStore: ours.store}, s.from); err == nil {
		t.Error("a trust store that is not there was taken")
	}
}

// noVerdict sees that a registry which does not answer makes no image unsigned.
func (s suite) noVerdict(t *testing.T) {
	ours := newAuthority(t)
	for _, status := range []int{http.StatusUnauthorized, http.StatusForbidden, http.StatusInternalServerError, http.StatusServiceUnavailable} {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(status) }))
		host := server.Listener.Addr().String()
		from, err := registry.New(config.NotifierRegistry{PlainHTTP: []string{host}}, slog.New(slog.DiscardHandler))
		must(t, err)
		for _, c := range []config.Verify{
			{Type: "cosign", Keys: []string{newKey(t).file}}, {Type: "notation", TrustPolicy: policy(t, "strict", "*"), TrustStore: ours.store},
		} {
			v, err := verify.New(c, from)
			must(t, err)
			err = v.Verify(context.Background(), registry.Repo{Host: host, Path: "a/b"}, digest.FromString("x"))
			if err == nil || errors.Is(err, verify.ErrUnsigned) || errors.Is(err, verify.ErrUntrusted) || !registry.Passing(err) {
				t.Errorf("%s, status %d: %v", c.Type, status, err)
			}
		}
		server.Close()
	}
	v, err := verify.New(config.Verify{Type: "cosign", Keys: []string{newKey(t).file}}, s.from)
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := v.Verify(ctx, registry.Repo{Host: s.host, Path: "a/b"}, digest.FromString("x")); !errors.Is(err, context.Canceled) {
		t.Errorf("stopped: %v", err)
	}
}
