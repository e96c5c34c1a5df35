package bench

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"image/color"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/font"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

// plotNodes are the numbers of nodes that a plot shows.
var plotNodes = []int{1, 2, 4, 8, 16, 32}

// Plotted returns the options of the runs that Plot makes: 32 nodes share this
// machine's processors, so that the NICs are slow and the image is small.
func Plotted() Options {
	return Options{Rate: 20, Layers: 4, LayerMiB: 2, Repeat: 1, Scenarios: []string{cold}, KeepRate: true}
}

// Plot measures the cold scenario over numbers of nodes and draws the figures
// into a file.
func Plot(ctx context.Context, o Options, file string) error {
	var all []Result
	for _, n := range plotNodes {
		o.N = n
		results, err := measureAll(ctx, o)
		all = append(all, results...)
		if err != nil {
			return errors.Join(err, write(o.JSON, all)) // and the picture stays as it was
		}
	}
	if err := write(o.JSON, all); err != nil {
		return err
	}
	return Draw(all, file)
}

// Draw draws the cold scenario's results, at different numbers of nodes, as an
// SVG: the last node's time, and the bytes that left the registry.
func Draw(results []Result, file string) error {
	results = slices.DeleteFunc(slices.Clone(results), func(r Result) bool { return r.Scenario != cold })
	if len(results) == 0 {
		return fmt.Errorf("nothing to draw: no result of scenario %s", cold)
	}
	slices.SortStableFunc(results, func(a, b Result) int { return cmp.Compare(a.N, b.N) })
	times, err := panel("Until the last node is done, seconds", results, func(r Result) float64 { return r.LastS })
	if err != nil {
		return err
	}
	sent, err := panel("Sent by the registry, MiB", results, func(r Result) float64 {
		return r.RegistryCopies * float64(r.ImageBytes) / mib
	})
	if err != nil {
		return err
	}
	canvas := vgsvg.New(24*vg.Centimeter, 10.5*vg.Centimeter)
	dc := draw.New(canvas)
	dc.SetColor(color.White) // to be read on a dark page, too
	dc.Fill(dc.Path())
	upper := draw.Crop(dc, 0, 0, 0.9*vg.Centimeter, 0)
	tiles := draw.Tiles{Rows: 1, Cols: 2, PadX: vg.Centimeter, PadTop: vg.Points(8), PadLeft: vg.Points(8), PadRight: vg.Points(12)}
	for i, row := range plot.Align([][]*plot.Plot{{times, sent}}, tiles, upper)[0] {
		[]*plot.Plot{times, sent}[i].Draw(row)
	}
	r := results[0]
	style := times.Title.TextStyle
	style.Font.Size = vg.Points(9)
	style.XAlign = draw.XLeft
	dc.FillText(style, vg.Point{X: vg.Points(10), Y: vg.Points(10)},
		fmt.Sprintf("All nodes pull a new image of %d MiB at the same moment; every NIC, the registry's too, has %s. Commit %s.",
			r.ImageBytes/mib, rateName(r.Rate), shortCommit(r.Commit)))
	return save(canvas, file)
}

// dirty is what make puts behind the commit of a tree that was changed.
const dirty = "-dirty"

// shortCommit is enough of a commit to find it by, and tells when the tree was
// changed.
func shortCommit(c string) string {
	hash, changed := strings.CutSuffix(c, dirty)
	short := fmt.Sprintf("%.12s", cmp.Or(hash, "unknown"))
	if changed {
		short += dirty
	}
	return short
}

// save writes the file whole or not at all.
func save(canvas *vgsvg.Canvas, file string) error {
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return fmt.Errorf("plot: %w", err)
	}
	f, err := os.CreateTemp(filepath.Dir(file), ".plot")
	if err != nil {
		return fmt.Errorf("plot: %w", err)
	}
	var text bytes.Buffer
	_, err = canvas.WriteTo(&text)
	if err == nil {
		// Few machines have the font by this name.
		_, err = f.Write(bytes.ReplaceAll(text.Bytes(), []byte("font-family:Liberation Sans;"), []byte("font-family:Liberation Sans,Arial,Helvetica,sans-serif;")))
	}
	if err == nil {
		err = f.Chmod(0o644)
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(f.Name(), file)
	}
	if err != nil {
		_ = os.Remove(f.Name()) //nolint:errcheck // the first error counts
		return fmt.Errorf("plot: %w", err)
	}
	return nil
}

// panel is one of the two charts.
func panel(title string, results []Result, value func(Result) float64) (*plot.Plot, error) {
	p := plot.New()
	p.Title.Text, p.Title.Padding = title, vg.Points(6)
	p.X.Label.Text = "nodes"
	p.Y.Min = 0
	for _, s := range []*font.Font{&p.Title.TextStyle.Font, &p.X.Label.TextStyle.Font, &p.X.Tick.Label.Font, &p.Y.Tick.Label.Font, &p.Legend.TextStyle.Font} {
		s.Variant, s.Size = "Sans", vg.Points(10)
	}
	p.Title.TextStyle.Font.Size = vg.Points(12)
	// Equal steps for doubled numbers of nodes would bend direct's straight
	// line, so the axis is linear.
	var ticks plot.ConstantTicks
	for _, mode := range []struct {
		name  string
		mode  Mode
		color color.RGBA
		glyph draw.GlyphDrawer
	}{
		{"containerd alone", Direct, color.RGBA{R: 0xc0, G: 0x50, B: 0x20, A: 0xff}, draw.BoxGlyph{}},
		{"with ImageWolf", ImageWolf, color.RGBA{R: 0x20, G: 0x60, B: 0xb0, A: 0xff}, draw.CircleGlyph{}},
	} {
		var points plotter.XYs
		for _, r := range results {
			if r.Mode != mode.mode {
				continue
			}
			points = append(points, plotter.XY{X: float64(r.N), Y: value(r)})
			if mode.mode == ImageWolf {
				ticks = append(ticks, plot.Tick{Value: float64(r.N), Label: strconv.Itoa(r.N)})
			}
		}
		if len(points) == 0 {
			continue
		}
		line, dots, err := plotter.NewLinePoints(points)
		if err != nil {
			return nil, fmt.Errorf("plot: %w", err)
		}
		line.Color, line.Width = mode.color, vg.Points(2)
		dots.Color, dots.Shape, dots.Radius = mode.color, mode.glyph, vg.Points(3)
		p.Add(line, dots)
		p.Legend.Add(mode.name, line, dots)
		last := points[len(points)-1]
		p.Y.Max = max(p.Y.Max, last.Y*1.05)
	}
	grid := plotter.NewGrid()
	grid.Vertical.Width = 0
	p.Add(grid)
	p.X.Tick.Marker = ticks
	p.Legend.Top, p.Legend.Left, p.Legend.Padding = true, true, vg.Points(3)
	p.Legend.XOffs, p.Legend.YOffs = vg.Points(8), -vg.Points(4)
	return p, nil
}
