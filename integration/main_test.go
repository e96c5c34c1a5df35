// Package integration tests ImageWolf as its users meet it: real containerd
// daemons, real imagewolf daemons, a real registry.
package integration

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/imagewolf/imagewolf/integration/harness"
)

const mib = 1 << 20

var (
	env      *harness.Env
	registry *harness.Registry
)

func TestMain(m *testing.M) {
	harness.BeRegistry()
	knockOnly()
	storeOnly()
	os.Exit(setUp(m))
}

func setUp(m *testing.M) (code int) {
	bin, err := harness.FindBinaries("../bin", harness.V2, harness.V17)
	if err == nil {
		_, err = bin.Nerdctl()
	}
	if err == nil {
		env, err = harness.NewEnv(bin)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "%v\nThese tests are run by `make test-integration`, as root: it builds what they need.\n", err)
		return 1
	}
	defer func() {
		if err := env.Close(); err != nil {
			fmt.Fprintln(os.Stderr, "left behind:", err)
			code = 1
		}
	}()
	if registry, err = harness.NewRegistry(env); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	if err := writeReport(os.Getenv("FAULTS_JSON")); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

// world is what one scenario runs in: the cluster of one containerd version,
// shared by all scenarios and healed before each.
type world struct {
	*harness.Cluster
	version string
	ns      string // a namespace of its own
}

// clusters are started when first asked for. Scenarios do not run in parallel.
var clusters = map[string]*harness.Cluster{}

// startOnce keeps a second scenario from waiting for a cluster that does not
// start.
var startErrs sync.Map

// each runs a scenario with each version of containerd (all when none is given)
// on a cluster of four nodes in good health.
func each(t *testing.T, scenario func(ctx context.Context, t *testing.T, w *world), versions ...string) {
	t.Helper()
	eachOf(t, "", func(ctx context.Context, t *testing.T, w *world, _ *faultRecord) { scenario(ctx, t, w) }, versions...)
}

// eachFault is each for something that fails, of which the report has a line also
// when the cluster does not start or heal.
func eachFault(t *testing.T, fault string, scenario func(ctx context.Context, t *testing.T, w *world, line *faultRecord), versions ...string) {
	t.Helper()
	eachOf(t, fault, scenario, versions...)
}

// eachOf is eachFault; a fault of "" leaves the report to the scenario.
func eachOf(t *testing.T, fault string, scenario func(ctx context.Context, t *testing.T, w *world, line *faultRecord), versions ...string) {
	t.Helper()
	if len(versions) == 0 {
		versions = []string{harness.V2, harness.V17}
	}
	for _, v := range versions {
		t.Run(v, func(t *testing.T) {
			ctx, cancel := context.WithTimeoutCause(t.Context(), 90*time.Second, errors.New("the scenario takes too long"))
			defer cancel()
			var line *faultRecord
			if fault != "" {
				line = record(t, fault, v)
			}
			lame := func(err error) {
				if line == nil {
					line = record(t, strings.TrimSuffix(t.Name(), "/"+v), v)
				}
				line.say("the nodes are not well: %.200s", err)
				t.Fatalf("the cluster: %v", err)
			}
			registry.Behave(harness.Behavior{})
			c, err := clusterOf(v)
			if err != nil {
				lame(err)
			}
			ns := strings.ToLower(strings.Split(t.Name(), "/")[0])
			t.Cleanup(func() {
				registry.Behave(harness.Behavior{})
				registry.RequireAuth("", "")
				if t.Failed() {
					for _, r := range registry.Requests(nil) {
						t.Log(r)
					}
					t.Log(c.Logs())
				}
			})
			if err := c.Heal(ctx); err != nil {
				lame(err)
			}
			registry.Reset()
			scenario(ctx, t, &world{Cluster: c, version: v, ns: ns}, line)
		})
	}
}

func clusterOf(version string) (*harness.Cluster, error) {
	if err, failed := startErrs.Load(version); failed {
		return nil, fmt.Errorf("the cluster did not start: %v", err)
	}
	if c := clusters[version]; c != nil {
		return c, nil
	}
	c, err := harness.NewCluster(context.Background(), env, harness.ClusterOptions{
		Name: "c" + version[:1] + "n", Nodes: 4, Version: version,
		Hosts: map[string]string{registry.Host: "http://" + registry.Host},
		// Shorter than the default, for the scenarios that wait for it.
		Settings: map[string]string{"tracker": `max_wait = "6s"`},
	})
	if err != nil {
		startErrs.Store(version, err)
		return nil, err
	}
	clusters[version] = c
	return c, nil
}

// notInNames is what a repository's name must not have.
var notInNames = regexp.MustCompile(`[^a-z0-9]+`)

