package node

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"

	imagewolfv1 "github.com/imagewolf/imagewolf/api/v1"
	"github.com/imagewolf/imagewolf/cluster"
	"github.com/imagewolf/imagewolf/prefetch"
	"github.com/imagewolf/imagewolf/prefetch/fanout"
)

// prefetchRetry is how long to wait before prefetches are served again after
// they failed, for example because the disk is full.
const prefetchRetry = 5 * time.Second

// restAfter is how long a connection to a member for prefetches stays open that
// nobody uses: a node that takes requests would otherwise keep one to each.
const restAfter = time.Minute

// tidyFrom is the least number of connections that are looked through.
const tidyFrom = 64

var errNoCluster = errors.New("the cluster's side of this node is down: see its log")

// newFanout returns the node's part in prefetches.
func (n *Node) newFanout() *fanout.Fanout {
	return fanout.New(fanout.Options{
		Self: n.cfg.Cluster.Name, Path: filepath.Join(n.cfg.Root, "imagewolf", "prefetch.db"),
		Slots: n.cfg.Prefetch.Slots, Puller: puller{n}, Cluster: members{n}, Counter: n.metrics.Prefetch(),
		Log: n.log, Guard: func(f func() error) error { return n.guard(partPrefetch, f) },
	})
}

// runPrefetch keeps requests to prefetch worked off for as long as ctx lives.
func (n *Node) runPrefetch(ctx context.Context) {
	for ctx.Err() == nil {
		if err := n.guard(partPrefetch, func() error { return n.fanout.Run(ctx) }); err != nil && ctx.Err() == nil {
			n.log.Error("nothing is prefetched until it can be", "err", err, "retry", prefetchRetry)
		}
		select {
		case <-ctx.Done():
		case <-time.After(prefetchRetry):
		}
	}
}

// engine pulls one image through the node's containerd.
type engine interface {
	Pull(ctx context.Context, r prefetch.Request, progress func(prefetch.Progress)) (prefetch.Result, error)
	Record(r prefetch.Request) string
	HasRepository(ctx context.Context, namespace, image string) (bool, error)
}

// newEngine returns what pulls images, once there is a store.
func (n *Node) newEngine() engine {
	c := n.cfg.Prefetch
	return prefetch.New(prefetch.Options{
		ContainerdSocket: n.cfg.ContainerdSocket, Namespace: c.Namespace, Snapshotter: c.Snapshotter, CertsDir: c.CertsDir,
		CredentialFiles: c.CredentialFiles, BandwidthLimit: c.BandwidthLimit.Bytes(), Foreground: foreground{n.store}, Log: n.log,
	})
}

// puller has the node's engine pull images for requests.
type puller struct{ n *Node }

var _ fanout.Puller = puller{}

// Pull implements fanout.Puller.
func (p puller) Pull(ctx context.Context, r *imagewolfv1.PrefetchRequest, progress func(bytes, total int64)) (string, error) {
	res, err := p.n.engine.Pull(ctx, request(r), func(now prefetch.Progress) { progress(now.Bytes, now.Total) })
	if err != nil {
		return res.Digest.String(), err
	}
	p.n.metrics.Prefetch().Pulled(res.Bytes)
	return res.Digest.String(), nil
}

func request(r *imagewolfv1.PrefetchRequest) prefetch.Request {
	return prefetch.Request{
		Image: r.Image, Digest: digest.Digest(r.Digest), Platforms: r.Platforms, Namespace: r.Namespace, Referrers: r.Referrers,
	}
}

// Record implements fanout.Puller.
func (p puller) Record(r *imagewolfv1.PrefetchRequest) string { return p.n.engine.Record(request(r)) }

// HasRepository implements fanout.Puller.
func (p puller) HasRepository(ctx context.Context, namespace, image string) (bool, error) {
	return p.n.engine.HasRepository(ctx, namespace, image)
}

// members are the other nodes as prefetches see them. Without a cluster's side
// there are none, not even this one: nobody knows whom a request means.
type members struct{ n *Node }

var _ fanout.Cluster = members{}

// Members implements fanout.Cluster.
func (m members) Members(ctx context.Context) ([]fanout.Member, error) {
	st := m.n.current()
	if st == nil {
		return nil, errNoCluster
	}
	select {
	case <-st.company: // right after the start the others are not known yet
	case <-st.ctx.Done():
		return nil, errNoCluster
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	all := st.cluster.Members()
	out := make([]fanout.Member, len(all))
	for i, one := range all {
		out[i] = fanout.Member{Name: one.Name, Labels: one.Labels}
	}
	return out, nil
}

// Peer implements fanout.Cluster.
func (m members) Peer(name string) (imagewolfv1.PrefetcherClient, error) {
	st := m.n.current()
	if st == nil {
		return nil, errNoCluster
	}
	return st.prefetchers.to(name)
}

// prefetchers are the connections to members for what they are asked about
// prefetches: one to each that was asked, until some time after it has left.
type prefetchers struct {
	cluster *cluster.Cluster
	options []grpc.DialOption

	mu     sync.Mutex
	byName map[string]connection // guarded by mu
	tidyAt int                   // guarded by mu; so many connections are looked through for those to nobody
	closed bool                  // guarded by mu
}

// connection is the way to a member at an address.
type connection struct {
	address string
	conn    *grpc.ClientConn
}

func newPrefetchers(c *cluster.Cluster, options []grpc.DialOption) *prefetchers {
	return &prefetchers{
		cluster: c, byName: map[string]connection{}, tidyAt: tidyFrom,
		options: append(options, grpc.WithIdleTimeout(restAfter)),
	}
}

// to returns the way to a member.
func (p *prefetchers) to(name string) (imagewolfv1.PrefetcherClient, error) {
	m, ok := p.cluster.Member(name)
	p.mu.Lock()
	defer p.mu.Unlock()
	c, have := p.byName[name]
	if p.closed {
		return nil, errNoCluster
	}
	if have && (!ok || c.address != m.Address) {
		delete(p.byName, name)
		have = false
		_ = c.conn.Close() // nobody is there any more
	}
	if !ok {
		return nil, fmt.Errorf("node %s is no member of the cluster at the moment", name)
	}
	if !have {
		conn, err := grpc.NewClient("passthrough:///"+m.Address, p.options...)
		if err != nil {
			return nil, fmt.Errorf("node %s: %w", name, err)
		}
		p.tidy()
		c = connection{m.Address, conn}
		p.byName[name] = c
	}
	return imagewolfv1.NewPrefetcherClient(c.conn), nil
}

// tidy ends the connections to those that are no members any more, once there are
// twice as many as were left the last time. p.mu must be held.
func (p *prefetchers) tidy() {
	if len(p.byName) < p.tidyAt {
		return
	}
	for name, c := range p.byName {
		if _, ok := p.cluster.Member(name); !ok {
			delete(p.byName, name)
			_ = c.conn.Close() // nobody is there any more
		}
	}
	p.tidyAt = max(tidyFrom, 2*len(p.byName))
}

// close ends all connections.
func (p *prefetchers) close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	var errs []error
	for _, c := range p.byName {
		errs = append(errs, c.conn.Close())
	}
	clear(p.byName)
	return errors.Join(errs...)
}
