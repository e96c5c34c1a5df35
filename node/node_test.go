package node

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	contentproxy "github.com/containerd/containerd/v2/core/content/proxy"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/imagewolf/imagewolf/cluster"
	"github.com/imagewolf/imagewolf/config"
	"github.com/imagewolf/imagewolf/plugin/store"
)

// registry is where blobs come from, and counts what it hands out.
type registry struct {
	blob []byte
	says digest.Digest   // what it claims the blob to be; "": the truth
	gate func(off int64) // may block before the byte at off is read
	sent atomic.Int64
	gets atomic.Int64
}

func newRegistry(t *testing.T, size int) *registry {
	t.Helper()
	r := &registry{blob: make([]byte, size)}
	if _, err := rand.Read(r.blob); err != nil {
		t.Fatal(err)
	}
	return r
}

func (r *registry) desc() ocispec.Descriptor {
	return ocispec.Descriptor{
		MediaType: ocispec.MediaTypeImageLayer, Digest: cmp.Or(r.says, digest.FromBytes(r.blob)), Size: int64(len(r.blob)),
	}
}

// reader is one request to the registry, lazily sent like containerd's.
type reader struct {
	r    *registry
	off  int64
	sent bool
}

func (r *reader) Seek(off int64, whence int) (int64, error) {
	if whence != io.SeekStart {
		return 0, errors.New("only from the start")
	}
	r.off = off
	return off, nil
}

func (r *reader) Read(p []byte) (int, error) {
	if !r.sent {
		r.sent = true
		r.r.gets.Add(1)
	}
	if r.off >= int64(len(r.r.blob)) {
		return 0, io.EOF
	}
	if r.r.gate != nil {
		r.r.gate(r.off)
	}
	n := copy(p[:min(len(p), 64<<10)], r.r.blob[r.off:])
	r.off += int64(n)
	r.r.sent.Add(int64(n))
	return n, nil
}

// testNode is a node and what plays its containerd.
type testNode struct {
	*Node
	cfg    config.Config
	client content.Store
	cancel func() // tells it to stop
	end    func() // and waits
	stop   func() // and closes the connection before
}

func testConfig(t *testing.T, name, key, join string) config.Config {
	t.Helper()
	dir := t.TempDir()
	cfg := config.Default()
	cfg.Root = filepath.Join(dir, "content")
	cfg.Socket = filepath.Join(dir, "s")
	cfg.ContainerdSocket = ""
	cfg.NodeAPI.Socket = filepath.Join(dir, "n")
	// Many nodes share few processors here, so that nobody answers in time.
	cfg.Tracker.DecideTimeout = config.Duration(10 * time.Second)
	cfg.Tracker.StallTimeout = config.Duration(5 * time.Second)
	cfg.Cluster.Name = name
	cfg.Cluster.ClusterKey = key
	cfg.Cluster.GossipAddress = "127.0.0.1:0"
	cfg.Cluster.DataAddress = "127.0.0.1:0"
	if join != "" {
		cfg.Cluster.Join = []string{join}
	}
	return cfg
}

func startNode(t *testing.T, cfg config.Config, change ...func(*Node)) *testNode {
	t.Helper()
	n, err := New(cfg, testLog(t).With("node", cfg.Cluster.Name))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range change {
		f(n)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- n.Run(ctx) }()
	conn, err := grpc.NewClient("unix://"+cfg.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	tn := &testNode{Node: n, cfg: cfg, client: contentproxy.NewContentStore(conn), cancel: cancel}
	tn.stop = func() {
		if err := conn.Close(); err != nil && status.Code(err) != codes.Canceled {
			t.Error(err)
		}
		tn.end()
	}
	tn.end = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("%s: %v", cfg.Cluster.Name, err)
		}
	})
	t.Cleanup(tn.stop)
	return tn
}

