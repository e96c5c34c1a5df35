package registry

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.uber.org/goleak"
	"oras.land/oras-go/v2/registry/remote/auth"

	"github.com/imagewolf/imagewolf/config"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// server is a registry that has what is put into it, and remembers what was
// asked, each with the user that asked.
type server struct {
	*httptest.Server
	host, ca string // ca: a file

	mu      sync.Mutex // guards what follows
	answers map[string]func(http.ResponseWriter, *http.Request)
	asked   []string
}

func newServer(t *testing.T, plain bool) *server {
	t.Helper()
	s := &server{answers: map[string]func(http.ResponseWriter, *http.Request){}}
	if plain {
		s.Server = httptest.NewServer(s)
	} else {
		s.Server = httptest.NewTLSServer(s)
		s.ca = write(t, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})))
	}
	t.Cleanup(s.Close)
	s.host = s.Listener.Addr().String()
	return s
}

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	user, _, _ := r.BasicAuth()
	if b, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer "); ok {
		user = "token " + b
	}
	s.mu.Lock()
	s.asked = append(s.asked, strings.TrimSpace(r.Method+" "+r.URL.Path+" "+user))
	f := s.answers[r.URL.Path]
	s.mu.Unlock()
	if f == nil {
		http.Error(w, `{"errors":[{"code":"MANIFEST_UNKNOWN"}]}`, http.StatusNotFound)
		return
	}
	f(w, r)
}

func (s *server) on(path string, f func(http.ResponseWriter, *http.Request)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.answers[path] = f
}

// has puts a manifest or a blob, and returns its digest.
func (s *server) has(kind, mediaType, body string, tags ...string) digest.Digest {
	d := digest.FromString(body)
	for _, ref := range append(tags, d.String()) {
		s.on("/v2/apps/web/"+kind+"/"+ref, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", mediaType)
			w.Header().Set("Docker-Content-Digest", d.String())
			w.Header().Set("Content-Length", fmt.Sprint(len(body)))
			if r.Method != http.MethodHead {
				say(w, body)
			}
		})
	}
	return d
}

func (s *server) took() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := s.asked
	s.asked = nil
	return out
}

func (s *server) client(t *testing.T, c config.NotifierRegistry) *Registry {
	t.Helper()
	if c.CAFile = s.ca; s.ca == "" {
		c.PlainHTTP = []string{s.host}
	}
	r, err := New(c, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.http.CloseIdleConnections)
	t.Cleanup(func() {
		g := r.http.Transport.(*guard)
		for _, rt := range []http.RoundTripper{g.direct, g.foreign} {
			rt.(*http.Transport).CloseIdleConnections()
		}
	})
	return r
}

func (s *server) repo() Repo { return Repo{s.host, "apps/web"} }

// say writes an answer; that nobody waits for it any more is the client's business.
func say(w io.Writer, text string) { _, _ = io.WriteString(w, text) }

