package integration

import (
	"context"
	"os"
	"testing"
	"time"

	"github.com/imagewolf/imagewolf/integration/harness"
)

// TestClusterGone: nobody else is left, and the pull goes to the registry.
func TestClusterGone(t *testing.T) {
	each(t, func(ctx context.Context, t *testing.T, w *world) {
		img := image(ctx, t, 8, 8)
		for _, n := range w.Nodes[1:] {
			n.Wolf.Kill()
		}
		began := time.Now()
		must(t, w.Nodes[0].Pull(ctx, w.ns, img.Ref))
		if took := time.Since(began); took > 15*time.Second {
			t.Errorf("took %s", took)
		}
		sent(t, img.Bytes())
		whole(ctx, t, w.ns, img, w.Nodes[0])
	})
}

// TestFetcherKilled: the fetcher's containerd dies in mid-blob; another node
// goes on from the byte reached.
func TestFetcherKilled(t *testing.T) {
	each(t, func(ctx context.Context, t *testing.T, w *world) {
		img := image(ctx, t, 24)
		layer := img.Layer(0)
		registry.Behave(harness.Behavior{Rate: 6 * mib})
		nodes := w.Nodes[:3]
		pulls := pull(ctx, w.ns, img.Ref, nodes...)
		victim := w.nodeOf(t, reached(ctx, t, layer, 9*mib))
		victim.Kill()
		for _, p := range pulls {
			if err := <-p.done; p.node == victim && err == nil {
				t.Error("the pull on the killed containerd succeeded")
			} else if p.node != victim && err != nil {
				t.Errorf("pull on %s: %v", p.node.Name, err)
			}
		}
		others := without(nodes, victim)
		whole(ctx, t, w.ns, img, others...)
		gets := registry.Gets(layer)
		if len(gets) != 2 {
			t.Fatalf("%d requests for the layer, want 2", len(gets))
		}
		k, size := from(t, gets[1]), img.Blobs[layer]
		if k < 4*mib || k > gets[0].Bytes {
			t.Errorf("the second request is from byte %d, want at least a segment and at most %d", k, gets[0].Bytes)
		}
		if gets[1].Bytes != size-k {
			t.Errorf("the second request got %d bytes, want %d", gets[1].Bytes, size-k)
		}
		t.Logf("killed after %d bytes, the next went on from %d of %d", gets[0].Bytes, k, size)

		must(t, w.Heal(ctx))
		registry.Behave(harness.Behavior{})
		registry.Reset()
		must(t, victim.Pull(ctx, w.ns, img.Ref))
		sent(t, 0)
		whole(ctx, t, w.ns, img, victim)
	})
}

// TestDaemonRestarted: imagewolf is killed, or restarted, in mid-pull; the pull
// that is tried again goes on from about the byte reached.
func TestDaemonRestarted(t *testing.T) {
	ways := map[string]func(*harness.ImageWolf) error{
		"killed":  func(i *harness.ImageWolf) error { i.Kill(); return nil },
		"stopped": (*harness.ImageWolf).Stop,
	}
	for name, end := range ways {
		t.Run(name, func(t *testing.T) {
			each(t, func(ctx context.Context, t *testing.T, w *world) {
				// More than the 16 MiB after which the store notes what it has.
				img := image(ctx, t, 60)
				registry.Behave(harness.Behavior{Rate: 20 * mib})
				n := w.Nodes[0]
				first := pull(ctx, w.ns, img.Ref, n)[0]
				reached(ctx, t, img.Layer(0), 40*mib)
				must(t, end(n.Wolf))
				must(t, n.Wolf.Start(ctx))
				registry.Behave(harness.Behavior{})
				// 2.x fails at once when the daemon is killed; 1.7's client may
				// come through by itself, and what was under way may be let
				// through to its end when the daemon is asked to stop.
				err := <-first.done
				if err != nil {
					// containerd takes up to three seconds to connect again.
					soon, cancel := context.WithTimeout(ctx, 5*time.Second)
					defer cancel()
					must(t, harness.Poll(soon, 200*time.Millisecond, func() error { return n.Pull(ctx, w.ns, img.Ref) }))
				}
				whole(ctx, t, w.ns, img, n)
				// A daemon that is killed has noted what it had 16 MiB ago at the
				// most; some more was under way.
				t.Log("the first pull succeeded:", err == nil, registry.Gets(img.Layer(0)))
				if got := registry.Bytes(""); got > img.Bytes()+26*mib {
					t.Errorf("the registry sent %d bytes for an image of %d", got, img.Bytes())
				}
			})
		})
	}
}

