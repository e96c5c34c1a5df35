package node

import (
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/imagewolf/imagewolf/plugin/store"
)

// A prefetch's own streams are no foreground; a pull's are, also of the blob that
// a prefetch has under way.
func TestForegroundIsWhatSomebodyAskedFor(t *testing.T) {
	s, err := store.Open(store.Options{Root: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	f := foreground{s}
	d := digest.FromString("a blob")
	open := func(ref string) content.Writer {
		t.Helper()
		w, err := s.Writer(t.Context(), content.WithRef(ref+d.String()), content.WithDescriptor(ocispec.Descriptor{Size: 6}))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { w.Close() })
		return w
	}
	open("k8s.io/1/prefetch-layer-")
	if f.Busy() || f.Wants(d) {
		t.Error("a prefetch takes itself for a pull that somebody asked for")
	}
	w := open("k8s.io/2/layer-")
	if !f.Busy() || !f.Wants(d) || f.Wants(digest.FromString("another")) {
		t.Error("a pull that somebody asked for is not seen, or seen with another blob")
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if f.Busy() || f.Wants(d) {
		t.Error("a pull that has ended is still seen")
	}
}