func write(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

const (
	someConfig = `{"config":{"Labels":{"a":"b"}}}`
	somePart   = `{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945","size":5}`
	someImage  = `{"mediaType":"application/vnd.oci.image.manifest.v1+json","config":` + somePart + `,"layers":[` + somePart + `]}`
	someIndex  = `{"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[` + somePart + `]}`
)

func TestWhatHasADigestIsAskedForOnce(t *testing.T) {
	for _, plain := range []bool{true, false} {
		s := newServer(t, plain)
		d := s.has("manifests", ocispec.MediaTypeImageManifest, someImage, "1")
		c := s.has("blobs", "application/octet-stream", someConfig)
		r := s.client(t, config.NotifierRegistry{})
		for range 3 {
			if got, err := r.Resolve(t.Context(), s.repo(), "1"); got != d || err != nil {
				t.Fatalf("%s, %v", got, err)
			}
			m, err := r.Manifest(t.Context(), s.repo(), d)
			if err != nil || m.Digest != d || m.Index() || m.Config.MediaType != ocispec.MediaTypeImageConfig || len(m.Layers) != 1 {
				t.Fatalf("%+v, %v", m, err)
			}
			b, err := r.Blob(t.Context(), s.repo(), ocispec.Descriptor{Digest: c, Size: int64(len(someConfig))})
			if err != nil || string(b) != someConfig {
				t.Fatalf("%s, %v", b, err)
			}
		}
		want := fmt.Sprintf("HEAD /v2/apps/web/manifests/1, GET /v2/apps/web/manifests/%s, GET /v2/apps/web/blobs/%s, "+
			"HEAD /v2/apps/web/manifests/1, HEAD /v2/apps/web/manifests/1", d, c)
		if got := strings.Join(s.took(), ", "); got != want {
			t.Errorf("asked %s\nwant  %s", got, want)
		}
		if _, err := r.Manifest(t.Context(), Repo{s.host, "apps/other"}, d); !errors.Is(err, ErrNotFound) {
			t.Errorf("what is known of one repository is given out for another: %v", err)
		}
	}
}

func TestReferrersByTheAPIAndByTheTag(t *testing.T) {
	subject := digest.FromString("subject")
	index := `{"schemaVersion":2,"mediaType":"` + ocispec.MediaTypeImageIndex + `","manifests":[{"mediaType":"` + ocispec.MediaTypeImageManifest +
		`","artifactType":"x/sig","digest":"` + digest.FromString("a").String() + `","size":5},{"artifactType":"x/sbom","digest":"` + digest.FromString("b").String() + `","size":5}]}`
	byAPI, byTag := newServer(t, true), newServer(t, true)
	byAPI.on("/v2/apps/web/referrers/"+subject.String(), func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", ocispec.MediaTypeImageIndex)
		say(w, index)
	})
	byTag.has("manifests", ocispec.MediaTypeImageIndex, index, strings.ReplaceAll(subject.String(), ":", "-"))
	for _, s := range []*server{byAPI, byTag, newServer(t, true)} {
		refs, err := s.client(t, config.NotifierRegistry{}).Referrers(t.Context(), s.repo(), subject, "x/other", "x/sig")
		if err != nil || (s == byAPI || s == byTag) != (len(refs) == 1) || len(refs) == 1 && refs[0].Digest != digest.FromString("a") {
			t.Errorf("%v, %v", refs, err)
		}
	}
	many := `{"mediaType":"` + ocispec.MediaTypeImageIndex + `","manifests":[` + strings.TrimSuffix(strings.Repeat(`{"artifactType":"x/sig","size":5},`, maxReferrers+1), ",") + `]}`
	byAPI.on("/v2/apps/web/referrers/"+subject.String(), func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", ocispec.MediaTypeImageIndex)
		say(w, many)
	})
	if _, err := byAPI.client(t, config.NotifierRegistry{}).Referrers(t.Context(), byAPI.repo(), subject, "x/sig"); !errors.Is(err, ErrInvalid) {
		t.Errorf("got %v", err)
	}
	// Those of other types are not counted, but are read, and not for ever.
	if refs, err := byAPI.client(t, config.NotifierRegistry{}).Referrers(t.Context(), byAPI.repo(), subject, "x/other"); err != nil || len(refs) > 0 {
		t.Errorf("%v, %v", refs, err)
	}
	byAPI.on("/v2/apps/web/referrers/"+subject.String(), func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", ocispec.MediaTypeImageIndex)
		w.Header().Set("Link", "<"+r.URL.Path+">; rel=next")
		say(w, index)
	})
	if _, err := byAPI.client(t, config.NotifierRegistry{}).Referrers(t.Context(), byAPI.repo(), subject, "x/other"); !errors.Is(err, ErrInvalid) {
		t.Errorf("pages without end: got %v", err)
	}
}

