package integration

import (
	"context"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/imagewolf/imagewolf/integration/harness"
)

// TestColdPull: four nodes pull a new image at the same moment, and the
// registry sends it once.
func TestColdPull(t *testing.T) {
	each(t, func(ctx context.Context, t *testing.T, w *world) {
		img, fetchers := coldPull(ctx, t, w)
		// One pull may have got all its layers asked for first by one node, on a
		// busy machine. Several in a row do not.
		for range 3 {
			if len(fetchers) > 1 {
				break
			}
			registry.Reset()
			img, fetchers = coldPull(ctx, t, w)
		}
		if len(fetchers) < 2 {
			t.Errorf("one node fetched all layers, every time: %v", fetchers)
		}
		runs(ctx, t, w.ns, img, w.Nodes[len(w.Nodes)-1])

		// A second image that shares a layer: only what is new is sent.
		registry.Reset()
		second := imageOn(ctx, t, img.Layers[:1:1], 8)
		_, err := w.PullAll(ctx, w.ns, second.Ref)
		must(t, err)
		sent(t, second.Bytes()-second.Blobs[second.Layer(0)])
		whole(ctx, t, w.ns, second, w.Nodes...)
	})
}

// coldPull pulls a new image on all nodes at once and returns it with the nodes
// that fetched its blobs.
func coldPull(ctx context.Context, t *testing.T, w *world) (img *harness.Image, fetchers map[string]bool) {
	t.Helper()
	img = image(ctx, t, 8, 8, 8, 8)
	// Slow enough for the layers to be on their way at the same time.
	registry.Behave(harness.Behavior{Rate: 24 * mib})
	took, err := w.PullAll(ctx, w.ns, img.Ref)
	must(t, err)
	sent(t, img.Bytes())
	whole(ctx, t, w.ns, img, w.Nodes...)
	fetchers = map[string]bool{}
	for digest := range img.Blobs {
		gets := registry.Gets(digest)
		if len(gets) != 1 {
			t.Errorf("%d requests for %s, want 1", len(gets), digest)
		}
		for _, r := range gets {
			fetchers[r.Node] = true
		}
	}
	t.Logf("took %v; registry copies %.4f; fetchers %v", took, float64(registry.Bytes(""))/float64(img.Bytes()), fetchers)
	return img, fetchers
}

// TestLatePull: a node that comes late gets everything from the others.
func TestLatePull(t *testing.T) {
	each(t, func(ctx context.Context, t *testing.T, w *world) {
		img := image(ctx, t, 8, 8)
		must(t, w.Nodes[0].Pull(ctx, w.ns, img.Ref))
		sent(t, img.Bytes())
		registry.Reset()
		must(t, w.Nodes[1].Pull(ctx, w.ns, img.Ref))
		sent(t, 0)
		whole(ctx, t, w.ns, img, w.Nodes[:2]...)
	})
}

// TestWarmPull: what a node has, it does not get again, even after containerd
// has removed it.
func TestWarmPull(t *testing.T) {
	each(t, func(ctx context.Context, t *testing.T, w *world) {
		img := image(ctx, t, 8, 8)
		n := w.Nodes[0]
		must(t, n.Pull(ctx, w.ns, img.Ref))
		registry.Reset()
		must(t, n.Pull(ctx, w.ns, img.Ref))
		sent(t, 0)
		must(t, n.Remove(ctx, w.ns, img.Ref))
		blobs, err := n.Blobs(ctx, w.ns)
		must(t, err)
		if len(blobs) != 0 {
			t.Errorf("containerd still knows %v", blobs)
		}
		must(t, n.Pull(ctx, w.ns, img.Ref))
		sent(t, 0)
		whole(ctx, t, w.ns, img, n)
	})
}

// TestLocalPull: the client of 2.x pulls, in place of the transfer service.
func TestLocalPull(t *testing.T) {
	each(t, func(ctx context.Context, t *testing.T, w *world) {
		img := image(ctx, t, 8, 8)
		var g errgroup.Group
		for _, n := range w.Nodes[:2] {
			g.Go(func() error { return n.Pull(ctx, w.ns, img.Ref, "--local") })
		}
		must(t, g.Wait())
		sent(t, img.Bytes())
		whole(ctx, t, w.ns, img, w.Nodes[:2]...)
	}, harness.V2)
}

