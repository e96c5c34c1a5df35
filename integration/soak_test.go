package integration

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/imagewolf/imagewolf/integration/harness"
)

// steady is how many nodes' daemons are not restarted: what grows over hours grows
// there.
const steady = 2

// soak is six nodes that do at random what nodes do.
type soak struct {
	*faultSite
	ns     string
	images []*harness.Image
	locks  []sync.Mutex // one per node: who has it may change it

	pulls, failed, restarts, cuts atomic.Int64
}

// TestSoak: nodes pull, remove, restart and lose their network at random, for as
// long as SOAK says (three minutes; half an hour with FAULTS=all). Every image that a
// pull has brought is right to the last byte, in the end all are on every node, and
// no daemon has grown.
func TestSoak(t *testing.T) {
	length, err := time.ParseDuration(cmp.Or(os.Getenv("SOAK"), map[bool]string{true: "30m", false: "3m"}[os.Getenv("FAULTS") == "all"]))
	must(t, err)
	ctx, cancel := context.WithTimeoutCause(t.Context(), length+4*time.Minute, errors.New("the soak does not end"))
	defer cancel()
	line := record(t, "soak", harness.V2)
	registry.Behave(harness.Behavior{})
	s := &soak{faultSite: newFaultSite(t, harness.V2, nil), ns: "soak"}
	s.locks = make([]sync.Mutex, len(s.Nodes))
	for range 6 {
		s.images = append(s.images, image(ctx, t, 1, 4, 8))
	}
	s.finish(ctx, t)
	before := s.sizes(ctx, t)
	registry.Behave(harness.Behavior{Rate: 32 * mib})
	end := time.Now().Add(length)
	g, gctx := errgroup.WithContext(ctx)
	for range 4 {
		g.Go(func() error {
			for time.Now().Before(end) {
				if err := s.step(gctx); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatalf("%v\n%s", err, s.Logs())
	}
	registry.Behave(harness.Behavior{})
	must(t, s.Heal(ctx))
	s.finish(ctx, t)
	line.Seconds, line.Note = length.Seconds(), fmt.Sprintf("%d pulls, %d of them tried again, %d restarts, %d cuts", s.pulls.Load(), s.failed.Load(), s.restarts.Load(), s.cuts.Load())
	t.Log(line.Note)
	for i, now := range s.sizes(ctx, t) {
		t.Logf("%s: before %+v, after %+v", s.Nodes[i].Name, before[i], now)
		if now.files > before[i].files+64 || now.threads > before[i].threads+32 || now.goroutines > before[i].goroutines+200 ||
			now.rss > before[i].rss+96*mib || now.disk > before[i].disk+4*mib || now.staged > before[i].staged {
			t.Errorf("%s has grown", s.Nodes[i].Name)
		}
	}
	panics, err := s.Metric(ctx, "imagewolf_panics_total")
	must(t, err)
	if panics > 0 {
		t.Errorf("%v panics were contained", panics)
	}
}

// finish has every node pull every image, and checks them.
func (s *soak) finish(ctx context.Context, t *testing.T) {
	t.Helper()
	for _, img := range s.images {
		if _, err := s.PullAll(ctx, s.ns, img.Ref); err != nil {
			t.Fatalf("%v\n%s", err, s.Logs())
		}
		whole(ctx, t, s.ns, img, s.Nodes...)
	}
}

// step does one thing on one node.
func (s *soak) step(ctx context.Context) error {
	i := rand.IntN(len(s.Nodes))
	n, img := s.Nodes[i], s.images[rand.IntN(len(s.images))]
	s.locks[i].Lock()
	defer s.locks[i].Unlock()
	k := rand.IntN(20)
	if i < steady && k < 2 {
		k = 3 // its network is cut instead
	}
	switch {
	case k < 1:
		s.restarts.Add(1)
		return errors.Join(n.Wolf.Stop(), n.Wolf.Start(ctx))
	case k < 2:
		s.restarts.Add(1)
		n.Wolf.Kill()
		return n.Wolf.Start(ctx)
	case k < 3:
		s.restarts.Add(1)
		return n.Restart(ctx, n.Default())
	case k < 4:
		s.cuts.Add(1)
		m := s.machine(n)
		if err := m.Cut(); err != nil {
			return err
		}
		time.Sleep(time.Duration(rand.IntN(3000)) * time.Millisecond)
		return m.Mend()
	case k < 10:
		_ = n.Remove(ctx, s.ns, img.Ref) //nolint:errcheck // it may not be there
		return nil
	}
	s.pulls.Add(1)
	var err error
	for try := range 4 {
		if err = n.Pull(ctx, s.ns, img.Ref); err == nil {
			return n.Rehash(img.Blobs)
		}
		if try == 0 {
			s.failed.Add(1)
		}
		time.Sleep(time.Second)
	}
	return fmt.Errorf("pull on %s: %w", n.Name, err)
}

// size is what a daemon holds.
type size struct {
	files, threads, goroutines int
	rss, disk                  int64 // bytes; disk: of content, staging and state
	staged                     int   // files
}

// sizes waits until the daemons rest, and measures them.
func (s *soak) sizes(ctx context.Context, t *testing.T) []size {
	t.Helper()
	time.Sleep(3 * time.Second)
	var out []size
	for _, n := range s.Nodes {
		proc := fmt.Sprintf("/proc/%d/", n.Wolf.Process().Pid())
		files, err := filepath.Glob(proc + "fd/*")
		must(t, err)
		threads, err := filepath.Glob(proc + "task/*")
		must(t, err)
		staged, err := filepath.Glob(filepath.Join(n.ContentDir(), "imagewolf", "staging", "*"))
		must(t, err)
		goroutines, err := n.Wolf.Metric(ctx, "go_goroutines")
		must(t, err)
		disk, err := diskUsage(n.ContentDir())
		must(t, err)
		out = append(out, size{len(files), len(threads), int(goroutines), memory(t, n), disk, len(staged)})
	}
	return out
}

// diskUsage is how many bytes the files below a directory take.
func diskUsage(dir string) (int64, error) {
	var sum int64
	err := filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		info, err := d.Info()
		if errors.Is(err, fs.ErrNotExist) {
			return nil // gone meanwhile
		}
		if err == nil {
			sum += info.Sys().(*syscall.Stat_t).Blocks * 512 //nolint:errcheck // what Linux has
		}
		return err
	})
	return sum, err
}
