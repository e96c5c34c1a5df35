package prefetch

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// fakeRegistry answers as a registry does, for any repository.
type fakeRegistry struct {
	host string
	api  bool // has the referrers API

	mu       sync.Mutex
	blobs    map[string]stored // guarded by mu; by "manifests/<tag or digest>" and "blobs/<digest>"
	asked    []string          // guarded by mu; "METHOD path"
	user     string            // guarded by mu; whom a token is given; "": nobody is asked
	password string            // guarded by mu
	refresh  string            // guarded by mu; identity token that is good, too
}

type stored struct {
	mediaType string
	data      []byte
}

func newFakeRegistry(t *testing.T) *fakeRegistry {
	t.Helper()
	r := &fakeRegistry{blobs: map[string]stored{}}
	srv := httptest.NewServer(r)
	t.Cleanup(srv.Close)
	r.host = strings.TrimPrefix(srv.URL, "http://")
	return r
}

func (r *fakeRegistry) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.asked = append(r.asked, req.Method+" "+req.URL.Path)
	if req.URL.Path == "/token" {
		r.token(w, req)
		return
	}
	if r.user != "" && req.Header.Get("Authorization") != "Bearer good" {
		w.Header().Set("Www-Authenticate", fmt.Sprintf(`Bearer realm="http://%s/token",service="fake"`, r.host))
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	parts := strings.Split(req.URL.Path, "/")
	key := strings.Join(parts[max(0, len(parts)-2):], "/")
	b, ok := r.blobs[key]
	if !ok {
		w.WriteHeader(http.StatusNotFound)
		return
	}
	w.Header().Set("Content-Type", b.mediaType)
	w.Header().Set("Docker-Content-Digest", digest.FromBytes(b.data).String())
	w.Header().Set("Content-Length", fmt.Sprint(len(b.data)))
	if req.Method != http.MethodHead {
		_, _ = w.Write(b.data) //nolint:errcheck // who is gone needs no answer
	}
}

// token gives a token to those who may have one. r.mu is held.
func (r *fakeRegistry) token(w http.ResponseWriter, req *http.Request) {
	user, password, _ := req.BasicAuth()
	if req.Method == http.MethodPost {
		user, password = req.FormValue("username"), req.FormValue("password")
	}
	good := user == r.user && password == r.password || r.refresh != "" && req.FormValue("refresh_token") == r.refresh
	if !good {
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	_, _ = io.WriteString(w, `{"token":"good","access_token":"good"}`) //nolint:errcheck // as above
}

// put stores an object and returns its descriptor.
func (r *fakeRegistry) put(t *testing.T, mediaType string, v any, tags ...string) ocispec.Descriptor {
	t.Helper()
	data, ok := v.([]byte)
	if !ok {
		var err error
		if data, err = json.Marshal(v); err != nil {
			t.Fatal(err)
		}
	}
	d := digest.FromBytes(data)
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, key := range append(tags, "manifests/"+d.String(), "blobs/"+d.String()) {
		r.blobs[key] = stored{mediaType, data}
	}
	return ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(data))}
}

// manifest stores a manifest with a layer of its own.
func (r *fakeRegistry) manifest(t *testing.T, layer string, subject *ocispec.Descriptor, tags ...string) ocispec.Descriptor {
	t.Helper()
	config := r.put(t, ocispec.MediaTypeImageConfig, ocispec.Image{Author: layer})
	return r.put(t, ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: config,
		Layers:  []ocispec.Descriptor{r.put(t, ocispec.MediaTypeImageLayer, []byte(layer))},
		Subject: subject,
	}, tags...)
}

// refer makes the registry name the referrers of a subject.
func (r *fakeRegistry) refer(t *testing.T, subject ocispec.Descriptor, referrers ...ocispec.Descriptor) {
	t.Helper()
	key := "manifests/" + strings.Replace(subject.Digest.String(), ":", "-", 1)
	if r.api {
		key = "referrers/" + subject.Digest.String()
	}
	r.put(t, ocispec.MediaTypeImageIndex, ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: referrers,
	}, key)
}

// requests returns what was asked, as "METHOD path".
func (r *fakeRegistry) requests() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]string(nil), r.asked...)
}

// labels is a local.LabelStore in memory.
type labels struct {
	mu sync.Mutex
	of map[digest.Digest]map[string]string // guarded by mu
}

func (l *labels) Get(d digest.Digest) (map[string]string, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return maps.Clone(l.of[d]), nil
}

func (l *labels) Set(d digest.Digest, set map[string]string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.of[d] = maps.Clone(set)
	return nil
}

func (l *labels) Update(d digest.Digest, set map[string]string) (map[string]string, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.of[d] == nil {
		l.of[d] = map[string]string{}
	}
	maps.Copy(l.of[d], set)
	return maps.Clone(l.of[d]), nil
}

// newJob returns a pull of a request whose content store is a directory.
func newJob(t *testing.T, r Request, o Options) (*job, content.Store) {
	t.Helper()
	tg, err := parse(r)
	if err != nil {
		t.Fatal(err)
	}
	store, err := local.NewLabeledStore(t.TempDir(), &labels{of: map[digest.Digest]map[string]string{}})
	if err != nil {
		t.Fatal(err)
	}
	p := New(o)
	j := &job{Puller: p, target: tg, namespace: criNamespace, meter: newMeter(), slots: newSlots()}
	j.registry = newRegistry(o.CertsDir, tg, p.keys)
	t.Cleanup(j.registry.close)
	j.client, err = containerd.New("", containerd.WithServices(containerd.WithContentStore(&gate{Store: store, job: j})))
	if err != nil {
		t.Fatal(err)
	}
	return j, store
}

// credentialFile writes a config.json with one entry.
func credentialFile(t *testing.T, key, entry string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.json")
	if err := os.WriteFile(path, fmt.Appendf(nil, `{"auths":{%q:%s}}`, key, entry), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// resolve resolves the job's image.
func resolve(ctx context.Context, j *job) (string, ocispec.Descriptor, error) {
	return j.registry.resolver(ctx).Resolve(ctx, j.target.name)
}
