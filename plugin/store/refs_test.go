package store

import (
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestKnown(t *testing.T) {
	hex := strings.Repeat("0a", 32)
	d := "sha256:" + hex
	other := "sha256:" + strings.Repeat("0b", 32)
	for _, tc := range []struct {
		name   string
		ref    string
		digest string
		size   int64
		want   string
	}{
		{"layer", "k8s.io/1/layer-" + d, "", 5, d},
		{"no namespace", "layer-" + d, "", 5, d},
		{"any kind", "a/2/soci-index-" + d, "", 5, d},
		{"no size", "k8s.io/1/layer-" + d, "", 0, ""},
		{"negative size", "k8s.io/1/layer-" + d, "", -1, ""},
		{"no kind", "k8s.io/1/-" + d, "", 5, ""},
		{"no dash", "k8s.io/1/" + d, "", 5, ""},
		{"upper case", "k8s.io/1/layer-sha256:" + strings.ToUpper(hex), "", 5, ""},
		{"too short", "k8s.io/1/layer-sha256:" + hex[2:], "", 5, ""},
		{"something after", "k8s.io/1/layer-" + d + "/x", "", 5, ""},
		{"source of a conversion", "k8s.io/1/convert-uncompress-from-" + d, "", 5, ""},
		{"sha512", "k8s.io/1/layer-sha512:" + hex + hex, "", 5, ""},
		{"given", "anything", d, 5, d},
		{"given goes first", "layer-" + other, d, 5, d},
		{"given, no size", "anything", d, 0, ""},
		{"given, sha512", "anything", "sha512:" + hex + hex, 5, ""},
		{"given, not a digest", "layer-" + d, "sha256:zz", 5, ""},
		{"empty", "", "", 5, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			o := content.WriterOpts{Ref: tc.ref}
			o.Desc = ocispec.Descriptor{Size: tc.size}
			o.Desc.Digest = digest.Digest(tc.digest)
			got, ok := known(o)
			if ok != (tc.want != "") || ok && got.String() != tc.want {
				t.Errorf("got %q, %v; want %q", got, ok, tc.want)
			}
		})
	}
}

func FuzzRefDigest(f *testing.F) {
	f.Add("k8s.io/1/layer-sha256:" + strings.Repeat("0a", 32))
	f.Add("-sha256:")
	f.Fuzz(func(t *testing.T, ref string) {
		d, ok := refDigest(ref)
		if ok && (d.Validate() != nil || !strings.HasSuffix(ref, "-"+d.String()) || len(ref) <= len(d)+1) {
			t.Errorf("%q -> %q", ref, d)
		}
	})
}