// TestGarbageCollection: containerd collects garbage while pulls wait, and
// neither stops the other.
func TestGarbageCollection(t *testing.T) {
	each(t, func(ctx context.Context, t *testing.T, w *world) {
		old, img := image(ctx, t, 8), image(ctx, t, 8, 8)
		nodes := w.Nodes[:2]
		_, err := harness.PullOn(ctx, nodes, w.ns, old.Ref)
		must(t, err)
		registry.Behave(harness.Behavior{StallAfter: mib})
		pulls := pull(ctx, w.ns, img.Ref, nodes...)
		reached(ctx, t, img.Layer(0), mib)
		for _, n := range nodes {
			began := time.Now()
			must(t, n.CollectGarbage(ctx))
			must(t, n.Remove(ctx, w.ns, old.Ref))
			if took := time.Since(began); took > 3*time.Second {
				t.Errorf("garbage collection on %s took %s", n.Name, took)
			}
		}
		registry.Behave(harness.Behavior{})
		finish(t, pulls)
		whole(ctx, t, w.ns, img, nodes...)
	})
}

// TestWrongBytes: a seeder's disk has other bytes than it thinks. The next node
// gets the right ones.
func TestWrongBytes(t *testing.T) {
	each(t, func(ctx context.Context, t *testing.T, w *world) {
		img := image(ctx, t, 8, 8)
		liar, next := w.Nodes[0], w.Nodes[1]
		must(t, liar.Pull(ctx, w.ns, img.Ref))
		f, err := os.OpenFile(liar.BlobPath(img.Layer(0)), os.O_WRONLY, 0)
		must(t, err)
		_, err = f.WriteAt(make([]byte, 64<<10), 3*mib)
		must(t, err)
		must(t, f.Close())
		registry.Reset()
		must(t, next.Pull(ctx, w.ns, img.Ref))
		whole(ctx, t, w.ns, img, next)
		if got, size := registry.Bytes(""), img.Blobs[img.Layer(0)]; got == 0 || got > size+mib {
			t.Errorf("the registry sent %d bytes, want at most the layer's %d", got, size)
		}
	})
}

// TestTrackerKilled: a node that tracks some of the layers dies in mid-pull.
func TestTrackerKilled(t *testing.T) {
	each(t, func(ctx context.Context, t *testing.T, w *world) {
		// With twelve layers, the idle node tracks one of them in all but 3 % of
		// runs; what is asserted holds in those as well.
		img := image(ctx, t, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2)
		registry.Behave(harness.Behavior{Rate: 8 * mib})
		nodes, idle := w.Nodes[:3], w.Nodes[3]
		pulls := pull(ctx, w.ns, img.Ref, nodes...)
		err := harness.Poll(ctx, 10*time.Millisecond, func() error {
			if registry.Bytes("") < 6*mib {
				return context.DeadlineExceeded
			}
			return nil
		})
		must(t, err)
		idle.Wolf.Kill()
		finish(t, pulls)
		whole(ctx, t, w.ns, img, nodes...)
		copies := float64(registry.Bytes("")) / float64(img.Bytes())
		t.Logf("registry copies %.2f", copies)
		if copies > 2 {
			t.Errorf("registry copies %.2f after one tracker's death", copies)
		}
	})
}

