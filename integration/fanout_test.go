package integration

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/imagewolf/imagewolf/api/nodeapi"
	imagewolfv1 "github.com/imagewolf/imagewolf/api/v1"
	"github.com/imagewolf/imagewolf/integration/harness"
)

// wolf runs an imagewolf command against a node and returns what it printed and
// its exit status.
func wolf(ctx context.Context, t *testing.T, n *harness.Node, command string, args ...string) (stdout, stderr string, exit int) {
	t.Helper()
	words := append(strings.Fields(command), "--socket", n.Wolf.NodeSocket())
	cmd := exec.CommandContext(ctx, env.Bin.ImageWolf, append(words, args...)...)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	var ended *exec.ExitError
	if err != nil && !errors.As(err, &ended) {
		t.Fatal(err)
	}
	t.Logf("imagewolf %s %q: exit status %d\n%s%s", command, args, cmd.ProcessState.ExitCode(), &out, &errOut)
	return out.String(), errOut.String(), cmd.ProcessState.ExitCode()
}

// prefetchStatus asks a node for a request's status.
func prefetchStatus(ctx context.Context, t *testing.T, n *harness.Node, id string) *imagewolfv1.PrefetchStatus {
	t.Helper()
	out, _, exit := wolf(ctx, t, n, "prefetch status", "--json", id)
	st := &imagewolfv1.PrefetchStatus{}
	if exit != 0 {
		t.Fatalf("status of %s on %s", id, n.Name)
	}
	must(t, protojson.Unmarshal([]byte(out), st))
	return st
}

// awaitStates polls a node until a request is where it should be on all nodes.
func awaitStates(ctx context.Context, t *testing.T, n *harness.Node, id, want string) {
	t.Helper()
	must(t, harness.Poll(ctx, 200*time.Millisecond, func() error {
		st := prefetchStatus(ctx, t, n, id)
		var states []string
		for _, n := range st.Nodes {
			states = append(states, strings.ToLower(strings.TrimPrefix(n.State.String(), "PREFETCH_STATE_")))
		}
		if got := strings.Join(states, " "); got != want {
			return fmt.Errorf("states are %q, want %q", got, want)
		}
		return nil
	}))
}

// absent fails the test if a node has the image.
func absent(ctx context.Context, t *testing.T, ns string, img *harness.Image, nodes ...*harness.Node) {
	t.Helper()
	for _, n := range nodes {
		if err := n.Complete(ctx, ns, img.Ref); err == nil {
			t.Errorf("%s has %s", n.Name, img.Ref)
		}
	}
}

// TestPrefetchRequests: what is asked of one node happens on those that are
// selected, through restarts and all, and on no other.
func TestPrefetchRequests(t *testing.T) {
	ctx, cancel := context.WithTimeoutCause(t.Context(), 4*time.Minute, errors.New("the test takes too long"))
	defer cancel()
	registry.Behave(harness.Behavior{})
	c, err := harness.NewCluster(ctx, env, harness.ClusterOptions{
		Name: "pf", Nodes: 4, Version: harness.V2, Hosts: map[string]string{registry.Host: "http://" + registry.Host},
	})
	must(t, err)
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(c.Logs())
		}
		must(t, c.Close())
	})
	token := filepath.Join(t.TempDir(), "token")
	must(t, os.WriteFile(token, []byte("a-token-for-all-of-ci\n"), 0o600))
	for i, n := range c.Nodes {
		n.Wolf.Settings["cluster"] += fmt.Sprintf("labels = { zone = %q }\n", "aabb"[i:i+1])
		if i == 3 {
			host, _, err := net.SplitHostPort(n.Wolf.Data)
			must(t, err)
			n.Wolf.Settings["node_api"] = fmt.Sprintf("socket_mode = \"0660\"\naddress = %q\ntoken_file = %q\n", net.JoinHostPort(host, "7949"), token)
		}
		must(t, n.Wolf.Stop())
	}
	must(t, c.Heal(ctx))
	part := func(name string, do func(t *testing.T)) {
		t.Run(name, func(t *testing.T) {
			registry.Behave(harness.Behavior{})
			registry.Reset()
			do(t)
		})
	}
	part("selected nodes have it", func(t *testing.T) { selectedHaveIt(ctx, t, c) })
	part("restarts", func(t *testing.T) { prefetchThroughRestarts(ctx, t, c) })
	part("cancel", func(t *testing.T) { prefetchCanceled(ctx, t, c) })
	part("superseded", func(t *testing.T) { prefetchSuperseded(ctx, t, c) })
	part("exit status", func(t *testing.T) { prefetchExits(ctx, t, c) })
	part("network", func(t *testing.T) { prefetchByNetwork(ctx, t, c, token) })
}

