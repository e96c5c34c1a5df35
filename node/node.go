// Package node puts the content store, the differ, the swarm, the tracker and
// the cluster together into one running node, and decides for every blob that
// containerd wants where it comes from.
//
// It does not know how bytes are stored, sent or agreed on: that is the work
// of the packages it connects. The rule it keeps is that the local store
// never depends on the cluster: the socket is served before the cluster is
// joined, and whatever fails in the cluster is tried again beside it.
package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"runtime/debug"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/imagewolf/imagewolf/api/nodeapi"
	"github.com/imagewolf/imagewolf/cluster"
	"github.com/imagewolf/imagewolf/config"
	"github.com/imagewolf/imagewolf/internal/systemd"
	"github.com/imagewolf/imagewolf/node/metrics"
	"github.com/imagewolf/imagewolf/plugin/differ"
	"github.com/imagewolf/imagewolf/plugin/store"
	"github.com/imagewolf/imagewolf/prefetch/fanout"
	"github.com/imagewolf/imagewolf/proxy"
)

// stackRetry is how long to wait before the cluster's side is started again
// after it failed, for example because its port is taken.
const stackRetry = 5 * time.Second

// Node is one running node.
type Node struct {
	cfg      config.Config
	log      *slog.Logger
	identity *cluster.Identity
	book     *book
	metrics  *metrics.Metrics
	meter    meter
	inflow   *inflow
	listen   func(path string) (net.Listener, error) // for containerd
	store    *store.Store                            // set by Run before anything else starts
	engine   engine                                  // set by Run, as store is
	fanout   *fanout.Fanout

	mu       sync.Mutex
	stack    *stack                   // guarded by mu; nil while the cluster's side is down
	held     map[digest.Digest]int64  // guarded by mu: every whole blob and its size
	sessions map[digest.Digest]*entry // guarded by mu: a blob has one session at most
}

// New checks what can be checked without touching anything: above all that
// the node has an identity. It starts nothing.
func New(cfg config.Config, log *slog.Logger) (*Node, error) {
	c := &cfg.Cluster
	if c.Name == "" {
		host, err := os.Hostname()
		if err != nil {
			return nil, fmt.Errorf("cluster.name is empty and the host has no name: %w", err)
		}
		c.Name = host
	}
	key, err := c.Key()
	if err != nil {
		return nil, err
	}
	accepted, err := c.Accepted()
	if err != nil {
		return nil, err
	}
	id, err := cluster.LoadIdentity(cluster.IdentityOptions{
		ClusterKey: key, AcceptedKeys: accepted, AcceptedGossipKeyFiles: c.AcceptedGossip, CertFile: c.CertFile, KeyFile: c.KeyFile, CAFile: c.CAFile,
		GossipKeyFile: c.GossipKeyFile, Insecure: c.Insecure, NodeName: c.Name, Log: log,
	})
	if err != nil {
		return nil, err
	}
	n := &Node{
		cfg: cfg, log: log, identity: id, book: newBook(), inflow: newInflow(log),
		held: map[digest.Digest]int64{}, sessions: map[digest.Digest]*entry{}, listen: proxy.Listen,
	}
	n.metrics = n.newMetrics()
	n.fanout = n.newFanout()
	if f := cfg.NodeAPI.TokenFile; f != "" {
		if _, err := nodeapi.ReadToken(f); err != nil {
			return nil, err
		}
	}
	return n, nil
}

