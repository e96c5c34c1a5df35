package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
)

// plotFile is where the README looks for the plot.
const plotFile = "docs/bench.svg"

// Command runs what the arguments say: "run" (a full run), "smoke" or "plot".
// Parameters are taken from variables, which make passes on as they are.
func Command(ctx context.Context, args []string, getenv func(string) string, out io.Writer) error {
	o := Default()
	what := strings.Join(args, " ")
	switch what {
	case "smoke":
		o = Smoke()
	case "plot":
		o = Plotted()
	}
	o.Out, o.Bin, o.Commit = out, "bin", getenv("COMMIT")
	if err := o.parameters(getenv); err != nil {
		return err
	}
	switch what {
	case "run", "smoke":
		return Run(ctx, o)
	case "plot":
		return Plot(ctx, o, plotFile)
	}
	return errors.New("say one of: run, smoke, plot")
}

// parameters replaces what variables say.
func (o *Options) parameters(getenv func(string) string) error {
	var errs []error
	for name, field := range map[string]*int{"N": &o.N, "LAYERS": &o.Layers, "LAYER_MIB": &o.LayerMiB, "REPEAT": &o.Repeat} {
		v := getenv(name)
		if v == "" {
			continue
		}
		n, err := strconv.Atoi(v)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s=%s: %w", name, v, err))
		}
		*field = n
	}
	if v := getenv("RATE"); v != "" {
		var err error
		if o.Rate, err = parseRate(v); err != nil {
			errs = append(errs, err)
		}
	}
	if v := getenv("SCENARIOS"); v != "" {
		o.Scenarios = strings.FieldsFunc(v, func(r rune) bool { return r == ',' || r == ' ' })
	}
	switch v := getenv("MODES"); v {
	case "", "both":
	case string(ImageWolf):
		o.WolfOnly = true
	default:
		errs = append(errs, fmt.Errorf("MODES=%s: want both, or imagewolf, which alone can be had alone", v))
	}
	if v := getenv("BENCH_JSON"); v != "" {
		o.JSON = v
	}
	return errors.Join(errs...)
}

// parseRate reads Mbit/s: 200, 200mbit or 1gbit.
func parseRate(v string) (int, error) {
	digits, unit := strings.ToLower(v), 1
	if s, ok := strings.CutSuffix(digits, "gbit"); ok {
		digits, unit = s, 1000
	}
	n, err := strconv.Atoi(strings.TrimSuffix(digits, "mbit"))
	if err != nil {
		return 0, fmt.Errorf("RATE=%s: want Mbit/s, such as 200, 200mbit or 1gbit", v)
	}
	return n * unit, nil
}
