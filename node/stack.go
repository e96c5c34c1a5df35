package node

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"

	imagewolfv1 "github.com/imagewolf/imagewolf/api/v1"
	"github.com/imagewolf/imagewolf/cluster"
	"github.com/imagewolf/imagewolf/internal/serve"
	"github.com/imagewolf/imagewolf/swarm"
	"github.com/imagewolf/imagewolf/tracker"
)

// companyGrace is how long pulls are held after the start for other members to
// be found. A fleet that starts at once would otherwise ask the registry once
// per node: every one of them is alone in its first second.
const companyGrace = 2 * time.Second

// pingedEvery is how often clients of the Node API, and nodes of an older version,
// ping. Nodes themselves do not: serve.NewGRPC. That another has vanished without a
// word, package cluster has the kernel notice.
const pingedEvery = 10 * time.Second

// returnEvery is how often sessions that had to go to the next best tracker
// look whether the best one answers again.
const returnEvery = 10 * time.Second

// stack is the cluster's side of a node: membership, the data port, the
// swarm, and both halves of the tracker. It lives and dies as one.
type stack struct {
	node      *Node
	cluster   *cluster.Cluster
	port      *cluster.DataPort
	swarm     *swarm.Swarm
	server    *tracker.Server
	tracker   *tracker.Client
	registrar *tracker.Registrar

	prefetchers *prefetchers
	office      office

	seeds   sync.WaitGroup  // sessions that serve started
	crashed chan error      // has room for one: a panic that ends run
	company chan struct{}   // closed when members have been found, or nobody is to be waited for
	ctx     context.Context // ends with run; for the sessions, which belong to the store
	cancel  context.CancelFunc
}

// newStack builds the cluster's side on the data port's listener. It starts
// nothing.
func newStack(n *Node, l net.Listener) (*stack, error) {
	cfg := n.cfg
	st := &stack{node: n, company: make(chan struct{}), crashed: make(chan error, 1)}
	st.ctx, st.cancel = context.WithCancel(context.Background())
	c, err := cluster.New(cluster.Options{
		Identity: n.identity, Name: cfg.Cluster.Name, BindAddr: cfg.Cluster.GossipAddress,
		AdvertiseAddr: cfg.Cluster.AdvertiseAddress, DataAddress: l.Addr().String(),
		Labels: cfg.Cluster.Labels, Join: cfg.Cluster.Join, Log: n.log, Contain: st.containOrEnd(partGossip),
	})
	if err != nil {
		return nil, err
	}
	st.cluster = c
	st.prefetchers = newPrefetchers(c, c.GRPCDialOptions())
	st.port = cluster.NewDataPort(l, n.identity, c, n.log)
	st.port.Contain(st.contain(partDataPort))
	st.swarm = swarm.New(swarm.Options{
		Listener: st.port.BitTorrent(),
		Dial: func(ctx context.Context, addr string) (net.Conn, error) {
			return c.Dial(ctx, addr, cluster.ProtoBitTorrent)
		},
		UploadLimit: cfg.Swarm.UploadLimit.Bytes(), DownloadLimit: cfg.Swarm.DownloadLimit.Bytes(), Log: n.log,
		Counter: n.metrics.Swarm(), Contain: st.containOrEnd(partSwarm),
	})
	st.server = tracker.NewServer(tracker.ServerOptions{
		StallTimeout: cfg.Tracker.StallTimeout.Duration(),
		MaxWait:      cfg.Tracker.MaxWait.Duration(),
		Members:      func() int { return len(c.Members()) },
		TakesOver:    func(d digest.Digest) bool { return st.office.isNew(time.Now(), d, c.Self().Name) },
		Tracks:       func(d digest.Digest) bool { return c.Trackers(d)[0].Name == c.Self().Name },
		Layout: func(size int64) tracker.Layout {
			l := swarm.LayoutOf(size)
			return tracker.Layout{Segments: l.Segments(), SegmentSize: l.SegmentSize, Pieces: l.Pieces}
		},
		PeerName: n.peerName(), Log: n.log, Counter: trackerCounter{n.metrics.Tracker(), n.counts(partTracker)},
		Contain: st.contain(partTracker),
	})
	st.tracker = tracker.NewClient(tracker.ClientOptions{
		Self: peer(c.Self()), Zone: c.Self().Zone(), Log: n.log, Contain: st.containOrEnd(partRegistrar),
		Reach: cfg.Tracker.DecideTimeout.Duration(), Answer: answerTime(cfg),
		Dial: func(_ context.Context, addr string) (*grpc.ClientConn, error) {
			return grpc.NewClient("passthrough:///"+addr, c.GRPCDialOptions()...)
		},
		Trackers: func(d digest.Digest) []tracker.Peer { return peers(c.Trackers(d)) },
	})
	st.registrar = tracker.NewRegistrar(st.tracker, func(d digest.Digest) {
		st.seeds.Go(func() {
			err := n.guard(partSeed, func() error {
				n.session(st.ctx, st, d, true, func(ctx context.Context) { n.seed(ctx, st, d) })
				return nil
			})
			if err != nil {
				n.log.Error("seeding failed", "digest", d, "err", err)
			}
		})
	})
	return st, nil
}

