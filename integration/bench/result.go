package bench

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/docker/go-units"
)

// Result is one scenario in one mode, as BENCH_JSON has it.
type Result struct {
	Scenario string `json:"scenario"`
	Mode     Mode   `json:"mode"`
	N        int    `json:"n"`
	// Rate of each NIC in Mbit/s; 0 for loopback.
	Rate int `json:"rate"`
	// ImageBytes are those that a node lacks of the image.
	ImageBytes int64 `json:"image_bytes"`
	// MedianS and LastS are seconds of a node, from its own start.
	MedianS float64 `json:"median_s"`
	LastS   float64 `json:"last_s"`
	// LastRatio is LastS over that of a single direct pull on the same NIC; in
	// rolling, small and lone it is MedianS over direct's.
	LastRatio float64 `json:"last_ratio"`
	// RegistryCopies are those that the registry's NIC sent, with what TCP had to
	// send again; RegistryCopiesSaid are those that the registry says it sent.
	RegistryCopies     float64 `json:"registry_copies"`
	RegistryCopiesSaid float64 `json:"registry_copies_said"`
	// SentBytes and ReceivedBytes are the NIC's of each node.
	SentBytes     []int64 `json:"sent_bytes"`
	ReceivedBytes []int64 `json:"received_bytes"`
	// CPUS are processor seconds of the nodes' daemons, all together.
	CPUS float64 `json:"cpu_s"`
	// PeakRSSBytes are those of the largest imagewolf; with direct, containerd.
	PeakRSSBytes int64 `json:"peak_rss_bytes"`
	// ZoneCopies are the copies that crossed from zone to zone; zones only.
	ZoneCopies float64 `json:"zone_copies,omitempty"`
	Commit     string  `json:"commit"`
}

// sample is what one run of one mode has shown.
type sample struct {
	took           []time.Duration // of the nodes that pulled
	registry       int64           // bytes it sent
	said           int64           // bytes that it says it sent: without what TCP has sent again
	zones          int64           // bytes from zone to zone
	sent, received []int64         // of each node
	cpu            time.Duration
	rss            int64
	busy, disk     float64 // shares of the processors' time
}

func (s sample) last() time.Duration { return slices.Max(s.took) }

// median is the mean of the two in the middle when there are two.
func (s sample) median() time.Duration {
	t := slices.Sorted(slices.Values(s.took))
	return (t[(len(t)-1)/2] + t[len(t)/2]) / 2
}

// middle returns the sample whose last node is the median's; of an even number,
// the mean of the two in the middle, the times by their order.
func middle(s []sample) sample {
	s = slices.SortedFunc(slices.Values(s), func(a, b sample) int { return cmp.Compare(a.last(), b.last()) })
	a, b := s[(len(s)-1)/2], s[len(s)/2]
	if len(s)%2 == 1 {
		return a
	}
	return sample{
		took:     means(slices.Sorted(slices.Values(a.took)), slices.Sorted(slices.Values(b.took))),
		registry: mean(a.registry, b.registry), said: mean(a.said, b.said), zones: mean(a.zones, b.zones),
		sent: means(a.sent, b.sent), received: means(a.received, b.received),
		cpu: mean(a.cpu, b.cpu), rss: max(a.rss, b.rss), busy: (a.busy + b.busy) / 2, disk: (a.disk + b.disk) / 2,
	}
}

// mean is that of two durations or sums of bytes.
func mean[T ~int64](a, b T) T { return (a + b) / 2 }

// means are those of each two of a and b, which are of one length.
func means[T ~int64](a, b []T) []T {
	var out []T
	for i := range a {
		out = append(out, mean(a[i], b[i]))
	}
	return out
}

// measured is a scenario in both modes.
type measured struct {
	direct, wolf sample
	alone        time.Duration // of a single direct pull; 0 where medians are compared
	busy         float64       // the largest share of the processors' time in any run
}

// results puts the figures into their final form.
func (m measured) results(o Options, s *scenario, p plan, bytes int64) []Result {
	var out []Result
	for _, mode := range []Mode{Direct, ImageWolf} {
		took := m.direct
		if mode == ImageWolf {
			took = m.wolf
		}
		if took.took == nil { // left out
			continue
		}
		var ratio float64
		if s.byMedian {
			ratio = float64(took.median()) / float64(m.direct.median())
		} else {
			ratio = float64(took.last()) / float64(m.alone)
		}
		r := Result{
			Scenario: s.name, Mode: mode, N: p.n, Rate: p.rate, ImageBytes: bytes,
			MedianS: round(took.median().Seconds()), LastS: round(took.last().Seconds()), LastRatio: round(ratio),
			RegistryCopies:     round(float64(took.registry) / float64(bytes)),
			RegistryCopiesSaid: round(float64(took.said) / float64(bytes)),
			SentBytes:          took.sent, ReceivedBytes: took.received,
			CPUS: round(took.cpu.Seconds()), PeakRSSBytes: took.rss, Commit: o.Commit,
		}
		if s.place.zones > 0 {
			r.ZoneCopies = round(float64(took.zones) / float64(bytes))
		}
		out = append(out, r)
	}
	return out
}

// round cuts what no measurement here can tell.
func round(v float64) float64 { return math.Round(v*10_000) / 10_000 }

// table shows the results.
func table(out io.Writer, results []Result) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	text := "\nscenario\tmode\tnodes\tNIC\timage\tmedian s\tlast s\tratio\tregistry copies\tsays\tmost sent\tCPU s\tpeak RSS\t\n"
	for _, r := range results {
		text += fmt.Sprintf("%s\t%s\t%d\t%s\t%s\t%.2f\t%.2f\t%.2f\t%.2f\t%.2f\t%.2f\t%.1f\t%s\t\n",
			r.Scenario, r.Mode, r.N, rateName(r.Rate), units.BytesSize(float64(r.ImageBytes)), r.MedianS, r.LastS, r.LastRatio,
			r.RegistryCopies, r.RegistryCopiesSaid, float64(slices.Max(r.SentBytes))/float64(r.ImageBytes), r.CPUS, units.BytesSize(float64(r.PeakRSSBytes)))
	}
	if _, err := io.WriteString(w, text); err != nil {
		return fmt.Errorf("table: %w", err)
	}
	if err := w.Flush(); err != nil {
		return fmt.Errorf("table: %w", err)
	}
	_, err := io.WriteString(out, `
ratio: the last node over a single direct pull on the same NIC; in rolling, small and lone the median node over direct's.
registry copies: what its NIC sent; says: what it says that it sent, without what TCP sent again.
most sent: what the busiest node sent to others, in copies of the image.
`)
	if err != nil {
		return fmt.Errorf("table: %w", err)
	}
	return nil
}

func rateName(rate int) string {
	if rate == 0 {
		return "loopback"
	}
	return fmt.Sprintf("%d Mbit/s", rate)
}

// write puts the results, if there are any, into a file; "" for none.
func write(path string, results []Result) error {
	if path == "" || len(results) == 0 {
		return nil
	}
	data, err := json.MarshalIndent(results, "", "  ")
	if err == nil {
		err = os.WriteFile(path, append(data, '\n'), 0o644)
	}
	if err != nil {
		return fmt.Errorf("BENCH_JSON: %w", err)
	}
	return nil
}
