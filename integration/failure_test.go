package integration

import (
	"context"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/imagewolf/imagewolf/integration/harness"
)

// TestClusterGone: nobody else is left, and the pull goes to the registry.
func TestClusterGone(t *testing.T) {
	eachFault(t, "all other nodes killed", func(ctx context.Context, t *testing.T, w *world, line *faultRecord) {
		line.SecondsWithout = undisturbed(ctx, t, w.Nodes[:1], 0, 8, 8)
		img := image(ctx, t, 8, 8)
		for _, n := range w.Nodes[1:] {
			n.Wolf.Kill()
		}
		began := time.Now()
		must(t, w.Nodes[0].Pull(ctx, w.ns, img.Ref))
		took := time.Since(began)
		line.Seconds, line.RegistryCopies = took.Seconds(), copies(img)
		if took > 15*time.Second {
			t.Errorf("took %s", took)
		}
		sent(t, img.Bytes())
		whole(ctx, t, w.ns, img, w.Nodes[0])
	})
}

// TestFetcherKilled: the fetcher's containerd dies in mid-blob; another node
// goes on from the byte reached.
func TestFetcherKilled(t *testing.T) {
	eachFault(t, "fetcher's containerd killed, three nodes pull", func(ctx context.Context, t *testing.T, w *world, line *faultRecord) {
		nodes := w.Nodes[:3]
		line.SecondsWithout = undisturbed(ctx, t, nodes, 6*mib, 24)
		img := image(ctx, t, 24)
		layer := img.Layer(0)
		registry.Behave(harness.Behavior{Rate: 6 * mib})
		began := time.Now()
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
		line.Seconds, line.RegistryCopies = time.Since(began).Seconds(), copies(img)
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
			eachFault(t, "daemon "+name+" in a pull, its socket held by nobody", func(ctx context.Context, t *testing.T, w *world, line *faultRecord) {
				n := w.Nodes[0]
				line.SecondsWithout = undisturbed(ctx, t, w.Nodes[:1], 20*mib, 60)
				// More than the 16 MiB after which the store notes what it has.
				img := image(ctx, t, 60)
				registry.Behave(harness.Behavior{Rate: 20 * mib})
				began := time.Now()
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
				line.Seconds, line.RegistryCopies = time.Since(began).Seconds(), copies(img)
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
	eachFault(t, "a seeder's disk has other bytes", func(ctx context.Context, t *testing.T, w *world, line *faultRecord) {
		img := image(ctx, t, 8, 8)
		liar, next := w.Nodes[0], w.Nodes[1]
		must(t, liar.Pull(ctx, w.ns, img.Ref))
		f, err := os.OpenFile(liar.BlobPath(img.Layer(0)), os.O_WRONLY, 0)
		must(t, err)
		_, err = f.WriteAt(make([]byte, 64<<10), 3*mib)
		must(t, err)
		must(t, f.Close())
		registry.Reset()
		began := time.Now()
		must(t, next.Pull(ctx, w.ns, img.Ref))
		line.Seconds, line.RegistryCopies = time.Since(began).Seconds(), copies(img)
		whole(ctx, t, w.ns, img, next)
		if got, size := registry.Bytes(""), img.Blobs[img.Layer(0)]; got == 0 || got > size+mib {
			t.Errorf("the registry sent %d bytes, want at most the layer's %d", got, size)
		}
	})
}

// TestTrackerKilled: a node that tracks some of the layers dies in mid-pull.
func TestTrackerKilled(t *testing.T) {
	eachFault(t, "tracker of some of twelve layers killed", func(ctx context.Context, t *testing.T, w *world, line *faultRecord) {
		nodes, idle, sizes := w.Nodes[:3], w.Nodes[3], slices.Repeat([]int64{2}, 12)
		line.SecondsWithout = undisturbed(ctx, t, nodes, 8*mib, sizes...)
		// With twelve layers, the idle node tracks one of them in all but 3 % of
		// runs; what is asserted holds in those as well.
		img := image(ctx, t, sizes...)
		registry.Behave(harness.Behavior{Rate: 8 * mib})
		began := time.Now()
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
		line.Seconds, line.RegistryCopies = time.Since(began).Seconds(), copies(img)
		whole(ctx, t, w.ns, img, nodes...)
		t.Logf("registry copies %.2f", line.RegistryCopies)
		if line.RegistryCopies > 2 {
			t.Errorf("registry copies %.2f after one tracker's death", line.RegistryCopies)
		}
	})
}

// TestRegistryFails: the registry has trouble for good, and pulls say so, soon.
// Nothing of what it did not send, or sent wrong, is in any store; and when it is
// well again, all is.
func TestRegistryFails(t *testing.T) {
	versions := []string{harness.V2}
	if os.Getenv("FAULTS") == "all" {
		versions = append(versions, harness.V17)
	}
	for _, way := range []struct {
		name   string
		behave harness.Behavior
		all    bool   // not only for the layer
		says   string // containerd, at last
	}{
		{"answers 503 for good", harness.Behavior{Status: 503}, true, "503 Service Unavailable"},
		{"answers 500 for good, for a layer", harness.Behavior{Status: 500}, false, "500 Internal Server Error"},
		{"sends wrong bytes for good, for a layer", harness.Behavior{Corrupt: true}, false, "unexpected commit digest"},
	} {
		t.Run(way.name, func(t *testing.T) {
			eachFault(t, "registry "+way.name, func(ctx context.Context, t *testing.T, w *world, line *faultRecord) {
				nodes := w.Nodes[:3]
				line.SecondsWithout = undisturbed(ctx, t, nodes, 0, 8)
				img := image(ctx, t, 8)
				layer, bad := img.Layer(0), way.behave
				if !way.all {
					bad.Digest = layer
				}
				registry.Behave(bad)
				began := time.Now()
				for _, p := range pull(ctx, w.ns, img.Ref, nodes...) {
					if err := <-p.done; err == nil || !strings.Contains(err.Error(), way.says) {
						t.Errorf("pull on %s ended with %v, want %q", p.node.Name, err, way.says)
					}
				}
				took := time.Since(began)
				line.Seconds, line.RegistryCopies = took.Seconds(), copies(img)
				line.say("every pull fails, as without ImageWolf")
				t.Logf("all pulls failed within %.1f s; the registry sent %.2f copies", took.Seconds(), line.RegistryCopies)
				if took > 40*time.Second {
					t.Errorf("took %s", took)
				}
				lacks(ctx, t, w.ns, layer, w.Nodes...)
				registry.Behave(harness.Behavior{})
				_, err := harness.PullOn(ctx, nodes, w.ns, img.Ref)
				must(t, err)
				whole(ctx, t, w.ns, img, nodes...)
			}, versions...)
		})
	}
}

// lacks fails the test if a node has a blob, by containerd's word or on disk.
func lacks(ctx context.Context, t *testing.T, ns, digest string, nodes ...*harness.Node) {
	t.Helper()
	for _, n := range nodes {
		blobs, err := n.Blobs(ctx, ns)
		must(t, err)
		if _, known := blobs[digest]; known {
			t.Errorf("containerd of %s has %s", n.Name, digest)
		}
		if _, err := os.Stat(n.BlobPath(digest)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is on %s: %v", digest, n.Name, err)
		}
	}
}

// TestConnectionCut: the registry closes the fetcher's connection in mid-blob.
func TestConnectionCut(t *testing.T) {
	eachFault(t, "registry closes the fetcher's connection", func(ctx context.Context, t *testing.T, w *world, line *faultRecord) {
		line.SecondsWithout = undisturbed(ctx, t, w.Nodes[:2], 0, 16)
		img := image(ctx, t, 16)
		registry.Behave(harness.Behavior{CutAfter: 6 * mib})
		began := time.Now()
		pulls := pull(ctx, w.ns, img.Ref, w.Nodes[:2]...)
		reached(ctx, t, img.Layer(0), 6*mib)
		registry.Behave(harness.Behavior{})
		for _, p := range pulls {
			if err := <-p.done; err != nil {
				// As with containerd alone: its pull may fail, and the next goes on.
				must(t, p.node.Pull(ctx, w.ns, img.Ref))
			}
		}
		line.Seconds, line.RegistryCopies = time.Since(began).Seconds(), copies(img)
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
	t.Run("short layers", restartInShortLayers)
	if os.Getenv("FAULTS") == "all" {
		t.Run("long layer", restartInALongLayer)
	}
}

func restartInShortLayers(t *testing.T) {
	eachFault(t, "daemon restarted in a pull, its socket held", func(ctx context.Context, t *testing.T, w *world, line *faultRecord) {
		sizes, rate := slices.Repeat([]int64{8}, 6), int64(12*mib)
		line.SecondsWithout = undisturbed(ctx, t, w.Nodes[:1], rate, sizes...)
		r := restartInAPull(ctx, t, w, line, rate, sizes...)
		if r.err != nil {
			t.Errorf("the pull: %v", r.err)
		}
		whole(ctx, t, w.ns, r.img, w.Nodes[0])
	})
}

// restartInALongLayer has a layer that needs longer than a daemon that ends waits for
// what is under way. Its pull fails, once, and the next goes on from the byte that had
// been reached by then.
func restartInALongLayer(t *testing.T) {
	eachFault(t, "daemon restarted in a layer of more than 10 s, its socket held", func(ctx context.Context, t *testing.T, w *world, line *faultRecord) {
		const rate = mib
		line.SecondsWithout = undisturbed(ctx, t, w.Nodes[:1], rate, 18)
		r := restartInAPull(ctx, t, w, line, rate, 18)
		n, layer := w.Nodes[0], r.img.Layer(0)
		if r.err == nil {
			t.Fatal("the pull did not fail: the layer is too short to try anything")
		}
		line.say("the pull failed once")
		must(t, n.Pull(ctx, w.ns, r.img.Ref))
		line.Seconds, line.RegistryCopies = time.Since(r.began).Seconds(), copies(r.img)
		whole(ctx, t, w.ns, r.img, n)
		gets := registry.Gets(layer)
		if len(gets) != 2 {
			t.Fatalf("%d requests for the layer, want 2: %v", len(gets), gets)
		}
		k := from(t, gets[1])
		t.Logf("%.1f MiB came before the end, and the next pull went on from %.1f MiB: %v", float64(gets[0].Bytes)/mib, float64(k)/mib, r.err)
		line.say("it went on from %.1f MiB of %.1f that had come", float64(k)/mib, float64(gets[0].Bytes)/mib)
		// containerd writes a MiB at a time: what it had of one is lost, and what was on
		// its way.
		if lost := gets[0].Bytes - k; lost > mib+mib/2 || gets[0].Bytes < 8*mib {
			t.Errorf("%d bytes came in about 10 s of %d a second, and %d of them had to come again", gets[0].Bytes, rate, lost)
		}
	})
}

// restarted is a pull in whose first layer the daemon was started again.
type restarted struct {
	img   *harness.Image
	began time.Time
	err   error // of the pull
}

// restartInAPull has the first node's daemon stopped and started again when its pull
// has got the first MiB.
func restartInAPull(ctx context.Context, t *testing.T, w *world, line *faultRecord, rate int64, sizes ...int64) *restarted {
	t.Helper()
	n, r := w.Nodes[0], &restarted{img: image(ctx, t, sizes...)}
	holdSocket(ctx, t, n)
	registry.Behave(harness.Behavior{Rate: rate})
	r.began = time.Now()
	pulls := pull(ctx, w.ns, r.img.Ref, n)
	reached(ctx, t, r.img.Layer(0), mib)
	stop := time.Now()
	must(t, n.Wolf.Stop())
	stopped := time.Now()
	must(t, n.Wolf.Start(ctx))
	r.err = <-pulls[0].done
	line.Seconds, line.RegistryCopies = time.Since(r.began).Seconds(), copies(r.img)
	line.say("it stopped within %.1f s", stopped.Sub(stop).Seconds())
	t.Logf("stopped in %.1f s, pulled in %.1f s", stopped.Sub(stop).Seconds(), line.Seconds)
	return r
}

// TestSocketIsHeld: systemd holds the socket, so that containerd waits for a
// daemon that is started again, and does not fail.
func TestSocketIsHeld(t *testing.T) {
	eachFault(t, "daemon away for a second, its socket held", func(ctx context.Context, t *testing.T, w *world, line *faultRecord) {
		line.SecondsWithout = undisturbed(ctx, t, w.Nodes[:1], 0, 8)
		line.say("killed, then stopped")
		n, img := w.Nodes[0], image(ctx, t, 8)
		holdSocket(ctx, t, n)
		for _, end := range []func(){n.Wolf.Kill, func() { must(t, n.Wolf.Stop()) }} {
			end()
			began := time.Now()
			waiting := pull(ctx, w.ns, img.Ref, n)
			select {
			case err := <-waiting[0].done:
				t.Fatalf("the pull did not wait: %v", err)
			case <-time.After(time.Second):
			}
			must(t, n.Wolf.Start(ctx))
			finish(t, waiting)
			line.Seconds, line.RegistryCopies = max(line.Seconds, time.Since(began).Seconds()), copies(img)
			whole(ctx, t, w.ns, img, n)
			must(t, n.Remove(ctx, w.ns, img.Ref))
		}
	})
}
