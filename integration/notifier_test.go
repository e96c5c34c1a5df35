package integration

import (
	"context"
	"encoding/base64"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protojson"

	imagewolfv1 "github.com/imagewolf/imagewolf/api/v1"
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

// gather starts the nodes of a registry, with a version of containerd and settings of
// their own.
func gather(ctx context.Context, t *testing.T, name, version string, r *harness.Registry, change ...func(i int, n *harness.Node)) *audience {
	t.Helper()
	hosts := map[string]string{r.Host: "http://" + r.Host}
	c, err := harness.NewCluster(ctx, env, harness.ClusterOptions{Name: name, Nodes: 4, Version: version, Hosts: hosts})
	must(t, err)
	t.Cleanup(func() { must(t, c.Close()) })
	for i, n := range c.Nodes {
		n.Wolf.Settings["cluster"] += fmt.Sprintf("labels = { zone = %q }\n", "ab"[i/2:i/2+1])
		for _, f := range change {
			f(i, n)
		}
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
// has sent it once. Then containers start while the registry answers nothing but
// errors, and when it has ended.
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
		runs(ctx, t, ns, img, n)
	}
	if asked := a.registry.Requests(func(harness.Request) bool { return true }); len(asked) > 0 {
		t.Errorf("the registry was asked %d times when containers started: %v", len(asked), asked[0])
	}
	must(t, a.registry.Stop())
	if conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", a.registry.Host); err == nil {
		t.Errorf("somebody listens at %s: %v", a.registry.Host, conn.Close())
	}
	for _, n := range a.Nodes[:2] {
		runs(ctx, t, ns, img, n)
	}
}

// webhook is what a notifier needs for the registry's notifications.
const webhook = "[receiver.registry]\ntype = \"distribution\"\nsecret = \"" + hookSecret + "\"\n"

// TestPushIsHeard: a registry tells of a push, and the nodes that the rules select
// have the image before anyone asks, and run it when the registry's process has
// ended.
func TestPushIsHeard(t *testing.T) {
	for i, c := range []struct{ program, version string }{
		{harness.Distribution, harness.V2}, {harness.Distribution, harness.V17}, {harness.DockerRegistry, harness.V2},
	} {
		t.Run(c.program+" containerd "+c.version, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
			defer cancel()
			short := fmt.Sprint("hear", i)
			n, err := harness.NewNotifier(env, short+"n")
			must(t, err)
			r, err := harness.NewRegistryProcess(ctx, env, c.program, harness.RegistryOptions{Hooks: []harness.Webhook{{URL: n.URL("registry"), Token: hookSecret}}})
			must(t, err)
			a := gather(ctx, t, short, c.version, r)
			n.Settings = notifier(t, short+"m", r.Host, a.Nodes, webhook).Settings
			must(t, n.Start(ctx))
			a.hears(ctx, t, n)
			must(t, n.Stop())
		})
	}
}

