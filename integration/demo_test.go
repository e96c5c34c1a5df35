package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/imagewolf/imagewolf/integration/demo"
)

// TestDemo: the demo's figures are those of a registry asked once.
func TestDemo(t *testing.T) {
	img := image(t.Context(), t, 4, 4)
	for name, ref := range map[string]string{"made": "", "given": img.Ref} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
			defer cancel()
			var out bytes.Buffer
			file := filepath.Join(t.TempDir(), "demo.json")
			must(t, demo.Run(ctx, demo.Options{
				Image: ref, JSON: file, Bin: "../bin", Out: &out, MinBytes: 16 * mib, LayerBytes: 24 * mib,
			}))
			data, err := os.ReadFile(file)
			must(t, err)
			var r struct {
				Nodes []struct {
					Name          string  `json:"name"`
					Seconds       float64 `json:"seconds"`
					RegistryBytes int64   `json:"registry_bytes"`
					PeerBytes     int64   `json:"peer_bytes"`
				} `json:"nodes"`
				ImageBytes     int64   `json:"image_bytes"`
				RegistryBytes  int64   `json:"registry_bytes"`
				RegistryCopies float64 `json:"registry_copies"`
				Prefetch       *struct {
					Nodes          int     `json:"nodes"`
					Seconds        float64 `json:"seconds"`
					RegistryCopies float64 `json:"registry_copies"`
				} `json:"prefetch"`
			}
			d := json.NewDecoder(bytes.NewReader(data))
			d.DisallowUnknownFields()
			must(t, d.Decode(&r))
			if len(r.Nodes) != 4 || r.RegistryCopies != 1 || r.RegistryBytes != r.ImageBytes {
				t.Errorf("figures:\n%s", data)
			}
			for _, n := range r.Nodes {
				if n.RegistryBytes+n.PeerBytes != r.ImageBytes || n.Seconds <= 0 || !strings.Contains(out.String(), n.Name) {
					t.Errorf("figures of %s:\n%s", n.Name, data)
				}
			}
			if p := r.Prefetch; (p != nil) != (ref == "") || p != nil && (p.Nodes != 4 || p.Seconds <= 0 || p.RegistryCopies < 1 || p.RegistryCopies > 1.01) {
				t.Errorf("figures of the prefetch:\n%s", data)
			}
			t.Log(out.String())
		})
	}
}
