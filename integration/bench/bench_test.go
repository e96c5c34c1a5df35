package bench

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

// seconds makes durations.
func seconds(s ...float64) []time.Duration {
	var out []time.Duration
	for _, v := range s {
		out = append(out, time.Duration(v*float64(time.Second)))
	}
	return out
}

// example is a scenario measured in both modes.
func example() measured {
	return measured{
		alone:  10 * time.Second,
		direct: sample{took: seconds(30, 40, 10, 20), registry: 4000, said: 4000, sent: []int64{1, 2, 3, 4}, received: []int64{5, 6, 7, 8}},
		wolf: sample{
			took: seconds(11, 12.5, 10, 12), registry: 1010, said: 1000, sent: []int64{1, 900, 3, 4}, received: []int64{5, 6, 7, 8},
			cpu: 1500 * time.Millisecond, rss: 1 << 20, zones: 2000,
		},
	}
}

// TestResults: what the ratios are of.
func TestResults(t *testing.T) {
	o, p := Options{Commit: "c0ffee"}, plan{n: 4, rate: 200}
	got := example().results(o, &scenario{name: cold}, p, 1000)
	want := []Result{
		{
			Scenario: cold, Mode: Direct, N: 4, Rate: 200, ImageBytes: 1000, MedianS: 25, LastS: 40, LastRatio: 4, RegistryCopies: 4, RegistryCopiesSaid: 4,
			SentBytes: []int64{1, 2, 3, 4}, ReceivedBytes: []int64{5, 6, 7, 8}, Commit: "c0ffee",
		},
		{
			Scenario: cold, Mode: ImageWolf, N: 4, Rate: 200, ImageBytes: 1000, MedianS: 11.5, LastS: 12.5, LastRatio: 1.25, RegistryCopies: 1.01, RegistryCopiesSaid: 1,
			SentBytes: []int64{1, 900, 3, 4}, ReceivedBytes: []int64{5, 6, 7, 8}, CPUS: 1.5, PeakRSSBytes: 1 << 20, Commit: "c0ffee",
		},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	byMedian := example().results(o, &scenario{name: "rolling", byMedian: true}, p, 1000)
	if byMedian[0].LastRatio != 1 || byMedian[1].LastRatio != 0.46 {
		t.Errorf("ratios of medians: %+v", byMedian)
	}
	zones := example().results(o, &scenario{name: "zones", place: place{zones: 3}}, p, 1000)
	if zones[1].ZoneCopies != 2 {
		t.Errorf("copies between zones: %+v", zones[1])
	}
	m := example()
	m.direct = sample{}
	if got := m.results(o, &scenario{name: cold}, p, 1000); len(got) != 1 || got[0].Mode != ImageWolf {
		t.Errorf("without direct: %+v", got)
	}
}

// TestMiddle: repetitions are told apart by their last nodes.
func TestMiddle(t *testing.T) {
	s := []sample{{took: seconds(1, 9)}, {took: seconds(5)}, {took: seconds(6, 2)}}
	if got := middle(s).last(); got != 6*time.Second {
		t.Errorf("of three: %s", got)
	}
	a := sample{
		took: seconds(9, 1, 6), registry: 100, said: 90, zones: 10, sent: []int64{1, 2, 3}, received: []int64{4, 5, 6},
		cpu: 2 * time.Second, rss: 70, busy: 0.5, disk: 0.25,
	}
	b := sample{
		took: seconds(3, 4, 5), registry: 200, said: 110, zones: 30, sent: []int64{3, 4, 5}, received: []int64{6, 7, 8},
		cpu: 4 * time.Second, rss: 50, busy: 1, disk: 0.75,
	}
	want := sample{
		took: seconds(2, 5, 7), registry: 150, said: 100, zones: 20, sent: []int64{2, 3, 4}, received: []int64{5, 6, 7},
		cpu: 3 * time.Second, rss: 70, busy: 0.75, disk: 0.5,
	}
	for _, s := range [][]sample{{a, b}, {b, a}, {{took: seconds(99)}, a, b, {took: seconds(1)}}} {
		if got := middle(s); !reflect.DeepEqual(got, want) {
			t.Errorf("of %d: got %+v, want %+v", len(s), got, want)
		}
	}
}

// TestFailureKeepsWhatIsMeasured: a scenario that fails ends the run with an error, and
// takes nothing from those before it.
func TestFailureKeepsWhatIsMeasured(t *testing.T) {
	var out strings.Builder
	broken := errors.New("a disk broke")
	b := &bench{Options: Options{N: 4, Out: &out, JSON: filepath.Join(t.TempDir(), "bench.json"), MaxCopies: 0.99}}
	var tried []string
	err := each(t.Context(), scenarios[:3], func(_ context.Context, s *scenario) error {
		if tried = append(tried, s.name); len(tried) > 1 {
			return broken
		}
		b.results = example().results(b.Options, s, plan{n: 4}, 1000)
		b.notes = []string{"a note"}
		return nil
	})
	if !slices.Equal(tried, []string{cold, staggered}) || !errors.Is(err, broken) || !strings.Contains(err.Error(), staggered) {
		t.Errorf("tried %v: %v", tried, err)
	}
	if err := b.report(); err != nil || !strings.Contains(out.String(), "1.25") || !strings.Contains(out.String(), "a note") {
		t.Errorf("shown: %q, %v", out.String(), err)
	}
	err = conclude(b.Options, b.results, err)
	if !errors.Is(err, broken) || !strings.Contains(err.Error(), "1.000 copies") {
		t.Errorf("in the end: %v", err)
	}
	var got []Result
	if data, err := os.ReadFile(b.JSON); err != nil || json.Unmarshal(data, &got) != nil || !reflect.DeepEqual(got, b.results) {
		t.Errorf("written: %s, %v", data, err)
	}

	// Nothing at all leaves an earlier file alone, and shows no table.
	out.Reset()
	b.results = nil
	if err := b.report(); err != nil || out.Len() > 0 {
		t.Errorf("shown: %q, %v", out.String(), err)
	}
	if err := conclude(b.Options, nil, broken); !errors.Is(err, broken) {
		t.Error(err)
	}
	if data, err := os.ReadFile(b.JSON); err != nil || len(data) < 10 {
		t.Errorf("%q, %v", data, err)
	}

	// Who ends it is told why it ended, and not what that broke.
	ctx, cancel := context.WithCancelCause(t.Context())
	err = each(ctx, scenarios, func(context.Context, *scenario) error {
		cancel(errors.New("enough"))
		return broken
	})
	if err == nil || err.Error() != "enough" {
		t.Errorf("ended: %v", err)
	}
}

// TestJSON: the file has the names that others read, and no more.
func TestJSON(t *testing.T) {
	file := filepath.Join(t.TempDir(), "bench.json")
	if err := write(file, example().results(Options{}, &scenario{name: cold}, plan{n: 4}, 1000)); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var got []map[string]any
	if err := json.Unmarshal(data, &got); err != nil || len(got) != 2 {
		t.Fatalf("%v in %s", err, data)
	}
	want := strings.Fields(`scenario mode n rate image_bytes median_s last_s last_ratio registry_copies registry_copies_said
		sent_bytes received_bytes cpu_s peak_rss_bytes commit`)
	for _, object := range got {
		var names []string
		for name := range object {
			names = append(names, name)
		}
		if slices.Sort(names); !slices.Equal(names, slices.Sorted(slices.Values(want))) {
			t.Errorf("names: %v", names)
		}
	}
	if err := write("", nil); err != nil {
		t.Error(err)
	}
}

// TestTable: a line for each scenario and mode, and what the columns mean.
func TestTable(t *testing.T) {
	var out strings.Builder
	if err := table(&out, example().results(Options{}, &scenario{name: cold}, plan{n: 4, rate: 200}, 1000)); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"imagewolf      4  200 Mbit/s  1000B     11.50   12.50   1.25             1.01  1.00       0.90", "says:", "most sent:"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, out.String())
		}
	}
}

