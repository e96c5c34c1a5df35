package prefetch

import (
	"path/filepath"
	"strings"
	"testing"
)

// Who has no containerd there is told where it was looked for, and by which setting.
func TestWithoutContainerd(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "containerd.sock")
	p := New(Options{ContainerdSocket: socket})
	_, pulled := p.Pull(t.Context(), Request{Image: "r.example.com/app:1"}, nil)
	_, asked := p.HasRepository(t.Context(), "", "r.example.com/app")
	for _, err := range []error{pulled, asked} {
		if err == nil || !strings.Contains(err.Error(), "containerd at "+socket+" does not answer: is it running, and is that its containerd_socket?") {
			t.Errorf("got %v", err)
		}
	}
}
