package integration

import (
	"bytes"
	"context"
	"crypto/sha256"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/imagewolf/imagewolf/integration/harness"
)

// faults are all of them, in the order in which they happen.
var faults = []fault{
	{name: "fetcher's imagewolf killed", quick: true, layers: []int64{32, 32}, goesOn: mib, act: func(_ context.Context, r *faultRun) {
		r.lose(r.fetcher)
		r.fetcher.Wolf.Kill()
	}},
	{name: "fetcher's containerd killed", layers: []int64{32, 32}, goesOn: 4 * mib, act: func(_ context.Context, r *faultRun) {
		r.lose(r.fetcher)
		r.fetcher.Kill()
	}},
	{name: "fetcher's NIC down", layers: []int64{32, 32}, goesOn: mib, act: func(_ context.Context, r *faultRun) { r.cut(r.fetcher) }},
	{name: "fetcher's registry connection stalls", goesOn: 4 * mib, act: func(_ context.Context, r *faultRun) {
		r.lose(r.fetcher) // its client reads from that connection, as it would without us
		registry.Behave(harness.Behavior{Rate: faultRate, StallAfter: 1, Node: r.fetcher.Name, Digest: r.layer})
	}},
	{name: "tracker killed", quick: true, layers: []int64{32}, act: func(_ context.Context, r *faultRun) {
		n := r.tracker()
		r.lose(n)
		n.Wolf.Kill()
	}},
	{
		// Who knew what was on its way goes with who brought it.
		name: "fetcher killed, who is the tracker as well", layers: []int64{32, 32}, goesOn: mib,
		before: func(_ context.Context, r *faultRun) { r.first = trackerOf(r.layer, r.Nodes) },
		act: func(_ context.Context, r *faultRun) {
			if r.fetcher != r.first {
				r.Errorf("%s fetches, not the tracker %s", r.fetcher.Name, r.first.Name)
			}
			r.lose(r.fetcher)
			r.fetcher.Wolf.Kill()
		},
	},
	{
		name: "tracker partitioned", layers: []int64{32}, act: func(_ context.Context, r *faultRun) { r.cut(r.tracker()) },
		after: func(ctx context.Context, r *faultRun) { healed(ctx, r, trackerOf(r.layer, r.Nodes)) },
	},
	{name: "fetcher's imagewolf stopped", extra: 3 * time.Second, act: func(_ context.Context, r *faultRun) {
		r.stop(r.fetcher)
	}},
	{name: "tracker stopped", layers: []int64{32}, extra: stoppedExtra, act: func(_ context.Context, r *faultRun) {
		r.stop(r.tracker())
	}},
	{
		// They take turns at being first hop.
		name: "a leecher stopped", extra: stoppedExtra,
		act: func(_ context.Context, r *faultRun) { r.stop(r.leechers()[0]) },
	},
	{name: "a leecher killed", act: func(_ context.Context, r *faultRun) {
		n := r.leechers()[0]
		r.lose(n)
		n.Wolf.Kill()
	}},
	{name: "a third of the nodes killed", quick: true, act: func(_ context.Context, r *faultRun) {
		for _, n := range r.leechers()[:2] {
			r.lose(n)
			n.Wolf.Kill()
		}
	}},
	{
		// Until the tracker on the other side is found dead, a half may ask anew.
		name: "cluster split in halves", copies: 3, extra: 10 * time.Second,
		act: func(ctx context.Context, r *faultRun) {
			halves := [][]*harness.Node{r.Nodes[:faultNodes/2], r.Nodes[faultNodes/2:]}
			for i, half := range halves {
				for _, n := range half {
					m := r.machine(n)
					must(r.T, m.Drop(ctx, 100, r.addresses(halves[1-i])...))
					r.mend(func() error { return m.Drop(ctx, 0) })
				}
			}
		},
		after: func(ctx context.Context, r *faultRun) { healed(ctx, r, nil) },
	},
	{
		// Their sockets are held by nobody meanwhile.
		name: "all daemons restarted one after the other", layers: []int64{32}, extra: 20 * time.Second, copies: 2, tries: faultNodes,
		act: func(ctx context.Context, r *faultRun) {
			for _, n := range r.Nodes {
				must(r.T, n.Wolf.Stop())
				must(r.T, n.Wolf.Start(ctx))
			}
		},
	},
	{name: "registry answers 429 at first", tries: 1, before: func(_ context.Context, r *faultRun) {
		registry.Behave(harness.Behavior{Rate: faultRate, Status: 429, RetryAfter: 1, Digest: r.layer, Times: 1})
	}},
	{name: "registry answers 500 at first", tries: 1, before: func(_ context.Context, r *faultRun) {
		registry.Behave(harness.Behavior{Rate: faultRate, Status: 500, Digest: r.layer, Times: 1})
	}},
	{name: "registry resets the connection", quick: true, tries: 1, before: func(_ context.Context, r *faultRun) {
		at := rand.Int64N(r.img.Blobs[r.layer])
		r.say("at byte %d", at)
		registry.Behave(harness.Behavior{Rate: faultRate, CutAfter: 1 + at, Digest: r.layer, Times: 1})
	}},
	{
		name: "registry resets the connection three times", extra: 10 * time.Second, tries: 3,
		before: func(_ context.Context, r *faultRun) {
			registry.Behave(harness.Behavior{Rate: faultRate, CutWithin: r.img.Blobs[r.layer], Digest: r.layer, Times: 3})
		},
	},
	{
		name: "registry answers 500 three times", extra: 10 * time.Second, tries: 3,
		before: func(_ context.Context, r *faultRun) {
			registry.Behave(harness.Behavior{Rate: faultRate, Status: 500, Digest: r.layer, Times: 3})
		},
	},
	{
		name: "registry answers 429 three times", extra: 10 * time.Second, tries: 3,
		before: func(_ context.Context, r *faultRun) {
			registry.Behave(harness.Behavior{Rate: faultRate, Status: 429, RetryAfter: 1, Digest: r.layer, Times: 3})
		},
	},
	{
		name: "registry without ranges, fetcher killed", copies: 1.4,
		before: func(context.Context, *faultRun) {
			registry.Behave(harness.Behavior{Rate: faultRate, NoRange: true})
		},
		act: func(_ context.Context, r *faultRun) {
			r.lose(r.fetcher)
			r.fetcher.Kill()
		},
	},
	{
		// One of the two layers once wrong and once right. The pull of the node that
		// was sent wrong bytes fails, as it would without ImageWolf.
		name: "registry sends wrong bytes once", copies: 1.6, tries: 1,
		before: func(_ context.Context, r *faultRun) {
			registry.Behave(harness.Behavior{Rate: faultRate, Corrupt: true, Digest: r.layer, Times: 1})
		},
	},
	{
		// A tracker that there is a connection to has stall_timeout to answer, which
		// outlasts some retransmissions. A connection may break yet.
		name: "a tenth of all packets lost", extra: 20 * time.Second, copies: 2,
		before: func(ctx context.Context, r *faultRun) {
			for _, m := range r.machines {
				must(r.T, m.Drop(ctx, 10))
				r.mend(func() error { return m.Drop(ctx, 0) })
			}
		},
	},
	{name: "a node of 1 Mbit/s", before: func(_ context.Context, r *faultRun) {
		slow := r.Nodes[rand.IntN(faultNodes)]
		r.say("%s", slow.Name)
		r.lose(slow)
		must(r.T, r.machine(slow).SetRate(1_000_000))
		r.mend(func() error { return r.machine(slow).SetRate(0) })
	}},
	{
		// The others know from another image how fast the registry is; the slow node
		// has just come, and is the first who wants this one.
		name: "a node of 1 Mbit/s fetches", layers: []int64{32}, extra: 5 * time.Second,
		before: func(ctx context.Context, r *faultRun) {
			other := image(ctx, r.T, 16, 16, 16)
			r.first = r.Nodes[rand.IntN(faultNodes)]
			r.say("%s", r.first.Name)
			r.lose(r.first)
			must(r.T, r.first.Wolf.Stop())
			_, err := harness.PullOn(ctx, without(r.Nodes, r.first), r.ns, other.Ref)
			must(r.T, err)
			must(r.T, r.first.Wolf.Start(ctx))
			must(r.T, r.Settle(ctx))
			must(r.T, r.machine(r.first).SetRate(1_000_000))
			r.mend(func() error { return r.machine(r.first).SetRate(0) })
			registry.Reset()
		},
	},
}