// TestJudge: more than one copy fails a smoke run, cold or staggered.
func TestJudge(t *testing.T) {
	results := []Result{
		{Scenario: cold, Mode: Direct, RegistryCopiesSaid: 4}, {Scenario: "warm", Mode: ImageWolf, RegistryCopiesSaid: 4},
		{Scenario: cold, Mode: ImageWolf, RegistryCopiesSaid: 1.02}, {Scenario: staggered, Mode: ImageWolf, RegistryCopies: 1.03, RegistryCopiesSaid: 1.02},
		{Scenario: staggered, Mode: Direct, RegistryCopiesSaid: 4},
	}
	if err := judge(results, 1.02); err != nil {
		t.Error(err)
	}
	for _, i := range []int{2, 3} {
		results[i].RegistryCopiesSaid = 1.03
		if err := judge(results, 1.02); err == nil || !strings.Contains(err.Error(), results[i].Scenario) {
			t.Errorf("1.03 copies %s: %v", results[i].Scenario, err)
		}
		if err := judge(results, 0); err != nil {
			t.Error(err)
		}
		results[i].RegistryCopiesSaid = 1
	}
}

// TestParameters: variables replace defaults, and wrong ones are named.
func TestParameters(t *testing.T) {
	vars := map[string]string{
		"N": "3", "RATE": "1gbit", "LAYERS": "2", "LAYER_MIB": "5", "REPEAT": "7", "SCENARIOS": "cold, lone", "BENCH_JSON": "f", "MODES": "imagewolf",
	}
	o := Default()
	if err := o.parameters(func(k string) string { return vars[k] }); err != nil {
		t.Fatal(err)
	}
	want := Options{N: 3, Rate: 1000, Layers: 2, LayerMiB: 5, Repeat: 7, Scenarios: []string{"cold", "lone"}, JSON: "f", WolfOnly: true}
	if !reflect.DeepEqual(o, want) {
		t.Errorf("got %+v, want %+v", o, want)
	}
	// What the table of variables gives as defaults is understood.
	for _, v := range []map[string]string{{}, {"MODES": "both", "SCENARIOS": "all"}} {
		o := Default()
		if err := o.parameters(func(k string) string { return v[k] }); err != nil || o.WolfOnly {
			t.Errorf("%v: %+v, %v", v, o, err)
		}
		if got, err := choose(o.Scenarios); err != nil || len(got) != len(scenarios) {
			t.Errorf("%v: %d scenarios, %v", v, len(got), err)
		}
	}
	for k, v := range map[string]string{"N": "x", "RATE": "1tbit", "MODES": "direct"} {
		err := o.parameters(func(name string) string { return map[string]string{k: v}[name] })
		if err == nil || !strings.Contains(err.Error(), k+"="+v) && !strings.Contains(err.Error(), v) {
			t.Errorf("%s=%s: %v", k, v, err)
		}
	}
	for _, bad := range []Options{{N: 0, Rate: 1, Layers: 1, LayerMiB: 1, Repeat: 1}, {N: 1, Layers: 1, LayerMiB: 1, Repeat: 1}, {N: 1, Rate: 1, LayerMiB: 1, Repeat: 1}, {N: 1, Rate: 1, Layers: 1, LayerMiB: 1}} {
		if bad.check() == nil {
			t.Errorf("%+v is fine", bad)
		}
	}
	d, s := Default(), Smoke()
	for _, o := range []*Options{&d, &s} {
		if err := o.check(); err != nil {
			t.Error(err)
		}
		if _, err := choose(o.Scenarios); err != nil {
			t.Error(err)
		}
	}
	if err := Command(t.Context(), []string{"sing"}, func(string) string { return "" }, nil); err == nil {
		t.Error("unknown command")
	}
}

