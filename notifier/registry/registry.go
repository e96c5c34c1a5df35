// Package registry asks the registries that events name about their images: what
// a tag points to, what is in manifests and configs, what refers to an image. It
// keeps what has a digest, so that the same thing is not asked for twice, and
// leaves a registry alone for a few seconds that could not be reached.
//
// What registries answer is checked against its digest and bounded in size; how
// long it may take is the context's business. Only the registry itself is asked,
// and sees credentials: where else requests may lead is said at guard.
package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2/content"
	"oras.land/oras-go/v2/errdef"
	"oras.land/oras-go/v2/registry/remote"
	"oras.land/oras-go/v2/registry/remote/auth"
	"oras.land/oras-go/v2/registry/remote/errcode"

	"github.com/imagewolf/imagewolf/config"
	"github.com/imagewolf/imagewolf/internal/credentials"
	"github.com/imagewolf/imagewolf/notifier/internal/lru"
	"github.com/imagewolf/imagewolf/notifier/pattern"
)

const (
	maxManifest  = 4 << 20  // bytes, as registries have it
	maxBlob      = 4 << 20  // bytes of a config or a signature
	maxCache     = 32 << 20 // bytes of manifests and blobs
	maxReferrers = 200      // of one image and the types that are asked for
	maxPages     = 10       // of a list of referrers
	maxRequests  = 1 << 12  // that one cache of tokens serves
	awayFor      = 5 * time.Second
)

// Errors that no other try will change soon.
var (
	// ErrNotFound is returned for what the registry does not have.
	ErrNotFound = errors.New("the registry does not have it")
	// ErrInvalid is returned for what is there and cannot be an image.
	ErrInvalid = errors.New("no image")
)

// Repo is a repository as image names have it.
type Repo struct {
	Host string // with port if it has one; "docker.io" for Docker Hub
	Path string
}

func (r Repo) String() string { return r.Host + "/" + r.Path }

// Registry asks registries. It is safe for concurrent use.
type Registry struct {
	plain       pattern.Hosts
	http        *http.Client
	credentials auth.CredentialFunc
	kept        *lru.Cache[string, any] // *Manifest or []byte by repository and digest

	mu     sync.Mutex // guards what follows
	client *auth.Client
	uses   int                  // of client
	away   map[string]time.Time // until when a host is not asked
}

// New reads what the settings name, but for the credentials' files: these are read
// when a registry wants to know who asks, and again when they change. What is wrong
// with one of them goes to log. It asks no registry yet.
func New(c config.NotifierRegistry, log *slog.Logger) (*Registry, error) {
	plain, err := pattern.NewHosts(c.PlainHTTP)
	if err != nil {
		return nil, fmt.Errorf("registry.plain_http: %w", err)
	}
	transport, err := newGuard(c)
	if err != nil {
		return nil, err
	}
	return &Registry{
		plain: plain, http: &http.Client{Transport: transport}, credentials: credentialsOf(credentials.New(c.CredentialFiles, log)),
		kept: lru.New[string, any](maxCache), away: map[string]time.Time{},
	}, nil
}

// Resolve returns the digest that a tag points to now.
func (r *Registry) Resolve(ctx context.Context, repo Repo, tag string) (digest.Digest, error) {
	remote, err := r.Remote(repo)
	if err != nil {
		return "", err
	}
	d, err := remote.Manifests().Resolve(ctx, tag)
	if err != nil {
		return "", told(repo, err)
	}
	return d.Digest, nil
}

// Manifest returns the manifest or index of that digest. The caller must not
// change it.
func (r *Registry) Manifest(ctx context.Context, repo Repo, d digest.Digest) (*Manifest, error) {
	key := repo.String() + "@" + d.String()
	if m, ok := r.kept.Get(key); ok {
		return m.(*Manifest), nil //nolint:errcheck // a digest of a manifest has this key, that of a blob another
	}
	remote, err := r.Remote(repo)
	if err != nil {
		return nil, err
	}
	desc, body, err := remote.Manifests().FetchReference(ctx, d.String())
	if err != nil {
		return nil, told(repo, err)
	}
	defer body.Close() //nolint:errcheck // only read
	if desc.Size > maxManifest {
		return nil, fmt.Errorf("%w: a manifest of %d bytes", ErrInvalid, desc.Size)
	}
	b, err := content.ReadAll(body, ocispec.Descriptor{Digest: d, Size: desc.Size})
	if err != nil {
		return nil, fmt.Errorf("manifest %s: %w", d, err)
	}
	m, err := Decode(desc.MediaType, b)
	if err != nil {
		return nil, err
	}
	m.Digest, m.Size = d, int64(len(b))
	r.kept.Put(key, m, 4*len(b)+1000)
	return m, nil
}

