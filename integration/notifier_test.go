package integration

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/imagewolf/imagewolf/integration/harness"
)

const (
	hookSecret = "a secret of the registry's"
	feedToken  = "a token of the other notifier's"
	// heardWithin is how long the nodes may take after a push.
	heardWithin = 10 * time.Second
)

// audience is four nodes, of which two are in zone a, and who tells them of pushes.
type audience struct {
	*harness.Cluster
	registry *harness.Registry
}

// gather starts the nodes of a registry, with a version of containerd.
func gather(ctx context.Context, t *testing.T, name, version string, r *harness.Registry) *audience {
	t.Helper()
	hosts := map[string]string{r.Host: "http://" + r.Host}
	c, err := harness.NewCluster(ctx, env, harness.ClusterOptions{Name: name, Nodes: 4, Version: version, Hosts: hosts})
	must(t, err)
	t.Cleanup(func() { must(t, c.Close()) })
	for i, n := range c.Nodes {
		n.Wolf.Settings["cluster"] += fmt.Sprintf("labels = { zone = %q }\n", "ab"[i/2:i/2+1])
		must(t, n.Wolf.Stop())
		must(t, n.Wolf.Start(ctx))
	}
	must(t, c.Heal(ctx))
	return &audience{c, r}
}

// notifier makes one whose rule has the nodes of zone a pull images of apps/.
func notifier(t *testing.T, name, host string, nodes []*harness.Node, more string) *harness.Notifier {
	t.Helper()
	n, err := harness.NewNotifier(env, name)
	must(t, err)
	var addresses []string
	for _, node := range nodes {
		addresses = append(addresses, fmt.Sprintf("%q", "unix://"+node.Wolf.NodeSocket()))
	}
	n.Settings = fmt.Sprintf(`allow_registries = [%q]
[registry]
plain_http = [%q]
[nodes]
addresses = [%s]
%s
[[rule]]
name = "apps"
images = ["%s/apps/**:*"]
nodes = "zone=a"
`, host, host, strings.Join(addresses, ", "), more, host)
	return n
}

// hears pushes images until one has arrived where it should: within 10 seconds all
// nodes of zone a have it, unpacked, the others have nothing of it, and the registry
// has sent it once. Then containers start though the registry is gone.
func (a *audience) hears(ctx context.Context, t *testing.T, tellers ...*harness.Notifier) {
	t.Helper()
	defer func() {
		if t.Failed() {
			for _, n := range tellers {
				t.Log(harness.Tail(n.Log(), 4000))
			}
			t.Log(a.Logs())
		}
	}()
	const ns = "k8s.io"
	program, err := harness.NewLayer(env, harness.Gzip, harness.Program(env))
	must(t, err)
	layer, err := harness.NewLayer(env, harness.Gzip, harness.Random(16*mib))
	must(t, err)
	a.registry.Reset()
	img, err := a.registry.Push(ctx, "apps/shop", program, layer)
	must(t, err)
	began := time.Now()
	for _, n := range a.Nodes[:2] {
		err := harness.Poll(ctx, 50*time.Millisecond, func() error { return n.Complete(ctx, ns, img.Ref) })
		must(t, err)
	}
	took := time.Since(began)
	copies := float64(a.registry.Bytes("")) / float64(img.Bytes())
	t.Logf("%.2f s from the push to the last node; the registry sent %.3f copies", took.Seconds(), copies)
	if took > heardWithin {
		t.Errorf("%v from the push to the last node, at most %v was asked", took, heardWithin)
	}
	if copies < 1 || copies > 1.001 {
		t.Errorf("the registry sent %.3f copies", copies)
	}
	for _, n := range a.Nodes[2:] {
		blobs, err := n.Blobs(ctx, ns)
		must(t, err)
		if len(blobs) > 0 {
			t.Errorf("%s is not of zone a and has %d blobs", n.Name, len(blobs))
		}
	}
	a.registry.Behave(harness.Behavior{Status: http.StatusServiceUnavailable})
	defer a.registry.Behave(harness.Behavior{})
	a.registry.Reset()
	for _, n := range a.Nodes[:2] {
		if harness.RuncPath() == "" {
			break
		}
		out, err := n.Run(ctx, ns, img.Ref)
		must(t, err)
		if !strings.Contains(out, "hello") {
			t.Errorf("%s runs it: %q", n.Name, out)
		}
	}
	if asked := a.registry.Requests(func(harness.Request) bool { return true }); len(asked) > 0 {
		t.Errorf("the registry was asked %d times when containers started: %v", len(asked), asked[0])
	}
}

// webhook is what a notifier needs for the registry's notifications.
const webhook = "[receiver.registry]\ntype = \"distribution\"\nsecret = \"" + hookSecret + "\"\n"

// TestPushIsHeard: a registry tells of a push, and the nodes that the rules select
// have the image before anyone asks.
func TestPushIsHeard(t *testing.T) {
	for name, start := range map[string]func(ctx context.Context, h harness.Webhook) (*harness.Registry, error){
		"distribution3": func(_ context.Context, h harness.Webhook) (*harness.Registry, error) {
			return harness.NewRegistry(env, h)
		},
		"docker-registry2.8": func(ctx context.Context, h harness.Webhook) (*harness.Registry, error) {
			return harness.NewDockerRegistry(ctx, env, h)
		},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
			defer cancel()
			short := "hear" + name[:1]
			n, err := harness.NewNotifier(env, short+"n")
			must(t, err)
			r, err := start(ctx, harness.Webhook{URL: n.URL("registry"), Token: hookSecret})
			must(t, err)
			a := gather(ctx, t, short, harness.V2, r)
			n.Settings = notifier(t, short+"m", r.Host, a.Nodes, webhook).Settings
			must(t, n.Start(ctx))
			a.hears(ctx, t, n)
			must(t, n.Stop())
		})
	}
}

// TestPushIsHeardThroughAFeed: a cluster that lets nothing in asks the feed of
// another notifier, which alone hears the registry. Its nodes have containerd 1.7.
func TestPushIsHeardThroughAFeed(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	outer, err := harness.NewNotifier(env, "outer")
	must(t, err)
	r, err := harness.NewRegistry(env, harness.Webhook{URL: outer.URL("registry"), Token: hookSecret})
	must(t, err)
	a := gather(ctx, t, "feed", harness.V17, r)
	outer.Settings = fmt.Sprintf("allow_registries = [%q]\n%s\n[feed]\ntoken = %q\n[[rule]]\nname = \"none\"\nimages = [\"**\"]\nskip = true\n", r.Host, webhook, feedToken)
	must(t, outer.Start(ctx))
	inner := notifier(t, "inner", r.Host, a.Nodes, fmt.Sprintf(
		"[poll.outer]\nurl = %q\ntoken = %q\ninterval = \"5s\"\n", "http://"+outer.Address+"/feed/atom", feedToken))
	must(t, inner.Start(ctx))
	a.hears(ctx, t, outer, inner)
	must(t, inner.Stop())
	must(t, outer.Stop())
}