// TestCRI: pulls as kubelet asks for them.
func TestCRI(t *testing.T) {
	pulls := func(ctx context.Context, t *testing.T, w *world) {
		t.Helper()
		img := image(ctx, t, 8, 8)
		var g errgroup.Group
		for _, n := range w.Nodes[:2] {
			g.Go(func() error { return n.PullCRI(ctx, img.Ref) })
		}
		must(t, g.Wait())
		sent(t, img.Bytes())
		whole(ctx, t, "k8s.io", img, w.Nodes[:2]...)
	}
	each(t, pulls)
	t.Run("use_local_image_pull", func(t *testing.T) {
		each(t, func(ctx context.Context, t *testing.T, w *world) {
			for _, n := range w.Nodes[:2] {
				o := n.Default()
				o.LocalPull = true
				must(t, n.Restart(ctx, o))
			}
			pulls(ctx, t, w)
		}, harness.V2)
	})
}

// TestDiscardUnpackedLayers: containerd deletes the layers once they are
// unpacked, and the next node gets them from this one all the same.
func TestDiscardUnpackedLayers(t *testing.T) {
	each(t, func(ctx context.Context, t *testing.T, w *world) {
		img := image(ctx, t, 8, 8)
		n := w.Nodes[0]
		o := n.Default()
		o.Discard = true
		must(t, n.Restart(ctx, o))
		must(t, n.PullCRI(ctx, img.Ref))
		must(t, n.CollectGarbage(ctx))
		blobs, err := n.Blobs(ctx, "k8s.io")
		must(t, err)
		for i := range img.Layers {
			if _, known := blobs[img.Layer(i)]; known {
				t.Errorf("containerd still knows layer %d", i)
			}
		}
		registry.Reset()
		must(t, w.Nodes[1].Pull(ctx, w.ns, img.Ref))
		sent(t, 0)
		whole(ctx, t, w.ns, img, w.Nodes[1])
	})
}

// TestTwoNamespaces: two namespaces of one node pull one image at once.
func TestTwoNamespaces(t *testing.T) {
	each(t, func(ctx context.Context, t *testing.T, w *world) {
		img := image(ctx, t, 8, 8)
		registry.Behave(harness.Behavior{Rate: 16 * mib}) // so that the two do meet
		one, two := pull(ctx, w.ns+"-one", img.Ref, w.Nodes[0]), pull(ctx, w.ns+"-two", img.Ref, w.Nodes[0])
		finish(t, append(one, two...))
		sent(t, img.Bytes())
		whole(ctx, t, w.ns+"-one", img, w.Nodes[0])
		whole(ctx, t, w.ns+"-two", img, w.Nodes[0])
	})
}

// TestPrivateImage: the registry checks the credentials, of each node.
func TestPrivateImage(t *testing.T) {
	each(t, func(ctx context.Context, t *testing.T, w *world) {
		img := image(ctx, t, 8)
		registry.RequireAuth("wolf", "howl")
		must(t, w.Nodes[0].Pull(ctx, w.ns, img.Ref, "--user", "wolf:howl"))
		if err := w.Nodes[1].Pull(ctx, w.ns, img.Ref); err == nil {
			t.Error("pulled without credentials, since another node has it")
		}
		registry.Reset()
		must(t, w.Nodes[1].Pull(ctx, w.ns, img.Ref, "--user", "wolf:howl"))
		sent(t, 0)
	})
}

// TestProgress: what containerd shows moves while the swarm works.
func TestProgress(t *testing.T) {
	each(t, func(ctx context.Context, t *testing.T, w *world) {
		img := image(ctx, t, 24)
		registry.Behave(harness.Behavior{Rate: 8 * mib})
		pulls := pull(ctx, w.ns, img.Ref, w.Nodes[:2]...)
		fetcher := w.nodeOf(t, reached(ctx, t, img.Layer(0), 1))
		leecher := without(w.Nodes[:2], fetcher)[0]
		seen := map[int64]bool{}
		for size := img.Blobs[img.Layer(0)]; len(pulls[0].done)+len(pulls[1].done) < 2; time.Sleep(50 * time.Millisecond) {
			active, err := leecher.Active(ctx, w.ns)
			must(t, err)
			if a, ok := active[img.Layer(0)]; ok && a.Offset > 0 && a.Offset < size {
				seen[a.Offset] = true
			}
		}
		finish(t, pulls)
		if len(seen) < 3 {
			t.Errorf("the leecher's ingest stood at %v only", seen)
		}
		sent(t, img.Bytes())
	})
}
