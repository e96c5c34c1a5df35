package config

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

// write puts content into a file of mode 0600 and returns its path.
func write(t *testing.T, name, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestExampleFileIsWhatConfigDefaultPrints(t *testing.T) {
	want, err := Example()
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile("../config.toml.example")
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != string(want) {
		t.Error("config.toml.example is not what 'imagewolf config default' prints: run 'make generate'")
	}
}

func TestExampleLoadsAsTheDefaults(t *testing.T) {
	b, err := Example()
	if err != nil {
		t.Fatal(err)
	}
	got, err := Load(Sources{File: write(t, "example.toml", string(b))})
	if err != nil {
		t.Fatal(err)
	}
	if want := Default(); !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

func TestEveryFieldIsDocumented(t *testing.T) {
	b, err := Example()
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(string(b), "\n")
	for _, f := range Fields() {
		if len(f.Usage) < 10 {
			t.Errorf("%s: no comment", f.Key)
		}
		name := f.Key[strings.LastIndex(f.Key, ".")+1:]
		found := false
		for i, l := range lines {
			found = found || strings.HasPrefix(l, name+" =") && strings.HasPrefix(lines[i-1], "# ")
		}
		if !found {
			t.Errorf("%s: not in the example under a comment", f.Key)
		}
	}
	for i, l := range lines {
		if len(l) > 110 {
			t.Errorf("example line %d has %d characters: break it", i+1, len(l))
		}
	}
}

func TestNamesOfEnvironmentAndFlagsAreUnique(t *testing.T) {
	seen := map[string]string{}
	for _, f := range Fields() {
		for _, name := range []string{f.Env, f.Flag} {
			if other, ok := seen[name]; ok && name != "" {
				t.Errorf("%s and %s share the name %s", f.Key, other, name)
			}
			seen[name] = f.Key
		}
		if f.Key == "cluster.cluster_key" && (f.Flag != "" || f.Env != "IMAGEWOLF_CLUSTER_KEY") {
			t.Errorf("the key must be settable by IMAGEWOLF_CLUSTER_KEY and not be a flag, is %q, %q", f.Env, f.Flag)
		}
	}
}

// Every field is set through every source, so that none is in the table and
// yet without effect.
func TestEverySourceSetsEveryField(t *testing.T) {
	for _, f := range Fields() {
		text := "x"
		var probe Config
		if f.Set(&probe, text) != nil {
			text = "7s"
		}
		if f.Set(&probe, text) != nil {
			text = "7"
		}
		if f.Bool {
			text = "true"
		}
		if f.Key == "cluster.labels" {
			text = "zone=b"
		}
		want := Default()
		if err := f.Set(&want, text); err != nil {
			t.Errorf("%s: %v", f.Key, err)
			continue
		}
		if reflect.DeepEqual(want, Default()) {
			t.Errorf("%s: Set had no effect", f.Key)
		}
		one := func(name string) func(string) (string, bool) {
			return func(n string) (string, bool) { return text, n == name }
		}
		got, err := Load(Sources{Env: one(f.Env)})
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s by %s: %+v, %v", f.Key, f.Env, got, err)
		}
		if f.Flag == "" {
			continue
		}
		if got, err = Load(Sources{Flags: one(f.Flag)}); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s by --%s: %+v, %v", f.Key, f.Flag, got, err)
		}
	}
}

func TestOrderOfSources(t *testing.T) {
	file := write(t, "c.toml", "seed_quota = 5\nlog_level = \"debug\"\n[cluster]\njoin = [\"a\", \"b:1\"]\nlabels = {zone = \"z\"}\n[tracker]\nmax_wait=\"1m\"\n")
	env := map[string]string{"IMAGEWOLF_SEED_QUOTA": "6KiB", "IMAGEWOLF_CLUSTER_JOIN": "", "IMAGEWOLF_LOG_LEVEL": "warn"}
	flags := map[string]string{"log-level": "error"}
	in := func(m map[string]string) func(string) (string, bool) {
		return func(k string) (string, bool) { v, ok := m[k]; return v, ok }
	}
	c, err := Load(Sources{File: file, Env: in(env), Flags: in(flags)})
	if err != nil {
		t.Fatal(err)
	}
	if c.SeedQuota != 6<<10 {
		t.Errorf("environment over file: seed_quota %v", c.SeedQuota)
	}
	if c.LogLevel != "error" {
		t.Errorf("flag over environment: log_level %v", c.LogLevel)
	}
	if !reflect.DeepEqual(c.Cluster.Join, []string{"a", "b:1"}) {
		t.Errorf("an empty variable must count as not set: join %v", c.Cluster.Join)
	}
	if c.Cluster.Labels["zone"] != "z" || c.Tracker.MaxWait.Duration() != time.Minute {
		t.Errorf("file over default: %+v", c)
	}
	if c.Tracker.StallTimeout != Default().Tracker.StallTimeout {
		t.Errorf("default where nothing is said: %v", c.Tracker.StallTimeout)
	}
}

func TestFileMayBeAbsentOnlyWhenOptional(t *testing.T) {
	absent := filepath.Join(t.TempDir(), "none.toml")
	if _, err := Load(Sources{File: absent, Optional: true}); err != nil {
		t.Error(err)
	}
	if _, err := Load(Sources{File: absent}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v", err)
	}
	if _, err := Load(Sources{File: t.TempDir(), Optional: true}); err == nil {
		t.Error("a directory was read as a file")
	}
}

