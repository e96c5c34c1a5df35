package integration

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/imagewolf/imagewolf/integration/harness"
)

// BenchmarkRest reports what a daemon costs that has a thousand blobs, knows
// another node, and has nothing to do. Run it on a quiet machine with
//
//	go test -run '^$' -bench Rest -benchtime 1x
func BenchmarkRest(b *testing.B) {
	const (
		blobs  = 1000
		settle = 20 * time.Second
		rest   = 20 * time.Second
	)
	must := func(err error) {
		b.Helper()
		if err != nil {
			b.Fatal(err)
		}
	}
	for b.Loop() {
		ctx, cancel := context.WithTimeout(b.Context(), 3*time.Minute)
		defer cancel()
		key, err := harness.NewClusterKey(ctx, env)
		must(err)
		full, err := env.Dir("rest-full")
		must(err)
		empty, err := env.Dir("rest-empty")
		must(err)
		must(randomBlobs(filepath.Join(full, "content"), blobs))
		began := time.Now()
		one, err := startIdle(ctx, full, key, "127.21.0.1", "127.21.0.2")
		must(err)
		two, err := startIdle(ctx, empty, key, "127.21.0.2", "127.21.0.1")
		must(err)
		b.ReportMetric(time.Since(began).Seconds(), "s-to-serve")
		time.Sleep(settle)
		for _, d := range []struct {
			name string
			cmd  *exec.Cmd
		}{{"", one}, {"-empty", two}} {
			before, err := processorTime(d.cmd.Process.Pid)
			must(err)
			time.Sleep(rest)
			after, err := processorTime(d.cmd.Process.Pid)
			must(err)
			b.ReportMetric((after-before).Seconds()/rest.Seconds()*100, "%core"+d.name)
			for field, unit := range map[string]string{"VmRSS": "MiB-rss", "RssAnon": "MiB-anon", "VmHWM": "MiB-peak"} {
				n, err := statusField(d.cmd.Process.Pid, field)
				must(err)
				b.ReportMetric(float64(n)/mib, unit+d.name)
			}
		}
		b.ReportMetric(0, "ns/op")
		for _, cmd := range []*exec.Cmd{one, two} {
			must(cmd.Process.Signal(syscall.SIGTERM))
			if err := cmd.Wait(); err != nil {
				b.Errorf("told to stop, it ended with %v", err)
			}
		}
		must(errors.Join(os.RemoveAll(full), os.RemoveAll(empty)))
	}
}

// randomBlobs fills a content directory with n blobs of 64 KiB to 1 MiB.
func randomBlobs(root string, n int) error {
	dir := filepath.Join(root, "blobs", "sha256")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	r := rand.NewChaCha8([32]byte{})
	for i := range n {
		data := make([]byte, 64<<10+i*((1<<20)-(64<<10))/n)
		if _, err := io.ReadFull(r, data); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("%x", sha256.Sum256(data))), data, 0o444); err != nil {
			return err
		}
	}
	return nil
}

// startIdle starts a daemon without a containerd and waits until it serves.
func startIdle(ctx context.Context, dir, key, ip, join string) (*exec.Cmd, error) {
	content, socket := filepath.Join(dir, "content"), filepath.Join(dir, "w.sock")
	log, err := os.Create(filepath.Join(dir, "log"))
	if err = errors.Join(err, os.MkdirAll(content, 0o755)); err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.CommandContext(ctx, env.Bin.ImageWolf, "daemon", "--root", content, "--socket", socket)
	cmd.Env = append(os.Environ(), "IMAGEWOLF_CLUSTER_KEY="+key, "IMAGEWOLF_CLUSTER_NAME=rest-"+ip,
		"IMAGEWOLF_CLUSTER_GOSSIP_ADDRESS="+net.JoinHostPort(ip, "7946"), "IMAGEWOLF_CLUSTER_DATA_ADDRESS="+net.JoinHostPort(ip, "7947"),
		"IMAGEWOLF_CLUSTER_JOIN="+join, "IMAGEWOLF_CONTAINERD_SOCKET="+filepath.Join(dir, "c.sock"))
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	return cmd, harness.Poll(ctx, 20*time.Millisecond, func() error {
		conn, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
		if err != nil {
			return errors.Join(err, errors.New(harness.Tail(log.Name(), 2000)))
		}
		return conn.Close()
	})
}

// processorTime is what a process has used so far, to a hundredth of a second.
func processorTime(pid int) (time.Duration, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// The second field is a name in brackets that may have blanks.
	f := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	user, err := strconv.ParseInt(f[11], 10, 64)
	if err != nil {
		return 0, err
	}
	system, err := strconv.ParseInt(f[12], 10, 64)
	return time.Duration(user+system) * 10 * time.Millisecond, err
}

// statusField is a size out of /proc/<pid>/status, in bytes.
func statusField(pid int, field string) (int64, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, field+":"); ok {
			n, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
			return n << 10, err
		}
	}
	return 0, fmt.Errorf("no %s", field)
}
