package node

import (
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/imagewolf/imagewolf/cluster"
	"github.com/imagewolf/imagewolf/config"
	"github.com/imagewolf/imagewolf/node/metrics"
	"github.com/imagewolf/imagewolf/plugin/store"
)

// told returns what a node tells Prometheus, by name with label.
func told(t *testing.T, n *Node) map[string]float64 {
	t.Helper()
	answer := httptest.NewRecorder()
	n.metrics.Handler().ServeHTTP(answer, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/metrics", nil))
	out := map[string]float64{}
	for line := range strings.Lines(answer.Body.String()) {
		name, value, ok := strings.Cut(strings.TrimSpace(line), "} ")
		if name += "}"; !ok {
			name, value, _ = strings.Cut(strings.TrimSpace(line), " ")
		}
		if v, err := strconv.ParseFloat(value, 64); err == nil && strings.HasPrefix(name, "imagewolf_") {
			out[name] = v
		}
	}
	return out
}

// What a pull on two nodes is told as, by both.
func TestPullIsCounted(t *testing.T) {
	key, seed := cluster.GenerateKey(), freeAddress(t)
	var nodes []*testNode
	for _, name := range []string{"one", "two"} {
		cfg := testConfig(t, name, key, seed)
		if name == "one" {
			cfg.Cluster.GossipAddress = seed
		}
		nodes = append(nodes, startNode(t, cfg))
	}
	for _, tn := range nodes {
		tn.awaitMembers(t, 2)
	}
	r := newRegistry(t, 9*mib)
	pullAll(t, nodes[:1], r)
	pullAll(t, nodes[1:], r)
	size := float64(len(r.blob))
	for i, want := range []map[string]float64{
		{"imagewolf_registry_received_bytes_total": size, "imagewolf_peer_received_bytes_total": 0, "imagewolf_peer_sent_bytes_total": size},
		{"imagewolf_registry_received_bytes_total": 0, "imagewolf_peer_received_bytes_total": size, "imagewolf_peer_sent_bytes_total": 0},
	} {
		want["imagewolf_members"] = 2
		want["imagewolf_blobs_completed_total"] = 1
		want["imagewolf_blobs_failed_total"] = 0
		want["imagewolf_digest_mismatches_total"] = 0
		got := told(t, nodes[i].Node)
		for name, v := range want {
			if is, ok := got[name]; !ok || is != v {
				t.Errorf("%s: %s is %v, want %v", nodes[i].cfg.Cluster.Name, name, is, v)
			}
		}
	}
	blobs, members := 0.0, 0.0
	for _, tn := range nodes {
		got := told(t, tn.Node)
		blobs, members = blobs+got["imagewolf_tracker_blobs"], members+got["imagewolf_tracker_members"]
	}
	if blobs != 1 || members != 2 {
		t.Errorf("%v blobs tracked with %v members, want 1 and 2", blobs, members)
	}
}

// Nobody to pull from is told, with the reason.
func TestFallbackIsCounted(t *testing.T) {
	cfg := testConfig(t, "alone", cluster.GenerateKey(), "")
	cfg.Cluster.DataAddress = "192.0.2.1:1" // no machine has it, so the cluster's side does not come up
	tn := startNode(t, cfg)
	r := newRegistry(t, mib)
	pullAll(t, []*testNode{tn}, r)
	if got := told(t, tn.Node)[`imagewolf_registry_fallbacks_total{reason="no cluster"}`]; got != 1 {
		t.Errorf("%v fallbacks counted, want 1", got)
	}
}

// A panic in a part of the cluster's side is contained, and counted under the
// part's name.
func TestPanicIsContainedAndCounted(t *testing.T) {
	cfg := config.Default()
	cfg.Cluster.Insecure, cfg.Cluster.Name = true, "n"
	n, err := New(cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	for i, part := range parts {
		err := n.guard(part, func() error {
			if i%2 == 0 {
				panic("no such luck")
			}
			return io.EOF
		})
		if i%2 == 0 == errors.Is(err, io.EOF) {
			t.Errorf("%s: %v", part, err)
		}
	}
	counted := told(t, n)
	for i, part := range parts {
		want := float64((i + 1) % 2)
		if got, ok := counted[`imagewolf_panics_total{part="`+part+`"}`]; !ok || got != want {
			t.Errorf("%s: %v panics counted, want %v", part, got, want)
		}
	}
}

// willing is content whose one client goes to the registry when told to.
type willing struct {
	source
	waits bool
}

func (w *willing) Watch() (store.State, <-chan struct{}) { return store.State{}, nil }

func (w *willing) Fetch() bool {
	went := w.waits
	w.waits = false
	return went
}

// A client is counted when it goes, not each time that it is told to.
func TestClientSentToTheRegistryIsCounted(t *testing.T) {
	cfg := config.Default()
	cfg.Cluster.Insecure, cfg.Cluster.Name = true, "n"
	n, err := New(cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	for _, reason := range []string{metrics.NoTracker, metrics.WrongBytes} {
		s := &session{node: n, content: &willing{waits: true}}
		s.fetch(reason)
		s.fetch(reason)
	}
	s := &session{node: n, log: n.log, content: &willing{waits: true}, state: store.State{Waiting: 1}}
	s.patience(time.Now())
	s.patience(time.Now())
	counted := told(t, n)
	for _, reason := range []string{metrics.NoTracker, metrics.WrongBytes, metrics.NoProgress} {
		if got := counted[`imagewolf_registry_fallbacks_total{reason="`+reason+`"}`]; got != 1 {
			t.Errorf("%s: %v, want 1", reason, got)
		}
	}
}

// A panic in a goroutine of the cluster's side ends that side, or, over what a peer
// sent, nothing but what has to do with that peer; both are counted.
func TestPanicEndsTheClustersSide(t *testing.T) {
	cfg := testConfig(t, "n", cluster.GenerateKey(), "")
	n, err := New(cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", cfg.Cluster.DataAddress)
	if err != nil {
		t.Fatal(err)
	}
	st, err := newStack(n, l)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error)
	go func() { ended <- st.run(t.Context()) }()
	unlucky := func() { panic("no such luck") }
	st.contain(partDataPort)(unlucky)
	err = n.contain(partGRPC).Stream(nil, nil, &grpc.StreamServerInfo{}, func(any, grpc.ServerStream) error { panic("no such luck") })
	if status.Code(err) != codes.Internal {
		t.Errorf("the call ended with %v", err)
	}
	select {
	case err := <-ended:
		t.Fatalf("ended over what a peer sent: %v", err)
	default:
	}
	st.containOrEnd(partSwarm)(unlucky)
	if err := <-ended; err == nil || !strings.Contains(err.Error(), "swarm: panic: no such luck") {
		t.Errorf("ended with %v", err)
	}
	counted := told(t, n)
	for _, part := range []string{partDataPort, partGRPC, partSwarm} {
		if got := counted[`imagewolf_panics_total{part="`+part+`"}`]; got != 1 {
			t.Errorf("%s: %v panics counted, want 1", part, got)
		}
	}
}