// TestRegistryFails: the registry has trouble, and pulls say so, soon.
func TestRegistryFails(t *testing.T) {
	each(t, func(ctx context.Context, t *testing.T, w *world) {
		img := image(ctx, t, 8)
		registry.Behave(harness.Behavior{Status: 503})
		began := time.Now()
		for _, p := range pull(ctx, w.ns, img.Ref, w.Nodes[:2]...) {
			if err := <-p.done; err == nil {
				t.Errorf("pull on %s succeeded without a registry", p.node.Name)
			}
		}
		if took := time.Since(began); took > 40*time.Second {
			t.Errorf("took %s", took)
		}
		registry.Behave(harness.Behavior{})
		_, err := harness.PullOn(ctx, w.Nodes[:2], w.ns, img.Ref)
		must(t, err)
		whole(ctx, t, w.ns, img, w.Nodes[:2]...)
	})
}

// TestConnectionCut: the registry closes the fetcher's connection in mid-blob.
func TestConnectionCut(t *testing.T) {
	each(t, func(ctx context.Context, t *testing.T, w *world) {
		img := image(ctx, t, 16)
		registry.Behave(harness.Behavior{CutAfter: 6 * mib})
		pulls := pull(ctx, w.ns, img.Ref, w.Nodes[:2]...)
		reached(ctx, t, img.Layer(0), 6*mib)
		registry.Behave(harness.Behavior{})
		for _, p := range pulls {
			if err := <-p.done; err != nil {
				// As with containerd alone: its pull may fail, and the next goes on.
				must(t, p.node.Pull(ctx, w.ns, img.Ref))
			}
		}
		whole(ctx, t, w.ns, img, w.Nodes[:2]...)
		if got := registry.Bytes(""); got > img.Bytes()+8*mib {
			t.Errorf("the registry sent %d bytes for an image of %d", got, img.Bytes())
		}
	})
}

// holdSocket starts a node's daemon anew, on a socket that is held until the test
// ends.
func holdSocket(ctx context.Context, t *testing.T, n *harness.Node) {
	t.Helper()
	hold(t, n)
	must(t, n.Wolf.Start(ctx))
}

// TestRestartInAPull: a daemon whose socket is held is started again in the middle
// of a pull. What is under way has a few seconds to end, what comes next waits.
func TestRestartInAPull(t *testing.T) {
	each(t, func(ctx context.Context, t *testing.T, w *world) {
		line := record(t, "daemon restarted in a pull, its socket held", w.version)
		n, img := w.Nodes[0], image(ctx, t, 8, 8, 8, 8, 8, 8)
		holdSocket(ctx, t, n)
		registry.Behave(harness.Behavior{Rate: 12 * mib})
		t.Cleanup(func() { registry.Behave(harness.Behavior{}) })
		began := time.Now()
		pulls := pull(ctx, w.ns, img.Ref, n)
		reached(ctx, t, img.Layer(0), mib)
		stop := time.Now()
		must(t, n.Wolf.Stop())
		stopped := time.Now()
		must(t, n.Wolf.Start(ctx))
		finish(t, pulls)
		line.Seconds, line.RegistryCopies = time.Since(began).Seconds(), float64(registry.Bytes(""))/float64(img.Bytes())
		t.Logf("stopped in %.1f s, pulled in %.1f s", stopped.Sub(stop).Seconds(), time.Since(began).Seconds())
		whole(ctx, t, w.ns, img, n)
	})
}

// TestSocketIsHeld: systemd holds the socket, so that containerd waits for a
// daemon that is started again, and does not fail.
func TestSocketIsHeld(t *testing.T) {
	each(t, func(ctx context.Context, t *testing.T, w *world) {
		defer timed(record(t, "daemon away, its socket held", w.version))()
		n, img := w.Nodes[0], image(ctx, t, 8)
		holdSocket(ctx, t, n)
		for _, end := range []func(){n.Wolf.Kill, func() { must(t, n.Wolf.Stop()) }} {
			end()
			waiting := pull(ctx, w.ns, img.Ref, n)
			select {
			case err := <-waiting[0].done:
				t.Fatalf("the pull did not wait: %v", err)
			case <-time.After(time.Second):
			}
			must(t, n.Wolf.Start(ctx))
			finish(t, waiting)
			whole(ctx, t, w.ns, img, n)
			must(t, n.Remove(ctx, w.ns, img.Ref))
		}
	})
}
