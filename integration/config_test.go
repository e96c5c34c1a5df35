package integration

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/imagewolf/imagewolf/integration/harness"
)

// TestExampleConfig boots the example configuration as it is, but for the
// places that belong to the machine, which flags and variables override.
func TestExampleConfig(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	key, err := harness.NewClusterKey(ctx, env)
	must(t, err)
	dir, err := env.Dir("example")
	must(t, err)
	content, socket := filepath.Join(dir, "content"), filepath.Join(dir, "w.sock")
	must(t, os.MkdirAll(content, 0o755))
	logFile, err := os.Create(filepath.Join(dir, "log"))
	must(t, err)
	defer logFile.Close()
	cmd := exec.CommandContext(ctx, env.Bin.ImageWolf, "daemon", "--config", "../config.toml.example",
		"--root", content, "--socket", socket, "--cluster-gossip-address", "127.0.0.1:0")
	cmd.Env = append(os.Environ(), "IMAGEWOLF_CLUSTER_KEY="+key, "IMAGEWOLF_CLUSTER_DATA_ADDRESS=127.0.0.1:0",
		"IMAGEWOLF_CONTAINERD_SOCKET="+filepath.Join(dir, "c.sock"))
	cmd.Stdout, cmd.Stderr = logFile, logFile
	must(t, cmd.Start())
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	err = harness.Poll(ctx, 20*time.Millisecond, func() error {
		select {
		case err := <-ended:
			cancel()
			return fmt.Errorf("the daemon ended: %w", errors.Join(err, errors.New(harness.Tail(logFile.Name(), 2000))))
		default:
		}
		conn, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
		if err != nil {
			return err
		}
		return conn.Close()
	})
	must(t, err)
	must(t, cmd.Process.Signal(syscall.SIGTERM))
	if err := <-ended; err != nil {
		t.Errorf("told to stop, it ended with %v:\n%s", err, harness.Tail(logFile.Name(), 2000))
	}
}