// run blocks until ctx ends or a part fails, and leaves nothing running.
func (st *stack) run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	contain := st.node.contain(partGRPC)
	srv := serve.NewGRPC(0,
		grpc.Creds(st.node.identity.ServerCredentials()),
		grpc.MaxConcurrentStreams(tracker.MaxStreams),
		grpc.StreamInterceptor(contain.Stream),
		grpc.UnaryInterceptor(contain.Unary),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: pingedEvery / 2, PermitWithoutStream: true}),
	)
	st.server.Register(srv)
	imagewolfv1.RegisterPrefetcherServer(srv, st.node.fanout.Prefetcher())
	part := func(name string, run func(ctx context.Context) error) {
		g.Go(func() error { return named(name, st.node.guard(name, func() error { return run(ctx) })) })
	}
	registered := make(chan struct{})
	part(partDataPort, st.port.Run)
	part(partGossip, st.cluster.Run)
	part(partSwarm, st.swarm.Run)
	part(partTracker, st.server.Run)
	part(partRegistrar, func(ctx context.Context) error {
		defer close(registered)
		return st.registrar.Run(ctx)
	})
	part(partGRPC, func(context.Context) error { return srv.Serve(st.port.GRPC()) })
	part(partMembership, st.follow)
	g.Go(func() error {
		select {
		case err := <-st.crashed:
			return err
		case <-ctx.Done():
			return nil
		}
	})
	g.Go(func() error {
		<-ctx.Done()
		st.cancel()  // sessions end first: they hold torrents and streams
		<-registered // no more seeds begin
		st.seeds.Wait()
		srv.Stop()
		return nil
	})
	return errors.Join(g.Wait(), st.tracker.Close(), st.prefetchers.close())
}

// contain returns what runs a goroutine of a part for one peer: its panic is
// counted and logged, and costs that peer's connection or stream alone, or what
// it was told would come round again and again.
func (st *stack) contain(part string) func(work func()) {
	return func(work func()) {
		if err := st.node.guard(part, func() error { work(); return nil }); err != nil {
			st.node.log.Error("panic over what a peer sent", "part", part, "err", err)
		}
	}
}

// containOrEnd returns what runs any other goroutine of a part: its panic is
// counted, and ends the cluster's side, which begins anew.
func (st *stack) containOrEnd(part string) func(work func()) {
	return func(work func()) {
		if err := st.node.guard(part, func() error { work(); return nil }); err != nil {
			select {
			case st.crashed <- named(part, err):
			default: // it ends already
			}
		}
	}
}

// follow tells the tracker's clients when the cluster's members have changed,
// and with them who tracks which blob.
func (st *stack) follow(ctx context.Context) error {
	warmer := tracker.NewWarmer(st.tracker)
	defer warmer.Close()
	meet := sync.OnceFunc(func() { close(st.company) })
	defer time.AfterFunc(companyGrace, meet).Stop()
	for {
		changed := st.cluster.Changed()
		trackers := st.cluster.TrackerNodes()
		st.office.note(time.Now(), trackers)
		var addresses []string
		for _, m := range trackers {
			addresses = append(addresses, m.Address)
		}
		warmer.Keep(ctx, addresses)
		if !st.alone() || len(st.node.cfg.Cluster.Join) == 0 {
			meet()
		}
		st.registrar.TrackersChanged()
		st.tracker.TrackersChanged()
		st.server.TrackersChanged()
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-time.After(returnEvery):
		}
	}
}

// alone says that there is nobody to share with.
func (st *stack) alone() bool { return len(st.cluster.Members()) < 2 }

// names returns the members' names for the sources of a blob, which the swarm
// names by data port address or, where it knows no address, by name.
func (st *stack) names(sources map[string]int64) []string {
	var names []string
	for _, m := range st.cluster.Members() {
		if sources[m.Address] > 0 || sources[m.Name] > 0 {
			names = append(names, m.Name)
		}
	}
	return names
}

func peer(m cluster.Member) tracker.Peer { return tracker.Peer{Name: m.Name, Address: m.Address} }

func peers(ms []cluster.Member) []tracker.Peer {
	out := make([]tracker.Peer, len(ms))
	for i, m := range ms {
		out[i] = peer(m)
	}
	return out
}

// named says which part an error came from.
func named(part string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", part, err)
}