func TestWrongAnswers(t *testing.T) {
	s := newServer(t, true)
	r := s.client(t, config.NotifierRegistry{})
	serve := func(mediaType, body string, length int64) digest.Digest {
		d := digest.FromString(mediaType + body)
		s.on("/v2/apps/web/manifests/"+d.String(), func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", mediaType)
			w.Header().Set("Content-Length", fmt.Sprint(length))
			w.Header().Set("Docker-Content-Digest", d.String())
			say(w, body)
		})
		return d
	}
	for name, d := range map[string]digest.Digest{
		"not its digest": serve(ocispec.MediaTypeImageManifest, someImage, int64(len(someImage))),
		"cut short":      serve(ocispec.MediaTypeImageManifest, "{", 5),
	} {
		if m, err := r.Manifest(t.Context(), s.repo(), d); err == nil || errors.Is(err, ErrInvalid) || errors.Is(err, ErrNotFound) {
			t.Errorf("%s: %+v, %v", name, m, err)
		}
	}
	if _, err := r.Manifest(t.Context(), s.repo(), serve(ocispec.MediaTypeImageManifest, "{", maxAnswer+1)); !errors.Is(err, ErrInvalid) {
		t.Errorf("too large: %v", err)
	}
	if _, err := r.Manifest(t.Context(), s.repo(), serve(ocispec.MediaTypeImageManifest, "{", maxManifest+1)); !errors.Is(err, ErrInvalid) {
		t.Errorf("a little too large: %v", err)
	}
	if _, err := r.Manifest(t.Context(), s.repo(), s.has("manifests", ocispec.MediaTypeImageIndex, someImage)); !errors.Is(err, ErrInvalid) {
		t.Errorf("another type: %v", err)
	}
	for _, desc := range []ocispec.Descriptor{{Digest: "sha256:x", Size: 1}, {Digest: digest.FromString("x"), Size: maxBlob + 1}, {Digest: digest.FromString("x"), Size: -1}} {
		if _, err := r.Blob(t.Context(), s.repo(), desc); !errors.Is(err, ErrInvalid) {
			t.Errorf("blob %+v: %v", desc, err)
		}
	}
	if _, err := r.Blob(t.Context(), s.repo(), ocispec.Descriptor{Digest: digest.FromString("x"), Size: 1}); !errors.Is(err, ErrNotFound) {
		t.Errorf("no blob: %v", err)
	}
	endless := digest.FromString("endless")
	s.on("/v2/apps/web/blobs/"+endless.String(), func(w http.ResponseWriter, _ *http.Request) {
		for range maxAnswer/1000 + 2 {
			if _, err := w.Write(make([]byte, 1000)); err != nil {
				return
			}
		}
	})
	if _, err := r.Blob(t.Context(), s.repo(), ocispec.Descriptor{Digest: endless, Size: maxBlob}); err == nil {
		t.Error("an endless blob was read")
	}
	if _, err := r.Resolve(t.Context(), Repo{s.host, "Apps"}, "1"); !errors.Is(err, ErrInvalid) {
		t.Errorf("no repository: %v", err)
	}
}

