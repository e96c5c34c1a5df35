package integration

import (
	"context"
	"time"

	"github.com/imagewolf/imagewolf/integration/harness"
)

// year is how long the certificates of the cluster's key once were valid.
const year = 365 * 24 * time.Hour

// clockFaults are what happens to nodes' clocks. The pulls last for longer than it
// takes gRPC's keepalive to close a connection.
var clockFaults = []fault{
	{
		name: "clocks of a third of the nodes jump 10 years forward, of a third 10 years back", layers: []int64{40, 40}, rate: 4 * mib,
		act: func(ctx context.Context, r *faultRun) {
			r.tracker()
			for i, n := range r.Nodes[:4] {
				r.setClock(ctx, n, []time.Duration{10 * year, -10 * year}[i/2])
			}
		},
		after: clocksAgree,
	},
	{
		name: "clocks of the fetcher's and the tracker's node jump by an hour, to and fro", layers: []int64{40, 40}, rate: 4 * mib,
		act: func(ctx context.Context, r *faultRun) {
			tracker := r.tracker()
			for i := range 10 {
				ahead := []time.Duration{time.Hour, 0, -time.Hour}[i%3]
				r.setClock(ctx, r.fetcher, ahead)
				r.setClock(ctx, tracker, -ahead)
				<-time.After(time.Second)
			}
		},
		after: clocksAgree,
	},
	{
		name: "a node with a clock 10 years ahead, and one 10 years behind, join",
		before: func(ctx context.Context, r *faultRun) {
			// The one fetches, and so serves the others; the other is one of those.
			r.first = r.Nodes[1]
			for i, n := range r.Nodes[1:3] {
				must(r.T, n.Wolf.Stop())
				r.setClock(ctx, n, []time.Duration{10 * year, -10 * year}[i])
				must(r.T, n.Wolf.Start(ctx))
			}
			must(r.T, r.Settle(ctx))
			for _, n := range r.Nodes[1:3] {
				r.seesClock(ctx, n)
			}
			registry.Reset()
		},
		after: func(ctx context.Context, r *faultRun) {
			for _, n := range r.Nodes[1:3] {
				img := image(ctx, r.T, 8, 8)
				must(r.T, n.Pull(ctx, r.ns, img.Ref))
				registry.Reset()
				_, err := harness.PullOn(ctx, without(r.Nodes, n), r.ns, img.Ref)
				must(r.T, err)
				sent(r.T, 0)
				whole(ctx, r.T, r.ns, img, r.Nodes...)
			}
			clocksAgree(ctx, r)
		},
	},
}

// setClock sets by how much a node's clock is ahead, of the machine's and for this
// fault.
func (r *faultRun) setClock(ctx context.Context, n *harness.Node, ahead time.Duration) {
	r.Helper()
	if r.clocks == nil {
		r.clocks = map[*harness.Node]time.Duration{}
		r.Cleanup(func() {
			for n := range r.clocks {
				must(r.T, n.Wolf.SetClock(0))
			}
		})
	}
	must(r.T, n.Wolf.SetClock(ahead))
	r.clocks[n] = ahead
	if n.Wolf.Process().Running() {
		r.seesClock(ctx, n)
	}
}

// seesClock checks that a node's daemon has the clock that was set.
func (r *faultRun) seesClock(ctx context.Context, n *harness.Node) {
	r.Helper()
	at, err := n.Wolf.Clock(ctx)
	must(r.T, err)
	if off := time.Until(at) - r.clocks[n]; off.Abs() > time.Minute {
		r.Errorf("clock of %s: %s, %s off what was set", n.Name, at, off)
	}
}

// clocksAgree pulls another image while the clocks are as wrong as the fault left
// them, sets them right, and pulls one more.
func clocksAgree(ctx context.Context, r *faultRun) {
	once := func() {
		r.Helper()
		img := image(ctx, r.T, 8, 8)
		registry.Reset()
		_, err := r.PullAll(ctx, r.ns, img.Ref)
		must(r.T, err)
		sent(r.T, img.Bytes())
		whole(ctx, r.T, r.ns, img, r.Nodes...)
	}
	once()
	for n := range r.clocks {
		r.setClock(ctx, n, 0)
	}
	once()
}
