package node

import "github.com/imagewolf/imagewolf/node/metrics"

// The parts of a node of which a panic is contained and counted, as the metric
// names them. Those of the cluster's side that end together are first.
const (
	partDataPort   = "data port"
	partGossip     = "gossip"
	partSwarm      = "swarm"
	partTracker    = "tracker"
	partRegistrar  = "registrar"
	partGRPC       = "grpc"
	partMembership = "membership"
	partCluster    = "cluster"  // what builds and ends those above
	partSeed       = "seed"     // the session of a blob that is whole
	partFill       = "fill"     // the session of one that is not
	partOffer      = "offer"    // hashing, for a session
	partProxy      = "proxy"    // one call of containerd
	partDiffer     = "differ"   // unpacking one layer
	partPrefetch   = "prefetch" // what is to be pulled before anyone asks
	partNodeAPI    = "node API" // one call of it
)

var parts = []string{
	partDataPort, partGossip, partSwarm, partTracker, partRegistrar, partGRPC, partMembership,
	partCluster, partSeed, partFill, partOffer, partProxy, partDiffer,
	partPrefetch, partNodeAPI,
}

// newMetrics returns the node's metrics. What they tell of the cluster's side is
// zero while it is down.
func (n *Node) newMetrics() *metrics.Metrics {
	ask := func(f func(st *stack) int) func() int {
		return func() int {
			if st := n.current(); st != nil {
				return f(st)
			}
			return 0
		}
	}
	return metrics.New(metrics.Now{
		Members:         ask(func(st *stack) int { return len(st.cluster.Members()) }),
		TrackerBlobs:    ask(func(st *stack) int { blobs, _ := st.server.Load(); return blobs }),
		TrackerMembers:  ask(func(st *stack) int { _, members := st.server.Load(); return members }),
		PrefetchQueued:  func() int { queued, _ := n.fanout.Load(); return queued },
		PrefetchPulling: func() int { _, pulling := n.fanout.Load(); return pulling },
	}, parts...)
}

// counts returns what counts a panic of a part.
func (n *Node) counts(part string) func() { return func() { n.metrics.Panicked(part) } }

// trackerCounter is what the tracker counts with.
type trackerCounter struct {
	metrics.Tracker
	panicked func()
}

// Panicked counts a machine that was dropped.
func (c trackerCounter) Panicked() { c.panicked() }