func TestARegistryThatIsAwayIsLeftAlone(t *testing.T) {
	s := newServer(t, true)
	r := s.client(t, config.NotifierRegistry{})
	for _, status := range []int{http.StatusTooManyRequests, http.StatusServiceUnavailable} {
		s.on("/v2/apps/web/manifests/1", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(status) })
		for range 3 {
			if _, err := r.Resolve(t.Context(), s.repo(), "1"); err == nil || !Passing(err) {
				t.Errorf("got %v", err)
			}
		}
		if n := len(s.took()); n != 1 {
			t.Errorf("asked %d times", n)
		}
		r.mu.Lock()
		until := r.away[s.host]
		r.away[s.host] = time.Now()
		r.mu.Unlock()
		if d := time.Until(until); d > awayFor || d < awayFor/2 {
			t.Errorf("left alone for %s", d)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	s.on("/v2/apps/web/manifests/1", func(_ http.ResponseWriter, r *http.Request) { cancel(); <-r.Context().Done() })
	if _, err := r.Resolve(ctx, s.repo(), "1"); !errors.Is(err, context.Canceled) || r.isAway(s.host) {
		t.Errorf("being stopped is the registry's fault: %v", err)
	}
	s.Close()
	for _, want := range []bool{false, true} {
		if _, err := r.Resolve(t.Context(), s.repo(), "1"); err == nil || !Passing(err) || errors.Is(err, errAway) != want {
			t.Errorf("got %v, want one that says so: %v", err, want)
		}
	}
	if r.isAway("other.example") {
		t.Error("another registry is away too")
	}
}

func login(user, password, host string) string {
	auths := map[string]any{host: map[string]string{"auth": base64.StdEncoding.EncodeToString([]byte(user + ":" + password))}}
	b, _ := json.Marshal(map[string]any{"auths": auths})
	return string(b)
}

func TestCredentialsAreSentToTheRegistryAndItsTokenServer(t *testing.T) {
	s := newServer(t, false)
	realm := s.URL + "/token"
	manifest := func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer abc" {
			w.Header().Set("WWW-Authenticate", `Bearer realm="`+realm+`",service="s",scope="repository:apps/web:pull"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
		w.Header().Set("Docker-Content-Digest", digest.FromString("x").String())
		w.Header().Set("Content-Length", "1")
	}
	s.on("/v2/apps/web/manifests/1", manifest)
	s.on("/token", func(w http.ResponseWriter, _ *http.Request) { say(w, `{"token":"abc"}`) })
	file := write(t, login("joe", "old", s.host))
	r := s.client(t, config.NotifierRegistry{CredentialFiles: []string{write(t, login("jane", "x", "other.example")), file}})
	for range 2 {
		if _, err := r.Resolve(t.Context(), s.repo(), "1"); err != nil {
			t.Fatal(err)
		}
	}
	want := "HEAD /v2/apps/web/manifests/1, GET /token joe, HEAD /v2/apps/web/manifests/1 token abc, HEAD /v2/apps/web/manifests/1 token abc"
	if got := strings.Join(s.took(), ", "); got != want {
		t.Errorf("asked %s\nwant  %s", got, want)
	}

	// The file is read again for the next login.
	if err := os.WriteFile(file, []byte(login("jim", "new", s.host)), 0o600); err != nil {
		t.Fatal(err)
	}
	r.mu.Lock()
	r.uses = maxRequests
	r.mu.Unlock()
	if _, err := r.Resolve(t.Context(), s.repo(), "1"); err != nil || !strings.Contains(strings.Join(s.took(), ","), "GET /token jim") {
		t.Errorf("%v; not read again", err)
	}

	// A stranger is not told.
	stranger := newServer(t, false)
	realm = strings.Replace(stranger.URL, "127.0.0.1", "localhost", 1) + "/token"
	r.mu.Lock()
	r.client = nil
	r.mu.Unlock()
	if _, err := r.Resolve(t.Context(), s.repo(), "1"); err == nil {
		t.Error("a token of a stranger was taken")
	}
	if got := stranger.took(); len(got) > 0 {
		t.Errorf("a stranger was asked %q", got)
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if c, err := r.credentials(t.Context(), s.host); err != nil || c != auth.EmptyCredential {
		t.Errorf("a file that is gone: %v, %v", c, err)
	}
}

func TestRedirectsLeadOnlyWhereTheyMay(t *testing.T) {
	s, other, plain := newServer(t, false), newServer(t, false), newServer(t, true)
	s.on("/token", func(w http.ResponseWriter, _ *http.Request) { say(w, `{"token":"abc"}`) })
	d := other.has("blobs", "application/octet-stream", someConfig)
	plain.has("blobs", "application/octet-stream", someConfig)
	to := ""
	s.on("/v2/apps/web/blobs/"+d.String(), func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") == "" {
			w.Header().Set("WWW-Authenticate", `Bearer realm="`+s.URL+`/token",service="s"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		http.Redirect(w, r, to+r.URL.Path, http.StatusTemporaryRedirect)
	})
	fetch := func(r *Registry) error {
		_, err := r.Blob(t.Context(), s.repo(), ocispec.Descriptor{Digest: d, Size: int64(len(someConfig))})
		return err
	}
	creds := config.NotifierRegistry{CredentialFiles: []string{write(t, login("joe", "x", s.host))}}
	for name, url := range map[string]string{"this machine": other.URL, "plain HTTP": plain.URL, "with a user": "https://joe:x@" + other.host} {
		to = url
		r := s.client(t, creds)
		var refused *refusedError
		if err := fetch(r); !errors.As(err, &refused) {
			t.Errorf("%s: %v", name, err)
		}
		if r.isAway(s.host) {
			t.Errorf("%s: the registry counts as away", name)
		}
	}
	if got := append(other.took(), plain.took()...); len(got) > 0 {
		t.Errorf("others were asked %q", got)
	}

	to = other.URL
	r := s.client(t, creds)
	elsewhere := r.http.Transport.(*guard).direct.(*http.Transport).Clone() // as if the other were not on this machine
	elsewhere.TLSClientConfig.RootCAs.AddCert(other.Certificate())
	r.http.Transport.(*guard).foreign = elsewhere
	if err := fetch(r); err != nil {
		t.Fatal(err)
	}
	if got := other.took(); len(got) != 1 || strings.Contains(got[0], "abc") || strings.Contains(got[0], "joe") {
		t.Errorf("the other was asked %q", got)
	}
}

