package prefetch

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"sync"

	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/imagewolf/imagewolf/internal/credentials"
)

// registry is how one pull speaks to the hosts that serve its image.
type registry struct {
	target target
	keys   *credentials.Keychain
	dirs   []string // of hosts.toml

	mu         sync.Mutex
	transports []http.RoundTripper // guarded by mu; to be closed
	asked      []challenge         // guarded by mu; hosts that wanted to know who asks
	resolved   digest.Digest       // guarded by mu; what the first resolve found; "": none yet
}

// challenge is a host that asked for credentials, and what it was given.
type challenge struct {
	host, source string // source is "" when there was nothing to give
}

func newRegistry(certsDir string, t target, keys *credentials.Keychain) *registry {
	return &registry{target: t, keys: keys, dirs: filepath.SplitList(certsDir), resolved: t.want}
}

// hosts returns what the image's hosts are, as containerd's CRI would find them.
func (r *registry) hosts(ctx context.Context) docker.RegistryHosts {
	return config.ConfigureHosts(ctx, config.HostOptions{
		HostDir:      r.hostDir,
		Credentials:  func(host string) (string, string, error) { return r.credentials(ctx, host) },
		UpdateClient: r.note,
	})
}

// hostDir returns the first directory that is there for a host.
func (r *registry) hostDir(host string) (string, error) {
	for _, root := range r.dirs {
		dir, err := config.HostDirFromRoot(root)(host)
		if err == nil || !errdefs.IsNotFound(err) {
			return dir, err
		}
	}
	return "", errdefs.ErrNotFound
}

func (r *registry) note(c *http.Client) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.transports = append(r.transports, c.Transport)
	return nil
}

// close drops the connections that idle.
func (r *registry) close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, t := range r.transports {
		(&http.Client{Transport: t}).CloseIdleConnections()
	}
}

// credentials is asked when a host refuses to answer strangers.
func (r *registry) credentials(ctx context.Context, host string) (username, secret string, err error) {
	c, err := r.keys.Lookup(ctx, host, r.target.path)
	if err != nil && !errors.Is(err, credentials.ErrNone) {
		return "", "", err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.asked = append(r.asked, challenge{host, c.Source})
	return c.Username, c.Secret, nil
}

// challenges returns who asked for credentials so far.
func (r *registry) challenges() []challenge {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]challenge(nil), r.asked...)
}

// resolver returns what a pull of the image resolves and fetches with.
func (r *registry) resolver(ctx context.Context) remotes.Resolver {
	return &resolver{
		Resolver: docker.NewResolver(docker.ResolverOptions{Hosts: r.hosts(ctx)}),
		registry: r,
	}
}

// resolver resolves the record's name to the digest that is wanted.
type resolver struct {
	remotes.Resolver
	registry *registry
}

// Resolve asks the registry, by digest once that is known, and returns the
// record's name, whatever was asked.
func (r *resolver) Resolve(ctx context.Context, _ string) (string, ocispec.Descriptor, error) {
	t := r.registry.target
	r.registry.mu.Lock()
	ask, want := t.ask, r.registry.resolved
	r.registry.mu.Unlock()
	if want != "" {
		ask = t.repo + "@" + want.String()
	}
	_, desc, err := r.Resolver.Resolve(ctx, ask)
	if err != nil {
		return "", ocispec.Descriptor{}, err
	}
	if want != "" && desc.Digest != want {
		return "", ocispec.Descriptor{}, fmt.Errorf("the registry answers with %s in place of %s: %w", desc.Digest, want, errdefs.ErrFailedPrecondition)
	}
	r.registry.mu.Lock()
	r.registry.resolved = desc.Digest
	r.registry.mu.Unlock()
	return t.name, desc, nil
}