func TestUnits(t *testing.T) {
	sizes := map[string]int64{"0": 0, "17": 17, "20GiB": 20 << 30, "20GB": 20e9, "1.5 MiB": 3 << 19, "64k": 64000, "9223372036854775807": 1<<63 - 1}
	for text, want := range sizes {
		var s Size
		if err := s.UnmarshalText([]byte(text)); err != nil || s.Bytes() != want {
			t.Errorf("size %q: %d, %v", text, s, err)
		}
		var again Size
		if err := again.UnmarshalText([]byte(s.String())); err != nil || again != s {
			t.Errorf("size %q printed as %q reads as %d, %v", text, s, again, err)
		}
	}
	for _, text := range []string{"", "-1", "-1GiB", "GiB", "1XB", "1e30", "9999999PiB", "NaN", "0x10"} {
		var s Size
		if err := s.UnmarshalText([]byte(text)); err == nil {
			t.Errorf("size %q was read as %d", text, s)
		}
	}
	var r Rate
	if err := r.UnmarshalText([]byte("10MiB/s")); err != nil || r.Bytes() != 10<<20 || r.String() != "10MiB/s" {
		t.Errorf("rate: %v, %v", r, err)
	}
	for _, text := range []string{"300ms", "2s", "1m", "1h", "1h30m", "1m30s", "0s", "10m"} {
		var d Duration
		if err := d.UnmarshalText([]byte(text)); err != nil || d.String() != text {
			t.Errorf("duration %q: %v, %v", text, d, err)
		}
	}
	for _, text := range []string{"", "5", "-1s", "soon"} {
		var d Duration
		if err := d.UnmarshalText([]byte(text)); err == nil {
			t.Errorf("duration %q was read as %v", text, d)
		}
	}
}

// FuzzSet has any text in the environment: what is taken can be written down, and is
// read as the same again.
func FuzzSet(f *testing.F) {
	fields := Fields()
	for i, field := range fields {
		for _, text := range []string{field.Default, "5764607523034234880", "9007199254740993", "1h0m0s", "a=b, c=d=,=", "0.5KiB/s"} {
			f.Add(uint8(i), text)
		}
	}
	f.Fuzz(func(t *testing.T, n uint8, text string) {
		field := fields[int(n)%len(fields)]
		c, again := Default(), Default()
		if field.Set(&c, text) != nil {
			return
		}
		said := format(reflect.ValueOf(c).FieldByIndex(field.index))
		if err := field.Set(&again, said); err != nil || !reflect.DeepEqual(again, c) {
			t.Errorf("%s: %q is written as %q: %v", field.Key, text, said, err)
		}
	})
}

func TestClusterKey(t *testing.T) {
	if k, err := (Cluster{ClusterKey: " k\n"}).Key(); k != "k" || err != nil {
		t.Errorf("%q, %v", k, err)
	}
	if k, err := (Cluster{ClusterKeyFile: write(t, "key", "k2\n")}).Key(); k != "k2" || err != nil {
		t.Errorf("%q, %v", k, err)
	}
	if k, err := (Cluster{ClusterKeyFile: write(t, "key", " \n")}).Key(); err == nil {
		t.Errorf("an empty file gave key %q", k)
	}
	if k, err := (Cluster{}).Key(); k != "" || err != nil {
		t.Errorf("%q, %v", k, err)
	}
	c := Cluster{AcceptedKeys: []string{" a\n", "b"}, AcceptedKeyFiles: []string{write(t, "key", "c\n")}}
	if got, err := c.Accepted(); !slices.Equal(got, []string{"a", "b", "c"}) || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	c.AcceptedKeyFiles = []string{write(t, "key", "")}
	if got, err := c.Accepted(); err == nil {
		t.Errorf("an empty file gave keys %q", got)
	}
}

func FuzzLoad(f *testing.F) {
	bad, err := filepath.Glob("testdata/*.toml")
	if err != nil {
		f.Fatal(err)
	}
	for _, path := range append(bad, "../config.toml.example") {
		b, err := os.ReadFile(path)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, doc []byte) {
		c := Default()
		if errs := c.decode("f", doc); errors.Join(errs...) != nil {
			for _, err := range errs {
				if err != nil && !strings.HasPrefix(err.Error(), "f:") {
					t.Errorf("error without its place: %v", err)
				}
			}
			return
		}
		// Whatever was read must be judged without a panic, and no number may
		// have come out negative.
		for _, e := range complaints(c.Validate()) {
			if !strings.Contains(e, ": ") {
				t.Errorf("complaint without its key: %q", e)
			}
		}
		c.Warnings()
		if c.SeedQuota < 0 || c.Swarm.UploadLimit < 0 || c.Swarm.DownloadLimit < 0 ||
			c.Swarm.IdleTimeout < 0 || c.Tracker.MaxWait < 0 {
			t.Errorf("negative: %+v", c)
		}
	})
}

func TestPortsThatTakeEachOther(t *testing.T) {
	for _, c := range []struct {
		metrics string
		taken   bool
	}{
		{"0.0.0.0:7947", true}, {"127.0.0.1:7947", true}, {":7947", true}, {"[::]:7947", true},
		{"[::1]:7947", false}, {"127.0.0.1:7948", false}, {"127.0.0.1:0", false},
	} {
		cfg := Default()
		cfg.Cluster.Insecure, cfg.Metrics.Address = true, c.metrics
		if err := cfg.Validate(); (err != nil) != c.taken {
			t.Errorf("%s beside %s: %v", c.metrics, cfg.Cluster.DataAddress, err)
		}
	}
	n := DefaultNotifier()
	n.Metrics.Address = "127.0.0.1:7950"
	if err := n.Validate(); err == nil || !strings.Contains(err.Error(), "metrics.address: 127.0.0.1:7950 has the port of listen") {
		t.Errorf("the notifier's: %v", err)
	}
}