func TestWhereRequestsMayLead(t *testing.T) {
	g, err := newGuard(config.NotifierRegistry{TokenHosts: []string{"login.example.org"}})
	if err != nil {
		t.Fatal(err)
	}
	redirect := &http.Response{}
	for _, c := range []struct {
		to, url string
		from    *http.Response
		want    string // direct, foreign or no
	}{
		{"r.example.com", "https://r.example.com/v2/", nil, "direct"},
		{"r.example.com", "https://R.example.com:443/v2/", nil, "direct"},
		{"r.example.com", "https://r.example.com:8443/v2/", nil, "direct"}, // its own name: for tokens
		{"r.example.com", "https://r.example.com:8443/v2/", redirect, "foreign"},
		{"r.example.com", "http://r.example.com/v2/", nil, "no"},
		{"r.example.com", "https://auth.example.com/token", nil, "direct"},
		{"r.example.com", "https://example.com/token", nil, "direct"},
		{"r.example.com", "https://evil.com/token", nil, "no"},
		{"r.example.com", "https://evilexample.com/token", nil, "no"},
		{"r.example.com", "https://login.example.org/token", nil, "direct"},
		{"r.example.com", "https://login.example.org:8443/token", nil, "no"},
		{"r.example.co.uk", "https://other.co.uk/token", nil, "no"},
		{"a.github.io", "https://b.github.io/token", nil, "no"},
		{"registry-1.docker.io", "https://auth.docker.io/token", nil, "direct"},
		{"10.0.0.1:5000", "https://20.0.0.1/token", nil, "no"},
		{"r.example.com", "https://storage.example.net/blob", redirect, "foreign"},
		{"r.example.com", "http://storage.example.net/blob", redirect, "no"},
		{"r.example.com", "https://u:p@r.example.com/", nil, "no"},
		{"plain:localhost:5000", "http://localhost:5000/v2/", nil, "direct"},
		{"plain:localhost:5000", "http://localhost/v2/", redirect, "foreign"},
		{"plain:localhost:5000", "ftp://localhost:5000/v2/", nil, "no"},
	} {
		host, plain := strings.CutPrefix(c.to, "plain:")
		u, err := url.Parse(c.url)
		if err != nil {
			t.Fatal(err)
		}
		via, err := g.via(&http.Request{Method: http.MethodGet, URL: u, Response: c.from}, target{host, plain})
		got := map[bool]string{true: "direct", false: "foreign"}[via == g.direct]
		if err != nil {
			got = "no"
		}
		if got != c.want {
			t.Errorf("from %s to %s (redirected: %v): %s, want %s", c.to, c.url, c.from != nil, got, c.want)
		}
	}
	if _, err := g.via(&http.Request{Method: http.MethodPost, URL: &url.URL{Scheme: "https", Host: "x.example"}, Response: redirect}, target{"r.example.com", false}); err == nil {
		t.Error("a POST is redirected")
	}
	if resp, err := (&http.Client{Transport: g}).Get("https://r.example.com/"); err == nil {
		resp.Body.Close()
		t.Error("a request to no registry is sent")
	}
	for address, ok := range map[string]bool{
		"127.0.0.1:443": false, "[::1]:443": false, "169.254.169.254:80": false, "[fe80::1]:443": false, "[::ffff:127.0.0.1]:443": false, "0.0.0.0:1": false,
		"[fe80::1%eth0]:443": false, "[::ffff:169.254.169.254]:80": false, "[::127.0.0.1]:443": false, "[64:ff9b::a9fe:a9fe]:80": false,
		"100.100.100.200:80": false, "[::ffff:100.100.100.200]:80": false, "168.63.129.16:80": false,
		"[fd00:ec2::254]:80": false, "[fd20:ce::254]:80": false, "[fd00:c1::a9fe:a9fe]:80": false, "[fd00:42::42]:80": false,
		"[64:ff9b::203.0.113.1]:443": true, "[fd00:ec3::254]:443": true, "100.100.100.201:443": true,
		"[2002:7f00:1::1]:443": false, "[2002:a9fe:a9fe::]:80": false, "[2002:6464:64c8::1]:80": false, "[2002:cb00:7101::7f00:1]:443": true,
		"[64:ff9b:1::169.254.169.254]:80": false, "[64:ff9b:1:2:3:4:7f00:1]:80": false, "[64:ff9b:1:a9fe:a9:fe00::]:80": false,
		"[64:ff9b:1:a9:fe:a9fe::]:80": false, "[64:ff9b:1:2:a9:fea9:fe00:0]:80": false, "[64:ff9b:1:6464:64:c800::]:80": false,
		"[64:ff9b:1::203.0.113.1]:443": true, "[64:ff9b:1:cb00:71:100::]:443": true, "[64:ff9b:1:cbe0:e1:100::]:443": true,
		"[64:ff9b:2::169.254.169.254]:80": true,
		"10.0.0.1:443":                    true, "192.0.2.1:443": true, "[2001:db8::1]:443": true, "nonsense": false,
	} {
		if err := refuseOwn("tcp", address, nil); (err == nil) != ok {
			t.Errorf("%s: %v", address, err)
		}
	}
}