func selectedHaveIt(ctx context.Context, t *testing.T, c *harness.Cluster) {
	img := image(ctx, t, 16, 16)
	out, _, exit := wolf(ctx, t, c.Nodes[2], "prefetch", img.Ref, "--wait", "--nodes", "zone=a", "--timeout", "1m")
	if exit != 0 || strings.Count(out, "  done") != 2 {
		t.Errorf("exit status %d", exit)
	}
	whole(ctx, t, kubelets, img, c.Nodes[:2]...)
	absent(ctx, t, kubelets, img, c.Nodes[2:]...)
	sent(t, img.Bytes())
	runs(ctx, t, kubelets, img, c.Nodes[0])
	// Whoever has one of the repository, and all others are as before.
	out, _, exit = wolf(ctx, t, c.Nodes[3], "prefetch", "--running", "--json", "--wait", img.Ref)
	if exit != 0 || strings.Count(out, "PREFETCH_STATE_DONE") != 2 {
		t.Errorf("exit status %d", exit)
	}
	absent(ctx, t, kubelets, img, c.Nodes[2:]...)
	sent(t, img.Bytes())
	out, _, _ = wolf(ctx, t, c.Nodes[1], "prefetch ls")
	if strings.Count(out, img.Ref) != 2 || strings.Count(out, "2 done") != 2 {
		t.Error("the list is not right")
	}
}

func prefetchThroughRestarts(ctx context.Context, t *testing.T, c *harness.Cluster) {
	img := image(ctx, t, 24, 24)
	registry.Behave(harness.Behavior{Rate: 8 * mib})
	out, _, exit := wolf(ctx, t, c.Nodes[3], "prefetch", img.Ref, "--nodes", "zone=a")
	if exit != 0 {
		t.Fatal("it is refused")
	}
	id := strings.TrimSpace(out)
	reached(ctx, t, img.Layer(0), 4*mib)
	for _, i := range []int{3, 0} { // the one that took it, and one that pulls
		must(t, c.Nodes[i].Wolf.Stop())
	}
	awaitStates(ctx, t, c.Nodes[2], id, "unreachable pulling")
	for _, i := range []int{0, 3} {
		must(t, c.Nodes[i].Wolf.Start(ctx))
	}
	awaitStates(ctx, t, c.Nodes[2], id, "done done")
	awaitStates(ctx, t, c.Nodes[3], id, "done done")
	whole(ctx, t, kubelets, img, c.Nodes[:2]...)
	absent(ctx, t, kubelets, img, c.Nodes[2:]...)
	t.Logf("the registry sent %.2f copies", float64(registry.Bytes(""))/float64(img.Bytes()))
	must(t, c.Settle(ctx))
}

func prefetchCanceled(ctx context.Context, t *testing.T, c *harness.Cluster) {
	img := image(ctx, t, 32)
	registry.Behave(harness.Behavior{Rate: 4 * mib})
	out, _, _ := wolf(ctx, t, c.Nodes[0], "prefetch", img.Ref)
	id := strings.TrimSpace(out)
	reached(ctx, t, img.Layer(0), 2*mib)
	if _, _, exit := wolf(ctx, t, c.Nodes[1], "prefetch cancel", id); exit != 0 {
		t.Error("it cannot be canceled")
	}
	awaitStates(ctx, t, c.Nodes[2], id, "canceled canceled canceled canceled")
	time.Sleep(2 * time.Second)
	before := registry.Bytes("")
	time.Sleep(2 * time.Second)
	if after := registry.Bytes(""); after != before {
		t.Errorf("the registry still sends: %d bytes, then %d", before, after)
	}
	absent(ctx, t, kubelets, img, c.Nodes...)
}

