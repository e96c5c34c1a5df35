// Package bench measures what ImageWolf is for: how much leaves the registry
// when many nodes pull an image, and how long the last of them takes, next to
// what the same nodes do without ImageWolf.
//
// Nodes and registry are on this machine, each in a network namespace of its own
// with a NIC of a bounded rate. They share its processors and its disk: where
// those are the limit and not the NICs, the scenario is repeated at a lower rate,
// and the output says so. It judges nothing but a smoke run's copies.
package bench

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/docker/go-units"
)

// Mode is what nodes pull with.
type Mode string

// The two modes of every scenario.
const (
	ImageWolf Mode = "imagewolf"
	Direct    Mode = "direct" // containerd with its builtin store
)

// Options are what the user can choose.
type Options struct {
	// N is the number of nodes.
	N int
	// Rate of each NIC in either direction, in Mbit/s.
	Rate int
	// Layers of LayerMiB each make the image of most scenarios.
	Layers, LayerMiB int
	// Scenarios are names of scenarios or of their groups; none, or "all": all.
	Scenarios []string
	// Repeat is how often a scenario is measured; the median run counts, or the
	// mean of the two in the middle. Those where milliseconds matter are measured
	// more often, unless Brief is set.
	Repeat int
	Brief  bool
	// WolfOnly leaves out the nodes without ImageWolf where nothing but their own
	// figures needs them. It saves most of the time where ImageWolf is tuned.
	WolfOnly bool
	// KeepRate keeps the rate also where the processors cannot bear it.
	KeepRate bool
	// MaxCopies is how many copies the registry may say that it sent in the scenarios cold
	// and staggered before Run fails; 0: any number.
	MaxCopies float64
	// JSON is a file that gets the figures; "" for none.
	JSON string
	// Commit is what was built, for the figures.
	Commit string
	// Bin is the directory of the programs to run.
	Bin string
	// Out gets everything that is shown.
	Out io.Writer
}

// Default returns the options of a full run.
func Default() Options { return Options{N: 8, Rate: 200, Layers: 4, LayerMiB: 64, Repeat: 1} }

// Smoke returns the options of a run that shows within two minutes whether all
// works.
func Smoke() Options {
	return Options{
		N: 4, Rate: 200, KeepRate: true, Layers: 2, LayerMiB: 8, Repeat: 1, Brief: true, MaxCopies: 1.02,
		Scenarios: []string{cold, staggered, "warm", "rolling", "update", "small"},
	}
}

// check refuses options that no run can do.
func (o *Options) check() error {
	switch {
	case o.N < 1 || o.N > 200:
		return fmt.Errorf("%d nodes: 1 to 200 are possible", o.N)
	case o.Rate < 1:
		return fmt.Errorf("rate of %d Mbit/s: at least 1 is needed", o.Rate)
	case o.Layers < 1 || o.LayerMiB < 1:
		return fmt.Errorf("%d layers of %d MiB: at least one of 1 MiB is needed", o.Layers, o.LayerMiB)
	case o.Repeat < 1:
		return fmt.Errorf("%d repetitions: at least one is needed", o.Repeat)
	}
	return nil
}

// bench is one run.
type bench struct {
	Options
	lab     *lab
	results []Result
	notes   []string
}

// Run measures the scenarios, shows a table and leaves nothing else behind,
// whatever ends it. When a scenario fails, or ctx ends, the figures of those
// before it are still shown and written.
func Run(ctx context.Context, o Options) error {
	results, err := measureAll(ctx, o)
	return conclude(o, results, err)
}

// conclude writes the figures that there are and judges them; err is why there
// are no more, and is returned.
func conclude(o Options, results []Result, err error) error {
	return errors.Join(err, write(o.JSON, results), judge(results, o.MaxCopies))
}

// measureAll measures the scenarios and shows a table. With an error it returns
// what was measured before.
func measureAll(ctx context.Context, o Options) (_ []Result, err error) {
	if err := o.check(); err != nil {
		return nil, err
	}
	scenarios, err := choose(o.Scenarios)
	if err != nil {
		return nil, err
	}
	l, err := newLab(o.Bin)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, l.close()) }()
	b := &bench{Options: o, lab: l}
	err = each(ctx, scenarios, b.scenario)
	return b.results, errors.Join(err, b.report())
}

// each measures one scenario after the other until one fails.
func each(ctx context.Context, scenarios []*scenario, measure func(context.Context, *scenario) error) error {
	for _, s := range scenarios {
		if err := measure(ctx, s); err != nil {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			return fmt.Errorf("scenario %s: %w", s.name, err)
		}
	}
	return nil
}

func (b *bench) say(format string, args ...any) {
	_, _ = fmt.Fprintf(b.Out, format+"\n", args...) //nolint:errcheck // nobody to tell that nothing can be told
}