// Run serves containerd until ctx ends. It returns an error only where the
// node cannot serve its containerd: a store that cannot be opened, a socket
// that cannot be listened on. Nothing that happens in the cluster ends it. When
// ctx ends it goes on while a blob is being pulled, or others take from here what
// nobody else has, for at most 10 seconds; and the latter for two more.
func (n *Node) Run(ctx context.Context) (err error) {
	l, err := n.listen(n.cfg.Socket)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	n.store, err = store.Open(store.Options{
		Root: n.cfg.Root, SeedQuota: n.cfg.SeedQuota.Bytes(), Filler: n,
		MaxWait: n.cfg.Tracker.MaxWait.Duration(), Log: n.log,
		Counter: n.metrics.Store(), Panicked: n.counts(partFill),
	})
	if err != nil {
		return errors.Join(fmt.Errorf("root: %w", err), l.Close())
	}
	defer func() { err = errors.Join(err, n.store.Close()) }()
	if n.engine == nil { // a test's own
		n.engine = n.newEngine()
	}
	srv := proxy.New(proxy.Options{
		Store: n.store, Log: n.log, Panicked: n.counts(partProxy),
		Applier: differ.New(differ.Options{
			Blobs: differ.Dir(n.cfg.Root), ContainerdSocket: n.cfg.ContainerdSocket, Log: n.log,
			Panicked: n.counts(partDiffer),
		}),
		Needed: n.needed,
	})
	g, ctx := errgroup.WithContext(ctx)
	// Pulls under way have a few seconds to end, and so has what this node does
	// for the others; they hear of its leave when it goes, not when it is killed.
	inCluster, leave := context.WithCancel(context.WithoutCancel(ctx))
	g.Go(func() error {
		defer leave()
		err := srv.Serve(ctx, l)
		linger(n.needed, handOverTime)
		return err
	})
	g.Go(func() error { return n.store.Run(ctx) })
	g.Go(func() error { n.runStack(inCluster); return nil })
	socket := l.Addr().String() // systemd's own, if it handed one over
	g.Go(func() error { n.watch(ctx, socket); return nil })
	g.Go(func() error { n.runPrefetch(ctx); return nil }) // what it pulls goes on when the node is back
	if n.cfg.NodeAPI.Socket != "" {
		g.Go(func() error { n.runAPI(ctx, "node_api.socket", n.listenSocket); return nil })
	}
	if n.cfg.NodeAPI.Address != "" {
		g.Go(func() error {
			n.runAPI(ctx, "node_api.address", n.listenNetwork, n.networkOptions()...)
			return nil
		})
	}
	if a := n.cfg.Metrics.Address; a != "" {
		g.Go(func() error { n.metrics.Serve(ctx, a, n.log); return nil })
	}
	n.log.Info("serving containerd", "socket", socket, "root", n.cfg.Root)
	systemd.Tell(n.log, systemd.Ready)
	<-ctx.Done()
	systemd.Tell(n.log, systemd.Stopping)
	err = g.Wait()
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// runStack keeps the cluster's side alive for as long as the node lives.
func (n *Node) runStack(ctx context.Context) {
	for ctx.Err() == nil {
		if err := n.guard(partCluster, func() error { return n.serveStack(ctx) }); err != nil && ctx.Err() == nil {
			n.log.Error("the cluster's side ended: pulls go to the registry until it is back",
				"err", err, "retry", stackRetry)
		}
		select {
		case <-ctx.Done():
		case <-time.After(stackRetry):
		}
	}
}

// guard turns a panic of f, which is of that part, into an error and counts it, so
// that the cluster's side does not take the store down with it. The torrent library's own goroutines are beyond
// its reach; package swarm keeps from them what is known to make them panic.
func (n *Node) guard(part string, f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			n.metrics.Panicked(part)
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	return f()
}

func (n *Node) serveStack(ctx context.Context) error {
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", n.cfg.Cluster.DataAddress)
	if err != nil {
		return fmt.Errorf("cluster.data_address: %w", err)
	}
	st, err := newStack(n, l)
	if err != nil {
		return errors.Join(err, l.Close())
	}
	n.mu.Lock()
	n.stack = st
	for d, size := range n.held {
		st.registrar.Add(d, size)
	}
	n.mu.Unlock()
	defer func() {
		n.mu.Lock()
		n.stack = nil
		n.mu.Unlock()
	}()
	return st.run(ctx)
}

// peerName is how a caller's name is proven. Certificates of the user's own
// need not carry the node's name; those who have one are trusted with it.
func (n *Node) peerName() func(context.Context) (string, bool) {
	if n.cfg.Cluster.CertFile != "" {
		return nil
	}
	return cluster.PeerName
}

// current is the cluster's side as it is now; nil while it is down.
func (n *Node) current() *stack {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.stack
}

// Fill implements store.Filler: it gets an ingest from the swarm, or has one
// client fetch it, and shares it as it grows.
func (n *Node) Fill(ctx context.Context, in *store.Ingest) {
	if st := n.current(); st != nil {
		select {
		case <-st.company:
		case <-st.ctx.Done():
		case <-ctx.Done():
		}
		n.session(ctx, st, in.Digest(), false, func(ctx context.Context) {
			newSession(n, st, in.Digest(), in.Size(), ingest{in}).run(ctx)
		})
	} else {
		n.metrics.FellBack(metrics.NoCluster)
	}
}

// Added implements store.Filler: the blob is whole here and can be seeded.
func (n *Node) Added(d digest.Digest, size int64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.held[d] = size
	if n.stack != nil {
		n.stack.registrar.Add(d, size)
	}
}

// Removed implements store.Filler: the blob cannot be seeded any more.
func (n *Node) Removed(d digest.Digest) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.held, d)
	if e := n.sessions[d]; e != nil && e.seed {
		e.end()
	}
	if n.stack != nil {
		n.stack.registrar.Remove(d)
	}
}

// entry is a blob's session as the node sees it.
type entry struct {
	seed    bool // serves a blob that is whole; else fills an ingest
	leaving bool // is of no more use; guarded by Node.mu
	end     context.CancelFunc
	done    chan struct{} // closed when it has ended
}

// session runs f as the one session that a blob has on this node. f's context
// ends with ctx, with the cluster's side, and, for a seed, when the blob is
// removed. One that is ending is waited for. A seed finds another that is alive
// and does nothing: the tracker knows that one. An ingest that is to be filled
// is new, so that another session is that of a blob that is no more.
func (n *Node) session(ctx context.Context, st *stack, d digest.Digest, seed bool, f func(ctx context.Context)) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(st.ctx, cancel)()
	e := &entry{seed: seed, end: cancel, done: make(chan struct{})}
	for {
		n.mu.Lock()
		old := n.sessions[d]
		if old == nil {
			n.sessions[d] = e
			n.mu.Unlock()
			break
		}
		alive := !old.leaving
		n.mu.Unlock()
		if alive && seed {
			return
		}
		old.end()
		select {
		case <-old.done:
		case <-ctx.Done():
			return
		}
	}
	defer func() {
		n.mu.Lock()
		delete(n.sessions, d)
		n.mu.Unlock()
		close(e.done)
	}()
	f(ctx)
}

// leaving says that a blob's session is about to end.
func (n *Node) leaving(d digest.Digest) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if e := n.sessions[d]; e != nil {
		e.leaving = true
	}
}

// seed joins a blob's swarm as a seeder, because a tracker asks for it.
func (n *Node) seed(ctx context.Context, st *stack, d digest.Digest) {
	b, err := n.store.OpenBlob(d)
	if err != nil {
		n.log.Info("blob cannot be seeded", "digest", d, "err", err)
		if errdefs.IsNotFound(err) {
			n.Removed(d)
		}
		return
	}
	defer func() {
		if err := b.Close(); err != nil {
			n.log.Warn("blob did not close", "digest", d, "err", err)
		}
	}()
	s := newSession(n, st, d, b.Size(), wholeBlob{b})
	s.recallPieces()
	s.run(ctx)
}