// prefetchSuperseded: a request that has to be tried again leaves the tag to a younger
// one, though it could be pulled by then.
func prefetchSuperseded(ctx context.Context, t *testing.T, c *harness.Cluster) {
	digestOf := func(ref string) string {
		t.Helper()
		parsed, err := name.ParseReference(ref, name.Insecure)
		must(t, err)
		head, err := remote.Head(parsed, remote.WithContext(ctx), remote.WithAuth(authn.Anonymous))
		must(t, err)
		return head.Digest.String()
	}
	older := image(ctx, t, 1)
	d1 := digestOf(older.Ref)
	registry.Behave(harness.Behavior{Status: http.StatusInternalServerError, Digest: older.Layer(0)})
	type end struct {
		said string
		exit int
	}
	waited := make(chan end, 1)
	go func() {
		_, said, exit := wolf(ctx, t, c.Nodes[3], "prefetch", older.Ref, "--digest", d1, "--nodes", "zone=a", "--wait")
		waited <- end{said, exit}
	}()
	var first string
	must(t, harness.Poll(ctx, 200*time.Millisecond, func() error {
		list, _, _ := wolf(ctx, t, c.Nodes[3], "prefetch ls")
		for line := range strings.Lines(list) {
			if f := strings.Fields(line); len(f) > 1 && f[1] == older.Ref {
				first = f[0]
				return nil
			}
		}
		return errors.New("it is not listed")
	}))
	must(t, harness.Poll(ctx, 200*time.Millisecond, func() error {
		for _, n := range prefetchStatus(ctx, t, c.Nodes[2], first).Nodes {
			if !strings.Contains(n.Reason, "failed: ") {
				return fmt.Errorf("%s: %q", n.Node, n.Reason)
			}
		}
		return nil
	}))
	ci := askAsCI(ctx, t, c, first)
	repo := strings.TrimSuffix(strings.TrimPrefix(older.Ref, registry.Host+"/"), ":latest")
	younger, err := registry.Push(ctx, repo, newLayer(t, harness.Gzip, harness.Random(mib)))
	must(t, err)
	d2 := digestOf(younger.Ref)
	if _, _, exit := wolf(ctx, t, c.Nodes[2], "prefetch", younger.Ref, "--digest", d2, "--nodes", "zone=a", "--wait"); exit != 0 {
		t.Errorf("the younger one: exit status %d", exit)
	}
	registry.Behave(harness.Behavior{})
	awaitStates(ctx, t, c.Nodes[3], first, "canceled canceled")
	for _, n := range prefetchStatus(ctx, t, c.Nodes[3], first).Nodes {
		if !n.Superseded {
			t.Errorf("%s says %q", n.Node, n.Reason)
		}
	}
	if e := <-waited; e.exit != 3 || !strings.Contains(e.said, "superseded on 2 of 2 nodes: ") {
		t.Errorf("who waited for the older one: exit status %d, %q", e.exit, e.said)
	}
	if answer := <-ci; !strings.Contains(answer, `"state":"superseded"`) || strings.Count(answer, `"state":"canceled"`) != 2 {
		t.Errorf("a CI system that waited for the older one was told %s", answer)
	}
	for _, n := range c.Nodes[:2] {
		out, err := n.Ctr(ctx, kubelets, "images", "ls", "name=="+younger.Ref)
		must(t, err)
		if !strings.Contains(out, d2) || strings.Contains(out, d1) {
			t.Errorf("%s has %s", n.Name, out)
		}
	}
}

// askAsCI has a notifier wait for a request as it does for a CI system, and returns
// where the answer will be, once that is on its way.
func askAsCI(ctx context.Context, t *testing.T, c *harness.Cluster, id string) <-chan string {
	t.Helper()
	n := notifier(t, "pfci", registry.Host, c.Nodes, "[api]\ntoken = \""+feedToken+"\"\n")
	must(t, n.Start(ctx))
	t.Cleanup(func() { must(t, n.Stop()) })
	get := func(query string) string {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+n.Address+"/v1/prefetch/"+id+query, http.NoBody)
		if err != nil {
			return err.Error()
		}
		req.Header.Set("Authorization", "Bearer "+feedToken)
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			return err.Error()
		}
		defer res.Body.Close() //nolint:errcheck // only read
		b, err := io.ReadAll(res.Body)
		return fmt.Sprintf("%s: %s (%v)", res.Status, b, err)
	}
	if answer := get(""); !strings.Contains(answer, `"state":"running"`) {
		t.Errorf("before the younger one: %s", answer)
	}
	told := make(chan string, 1)
	go func() { told <- get("?wait=60s") }()
	return told
}