// testLog writes to the test's output for as long as the test runs: gossip
// may have a last word after it.
func testLog(t *testing.T) *slog.Logger {
	var over atomic.Bool
	t.Cleanup(func() { over.Store(true) })
	return slog.New(slog.NewTextHandler(writerFunc(func(p []byte) (int, error) {
		if over.Load() || bytes.Contains(p, []byte("part=torrent")) {
			return len(p), nil
		}
		return t.Output().Write(p)
	}), &slog.HandlerOptions{Level: slog.LevelDebug}))
}

type writerFunc func(p []byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// startNodes starts n nodes, configured as change has it, and waits until all know all.
func startNodes(t *testing.T, n int, change ...func(*config.Config)) []*testNode {
	t.Helper()
	key := cluster.GenerateKey()
	seed := freeAddress(t)
	nodes := make([]*testNode, n)
	for i := range nodes {
		cfg := testConfig(t, fmt.Sprintf("node%d", i), key, seed)
		if i == 0 {
			cfg.Cluster.GossipAddress = seed
		}
		for _, f := range change {
			f(&cfg)
		}
		nodes[i] = startNode(t, cfg)
	}
	for _, tn := range nodes {
		tn.awaitMembers(t, n)
	}
	return nodes
}

func (tn *testNode) awaitMembers(t *testing.T, n int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		if st := tn.current(); st != nil && len(st.cluster.Members()) == n {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("%s does not know %d members", tn.cfg.Cluster.Name, n)
		case <-tick.C:
		}
	}
}

func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	return l.Addr().String()
}

// pull does what containerd does for one blob: open a writer, ask for the
// status, fetch what is missing, commit.
func (tn *testNode) pull(ctx context.Context, r *registry, namespace string) error {
	ctx = namespaces.WithNamespace(ctx, namespace)
	desc := r.desc()
	w, err := content.OpenWriter(ctx, tn.client,
		content.WithRef(namespace+"/1/layer-"+desc.Digest.String()), content.WithDescriptor(ocispec.Descriptor{Size: desc.Size}))
	if errdefs.IsAlreadyExists(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer func() { _ = w.Close() }()
	st, err := w.Status()
	if err != nil {
		return err
	}
	if st.Offset == desc.Size {
		return ignoreExists(w.Commit(ctx, desc.Size, desc.Digest))
	}
	return ignoreExists(content.Copy(ctx, w, &reader{r: r}, desc.Size, desc.Digest))
}

func ignoreExists(err error) error {
	if errdefs.IsAlreadyExists(err) {
		return nil
	}
	return err
}

// check reads the blob back through the socket.
func (tn *testNode) check(t *testing.T, r *registry) {
	t.Helper()
	got, err := content.ReadBlob(namespaces.WithNamespace(t.Context(), "default"), tn.client, r.desc())
	if err != nil {
		t.Errorf("%s: %v", tn.cfg.Cluster.Name, err)
		return
	}
	if !bytes.Equal(got, r.blob) {
		t.Errorf("%s: wrong bytes", tn.cfg.Cluster.Name)
	}
}

// pullAll pulls on all nodes at once and checks what they got.
func pullAll(t *testing.T, nodes []*testNode, r *registry) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	var wg sync.WaitGroup
	for _, tn := range nodes {
		wg.Go(func() {
			if err := tn.pull(ctx, r, "default"); err != nil {
				t.Errorf("%s: %v", tn.cfg.Cluster.Name, err)
			}
		})
	}
	wg.Wait()
	for _, tn := range nodes {
		tn.check(t, r)
	}
}

func wantSent(t *testing.T, r *registry, copies float64) {
	t.Helper()
	if got := float64(r.sent.Load()) / float64(len(r.blob)); got > copies {
		t.Errorf("the registry sent %.3f copies in %d requests, want at most %.3f", got, r.gets.Load(), copies)
	}
}

// What keeps a node from serving its containerd is told by the setting.
func TestRunNamesTheSetting(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for setting, change := range map[string]func(*config.Config){
		"socket": func(c *config.Config) { c.Socket = file },
		"root":   func(c *config.Config) { c.Root = file },
	} {
		cfg := testConfig(t, "n", cluster.GenerateKey(), "")
		change(&cfg)
		n, err := New(cfg, testLog(t))
		if err != nil {
			t.Fatal(err)
		}
		if err := n.Run(t.Context()); err == nil || !strings.HasPrefix(err.Error(), setting+": ") {
			t.Errorf("%s: %v", setting, err)
		}
	}
}

