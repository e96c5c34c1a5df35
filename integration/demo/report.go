package demo

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"text/tabwriter"
	"time"

	"github.com/docker/go-units"
)

// report is the demo's result, as DEMO_JSON has it.
type report struct {
	Nodes          []nodeReport `json:"nodes"`
	ImageBytes     int64        `json:"image_bytes"`
	RegistryBytes  int64        `json:"registry_bytes"`
	RegistryCopies float64      `json:"registry_copies"`
	// Prefetch is absent with an image of the user's.
	Prefetch *prefetchReport `json:"prefetch,omitempty"`
}

// prefetchReport is about the image that was pushed while the notifier listened.
type prefetchReport struct {
	Nodes          int     `json:"nodes"`
	Seconds        float64 `json:"seconds"` // from the push to the last node that had unpacked it
	RegistryCopies float64 `json:"registry_copies"`
}

type nodeReport struct {
	Name          string  `json:"name"`
	Seconds       float64 `json:"seconds"`
	RegistryBytes int64   `json:"registry_bytes"`
	PeerBytes     int64   `json:"peer_bytes"`
}

// report makes the figures: the registry's own counter says what came from it,
// and what else a node has of the image now came from its peers.
func (s *show) report(ctx context.Context, took []time.Duration) (*report, error) {
	r := &report{RegistryBytes: s.counter.Bytes("")}
	for i, n := range s.cluster.Nodes {
		if err := n.Complete(ctx, ns, s.ref); err != nil {
			return nil, err
		}
		blobs, err := n.Blobs(ctx, ns)
		if err != nil {
			return nil, err
		}
		if err := n.Rehash(blobs); err != nil {
			return nil, err
		}
		var have int64
		for _, size := range blobs {
			have += size
		}
		r.ImageBytes = max(r.ImageBytes, have)
		from := s.counter.Bytes(n.Name)
		r.Nodes = append(r.Nodes, nodeReport{
			Name: n.Name, Seconds: took[i].Seconds(), RegistryBytes: from, PeerBytes: max(0, have-from),
		})
	}
	r.RegistryCopies = float64(r.RegistryBytes) / float64(r.ImageBytes)
	return r, nil
}

// print shows the table.
func (r *report) print(out io.Writer) error {
	w := tabwriter.NewWriter(out, 0, 0, 3, ' ', tabwriter.AlignRight)
	size := func(n int64) string { return units.BytesSize(float64(n)) }
	lines := "\nnode\tseconds\tfrom registry\tfrom peers\t\n"
	for _, n := range r.Nodes {
		lines += fmt.Sprintf("%s\t%.1f\t%s\t%s\t\n", n.Name, n.Seconds, size(n.RegistryBytes), size(n.PeerBytes))
	}
	if _, err := io.WriteString(w, lines); err != nil {
		return fmt.Errorf("table: %w", err)
	}
	if err := w.Flush(); err != nil {
		return fmt.Errorf("table: %w", err)
	}
	_, err := fmt.Fprintf(out, "\nThe registry sent %s for an image of %s: %.2f copies for %d nodes.\nEvery blob on every node has been hashed again: all are right.\n\n",
		size(r.RegistryBytes), size(r.ImageBytes), r.RegistryCopies, len(r.Nodes))
	if err != nil {
		return fmt.Errorf("table: %w", err)
	}
	return nil
}

// write puts the figures into a file; "" for none.
func (r *report) write(path string) error {
	if path == "" {
		return nil
	}
	data, err := json.MarshalIndent(r, "", "  ")
	if err == nil {
		err = os.WriteFile(path, append(data, '\n'), 0o644)
	}
	if err != nil {
		return fmt.Errorf("DEMO_JSON: %w", err)
	}
	return nil
}