// report shows the table, if it has a line, and what there is to say about it.
func (b *bench) report() error {
	if len(b.results) == 0 {
		return nil
	}
	if err := table(b.Out, b.results); err != nil {
		return err
	}
	for _, n := range b.notes {
		b.say("%s", n)
	}
	return nil
}

// judge fails when the registry says that it sent more copies than may be where all
// nodes pull a new image, at the same moment or one soon after the other; 0 is any
// number. What TCP sends again on a full line, some hundredths, is not held against it.
func judge(results []Result, most float64) error {
	var errs []error
	for _, r := range results {
		judged := r.Mode == ImageWolf && (r.Scenario == cold || r.Scenario == staggered)
		if most > 0 && judged && r.RegistryCopiesSaid > most {
			errs = append(errs, fmt.Errorf("the registry says that it sent %.3f copies in scenario %s, more than %.2f", r.RegistryCopiesSaid, r.Scenario, most))
		}
	}
	return errors.Join(errs...)
}

const (
	// saturated is the share of the processors' time, over a pull, beyond which
	// they and not the NICs are taken to be the limit.
	saturated = 0.9
	// leastRate is where lowering it ends, in Mbit/s.
	leastRate = 10
)

// scenario measures one scenario in both modes, at the rate that the processors
// can bear.
func (b *bench) scenario(ctx context.Context, s *scenario) error {
	p := s.plan(b.Options)
	p.fixed = p.fixed || b.KeepRate
	img, err := b.lab.images(ctx, s, b.Options)
	if err != nil {
		return err
	}
	for {
		m, err := b.measure(ctx, s, p, img)
		if err := errors.Join(err, b.lab.tidy()); err != nil {
			return err
		}
		switch {
		case b.tooFast(p, m.busy):
			b.note("%s: at %s the processors were busy for %.0f %% of the time (last node %.2f s); measured again at %s.",
				s.name, rateName(p.rate), 100*m.busy, m.wolf.last().Seconds(), rateName(p.rate/2))
			p.rate /= 2
			continue
		case m.busy > saturated:
			b.note("%s: the processors were busy for %.0f %% of the time; they have a part in its figures.", s.name, 100*m.busy)
		}
		b.results = append(b.results, m.results(b.Options, s, p, img.bytes)...)
		return nil
	}
}

// note shows something now, and again below the table.
func (b *bench) note(format string, args ...any) {
	b.notes = append(b.notes, fmt.Sprintf(format, args...))
	b.say("%s", b.notes[len(b.notes)-1])
}

// tooFast reports whether a scenario is to be measured at a lower rate.
func (b *bench) tooFast(p plan, busy float64) bool {
	return busy > saturated && !p.fixed && p.rate/2 >= leastRate
}

// measure runs a scenario, the modes by turns. It ends early, without all of the
// figures, when the rate turns out to be too high.
func (b *bench) measure(ctx context.Context, s *scenario, p plan, img images) (measured, error) {
	var m measured
	var alone, direct, wolf []sample
	once := func(p plan, mode Mode, title string, samples *[]sample) error {
		took, err := b.once(ctx, s, p, img, mode, title)
		*samples = append(*samples, took)
		m.busy = max(m.busy, took.busy)
		return err
	}
	times := b.Repeat
	if !b.Brief {
		times = max(times, s.least)
	}
	for range times {
		if !s.byMedian {
			one := p
			one.n = 1
			if err := once(one, Direct, "alone", &alone); err != nil {
				return m, err
			}
		}
		if err := once(p, ImageWolf, string(ImageWolf), &wolf); err != nil {
			return m, err
		}
		m.wolf = middle(wolf)
		if b.tooFast(p, m.busy) {
			return m, nil
		}
		if b.WolfOnly && !s.byMedian {
			continue
		}
		if err := once(p, Direct, string(Direct), &direct); err != nil {
			return m, err
		}
		m.direct = middle(direct)
	}
	if len(alone) > 0 {
		m.alone = middle(alone).last()
	}
	return m, nil
}

// once runs one mode of a scenario and shows how it went.
func (b *bench) once(ctx context.Context, s *scenario, p plan, img images, mode Mode, title string) (sample, error) {
	took, err := b.lab.run(ctx, s, p, img, mode)
	if err != nil {
		return took, err
	}
	b.say("%s, %s, %d node(s), %s, %s: last %.2f s, median %.2f s, the registry sent %.3f copies (%.3f without what TCP sent again); daemons %.1f CPU s, processors %.0f %% busy, %.0f %% waiting for the disk",
		s.name, title, p.n, rateName(p.rate), units.BytesSize(float64(img.bytes)), took.last().Seconds(), took.median().Seconds(),
		float64(took.registry)/float64(img.bytes), float64(took.said)/float64(img.bytes), took.cpu.Seconds(), 100*took.busy, 100*took.disk)
	return took, nil
}
