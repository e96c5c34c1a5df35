package harness

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestNetwork: a NIC has the rate that it is given, in either direction, and
// its counters say what went through.
func TestNetwork(t *testing.T) {
	n := NewNetwork()
	defer n.Close()
	near, err := n.Switch()
	if err != nil {
		t.Fatal(err)
	}
	far, err := n.Switch()
	if err != nil {
		t.Fatal(err)
	}
	up, err := far.Uplink(near, 0)
	if err != nil {
		t.Fatal(err)
	}
	const rate = 80_000_000
	var machines []*Machine
	for _, sw := range []*Switch{near, near, far} {
		m, err := sw.Machine(rate)
		if err != nil {
			t.Fatal(err)
		}
		machines = append(machines, m)
	}
	a, b, c := machines[0], machines[1], machines[2]
	const size = 8 << 20
	took := copyBytes(t, a, b, size)
	if want := 8 * size / float64(rate); took < 0.95*want || took > 1.25*want {
		t.Errorf("%.2f s at the NIC's rate, want %.2f", took, want)
	}
	near1, near2 := traffic(t, a.Link), traffic(t, b.Link)
	for what, got := range map[string]int64{"sent": near1.Sent, "received": near2.Received} {
		if got < size*99/100 || got > size*105/100 {
			t.Errorf("%d bytes %s, want %d", got, what, size)
		}
	}
	if got := traffic(t, up); got.Sent > size/100 {
		t.Errorf("%d bytes on a link that was not in the way", got.Sent)
	}
	// Without a bound, and through both switches.
	for _, m := range machines {
		if err := m.SetRate(0); err != nil {
			t.Fatal(err)
		}
	}
	if took := copyBytes(t, c, a, size); took > 0.5*8*size/float64(rate) {
		t.Errorf("%.2f s without a bound", took)
	}
	if got := traffic(t, up).Sent; got < size*99/100 {
		t.Errorf("%d bytes sent over the uplink, want %d", got, size)
	}
	// The slowest link on the way counts.
	if err := up.SetRate(rate); err != nil {
		t.Fatal(err)
	}
	if took := copyBytes(t, a, c, size); took < 0.95*8*size/float64(rate) {
		t.Errorf("%.2f s through a bounded uplink", took)
	}
}

// copyBytes sends bytes from one machine to another and returns the seconds.
func copyBytes(t *testing.T, from, to *Machine, size int64) float64 {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	l, err := to.Listen("0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	out, err := from.dial(ctx, "tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	in, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	began := time.Now()
	sent := make(chan error, 1)
	go func() {
		_, err := out.Write(make([]byte, size))
		sent <- err
	}()
	if _, err := io.CopyN(io.Discard, in, size); err != nil {
		t.Fatal(err)
	}
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
	return time.Since(began).Seconds()
}

func traffic(t *testing.T, l *Link) Traffic {
	t.Helper()
	c, err := l.Traffic()
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// TestNetworkGoes: the owner of a network is killed, and no process and no
// namespace of it stays.
func TestNetworkGoes(t *testing.T) {
	if note := os.Getenv("HARNESS_TEST_NETWORK"); note != "" {
		dieInNetwork(t, note)
	}
	before := spaces(t)
	note := filepath.Join(t.TempDir(), "note")
	cmd := exec.Command(os.Args[0], "-test.run=^TestNetworkGoes$")
	cmd.Env = append(os.Environ(), "HARNESS_TEST_NETWORK="+note)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	err := Poll(ctx, 10*time.Millisecond, func() error {
		_, err := os.Stat(note)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	name, err := os.ReadFile(note)
	if err != nil {
		t.Fatal(err)
	}
	if !spaces(t)[string(name)] || before[string(name)] {
		t.Errorf("the sleeper's namespace %s is not one of its own", name)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	err = Poll(ctx, 10*time.Millisecond, func() error {
		if spaces(t)[string(name)] {
			return fmt.Errorf("there are still processes in %s", name)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(mounts), string(name)) {
		t.Errorf("a mount keeps %s", name)
	}
}

// dieInNetwork builds a network with a process in it, and waits to be killed.
func dieInNetwork(t *testing.T, note string) {
	e, err := NewEnv(Binaries{})
	if err != nil {
		t.Fatal(err)
	}
	sw, err := NewNetwork().Switch()
	if err != nil {
		t.Fatal(err)
	}
	m, err := sw.Machine(1_000_000)
	if err != nil {
		t.Fatal(err)
	}
	p, err := e.startOn(m, "sleeper", filepath.Join(e.Root, "log"), nil, nil, "sleep", "1000")
	if err != nil {
		t.Fatal(err)
	}
	name, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", p.Pid()))
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.WriteFile(note+".new", []byte(name), 0o600), os.Rename(note+".new", note)); err != nil {
		t.Fatal(err)
	}
	select {}
}

// spaces returns the network namespaces that processes are in.
func spaces(t *testing.T) map[string]bool {
	t.Helper()
	links, err := filepath.Glob("/proc/[0-9]*/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]bool{}
	for _, l := range links {
		if name, err := os.Readlink(l); err == nil {
			out[name] = true
		}
	}
	return out
}
