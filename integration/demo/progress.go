package demo

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/docker/go-units"
	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
	"golang.org/x/sys/unix"

	"github.com/imagewolf/imagewolf/integration/harness"
)

// progress is how far a node is, in bytes.
type progress struct{ done, total int64 }

// at asks a node how far it is. Total is of the blobs it knows of, unless the
// image's size is known.
func at(ctx context.Context, n *harness.Node, total int64) (progress, error) {
	var p progress
	blobs, err := n.Blobs(ctx, ns)
	if err != nil {
		return p, err
	}
	for _, size := range blobs {
		p.done += size
	}
	p.total = p.done
	active, err := n.Active(ctx, ns)
	if err != nil {
		return p, err
	}
	for digest, a := range active {
		if _, whole := blobs[digest]; !whole {
			p.done, p.total = p.done+a.Offset, p.total+a.Total
		}
	}
	p.total = max(total, p.total)
	return p, nil
}

// watch shows every node's progress until the function that it returns is
// called: bars on a terminal, a line per second elsewhere.
func (s *show) watch(ctx context.Context, total int64) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	update, finish := s.lines()
	every := time.Second
	if f, ok := s.Out.(*os.File); ok {
		if _, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS); err == nil {
			update, finish = s.bars()
			every = 100 * time.Millisecond
		}
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		state := make([]progress, len(s.cluster.Nodes))
		tick := time.NewTicker(every)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			for i, n := range s.cluster.Nodes {
				// A node that does not answer is shown as it was: the pull will
				// say what is wrong.
				// A blob on its way from ingest to store is nowhere for a moment.
				if p, err := at(ctx, n, total); err == nil && p.done >= state[i].done {
					state[i] = p
				}
			}
			if ctx.Err() == nil {
				update(state)
			}
		}
	})
	return func() {
		cancel()
		wg.Wait()
		finish()
	}
}

// lines shows progress in lines.
func (s *show) lines() (update func([]progress), finish func()) {
	began := time.Now()
	whole := false
	return func(state []progress) {
		if whole {
			return
		}
		whole = !slices.ContainsFunc(state, func(p progress) bool { return p.total == 0 || p.done < p.total })
		parts := make([]string, len(state))
		for i, p := range state {
			parts[i] = fmt.Sprintf("%s %s/%s", s.cluster.Nodes[i].Name, units.BytesSize(float64(p.done)), units.BytesSize(float64(p.total)))
		}
		s.say("%4.0f s  %s", time.Since(began).Seconds(), strings.Join(parts, "  "))
		if whole {
			s.say("Every byte is there; containerd is unpacking.")
		}
	}, func() {}
}

// bars shows progress in one bar per node.
func (s *show) bars() (update func([]progress), finish func()) {
	p := mpb.New(mpb.WithOutput(s.Out), mpb.WithWidth(72))
	bars := make([]*mpb.Bar, len(s.cluster.Nodes))
	for i, n := range s.cluster.Nodes {
		bars[i] = p.AddBar(0,
			mpb.PrependDecorators(decor.Name(n.Name+" ")),
			mpb.AppendDecorators(decor.CountersKibiByte("% .1f / % .1f"), decor.Name("  "), decor.Elapsed(decor.ET_STYLE_GO)))
	}
	return func(state []progress) {
			for i, b := range bars {
				b.SetTotal(state[i].total, false)
				b.SetCurrent(state[i].done)
			}
		}, func() {
			for _, b := range bars {
				b.SetTotal(b.Current(), true)
			}
			p.Wait()
		}
}
