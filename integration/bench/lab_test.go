package bench

import (
	"context"
	"math"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestLab runs a small scenario in both modes: what the NICs count is what the
// registry says that it sent, and nothing of it all remains.
func TestLab(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	before := interfaces(t)
	l, err := newLab("../../bin")
	if err != nil {
		t.Fatal(err)
	}
	closed := false
	defer func() {
		if !closed {
			_ = l.close()
		}
	}()
	o := Options{N: 3, Rate: 100, Layers: 2, LayerMiB: 4}
	for _, r := range []struct {
		name string
		mode Mode
	}{{cold, Direct}, {cold, ImageWolf}, {"zones", Direct}} {
		name, mode := r.name, r.mode
		chosen, err := choose([]string{name})
		if err != nil {
			t.Fatal(err)
		}
		s := chosen[0]
		img, err := l.images(ctx, s, o)
		if err != nil {
			t.Fatal(err)
		}
		got, err := l.run(ctx, s, s.plan(o), img, mode)
		if err != nil {
			t.Fatal(err)
		}
		// A narrow place behind the registry's NIC, as between zones, has TCP send
		// a part again.
		if said := l.registry.Bytes(""); name == cold && (said != got.said || math.Abs(float64(got.registry-said)) > 0.05*float64(said)) {
			t.Errorf("%s: the registry's NIC sent %d bytes, the registry says %d", name, got.registry, said)
		}
		var received int64
		for _, n := range got.received {
			received += n
		}
		// In a swarm some pieces may come twice.
		if want := 3 * img.bytes; received < want || mode == Direct && float64(received) > 1.05*float64(want) {
			t.Errorf("%s: the nodes' NICs received %d bytes, want %d", name, received, want)
		}
		if math.Abs(float64(got.zones)) > 0.05*float64(img.bytes) {
			t.Errorf("%s: %d bytes from zone to zone, where nothing goes from node to node over zones", name, got.zones)
		}
		if len(got.took) != 3 || len(got.sent) != 3 || got.last() <= 0 || got.cpu <= 0 || got.rss <= 0 || got.busy <= 0 {
			t.Errorf("%s: %+v", name, got)
		}
	}
	closed = true
	root := l.env.Root
	if err := l.close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(root); err == nil {
		t.Error("the directory remains")
	}
	if after := interfaces(t); !slices.Equal(before, after) {
		t.Errorf("interfaces %v, before %v", after, before)
	}
	commands, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range commands {
		if text, _ := os.ReadFile(c); strings.Contains(string(text), root) {
			t.Errorf("still running: %q", text)
		}
	}
}

func interfaces(t *testing.T) []string {
	t.Helper()
	all, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, i := range all {
		names = append(names, i.Name)
	}
	return names
}
