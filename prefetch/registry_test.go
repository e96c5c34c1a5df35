package prefetch

import (
	"encoding/base64"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
)

func basic(user, password string) string {
	return fmt.Sprintf(`{"auth":%q}`, base64.StdEncoding.EncodeToString([]byte(user+":"+password)))
}

// The digest that is asked for is the one that is got, by the name that was asked
// for; a tag is resolved once, for all platforms.
func TestResolve(t *testing.T) {
	r := newFakeRegistry(t)
	first := r.manifest(t, "first", nil, "manifests/1")
	image := r.host + "/team/app:1"

	j, _ := newJob(t, Request{Image: image}, Options{})
	name, desc, err := resolve(t.Context(), j)
	if err != nil || name != image || desc.Digest != first.Digest || desc.Size != first.Size {
		t.Fatalf("%s, %+v, %v", name, desc, err)
	}
	second := r.manifest(t, "second", nil, "manifests/1") // the tag moves
	if _, desc, err = resolve(t.Context(), j); err != nil || desc.Digest != first.Digest {
		t.Errorf("the second platform is pulled of %s, %v", desc.Digest, err)
	}
	if fresh, _ := newJob(t, Request{Image: image}, Options{}); true {
		if _, desc, err = resolve(t.Context(), fresh); err != nil || desc.Digest != second.Digest {
			t.Errorf("a new pull is of %s, %v", desc.Digest, err)
		}
	}
	pinned, _ := newJob(t, Request{Image: image, Digest: first.Digest}, Options{})
	if name, desc, err = resolve(t.Context(), pinned); err != nil || name != image || desc.Digest != first.Digest {
		t.Errorf("by digest: %s, %+v, %v", name, desc, err)
	}
	for _, path := range r.requests()[len(r.requests())-1:] {
		if strings.HasSuffix(path, "/1") {
			t.Errorf("with a digest the tag is asked for: %s", path)
		}
	}
}

// What certs.d says is where is asked, with the credentials of that host.
func TestResolveThroughAMirror(t *testing.T) {
	r := newFakeRegistry(t)
	desc := r.manifest(t, "mirrored", nil, "manifests/1")
	r.user, r.password = "wolf", "howl"
	certs := t.TempDir()
	dir := filepath.Join(certs, "registry.example.com")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	text := fmt.Sprintf("server = \"http://127.0.0.1:1\"\n[host.\"http://%s\"]\n", r.host)
	if err := os.WriteFile(filepath.Join(dir, "hosts.toml"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for key, want := range map[string]bool{r.host: true, "registry.example.com": false} {
		j, _ := newJob(t, Request{Image: "registry.example.com/app:1"}, Options{
			CertsDir: t.TempDir() + ":" + certs, CredentialFiles: []string{credentialFile(t, key, basic("wolf", "howl"))},
		})
		_, got, err := resolve(t.Context(), j)
		if want != (err == nil && got.Digest == desc.Digest) {
			t.Errorf("with a credential of %s: %s, %v", key, got.Digest, err)
		}
	}
}

func TestCredentials(t *testing.T) {
	r := newFakeRegistry(t)
	r.manifest(t, "private", nil, "manifests/1")
	r.user, r.password, r.refresh = "wolf", "s3cret", "s3cret-token"
	image := r.host + "/team/app:1"
	for _, c := range []struct {
		name, key, entry string
		fails            []string
	}{
		{"host", r.host, basic("wolf", "s3cret"), nil},
		{"repository", r.host + "/team", basic("wolf", "s3cret"), nil},
		{"identity token", r.host, `{"auth":"MDA6","identitytoken":"s3cret-token"}`, nil},
		{"wrong", r.host, basic("wolf", "s3cret-not"), []string{image, r.host + " refuses it with the credential of entry", "may not pull team/app"}},
		{"other repository", r.host + "/teams", basic("wolf", "s3cret"), []string{image, r.host + " refuses it without credentials", `"` + r.host + `/team"`}},
		{"other host", "registry.example.com", basic("wolf", "s3cret"), []string{"without credentials", "config.json"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			j, _ := newJob(t, Request{Image: image}, Options{CredentialFiles: []string{credentialFile(t, c.key, c.entry)}})
			_, _, err := resolve(t.Context(), j)
			if c.fails == nil {
				if err != nil {
					t.Error(err)
				}
				return
			}
			if err == nil {
				t.Fatal("resolved all the same")
			}
			said := fmt.Errorf("prefetch %s: %w", j.target, j.explain(t.Context(), err)).Error()
			for _, s := range c.fails {
				if !strings.Contains(said, s) {
					t.Errorf("%q does not say %q", said, s)
				}
			}
			if strings.Contains(said, "s3cret") {
				t.Errorf("%q tells a secret", said)
			}
		})
	}
}

func TestErrorsNameTheHost(t *testing.T) {
	r := newFakeRegistry(t)
	for image, want := range map[string]string{
		r.host + "/app:none": r.host + " does not have it, or not for those without credentials",
		"127.0.0.1:1/app:1":  "127.0.0.1:1 cannot be reached",
	} {
		j, _ := newJob(t, Request{Image: image}, Options{})
		_, _, err := resolve(t.Context(), j)
		if err == nil || !strings.Contains(j.explain(t.Context(), err).Error(), want) {
			t.Errorf("%s: %v, want %q", image, j.explain(t.Context(), err), want)
		}
	}
}

// Nothing listens there: containerd is named, and what becomes of it.
func TestPullWithoutContainerd(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "none.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false) // a socket that is not there at all is waited for
	l.Close()
	p := New(Options{ContainerdSocket: socket})
	_, err = p.Pull(t.Context(), Request{Image: "r.example.com/app:1"}, nil)
	if err == nil || !strings.Contains(err.Error(), socket) || !strings.Contains(err.Error(), "r.example.com/app:1") {
		t.Error(err)
	}
	if _, err := p.HasRepository(t.Context(), "", "r.example.com/app"); err == nil || !strings.Contains(err.Error(), socket) {
		t.Error(err)
	}
	if _, err := p.Pull(t.Context(), Request{Image: "r.example.com/app", Digest: digest.Digest("x")}, nil); err == nil {
		t.Error("pulls by what is no digest")
	}
}
