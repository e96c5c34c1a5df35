package prefetch

import (
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
)

const (
	one = "sha256:1111111111111111111111111111111111111111111111111111111111111111"
	two = "sha256:2222222222222222222222222222222222222222222222222222222222222222"
)

func TestWhatARequestMeans(t *testing.T) {
	for _, c := range []struct {
		image, digest string
		name, ask     string // "": an error, and ask says which
	}{
		{"nginx", "", "docker.io/library/nginx:latest", "docker.io/library/nginx:latest"},
		{"r.example.com:5000/team/app:1", "", "r.example.com:5000/team/app:1", "r.example.com:5000/team/app:1"},
		{"r.example.com/app:1", one, "r.example.com/app:1", "r.example.com/app@" + one},
		{"r.example.com/app", one, "r.example.com/app@" + one, "r.example.com/app@" + one},
		{"r.example.com/app@" + one, "", "r.example.com/app@" + one, "r.example.com/app@" + one},
		{"r.example.com/app@" + one, one, "r.example.com/app@" + one, "r.example.com/app@" + one},
		{"r.example.com/app:1@" + one, "", "r.example.com/app@" + one, "r.example.com/app@" + one},
		{"r.example.com/app@" + one, two, "", "another digest"},
		{"r.example.com/app", "sha256:1", "", "digest"},
		{"r.example.com/App", "", "", "lowercase"},
		{"", "", "", "invalid reference"},
		{"-x", "", "", "invalid reference"},
	} {
		got, err := parse(Request{Image: c.image, Digest: digest.Digest(c.digest)})
		if c.name == "" {
			if err == nil || !strings.Contains(err.Error(), c.ask) {
				t.Errorf("%q with %q: %+v, %v; want %q", c.image, c.digest, got, err, c.ask)
			}
			continue
		}
		if err != nil || got.name != c.name || got.ask != c.ask {
			t.Errorf("%q with %q: %+v, %v", c.image, c.digest, got, err)
		}
	}
}

func TestRecordIsWhatAPullMoves(t *testing.T) {
	p := New(Options{Namespace: "here"})
	for _, c := range []struct{ image, digest, namespace, want string }{
		{"nginx", "", "", "here docker.io/library/nginx:latest"},
		{"r.example.com/app:1", one, "other", "other r.example.com/app:1"},
		{"r.example.com/app", one, "", ""},
		{"r.example.com/app:1@" + one, "", "", ""},
		{"r.example.com/App", "", "", ""},
	} {
		if got := p.Record(Request{Image: c.image, Digest: digest.Digest(c.digest), Namespace: c.namespace}); got != c.want {
			t.Errorf("%q with %q in %q: %q, want %q", c.image, c.digest, c.namespace, got, c.want)
		}
	}
}

func TestIsRef(t *testing.T) {
	for ref, want := range map[string]bool{
		"k8s.io/12/" + refPrefix + "layer-" + one: true,
		"k8s.io/12/layer-" + one:                  false,
		"prefetch-/12/layer-" + one:               false,
		"k8s.io/12/layer-x/prefetch-" + one:       false,
		refPrefix + "layer-" + one:                false,
		"":                                        false,
	} {
		if IsRef(ref) != want {
			t.Errorf("IsRef(%q) is not %t", ref, want)
		}
	}
}

func FuzzRequest(f *testing.F) {
	f.Add("nginx", "")
	f.Add("r.example.com:5000/team/app:1@"+one, two)
	f.Fuzz(func(t *testing.T, image, d string) {
		got, err := parse(Request{Image: image, Digest: digest.Digest(d)})
		if err != nil {
			return
		}
		if got.host == "" || got.path == "" || !strings.HasPrefix(got.name, got.repo) || !strings.HasPrefix(got.ask, got.repo) ||
			d != "" && got.want.String() != d {
			t.Fatalf("%q with %q: %+v", image, d, got)
		}
	})
}