func TestColdPullLeavesTheRegistryOnce(t *testing.T) {
	for _, size := range []int{1000, 64 << 10, 64<<10 + 1, 20<<20 + 4711} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			nodes := startNodes(t, 5)
			r := newRegistry(t, size)
			pullAll(t, nodes, r)
			wantSent(t, r, 1)
		})
	}
}

func TestWarmPullNeedsNoRegistry(t *testing.T) {
	nodes := startNodes(t, 4)
	r := newRegistry(t, 12<<20)
	pullAll(t, nodes[:1], r)
	pullAll(t, nodes[1:], r)
	wantSent(t, r, 1)
}

func TestSmallWarmPullNeedsNoRegistry(t *testing.T) {
	nodes := startNodes(t, 3)
	r := newRegistry(t, 3000)
	pullAll(t, nodes[:1], r)
	pullAll(t, nodes[1:], r)
	wantSent(t, r, 1)
}

func TestAloneGoesToTheRegistry(t *testing.T) {
	nodes := startNodes(t, 1)
	r := newRegistry(t, 5<<20)
	pullAll(t, nodes, r)
	wantSent(t, r, 1)
}

func TestTwoNamespacesShareOneFetch(t *testing.T) {
	nodes := startNodes(t, 2)
	r := newRegistry(t, 6<<20)
	var wg sync.WaitGroup
	for _, ns := range []string{"one", "two"} {
		wg.Go(func() {
			if err := nodes[0].pull(t.Context(), r, ns); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	nodes[0].check(t, r)
	wantSent(t, r, 1)
}

// pullInVain has the first node pull from one registry, up to the byte at off, and
// then the others from another. kill ends the first pull; others waits for the
// rest of them, which must succeed.
func pullInVain(t *testing.T, nodes []*testNode, from, rest *registry, off int64) (kill, others func()) {
	t.Helper()
	reached, resume := make(chan struct{}), make(chan struct{})
	var once sync.Once
	from.gate = func(at int64) {
		if at >= off {
			once.Do(func() { close(reached) })
			<-resume
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	first := make(chan error, 1)
	go func() { first <- nodes[0].pull(ctx, from, "default") }()
	<-reached
	var wg sync.WaitGroup
	for _, tn := range nodes[1:] {
		wg.Go(func() {
			if err := tn.pull(t.Context(), rest, "default"); err != nil {
				t.Errorf("%s: %v", tn.cfg.Cluster.Name, err)
			}
		})
	}
	kill = func() {
		t.Helper()
		cancel()
		close(resume)
		if err := <-first; err == nil {
			t.Error("the first pull was killed and says it is complete")
		}
	}
	others = func() {
		t.Helper()
		wg.Wait()
		for _, tn := range nodes[1:] {
			tn.check(t, rest)
		}
	}
	return kill, others
}

// A node that is told to stop in the middle of a pull goes on with it for a moment:
// neither its own pull fails nor that of one who has it from there.
func TestStopInAPull(t *testing.T) {
	r := newRegistry(t, 4*mib)
	nodes := startNodes(t, 3)
	reached, released := make(chan struct{}), make(chan struct{})
	once := sync.OnceFunc(func() { close(reached) })
	r.gate = func(off int64) {
		if off >= 2*mib {
			once()
			<-released
		}
	}
	pulls := make(chan error, len(nodes))
	for _, tn := range nodes {
		go func() { pulls <- tn.pull(t.Context(), r, "default") }()
	}
	<-reached
	var stops sync.WaitGroup
	for _, tn := range nodes[1:] {
		tn.cancel()
		stops.Go(tn.end)
	}
	close(released)
	for range nodes {
		if err := <-pulls; err != nil {
			t.Error(err)
		}
	}
	stops.Wait()
	wantSent(t, r, 1)
}

// The client that fetches dies in mid-blob: another node goes on from the
// byte it reached, and the registry sends about one copy in all.
func TestFetchersClientDies(t *testing.T) {
	nodes := startNodes(t, 4)
	r := newRegistry(t, 32<<20)
	kill, others := pullInVain(t, nodes, r, r, 17*mib)
	kill()
	others()
	// The tail of the segment that the dead client had begun is fetched again.
	wantSent(t, r, 1+float64(4<<20)/float64(len(r.blob)))

	// The first node comes back for what the others have by now.
	before := r.sent.Load()
	pullAll(t, nodes[:1], r)
	if got := r.sent.Load() - before; got != 0 {
		t.Errorf("the registry sent %d bytes to a node whose peers have the blob", got)
	}
}

// A client whose connection to the registry hangs does not hold the other
// clients of its node for longer than max_wait.
func TestHungClientHoldsNobody(t *testing.T) {
	cfg := testConfig(t, "node0", cluster.GenerateKey(), "")
	cfg.Tracker.MaxWait = config.Duration(2 * time.Second)
	tn := startNode(t, cfg)
	tn.awaitMembers(t, 1)
	r := newRegistry(t, 4<<20)
	hung, release := make(chan struct{}), make(chan struct{})
	var first atomic.Bool
	r.gate = func(off int64) {
		if off >= 1<<20 && first.CompareAndSwap(false, true) {
			close(hung)
			<-release
		}
	}
	one := make(chan error, 1)
	go func() { one <- tn.pull(t.Context(), r, "one") }()
	<-hung
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := tn.pull(ctx, r, "two"); err != nil {
		t.Error(err)
	}
	close(release)
	if err := <-one; err != nil {
		t.Error(err)
	}
	tn.check(t, r)
}

// A seeder whose disk lies: the pull is right all the same, from the registry.
func TestWrongBytesEndAtTheRegistry(t *testing.T) {
	nodes := startNodes(t, 2)
	r := newRegistry(t, 9<<20)
	pullAll(t, nodes[:1], r)
	corrupt(t, nodes[0], r)
	nodes[0].stop()
	nodes[0] = startNode(t, nodes[0].cfg)
	nodes[0].awaitMembers(t, 2)
	nodes[1].awaitMembers(t, 2)
	pullAll(t, nodes[1:], r)
}

// The node that fetches brings wrong bytes, and its client dies in mid-blob. The
// next fetcher goes on behind the wrong prefix, which shows only at the end; yet
// every pull that began succeeds, and the registry sends about one copy more.
func TestWrongPrefixIsFetchedAgain(t *testing.T) {
	nodes := startNodes(t, 4)
	r := newRegistry(t, 24<<20)
	wrong := &registry{blob: bytes.Clone(r.blob), says: r.desc().Digest}
	wrong.blob[mib] ^= 1
	kill, others := pullInVain(t, nodes, wrong, r, 12*mib)
	for _, tn := range nodes[1:] {
		tn.awaitOffset(t, r, 10*mib)
	}
	kill()
	others()
	// The tail behind the wrong prefix, then all of it by one node.
	wantSent(t, r, 1.7)
}

// awaitOffset waits until so many bytes of the blob have come.
func (tn *testNode) awaitOffset(t *testing.T, r *registry, n int64) {
	t.Helper()
	ctx, cancel := context.WithTimeout(namespaces.WithNamespace(t.Context(), "default"), 30*time.Second)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		if st, err := tn.client.Status(ctx, "default/1/layer-"+r.desc().Digest.String()); err == nil && st.Offset >= n {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("%s does not reach %d bytes", tn.cfg.Cluster.Name, n)
		case <-tick.C:
		}
	}
}

const mib = 1 << 20

var _ store.Filler = (*Node)(nil)

// corrupt turns a byte of a blob on a node's disk, behind the store's back.
func corrupt(t *testing.T, tn *testNode, r *registry) {
	t.Helper()
	p := filepath.Join(tn.cfg.Root, "blobs", "sha256", r.desc().Digest.Encoded())
	f, err := os.OpenFile(p, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte{r.blob[5<<20] ^ 1}, 5<<20); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}