// Blob returns a small blob, such as a config.
func (r *Registry) Blob(ctx context.Context, repo Repo, desc ocispec.Descriptor) ([]byte, error) {
	if err := desc.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("%w: digest %.80q: %w", ErrInvalid, desc.Digest, err)
	}
	if desc.Size < 0 || desc.Size > maxBlob {
		return nil, fmt.Errorf("%w: blob %s has %d bytes, at most %d are read", ErrInvalid, desc.Digest, desc.Size, maxBlob)
	}
	key := repo.String() + " " + desc.Digest.String()
	if b, ok := r.kept.Get(key); ok {
		return b.([]byte), nil //nolint:errcheck // as above
	}
	remote, err := r.Remote(repo)
	if err != nil {
		return nil, err
	}
	body, err := remote.Blobs().Fetch(ctx, desc)
	if err != nil {
		return nil, told(repo, err)
	}
	defer body.Close() //nolint:errcheck // only read
	b, err := content.ReadAll(body, desc)
	if err != nil {
		return nil, fmt.Errorf("blob %s: %w", desc.Digest, err)
	}
	r.kept.Put(key, b, len(b)+200)
	return b, nil
}

// Referrers returns the manifests of one of the types that refer to the digest, at
// most 200 of them: by the registry's API, or by the tag that stands in for it. All
// are listed and the types picked here, for an API takes one type only. ErrInvalid
// is returned where there are more than are read.
func (r *Registry) Referrers(ctx context.Context, repo Repo, d digest.Digest, artifactTypes ...string) ([]ocispec.Descriptor, error) {
	remote, err := r.Remote(repo)
	if err != nil {
		return nil, err
	}
	var out []ocispec.Descriptor
	err = remote.Referrers(ctx, ocispec.Descriptor{Digest: d}, "", func(page []ocispec.Descriptor) error {
		for _, ref := range page {
			if slices.Contains(artifactTypes, ref.ArtifactType) {
				out = append(out, ref)
			}
		}
		if len(out) > maxReferrers {
			return fmt.Errorf("%w: more than %d referrers of type %q", ErrInvalid, maxReferrers, artifactTypes)
		}
		return nil
	})
	if errors.Is(err, errdef.ErrTooManyPages) {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	if err != nil {
		return nil, told(repo, err)
	}
	return out, nil
}

// Remote returns a client of one repository for libraries that want one; its
// requests are held to the same bounds.
func (r *Registry) Remote(repo Repo) (*remote.Repository, error) {
	out, err := remote.NewRepository(repo.String())
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	out.PlainHTTP = r.plain.Match(repo.Host)
	out.ReferrerListMaxPages = maxPages
	out.Client = scoped{r, target{host: out.Reference.Host(), plain: out.PlainHTTP}}
	return out, nil
}

// Passing tells whether it was the way to the registry that failed, or the
// registry, so that another try may succeed.
func Passing(err error) bool {
	var way *url.Error
	var answer *errcode.ErrorResponse
	return errors.As(err, &way) || errors.As(err, &answer) || errors.Is(err, errAway) ||
		errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) || errors.Is(err, io.ErrUnexpectedEOF)
}

// told gives errors of the library the kinds of this package.
func told(repo Repo, err error) error {
	if errors.Is(err, errdef.ErrNotFound) {
		return fmt.Errorf("%w: %w", ErrNotFound, err)
	}
	return explain(repo.Host, err)
}

var errAway = errors.New("did not answer a moment ago")

// scoped sends the requests of one repository.
type scoped struct {
	r  *Registry
	to target
}

// Do implements remote.Client.
func (s scoped) Do(req *http.Request) (*http.Response, error) {
	if s.r.isAway(s.to.host) {
		return nil, fmt.Errorf("registry %s: %w", s.to.host, errAway)
	}
	ctx := context.WithValue(req.Context(), targetKey{}, s.to)
	resp, err := s.r.authClient().Do(req.WithContext(ctx))
	withoutQueries(resp, err)
	var refused *refusedError
	switch {
	case err != nil && !errors.As(err, &refused) && !errors.Is(err, ErrInvalid) && !errors.Is(err, context.Canceled),
		err == nil && (resp.StatusCode == http.StatusTooManyRequests || resp.StatusCode == http.StatusServiceUnavailable):
		s.r.setAway(s.to.host)
	}
	if err != nil {
		return resp, explain(s.to.host, err) // also for the libraries that have the client
	}
	return resp, nil
}

// withoutQueries takes the queries out of URLs that errors will name: those that
// registries redirect to have signatures in them, by which anyone may read.
func withoutQueries(resp *http.Response, err error) {
	var way *url.Error
	if errors.As(err, &way) {
		way.URL, _, _ = strings.Cut(way.URL, "?")
	}
	if err == nil && resp.StatusCode >= http.StatusBadRequest && resp.Request != nil && resp.Request.Response != nil {
		u := *resp.Request.URL
		u.RawQuery = ""
		resp.Request = resp.Request.Clone(resp.Request.Context())
		resp.Request.URL = &u
	}
}

func (r *Registry) isAway(host string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return time.Now().Before(r.away[host])
}

func (r *Registry) setAway(host string) {
	now := time.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	for h, until := range r.away {
		if until.Before(now) {
			delete(r.away, h)
		}
	}
	r.away[host] = now.Add(awayFor)
}

// authClient returns the client that keeps tokens. It is made anew now and then,
// for it keeps one for every repository and forgets none.
func (r *Registry) authClient() *auth.Client {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.uses++; r.client == nil || r.uses > maxRequests {
		r.uses = 0
		r.client = &auth.Client{
			Client: r.http, Header: http.Header{"User-Agent": {"imagewolf-notifier"}},
			Cache: auth.NewCache(), ClientID: "imagewolf-notifier", Credential: r.credentials,
		}
	}
	return r.client
}