func TestSettingsThatCannotBe(t *testing.T) {
	for _, c := range []config.NotifierRegistry{
		{CAFile: "/nonexistent"}, {CAFile: write(t, "no certificate")}, {PlainHTTP: []string{"a b"}}, {TokenHosts: []string{"a/b"}},
	} {
		if _, err := New(c, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), "registry.") {
			t.Errorf("%+v: %v", c, err)
		}
	}
}

func TestManifests(t *testing.T) {
	part := func(d string) string { return strings.Replace(somePart, "sha256:4f", d, 1) }
	for name, c := range map[string]struct{ mediaType, body, want string }{
		"image":                  {ocispec.MediaTypeImageManifest, someImage, ""},
		"with parameters":        {ocispec.MediaTypeImageManifest + "; charset=utf-8", someImage, ""},
		"index":                  {ocispec.MediaTypeImageIndex, someIndex, ""},
		"silent about itself":    {dockerManifest, `{"config":` + somePart + `}`, ""},
		"list":                   {dockerList, `{"manifests":[]}`, ""},
		"called another":         {ocispec.MediaTypeImageIndex, someImage, "calls it"},
		"of no known type":       {"application/json", `{}`, "media type"},
		"no type":                {"", someImage, "media type"},
		"no JSON":                {ocispec.MediaTypeImageManifest, `[`, "not the JSON"},
		"without config":         {ocispec.MediaTypeImageManifest, `{}`, "without config"},
		"image with manifests":   {ocispec.MediaTypeImageManifest, `{"config":` + somePart + `,"manifests":[` + somePart + `]}`, "others in it"},
		"index with config":      {ocispec.MediaTypeImageIndex, `{"config":` + somePart + `}`, "config or layers"},
		"index with layers":      {ocispec.MediaTypeImageIndex, `{"layers":[` + somePart + `]}`, "config or layers"},
		"a digest that is none":  {ocispec.MediaTypeImageIndex, `{"manifests":[` + part("../") + `]}`, "a part with"},
		"a config with none":     {ocispec.MediaTypeImageManifest, `{"config":` + part("md5:") + `}`, "a config with"},
		"a negative size":        {ocispec.MediaTypeImageIndex, `{"manifests":[` + strings.Replace(somePart, `"size":5`, `"size":-1`, 1) + `]}`, "-1 bytes"},
		"more parts than anyone": {ocispec.MediaTypeImageIndex, `{"manifests":[` + somePart + strings.Repeat(","+somePart, maxParts) + `]}`, "parts"},
	} {
		m, err := Decode(c.mediaType, []byte(c.body))
		if c.want == "" && err != nil || c.want != "" && (!errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %+v, %v", name, m, err)
		}
	}
	if l, err := Labels(ocispec.MediaTypeImageConfig, []byte(someConfig)); err != nil || l["a"] != "b" {
		t.Errorf("%v, %v", l, err)
	}
	if l, err := Labels("application/vnd.cncf.helm.config.v1+json", []byte(someConfig)); err != nil || l != nil {
		t.Errorf("a chart has labels: %v, %v", l, err)
	}
	if _, err := Labels(dockerConfig, []byte(`{"config":[]}`)); !errors.Is(err, ErrInvalid) {
		t.Errorf("got %v", err)
	}
}