// stop stops a node's daemon as systemd would.
func (r *faultRun) stop(n *harness.Node) {
	r.lose(n)
	r.say("%s", n.Name)
	began := time.Now()
	must(r.T, n.Wolf.Stop())
	r.say("it took %.1f s", time.Since(began).Seconds())
}

// cut takes a node off the network until all is mended.
func (r *faultRun) cut(n *harness.Node) {
	r.lose(n)
	m := r.machine(n)
	must(r.T, m.Cut())
	r.mend(m.Mend)
}

// tracker returns the node that tracks the first layer.
func (r *faultRun) tracker() *harness.Node {
	n := trackerOf(r.layer, r.Nodes)
	r.say("tracker %s, fetcher %s", n.Name, r.fetcher.Name)
	return n
}

// trackerOf returns the node that tracks a blob: the first in an order that every
// node computes from the members' names (cluster.Trackers).
func trackerOf(digest string, nodes []*harness.Node) *harness.Node {
	weight := func(n *harness.Node) []byte {
		sum := sha256.Sum256([]byte(n.Name + "\x00" + digest))
		return sum[:8]
	}
	return slices.MaxFunc(nodes, func(a, b *harness.Node) int { return bytes.Compare(weight(a), weight(b)) })
}

// leechers returns the nodes that fetch nothing from the registry.
func (r *faultRun) leechers() []*harness.Node {
	var out []*harness.Node
	for _, n := range r.Nodes {
		fetches := slices.ContainsFunc(registry.Requests(nil), func(q harness.Request) bool {
			return q.Node == n.Name && q.Digest != "" && r.img.Blobs[q.Digest] > mib && !q.Done
		})
		if !fetches {
			out = append(out, n)
		}
	}
	if len(out) < 2 {
		r.Fatalf("%d nodes do not fetch", len(out))
	}
	return out
}

// healed checks that nodes which were cut off share with the others again, also a blob
// that this one tracks.
func healed(ctx context.Context, r *faultRun, tracker *harness.Node) {
	began := time.Now()
	must(r.T, r.Settle(ctx))
	r.say("together again after %.1f s", time.Since(began).Seconds())
	img := image(ctx, r.T, 8)
	for tracker != nil && trackerOf(img.Layer(0), r.Nodes) != tracker {
		img = image(ctx, r.T, 8)
	}
	registry.Reset()
	_, err := r.PullAll(ctx, r.ns, img.Ref)
	must(r.T, err)
	if got := registry.Bytes(""); got > img.Bytes()+64<<10 {
		r.Errorf("healed, and the registry sent %d bytes for an image of %d", got, img.Bytes())
	}
	whole(ctx, r.T, r.ns, img, r.Nodes...)
}
