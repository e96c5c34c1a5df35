package integration

import (
	"context"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sync/errgroup"

	"github.com/imagewolf/imagewolf/integration/harness"
)

// TestNerdctl: `nerdctl pull` on all nodes at once. What it shows moves on the
// nodes that get their bytes from others, too.
func TestNerdctl(t *testing.T) {
	each(t, func(ctx context.Context, t *testing.T, w *world) {
		img := image(ctx, t, 24)
		layer := img.Layer(0)
		registry.Behave(harness.Behavior{Rate: 8 * mib})
		shown := make([]string, len(w.Nodes))
		var g errgroup.Group
		for i, n := range w.Nodes {
			g.Go(func() (err error) {
				shown[i], err = n.PullNerdctl(ctx, w.ns, img.Ref)
				return err
			})
		}
		must(t, g.Wait())
		sent(t, img.Bytes())
		whole(ctx, t, w.ns, img, w.Nodes...)
		gets := registry.Gets(layer)
		if len(gets) != 1 {
			t.Fatalf("%d requests for the layer, want 1: %v", len(gets), gets)
		}
		fetcher := w.nodeOf(t, gets[0])
		for i, n := range w.Nodes {
			offsets := harness.ShownOffsets(shown[i], layer)
			t.Logf("%s (fetcher: %t) showed %v", n.Name, n == fetcher, offsets)
			between := slices.DeleteFunc(offsets, func(o int64) bool { return o == 0 || o >= img.Blobs[layer] })
			if len(between) < 3 || !slices.IsSorted(between) {
				t.Errorf("%s showed the layer at %v, want it to grow; it said\n%s", n.Name, offsets, shown[i][:min(len(shown[i]), 4000)])
			}
		}
		runs(ctx, t, w.ns, img, w.Nodes[len(w.Nodes)-1])
	})
}

// TestNerdctlForms: the other ways to name an image and to ask for it, with
// credentials where Docker's own are.
func TestNerdctlForms(t *testing.T) {
	forms := map[string]func(img *harness.Image) (ref string, flags []string){
		"by digest": func(img *harness.Image) (string, []string) {
			return strings.TrimSuffix(img.Ref, ":latest") + "@" + img.Manifest, nil
		},
		"all platforms": func(img *harness.Image) (string, []string) { return img.Ref, []string{"--all-platforms"} },
		"not unpacked":  func(img *harness.Image) (string, []string) { return img.Ref, []string{"--unpack=false", "--quiet"} },
	}
	each(t, func(ctx context.Context, t *testing.T, w *world) {
		nodes := w.Nodes[:2]
		for _, n := range nodes {
			must(t, n.Login(registry.Host, "wolf", "howl"))
		}
		registry.RequireAuth("wolf", "howl")
		for name, form := range forms {
			img := image(ctx, t, 6)
			ref, flags := form(img)
			for _, n := range nodes {
				registry.Reset()
				_, err := n.PullNerdctl(ctx, w.ns, ref, flags...)
				must(t, err)
				if err := n.Rehash(img.Blobs); err != nil {
					t.Errorf("%s: %v", name, err)
				}
			}
			sent(t, 0) // to the second
		}
		if _, err := w.Nodes[2].PullNerdctl(ctx, w.ns, image(ctx, t, 1).Ref); err == nil {
			t.Error("pulled without credentials")
		}
	})
}