func FuzzDecode(f *testing.F) {
	for _, mt := range []string{ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageIndex, dockerManifest, dockerList, ocispec.MediaTypeImageConfig} {
		for _, body := range []string{someImage, someIndex, someConfig, `{"manifests":[{"digest":"sha256:x"}]}`} {
			f.Add(mt, []byte(body))
		}
	}
	f.Fuzz(func(t *testing.T, mediaType string, body []byte) {
		if l, err := Labels(mediaType, body); err != nil && (!errors.Is(err, ErrInvalid) || l != nil) {
			t.Errorf("labels %v beside %v", l, err)
		}
		m, err := Decode(mediaType, body)
		if err != nil {
			if !errors.Is(err, ErrInvalid) || m != nil {
				t.Errorf("%+v beside %v", m, err)
			}
			return
		}
		if m.Index() == (m.Config.Digest != "") || m.Index() && len(m.Layers) > 0 || !m.Index() && len(m.Manifests) > 0 {
			t.Errorf("an image and an index at once: %+v", m)
		}
		for _, d := range append(append([]ocispec.Descriptor{}, m.Layers...), m.Manifests...) {
			if d.Digest.Validate() != nil || d.Size < 0 {
				t.Errorf("part %+v", d)
			}
		}
	})
}

type recorder struct{ got *http.Request }

func (r *recorder) RoundTrip(req *http.Request) (*http.Response, error) {
	r.got = req
	return &http.Response{StatusCode: http.StatusOK, Body: http.NoBody, Request: req}, nil
}

// Whatever the library above does with redirects, credentials do not leave.
func TestNoCredentialsGoWhereARedirectLeads(t *testing.T) {
	seen := &recorder{}
	g := &guard{direct: &recorder{}, foreign: seen}
	ctx := context.WithValue(t.Context(), targetKey{}, target{"r.example.com", false})
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://storage.example.net/blob", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Response = &http.Response{}
	req.Header.Set("Authorization", "Bearer abc")
	req.Header.Set("Cookie", "a=b")
	resp, err := g.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if len(seen.got.Header) > 0 || req.Header.Get("Authorization") == "" {
		t.Errorf("sent %v, and the caller's request has %v", seen.got.Header, req.Header)
	}
}

// Where a registry redirects to is a URL that anyone who has it may read.
func TestErrorsHaveNoSignatureOfAURL(t *testing.T) {
	s := newServer(t, false)
	d := digest.FromString("x")
	s.on("/v2/apps/web/blobs/"+d.String(), func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "https://storage.example.net/blob?X-Signature=abc", http.StatusTemporaryRedirect)
	})
	for name, answers := range map[string]func(*http.Request) (*http.Response, error){
		"away": func(*http.Request) (*http.Response, error) { return nil, errors.New("no way there") },
		"refuses": func(req *http.Request) (*http.Response, error) {
			return &http.Response{StatusCode: http.StatusForbidden, Body: http.NoBody, Request: req}, nil
		},
	} {
		r := s.client(t, config.NotifierRegistry{})
		g := r.http.Transport.(*guard)
		kept := g.foreign
		g.foreign = &elsewhere{answers}
		_, err := r.Blob(t.Context(), s.repo(), ocispec.Descriptor{Digest: d, Size: 1})
		g.foreign = kept
		if err == nil || strings.Contains(err.Error(), "abc") || !strings.Contains(err.Error(), "https://storage.example.net/blob") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

type elsewhere struct {
	answer func(*http.Request) (*http.Response, error)
}

func (e *elsewhere) RoundTrip(req *http.Request) (*http.Response, error) { return e.answer(req) }
