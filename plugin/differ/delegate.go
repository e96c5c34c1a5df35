package differ

import (
	"context"
	"fmt"
	"sync"

	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	"github.com/containerd/containerd/v2/core/diff"
	diffproxy "github.com/containerd/containerd/v2/core/diff/proxy"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// delegate hands layers to containerd's diff service, which asks one differ
// after the other, us first. containerd's transfer service asks the one differ
// it is set to and no other, so without this an encrypted image could not be
// pulled.
type delegate struct {
	socket string

	mu   sync.Mutex
	busy map[request]struct{} // handed to containerd and not answered; guarded by mu
}

// request is what is the same of a layer that we hand to containerd and the one
// that it hands back to us. No two snapshots have the same mounts.
type request struct {
	namespace string
	digest    digest.Digest
	mounts    string
}

func (d *delegate) apply(ctx context.Context, desc ocispec.Descriptor, mounts []mount.Mount, opts []diff.ApplyOpt) (ocispec.Descriptor, error) {
	namespace, ok := namespaces.Namespace(ctx)
	if !ok {
		namespace = namespaces.Default
	}
	// %q writes nil and empty options alike, which gRPC may swap.
	req := request{namespace: namespace, digest: desc.Digest, mounts: fmt.Sprintf("%q", mounts)}
	if !d.enter(req) {
		// Our own request came back: the next differ is to take it.
		return ocispec.Descriptor{}, fmt.Errorf("layer %v: media type %q: %w", desc.Digest, desc.MediaType, errdefs.ErrNotImplemented)
	}
	defer d.leave(req)

	// Such layers are rare, so a connection of its own for each leaves nothing
	// to look after. Dialing begins with the call.
	conn, err := grpc.NewClient("unix:"+d.socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("containerd's socket %s: %w", d.socket, err)
	}
	defer func() { _ = conn.Close() }()
	applier := diffproxy.NewDiffApplier(diffapi.NewDiffClient(conn)).(diff.Applier) //nolint:errcheck // documented to be both
	applied, err := applier.Apply(namespaces.WithNamespace(ctx, namespace), desc, mounts, opts...)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("layer %v: media type %q, applied by containerd: %w", desc.Digest, desc.MediaType, err)
	}
	return applied, nil
}

// enter notes that req is on its way to containerd; false if it is already.
func (d *delegate) enter(req request) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, ok := d.busy[req]; ok {
		return false
	}
	d.busy[req] = struct{}{}
	return true
}

func (d *delegate) leave(req request) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.busy, req)
}
