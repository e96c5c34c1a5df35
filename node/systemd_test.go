package node

import (
	"context"
	"log/slog"
	"net"
	"path/filepath"
	"testing"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	"google.golang.org/grpc"

	"github.com/imagewolf/imagewolf/config"
	"github.com/imagewolf/imagewolf/internal/systemd/systemdtest"
	"github.com/imagewolf/imagewolf/proxy"
)

// TestSystemdIsTold: that the node is ready, that it lives, and that it stops.
func TestSystemdIsTold(t *testing.T) {
	s, dir := systemdtest.Listen(t, 400*time.Millisecond), t.TempDir()
	cfg := config.Default()
	cfg.Root, cfg.Socket, cfg.NodeAPI.Socket = filepath.Join(dir, "content"), filepath.Join(dir, "s"), filepath.Join(dir, "n")
	cfg.Cluster.Insecure, cfg.Cluster.Name = true, "n"
	cfg.Cluster.GossipAddress, cfg.Cluster.DataAddress = "127.0.0.1:0", "127.0.0.1:0"
	n, err := New(cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	// systemd may hand over a socket at another path than the settings have.
	n.listen = func(string) (net.Listener, error) { return proxy.Bind(filepath.Join(dir, "systemd's")) }
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- n.Run(ctx) }()
	s.Until(t, "READY=1")
	s.Until(t, "WATCHDOG=1")
	s.Until(t, "WATCHDOG=1")
	cancel()
	s.Until(t, "STOPPING=1")
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// TestWatchdogMissesTheStore: a socket on which nobody answers is no life.
func TestWatchdogMissesTheStore(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close() //nolint:errcheck // nobody is accepted
	conn, err := dialSocket(path)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close() //nolint:errcheck // closed once, here
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := answers(ctx, contentapi.NewContentClient(conn)); err == nil {
		t.Error("the store is said to answer")
	}
}

// full is a store that has whatever it is asked for.
type full struct {
	contentapi.ContentClient
	asked map[string]bool
}

func (f full) Info(_ context.Context, r *contentapi.InfoRequest, _ ...grpc.CallOption) (*contentapi.InfoResponse, error) {
	f.asked[r.Digest] = true
	return &contentapi.InfoResponse{}, nil
}

// TestNoContentStopsTheWatchdog: a store that has what it is asked for answers, and
// nobody can know before what that will be.
func TestNoContentStopsTheWatchdog(t *testing.T) {
	f := full{asked: map[string]bool{}}
	for range 2 {
		if err := answers(t.Context(), f); err != nil {
			t.Errorf("a store that answers: %v", err)
		}
	}
	if len(f.asked) != 2 {
		t.Errorf("asked twice for the same: %v", f.asked)
	}
}
