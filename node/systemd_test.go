package node

import (
	"context"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"

	"github.com/imagewolf/imagewolf/config"
)

// TestSystemdIsTold: that the node is ready, that it lives, and that it stops.
func TestSystemdIsTold(t *testing.T) {
	dir := t.TempDir()
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: filepath.Join(dir, "notify")})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close() //nolint:errcheck // only read from
	t.Setenv("NOTIFY_SOCKET", l.LocalAddr().String())
	t.Setenv("WATCHDOG_USEC", "400000")
	t.Setenv("WATCHDOG_PID", strconv.Itoa(os.Getpid()))
	cfg := config.Default()
	cfg.Root, cfg.Socket, cfg.NodeAPI.Socket = filepath.Join(dir, "content"), filepath.Join(dir, "s"), filepath.Join(dir, "n")
	cfg.Cluster.Insecure, cfg.Cluster.Name = true, "n"
	cfg.Cluster.GossipAddress, cfg.Cluster.DataAddress = "127.0.0.1:0", "127.0.0.1:0"
	n, err := New(cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- n.Run(ctx) }()
	heard := func(want string) {
		t.Helper()
		if err := l.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		for {
			buf := make([]byte, 100)
			k, err := l.Read(buf)
			if err != nil {
				t.Fatalf("systemd did not hear %s: %v", want, err)
			}
			if string(buf[:k]) == want {
				return
			}
		}
	}
	heard("READY=1")
	heard("WATCHDOG=1")
	heard("WATCHDOG=1")
	cancel()
	heard("STOPPING=1")
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
	if err := answers(t.Context(), contentapi.NewContentClient(conn), 50*time.Millisecond); err == nil {
		t.Error("the store is said to answer")
	}
}