// TestPushToAPrivateRegistry: the notifier reads what it must know of the image with
// credentials of its own, once it has them, and the nodes pull with theirs; a node
// that has none says what the registry said, and knows nothing of the image.
func TestPushToAPrivateRegistry(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	const user, password = "wolf", "howl at the moon"
	n, err := harness.NewNotifier(env, "private")
	must(t, err)
	r, err := harness.NewRegistryProcess(ctx, env, harness.Distribution, harness.RegistryOptions{
		Hooks: []harness.Webhook{{URL: n.URL("registry"), Token: hookSecret}}, User: user, Password: password,
	})
	must(t, err)
	file := filepath.Join(t.TempDir(), "config.json")
	auth := base64.StdEncoding.EncodeToString([]byte(user + ":" + password))
	must(t, os.WriteFile(file, fmt.Appendf(nil, `{"auths":{%q:{"auth":%q}}}`, r.Host, auth), 0o600))
	a := gather(ctx, t, "priv", harness.V2, r, func(i int, n *harness.Node) {
		if i != 2 {
			n.Wolf.Settings["prefetch"] += fmt.Sprintf("credential_files = [%q]\n", file)
		}
	})
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(harness.Tail(n.Log(), 4000))
			t.Log(a.Logs())
		}
	})
	var addresses []string
	for _, node := range a.Nodes {
		addresses = append(addresses, fmt.Sprintf("%q", "unix://"+node.Wolf.NodeSocket()))
	}
	settings := func(registry string) string {
		return fmt.Sprintf(`allow_registries = [%q]
[registry]
plain_http = [%q]
%s
[nodes]
addresses = [%s]
%s
[[rule]]
name = "labelled"
images = ["%s/apps/**:*"]
labels = "!internal" # which is in the image's config
timeout = "1m"
`, r.Host, r.Host, registry, strings.Join(addresses, ", "), webhook, r.Host)
	}
	n.Settings = settings("")
	must(t, n.Start(ctx))
	layer, err := harness.NewLayer(env, harness.Gzip, harness.Random(4*mib))
	must(t, err)
	img, err := r.Push(ctx, "apps/private", layer)
	must(t, err)
	must(t, harness.Poll(ctx, 100*time.Millisecond, func() error {
		if log := harness.Tail(n.Log(), 8000); !strings.Contains(log, "an event is tried again later") || !strings.Contains(log, "credential_files") {
			return fmt.Errorf("without credentials the notifier does not say which setting helps:\n%s", log)
		}
		return nil
	}))
	must(t, n.Stop())
	n.Settings = settings(fmt.Sprintf("credential_files = [%q]", file))
	must(t, n.Start(ctx)) // the event is in its queue

	with, without := []*harness.Node{a.Nodes[0], a.Nodes[1], a.Nodes[3]}, a.Nodes[2]
	must(t, harness.Poll(ctx, 200*time.Millisecond, func() error {
		for _, node := range with {
			if err := node.Complete(ctx, kubelets, img.Ref); err != nil {
				return err
			}
		}
		return nil
	}))
	st := awaitFailed(ctx, t, a.Nodes[0], without.Name)
	for _, want := range []string{"refuses it without credentials", "authorization failed", "prefetch.credential_files"} {
		if !strings.Contains(st.GetReason(), want) {
			t.Errorf("%s failed, and its reason does not have %q: %q", without.Name, want, st.GetReason())
		}
	}
	if images, err := without.Ctr(ctx, kubelets, "images", "ls", "-q"); err != nil || strings.TrimSpace(images) != "" {
		t.Errorf("%s has records %q, %v", without.Name, images, err)
	}
	if blobs, err := without.Blobs(ctx, kubelets); err != nil || len(blobs) > 0 {
		t.Errorf("%s has %d blobs, %v", without.Name, len(blobs), err)
	}
	for _, log := range []string{n.Log(), a.Nodes[0].Wolf.Log(), without.Wolf.Log()} {
		text, err := os.ReadFile(log)
		must(t, err)
		if strings.Contains(string(text), password) || strings.Contains(string(text), auth) {
			t.Errorf("%s tells the password", log)
		}
	}
	must(t, n.Stop())
}

// awaitFailed waits until the only request that a node knows of has failed on one
// node and is done on all others, and returns that one's state.
func awaitFailed(ctx context.Context, t *testing.T, ask *harness.Node, failed string) *imagewolfv1.NodePrefetch {
	t.Helper()
	out, _, _ := wolf(ctx, t, ask, "prefetch ls", "--json")
	list := &imagewolfv1.ListPrefetchesResponse{}
	must(t, protojson.Unmarshal([]byte(out), list))
	if len(list.GetPrefetches()) != 1 {
		t.Fatalf("%d requests, want one", len(list.GetPrefetches()))
	}
	id := list.GetPrefetches()[0].GetRequest().GetId()
	var found *imagewolfv1.NodePrefetch
	must(t, harness.Poll(ctx, 500*time.Millisecond, func() error {
		for _, n := range prefetchStatus(ctx, t, ask, id).GetNodes() {
			want := imagewolfv1.PrefetchState_PREFETCH_STATE_DONE
			if n.GetNode() == failed {
				want, found = imagewolfv1.PrefetchState_PREFETCH_STATE_FAILED, n
			}
			if n.GetState() != want {
				return fmt.Errorf("%s is %s, want %s", n.GetNode(), n.GetState(), want)
			}
		}
		return nil
	}))
	return found
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
