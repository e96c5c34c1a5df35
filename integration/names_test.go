package integration

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/imagewolf/imagewolf/integration/harness"
)

// TestNamesGone: nodes that join by a name whose server does not answer. Those that
// know each other do not notice; those that start then serve their containerd,
// alone, and find each other once there are names again.
func TestNamesGone(t *testing.T) {
	ctx, cancel := context.WithTimeoutCause(t.Context(), 3*time.Minute, errors.New("the nodes do not find each other"))
	defer cancel()
	line := record(t, "names gone while all start", harness.V2)
	registry.Behave(harness.Behavior{})
	var names *harness.NameServer
	s := newFaultSite(t, harness.V2, func(s *faultSite, o *harness.ClusterOptions) {
		var all []string
		for _, m := range s.machines {
			all = append(all, m.IP)
		}
		var err error
		names, err = s.registry.ServeNames(all...)
		must(t, err)
		t.Cleanup(func() {
			if err := names.Close(); err != nil {
				t.Error(err)
			}
		})
		o.Join, o.Resolver = "nodes.example", s.registry.IP
	})
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(s.Logs())
		}
	})
	if names.Asked.Load() == 0 {
		t.Fatal("the nodes know each other without the name server")
	}
	names.SetSilent(true)
	img := image(ctx, t, 8, 8)
	registry.Reset()
	unnoticed, err := s.PullAll(ctx, "names", img.Ref)
	must(t, err)
	line.Seconds, line.RegistryCopies = slices.Max(unnoticed).Seconds(), copies(img)
	sent(t, img.Bytes())

	for _, n := range s.Nodes {
		must(t, n.Wolf.Stop())
	}
	for _, n := range s.Nodes {
		must(t, n.Wolf.Start(ctx)) // its own socket and port, which is all that it has
	}
	alone := image(ctx, t, 8)
	took, err := harness.PullOn(ctx, s.Nodes[:2], "names", alone.Ref)
	must(t, err)
	if last := max(took[0], took[1]); last > 15*time.Second {
		t.Errorf("alone, a pull took %s", last)
	}
	line.say("all started meanwhile, a pull of half as much took %.1f s, each node alone", slices.Max(took).Seconds())
	members, err := s.Metric(ctx, "imagewolf_members")
	must(t, err)
	if members != faultNodes {
		t.Errorf("without names the %d nodes see %v members, each itself", faultNodes, members)
	}

	names.SetSilent(false)
	began := time.Now()
	must(t, s.Settle(ctx))
	found := time.Since(began)
	img = image(ctx, t, 8, 8)
	registry.Reset()
	last, err := s.PullAll(ctx, "names", img.Ref)
	must(t, err)
	line.SecondsWithout, line.RegistryCopies = slices.Max(last).Seconds(), max(line.RegistryCopies, copies(img))
	sent(t, img.Bytes())
	whole(ctx, t, "names", img, s.Nodes...)
	line.say("together again %.1f s after they came back", found.Seconds())
	t.Logf("%+v", *line)
}