// TestChoose: names, groups, all, and unknown ones.
func TestChoose(t *testing.T) {
	for names, want := range map[string]int{"": len(scenarios), "cold": 1, "lone": 3, "lone-random": 1, "small cold": 3, "all": len(scenarios), "all cold": len(scenarios)} {
		if got, err := choose(strings.Fields(names)); err != nil || len(got) != want {
			t.Errorf("%q: %d, %v", names, len(got), err)
		}
	}
	if _, err := choose([]string{"hot"}); err == nil || !strings.Contains(err.Error(), "cold") {
		t.Errorf("unknown: %v", err)
	}
	seen := map[string]bool{}
	for _, s := range scenarios {
		if seen[s.name] || s.what == "" {
			t.Errorf("scenario %q", s.name)
		}
		seen[s.name] = true
	}
}

// TestLoad: shares of processor time between two moments.
func TestLoad(t *testing.T) {
	a, err := parseStat("cpu  100 0 100 700 50 0 0 50 0 0\ncpu0 1\n")
	if err != nil {
		t.Fatal(err)
	}
	b, err := parseStat("cpu  150 0 120 710 60 0 5 55 0 0\n")
	if err != nil {
		t.Fatal(err)
	}
	if busy, disk := b.since(a); busy != 0.8 || disk != 0.1 {
		t.Errorf("busy %v, disk %v", busy, disk)
	}
	if busy, _ := a.since(a); busy != 0 {
		t.Errorf("no time at all: %v", busy)
	}
	if _, err := parseStat("something else"); err == nil {
		t.Error("no error")
	}
}