func prefetchExits(ctx context.Context, t *testing.T, c *harness.Cluster) {
	img := image(ctx, t, 32)
	registry.Behave(harness.Behavior{Rate: 2 * mib})
	if _, stderr, exit := wolf(ctx, t, c.Nodes[0], "prefetch", "--wait", "--timeout", "3s", "--nodes", "zone=b", img.Ref); exit != 124 || !strings.Contains(stderr, "pf3, pf4") {
		t.Errorf("time is up: exit status %d", exit)
	}
	if _, stderr, exit := wolf(ctx, t, c.Nodes[0], "prefetch", img.Ref, "--nodes", "zone in a"); exit != 2 || !strings.Contains(stderr, "nodes.labels") {
		t.Errorf("broken selector: exit status %d", exit)
	}
	if _, stderr, exit := wolf(ctx, t, c.Nodes[0], "prefetch", img.Ref, "--nodes", "zone=z"); exit != 1 || !strings.Contains(stderr, "no node is selected") {
		t.Errorf("no node: exit status %d", exit)
	}
	if _, _, exit := wolf(ctx, t, c.Nodes[0], "prefetch status", "unknown"); exit != 1 {
		t.Errorf("unknown request: exit status %d", exit)
	}
	registry.Behave(harness.Behavior{})
	gone := strings.TrimSuffix(img.Ref, ":latest") + ":gone"
	if out, stderr, exit := wolf(ctx, t, c.Nodes[0], "prefetch", "--wait", "--nodes", "zone=b", gone); exit != 1 || !strings.Contains(stderr, "2 of 2 nodes failed") || !strings.Contains(out, gone) {
		t.Errorf("a tag that there is not: exit status %d", exit)
	}
}

func prefetchByNetwork(ctx context.Context, t *testing.T, c *harness.Cluster, token string) {
	n := c.Nodes[3]
	info, err := os.Stat(n.Wolf.NodeSocket())
	must(t, err)
	if info.Mode().Perm() != 0o660 {
		t.Errorf("the socket has mode %o", info.Mode().Perm())
	}
	ca := filepath.Join(t.TempDir(), "ca")
	cmd := exec.CommandContext(ctx, env.Bin.ImageWolf, "cluster-key", "ca", "--config", n.Wolf.Config())
	pem, err := cmd.Output()
	must(t, err)
	must(t, os.WriteFile(ca, pem, 0o600))
	wrong := filepath.Join(t.TempDir(), "wrong")
	must(t, os.WriteFile(wrong, []byte("a-token-for-none-of-ci\n"), 0o600))
	host, _, err := net.SplitHostPort(n.Wolf.Data)
	must(t, err)
	dial := func(token string) *nodeapi.Client {
		cl, err := nodeapi.Dial(nodeapi.Options{Addresses: []string{c.Nodes[0].Wolf.Data, net.JoinHostPort(host, "7949")}, CAFile: ca, TokenFile: token})
		must(t, err)
		t.Cleanup(func() { _ = cl.Close() })
		return cl
	}
	if _, err := dial(wrong).ListPrefetches(ctx, &imagewolfv1.ListPrefetchesRequest{}, grpc.WaitForReady(true)); status.Code(err) != codes.Unauthenticated {
		t.Errorf("with the wrong token: %v", err)
	}
	img := image(ctx, t, 4)
	cl := dial(token)
	st, err := cl.Prefetch(ctx, &imagewolfv1.PrefetchRequest{Image: img.Ref, Digest: img.Manifest, Nodes: &imagewolfv1.NodeSelection{Count: 1}}, grpc.WaitForReady(true))
	must(t, err)
	awaitStates(ctx, t, c.Nodes[0], st.Request.Id, "done")
	sent(t, img.Bytes())
}
