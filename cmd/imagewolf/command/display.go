package command

import (
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/docker/go-units"
	"github.com/urfave/cli/v2"
	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
	"golang.org/x/sys/unix"

	imagewolfv1 "github.com/imagewolf/imagewolf/api/v1"
)

// maxBars are shown on a terminal; a request for more nodes is shown in lines.
const maxBars = 24

// display shows how far each node is.
type display interface {
	update(st *imagewolfv1.PrefetchStatus)
	close()
}

func newDisplay(c *cli.Context, st *imagewolfv1.PrefetchStatus) display {
	switch {
	case c.Bool("json"):
		return quiet{}
	case len(st.Nodes) <= maxBars && isTerminal(c.App.Writer):
		return newBars(c.App.Writer)
	}
	return &lines{w: c.App.Writer, shown: map[string]imagewolfv1.PrefetchState{}}
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	return err == nil && size.Col > 0 // some have no size, and nothing fits into that
}

// quiet shows nothing.
type quiet struct{}

func (quiet) update(*imagewolfv1.PrefetchStatus) {}
func (quiet) close()                             {}

// lines has a line for every change of a node's state.
type lines struct {
	w     io.Writer
	shown map[string]imagewolfv1.PrefetchState
}

func (l *lines) update(st *imagewolfv1.PrefetchStatus) {
	for _, n := range st.Nodes {
		if was, ok := l.shown[n.Node]; ok && was == n.State {
			continue
		}
		l.shown[n.Node] = n.State
		_, _ = fmt.Fprintln(l.w, lineOf(n)) //nolint:errcheck // who reads it has gone; the exit status tells
	}
}

func (l *lines) close() {}

// lineOf says in one line where a node is.
func lineOf(n *imagewolfv1.NodePrefetch) string {
	parts := []string{oneLine(n.Node), stateName(n.State)}
	if n.Total > 0 {
		parts = append(parts, amount(n))
	}
	if n.Reason != "" {
		parts = append(parts, oneLine(n.Reason))
	}
	return strings.Join(parts, "  ")
}

func amount(n *imagewolfv1.NodePrefetch) string {
	return units.BytesSize(float64(n.Bytes)) + "/" + units.BytesSize(float64(n.Total))
}

// oneLine keeps what another node wrote from moving the cursor.
func oneLine(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r >= 0x7f && r < 0xa0 {
			return ' '
		}
		return r
	}, s)
}

func stateName(s imagewolfv1.PrefetchState) string {
	return strings.ToLower(strings.TrimPrefix(s.String(), "PREFETCH_STATE_"))
}

// bars has a bar for every node.
type bars struct {
	progress *mpb.Progress
	byNode   map[string]*bar
}

type bar struct {
	bar   *mpb.Bar
	after string // state and reason; read by the bar's own goroutine while its lock is held
	text  chan string
}

func newBars(w io.Writer) *bars {
	return &bars{progress: mpb.New(mpb.WithOutput(w), mpb.WithWidth(72)), byNode: map[string]*bar{}}
}

func (b *bars) update(st *imagewolfv1.PrefetchStatus) {
	for _, n := range st.Nodes {
		one := b.byNode[n.Node]
		if one == nil {
			one = b.add(n.Node)
			b.byNode[n.Node] = one
		}
		text := stateName(n.State)
		if n.Reason != "" {
			text += "  " + oneLine(n.Reason)
		}
		select { // the last text is the one that counts
		case <-one.text:
		default:
		}
		one.text <- text
		one.bar.SetTotal(max(n.Total, n.Bytes), false)
		one.bar.SetCurrent(n.Bytes)
	}
}

func (b *bars) add(name string) *bar {
	one := &bar{text: make(chan string, 1)}
	one.bar = b.progress.AddBar(0,
		mpb.PrependDecorators(decor.Name(oneLine(name)+" ")),
		mpb.AppendDecorators(decor.CountersKibiByte("% .1f / % .1f"), decor.Any(func(decor.Statistics) string {
			select {
			case one.after = <-one.text:
			default:
			}
			return "  " + one.after
		})))
	return one
}

func (b *bars) close() {
	for _, one := range b.byNode {
		one.bar.Abort(false) // stays as it is
	}
	b.progress.Wait()
}

// printStatus prints a request and where each node is.
func printStatus(c *cli.Context, st *imagewolfv1.PrefetchStatus) error {
	if c.Bool("json") {
		return printJSON(c, st)
	}
	w := tabwriter.NewWriter(c.App.Writer, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprintf(w, "ID\t%s\nIMAGE\t%s\nCREATED\t%s\n", st.Request.Id, oneLine(st.Request.Image), age(st)) //nolint:errcheck // Flush tells
	if st.Request.Digest != "" {
		_, _ = fmt.Fprintf(w, "DIGEST\t%s\n", st.Request.Digest) //nolint:errcheck // Flush tells
	}
	_, _ = fmt.Fprintln(w, "\nNODE\tSTATE\tBYTES\tREASON") //nolint:errcheck // Flush tells
	for _, n := range st.Nodes {
		_, _ = fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", oneLine(n.Node), stateName(n.State), amount(n), oneLine(n.Reason)) //nolint:errcheck // Flush tells
	}
	return w.Flush()
}

// printList prints a line for each request.
func printList(c *cli.Context, all *imagewolfv1.ListPrefetchesResponse) error {
	if c.Bool("json") {
		return printJSON(c, all)
	}
	w := tabwriter.NewWriter(c.App.Writer, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprintln(w, "ID\tIMAGE\tCREATED\tNODES\tSTATES") //nolint:errcheck // Flush tells
	for _, st := range all.Prefetches {
		_, _ = fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%s\n", st.Request.Id, oneLine(st.Request.Image), age(st), len(st.Nodes), states(st)) //nolint:errcheck // Flush tells
	}
	return w.Flush()
}

func age(st *imagewolfv1.PrefetchStatus) string {
	return units.HumanDuration(time.Since(time.UnixMilli(st.Created))) + " ago"
}

// states counts a request's nodes by state.
func states(st *imagewolfv1.PrefetchStatus) string {
	count := map[imagewolfv1.PrefetchState]int{}
	for _, n := range st.Nodes {
		count[n.State]++
	}
	var out []string
	for s := range imagewolfv1.PrefetchState(len(imagewolfv1.PrefetchState_name)) {
		if count[s] > 0 {
			out = append(out, fmt.Sprintf("%d %s", count[s], stateName(s)))
		}
	}
	return strings.Join(out, ", ")
}