// image pushes an image of random layers of the given sizes (MiB), with a
// runnable program on top.
func image(ctx context.Context, t *testing.T, sizes ...int64) *harness.Image {
	t.Helper()
	return imageOn(ctx, t, nil, sizes...)
}

// imageOn is image with some layers of another at the bottom.
func imageOn(ctx context.Context, t *testing.T, base []*harness.Layer, sizes ...int64) *harness.Image {
	t.Helper()
	layers := base
	for i, mibs := range sizes {
		compression := harness.Gzip
		if i%3 == 1 {
			compression = harness.Zstd
		}
		layers = append(layers, newLayer(t, compression, harness.Random(mibs*mib)))
	}
	if len(base) == 0 {
		// Bytes of its own keep the layer from being one that nodes have.
		layers = append(layers, newLayer(t, harness.Gzip, harness.Join(harness.Program(env), harness.Random(64))))
	}
	repo := strings.Trim(notInNames.ReplaceAllString(strings.ToLower(t.Name()), "-"), "-")
	img, err := registry.Push(ctx, fmt.Sprintf("%s-%d", repo, time.Now().UnixNano()), layers...)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func newLayer(t *testing.T, c harness.Compression, content harness.Content) *harness.Layer {
	t.Helper()
	l, err := harness.NewLayer(env, c, content)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// whole fails the test unless the image is complete on the nodes, by
// containerd's word and by every blob's bytes.
func whole(ctx context.Context, t *testing.T, ns string, img *harness.Image, nodes ...*harness.Node) {
	t.Helper()
	for _, n := range nodes {
		if err := errors.Join(n.Complete(ctx, ns, img.Ref), n.Rehash(img.Blobs)); err != nil {
			t.Error(err)
		}
	}
}

// runs fails the test unless the image runs on the node. Without runc on the
// machine there is nothing to try.
func runs(ctx context.Context, t *testing.T, ns string, img *harness.Image, n *harness.Node) {
	t.Helper()
	if harness.RuncPath() == "" {
		t.Log("no runc on this machine: the image is not run")
		return
	}
	out, err := n.Run(ctx, ns, img.Ref)
	if err != nil || !strings.HasPrefix(out, "hello from a container") {
		t.Errorf("the image on %s: %q, %v", n.Name, out, err)
	}
}

// sent fails the test unless the registry has sent exactly these bytes since
// the last Reset.
func sent(t *testing.T, want int64) {
	t.Helper()
	if got := registry.Bytes(""); got != want {
		t.Errorf("the registry sent %d bytes, want %d", got, want)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// pulling is a pull in the background.
type pulling struct {
	node  *harness.Node
	done  chan error // gets the pull's result, once
	ended time.Time  // to be read when done has been
}

// pull starts to pull an image on nodes, in the background.
func pull(ctx context.Context, ns, ref string, nodes ...*harness.Node) []*pulling {
	var out []*pulling
	for _, n := range nodes {
		p := &pulling{node: n, done: make(chan error, 1)}
		go func() {
			err := n.Pull(ctx, ns, ref)
			p.ended = time.Now()
			p.done <- err
		}()
		out = append(out, p)
	}
	return out
}

// finish waits for pulls and fails the test if one failed.
func finish(t *testing.T, pulls []*pulling) {
	t.Helper()
	for _, p := range pulls {
		if err := <-p.done; err != nil {
			t.Errorf("pull on %s: %v", p.node.Name, err)
		}
	}
}

// reached waits until the registry has sent so many bytes of a blob in one
// answer, and returns that request.
func reached(ctx context.Context, t *testing.T, digest string, n int64) harness.Request {
	t.Helper()
	var found harness.Request
	err := harness.Poll(ctx, 10*time.Millisecond, func() error {
		for _, r := range registry.Gets(digest) {
			if r.Bytes >= n {
				found = r
				return nil
			}
		}
		return fmt.Errorf("no request for %s got %d bytes", digest, n)
	})
	must(t, err)
	return found
}

// nodeOf returns the node of a request.
func (w *world) nodeOf(t *testing.T, r harness.Request) *harness.Node {
	t.Helper()
	for _, n := range w.Nodes {
		if n.Name == r.Node {
			return n
		}
	}
	t.Fatalf("no node of the cluster sent %s", r)
	return nil
}

// without returns the nodes but for one.
func without(nodes []*harness.Node, one *harness.Node) []*harness.Node {
	var out []*harness.Node
	for _, n := range nodes {
		if n != one {
			out = append(out, n)
		}
	}
	return out
}

// from returns the first byte that a Range header asks for.
func from(t *testing.T, r harness.Request) int64 {
	t.Helper()
	var k int64
	if r.Range == "" {
		return 0
	}
	if _, err := fmt.Sscanf(r.Range, "bytes=%d-", &k); err != nil {
		t.Fatalf("range %q: %v", r.Range, err)
	}
	return k
}
