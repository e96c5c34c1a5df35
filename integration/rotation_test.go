package integration

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"testing"
	"time"

	"github.com/imagewolf/imagewolf/integration/harness"
)

// TestKeyIsExchanged: the cluster's key is exchanged in three steps, by a restart
// of one daemon after the other, while images are pulled. No pull fails, and after
// each step the cluster is one and the registry sends one copy.
func TestKeyIsExchanged(t *testing.T) {
	ctx, cancel := context.WithTimeoutCause(t.Context(), 3*time.Minute, errors.New("the exchange takes too long"))
	defer cancel()
	var lines []*faultRecord
	for step := range 3 {
		lines = append(lines, record(t, fmt.Sprintf("the cluster's key is exchanged, step %d", step+1), harness.V2))
	}
	c := threeNodes(ctx, t, "kn")
	for _, n := range c.Nodes {
		hold(t, n)
	}
	must(t, c.Heal(ctx))
	next, err := harness.NewClusterKey(ctx, env)
	must(t, err)
	for step, keys := range [][]string{{c.Key, next}, {next, c.Key}, {next}} {
		line := lines[step]
		line.say("pulls during a restart, at most")
		var sentCopies []float64
		for _, n := range c.Nodes {
			n.Wolf.UseKeys(keys[0], keys[1:]...)
			img := image(ctx, t, 6)
			registry.Reset()
			began := time.Now()
			pulls := pull(ctx, "keys", img.Ref, without(c.Nodes, n)...)
			must(t, n.Wolf.Stop())
			pulls = append(pulls, pull(ctx, "keys", img.Ref, n)...)
			must(t, n.Wolf.Start(ctx))
			finish(t, pulls)
			for _, p := range pulls {
				line.Seconds = max(line.Seconds, p.ended.Sub(began).Seconds())
			}
			whole(ctx, t, "keys", img, c.Nodes...)
			sentCopies = append(sentCopies, copies(img))
		}
		must(t, c.Settle(ctx)) // all know all
		img := image(ctx, t, 6)
		registry.Reset()
		took, err := c.PullAll(ctx, "keys", img.Ref)
		must(t, err)
		line.SecondsWithout = slices.Max(took).Seconds()
		whole(ctx, t, "keys", img, c.Nodes...)
		sent(t, img.Bytes())
		line.RegistryCopies = slices.Max(sentCopies)
		if line.RegistryCopies > usualCopies {
			t.Errorf("for a pull during a restart the registry sent %.2f copies, more than %.2f", line.RegistryCopies, usualCopies)
		}
		t.Logf("step %d: copies during restarts %.2f", step+1, sentCopies)
	}
}

// threeNodes is a cluster of its own, whose nodes get new keys, until the test ends.
func threeNodes(ctx context.Context, t *testing.T, name string) *harness.Cluster {
	t.Helper()
	registry.Behave(harness.Behavior{Rate: 8 * mib})
	c, err := harness.NewCluster(ctx, env, harness.ClusterOptions{
		Name: name, Nodes: 3, Version: harness.V2, Hosts: map[string]string{registry.Host: "http://" + registry.Host},
	})
	t.Cleanup(func() {
		registry.Behave(harness.Behavior{})
		if t.Failed() {
			t.Log(c.Logs())
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	must(t, err)
	return c
}

// hold has a node's socket held as systemd would, until the test ends.
func hold(t *testing.T, n *harness.Node) {
	t.Helper()
	must(t, n.Wolf.Stop())
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: n.Wolf.Socket()})
	must(t, err)
	l.SetUnlinkOnClose(false) // the next daemon makes its own in its place
	n.Wolf.Socketed, err = l.File()
	must(t, err)
	must(t, l.Close())
	t.Cleanup(func() {
		must(t, n.Wolf.Stop())
		must(t, n.Wolf.Socketed.Close())
		n.Wolf.Socketed = nil
	})
}
