package bench

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/imagewolf/imagewolf/integration/harness"
)

// cold and staggered are the scenarios that a smoke run judges.
const (
	cold      = "cold"
	staggered = "staggered"
)

// everything stands for all scenarios.
const everything = "all"

// scenario is one way for nodes to come to an image.
type scenario struct {
	// name is its name in tables, and group what else it is chosen by.
	name, group string
	// what it is, in some words.
	what string
	// unpack has images pulled as a user pulls them; otherwise their blobs are
	// fetched, and no more.
	unpack bool
	// byMedian compares the median node with direct's; otherwise the last node
	// is compared with a single direct pull.
	byMedian bool
	// least is how often it is repeated, whatever the user says.
	least int
	// kind of its image.
	kind kind
	// place is where it runs; the zero value is nodes on one switch.
	place place
	// before prepares the nodes, without a bound on the NICs; may be nil.
	before func(ctx context.Context, r *run) error
	// pull has the nodes get the image, and returns what each took.
	pull func(ctx context.Context, r *run) ([]time.Duration, error)
}

// place is a network that a scenario runs in.
type place struct {
	lone     bool // one node
	loopback bool // no network at all
	rate     int  // Mbit/s whatever the user says; 0: as he says
	zones    int  // that the nodes are spread over; 0: none
}

// stagger is the time between two nodes' starts in the scenario staggered.
const stagger = 200 * time.Millisecond

// scenarios are all of them, in the order in which they run.
var scenarios = []*scenario{
	{name: cold, what: "all nodes pull a new image at the same moment", pull: atOnce(0)},
	{name: staggered, what: "the same, each node 200 ms after the one before", pull: atOnce(stagger)},
	{name: "warm", what: "one node has the image, the others pull at the same moment", before: onFirst, pull: others},
	{name: "rolling", what: "node after node", byMedian: true, pull: oneByOne},
	{name: "update", what: "cold; every node has an image that shares all layers but one", kind: updated, before: olderOnAll, pull: atOnce(0)},
	{name: "small", group: "small", what: "cold, 5 MiB in three layers, unpacked", unpack: true, byMedian: true, least: 3, kind: tiny, pull: atOnce(0)},
	{name: "small-rolling", group: "small", what: "the same, node after node", unpack: true, byMedian: true, least: 3, kind: tiny, pull: oneByOne},
	{
		name: "lone", group: "lone", what: "one node, a layer of real files, loopback, unpacked",
		unpack: true, byMedian: true, least: 3, kind: files, place: place{lone: true, loopback: true}, pull: atOnce(0),
	},
	{
		name: "lone-random", group: "lone", what: "one node, a layer of 1 GiB that does not compress, loopback, unpacked",
		unpack: true, byMedian: true, least: 3, kind: gibibyte, place: place{lone: true, loopback: true}, pull: atOnce(0),
	},
	{
		name: "lone-1gbit", group: "lone", what: "the same at 1 Gbit/s",
		unpack: true, byMedian: true, least: 3, kind: gibibyte, place: place{lone: true, rate: 1000}, pull: atOnce(0),
	},
	{name: "zones", what: "cold; nodes in three zones, the links between them at half the rate", place: place{zones: 3}, pull: atOnce(0)},
}

// choose returns the scenarios of these names and groups, in their own order;
// all when there is no name, or that of everything.
func choose(names []string) ([]*scenario, error) {
	var out []*scenario
	known := map[string]bool{everything: true}
	all := len(names) == 0 || slices.Contains(names, everything)
	for _, s := range scenarios {
		known[s.name], known[s.group] = true, true
		if all || slices.Contains(names, s.name) || s.group != "" && slices.Contains(names, s.group) {
			out = append(out, s)
		}
	}
	for _, n := range names {
		if !known[n] || n == "" {
			var there []string
			for _, s := range scenarios {
				there = append(there, s.name)
			}
			return nil, fmt.Errorf("no scenario %q; there are %s, and %s", n, strings.Join(there, ", "), everything)
		}
	}
	return out, nil
}

// plan is a scenario's size in this run.
type plan struct {
	n     int  // nodes
	rate  int  // Mbit/s of each NIC; 0: no NIC
	fixed bool // the rate belongs to the scenario, and stays
}

func (s *scenario) plan(o Options) plan {
	p := plan{n: o.N, rate: o.Rate}
	if s.place.lone {
		p.n = 1
	}
	if s.place.rate != 0 {
		p.rate, p.fixed = s.place.rate, true
	}
	if s.place.loopback {
		p.rate, p.fixed = 0, true
	}
	return p
}

// run is one mode of a scenario under way.
type run struct {
	s       *scenario
	cluster *harness.Cluster
	image   images
}

// ns is the containerd namespace of all pulls.
const ns = "bench"

// get has a node get an image in the scenario's way.
func (r *run) get(ctx context.Context, n *harness.Node, ref string) error {
	get := n.Fetch
	if r.s.unpack {
		get = func(ctx context.Context, ns, ref string) error { return n.Pull(ctx, ns, ref) }
	}
	if err := get(ctx, ns, ref); err != nil {
		return fmt.Errorf("on %s: %w", n.Name, err)
	}
	return nil
}

// pullOn has some nodes get an image, each so much after the one before, and
// returns what each took.
func (r *run) pullOn(ctx context.Context, nodes []*harness.Node, ref string, apart time.Duration) ([]time.Duration, error) {
	took, errs := make([]time.Duration, len(nodes)), make([]error, len(nodes))
	var all sync.WaitGroup
	for i, n := range nodes {
		all.Go(func() {
			select {
			case <-ctx.Done():
				errs[i] = context.Cause(ctx)
				return
			case <-time.After(time.Duration(i) * apart):
			}
			began := time.Now()
			errs[i] = r.get(ctx, n, ref)
			took[i] = time.Since(began)
		})
	}
	all.Wait()
	return took, errors.Join(errs...)
}

// atOnce has all nodes pull, each so much after the one before.
func atOnce(apart time.Duration) func(context.Context, *run) ([]time.Duration, error) {
	return func(ctx context.Context, r *run) ([]time.Duration, error) {
		return r.pullOn(ctx, r.cluster.Nodes, r.image.ref, apart)
	}
}

func oneByOne(ctx context.Context, r *run) ([]time.Duration, error) {
	var took []time.Duration
	for _, n := range r.cluster.Nodes {
		t, err := r.pullOn(ctx, []*harness.Node{n}, r.image.ref, 0)
		if err != nil {
			return nil, err
		}
		took = append(took, t...)
	}
	return took, nil
}

// onFirst has the first node get the image. One that is alone in the cluster
// is to pull it later.
func onFirst(ctx context.Context, r *run) error {
	if len(r.cluster.Nodes) == 1 {
		return nil
	}
	return r.get(ctx, r.cluster.Nodes[0], r.image.ref)
}

// others has all nodes but the first pull.
func others(ctx context.Context, r *run) ([]time.Duration, error) {
	nodes := r.cluster.Nodes
	if len(nodes) > 1 {
		nodes = nodes[1:]
	}
	return r.pullOn(ctx, nodes, r.image.ref, 0)
}

// olderOnAll has all nodes get the older image.
func olderOnAll(ctx context.Context, r *run) error {
	_, err := r.pullOn(ctx, r.cluster.Nodes, r.image.older, 0)
	return err
}
