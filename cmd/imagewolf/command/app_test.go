package command

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/imagewolf/imagewolf/cluster"
	"github.com/imagewolf/imagewolf/config"
)

// fakeNode stands for a node: what is tested here is the way to it.
type fakeNode struct{ run func(context.Context) error }

func (f fakeNode) Run(ctx context.Context) error { return f.run(ctx) }

// clean takes every variable of ours out of the environment of the test.
func clean(t *testing.T) {
	t.Helper()
	for _, kv := range os.Environ() {
		if name, _, _ := strings.Cut(kv, "="); strings.HasPrefix(name, "IMAGEWOLF_") {
			t.Setenv(name, "")
		}
	}
}

// run runs the command line and returns what it printed.
func run(t *testing.T, ctx context.Context, makeNode func(config.Config, *slog.Logger) (runner, error), args ...string) (stdout, stderr string, err error) {
	t.Helper()
	clean(t)
	var out, errOut bytes.Buffer
	app := newApp(makeNode)
	app.Writer, app.ErrWriter = &out, &errOut
	err = app.RunContext(ctx, append([]string{"imagewolf"}, args...))
	return out.String(), errOut.String(), err
}

func write(t *testing.T, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestDaemonRunsANodeOnTheSettings(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	var got config.Config
	ran := false
	makeNode := func(c config.Config, log *slog.Logger) (runner, error) {
		got = c
		return fakeNode{func(ctx context.Context) error {
			log.Debug("too quiet to be heard")
			log.Error("heard")
			cancel()
			<-ctx.Done()
			ran = true
			return nil
		}}, nil
	}
	file := write(t, "seed_quota = \"1GiB\"\nlog_format = \"json\"\n[cluster]\ninsecure = true\nname = \"file\"\n")
	_, stderr, err := run(t, ctx, makeNode, "daemon", "--config", file, "--cluster-name", "flag", "--cluster-join", "a,b:7", "--cluster-labels=zone=x", "--seed-quota=2GiB")
	if err != nil || !ran {
		t.Fatalf("ran %v, %v", ran, err)
	}
	if got.Cluster.Name != "flag" || len(got.Cluster.Join) != 2 || got.Cluster.Labels["zone"] != "x" || got.SeedQuota != 2<<30 || !got.Cluster.Insecure {
		t.Errorf("node got %+v", got)
	}
	if !strings.Contains(stderr, `"msg":"heard"`) || strings.Contains(stderr, "too quiet") || !strings.Contains(stderr, "cluster.insecure: anyone") {
		t.Errorf("log:\n%s", stderr)
	}
}

func TestDaemonRefusesToStart(t *testing.T) {
	never := func(config.Config, *slog.Logger) (runner, error) {
		t.Error("a node was made")
		return nil, errors.New("unreached")
	}
	for name, c := range map[string]struct {
		args []string
		want string
	}{
		"without identity":     {[]string{"--config", write(t, "")}, "cluster: no identity"},
		"with unknown key":     {[]string{"--config", write(t, "rot = \"/a\"\n")}, "config.toml:1:1: unknown key rot (did you mean root?)"},
		"with absent file":     {[]string{"--config", "/nonexistent/c.toml"}, "no such file"},
		"with a bad flag":      {[]string{"--cluster-insecure", "--tracker-max-wait", "1"}, "flag --tracker-max-wait: \"1\" is no duration"},
		"with a stray word":    {[]string{"--cluster-insecure", "now"}, `takes no argument, and was given "now"`},
		"with an unknown flag": {[]string{"--frobnicate"}, "frobnicate"},
	} {
		t.Run(name, func(t *testing.T) {
			_, _, err := run(t, t.Context(), never, append([]string{"daemon"}, c.args...)...)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestDaemonHandsOnTheNodesError(t *testing.T) {
	want := errors.New("no luck")
	for _, makeNode := range []func(config.Config, *slog.Logger) (runner, error){
		func(config.Config, *slog.Logger) (runner, error) { return nil, want },
		func(config.Config, *slog.Logger) (runner, error) {
			return fakeNode{func(context.Context) error { return want }}, nil
		},
	} {
		if _, _, err := run(t, t.Context(), makeNode, "daemon", "--config", write(t, "[cluster]\ninsecure = true\n")); !errors.Is(err, want) {
			t.Errorf("got %v", err)
		}
	}
}

func TestConfigDefaultIsTheExample(t *testing.T) {
	out, _, err := run(t, t.Context(), newNode, "config", "default")
	want, werr := config.Example()
	if err != nil || werr != nil || out != string(want) {
		t.Errorf("%v, %v, %q", err, werr, out)
	}
}

func TestConfigCheck(t *testing.T) {
	good := write(t, "[cluster]\njoin = [\"a\"]\ncluster_key = \""+cluster.GenerateKey()+"\"\n")
	out, stderr, err := run(t, t.Context(), newNode, "config", "check", "--config", good)
	if err != nil || out != good+": good\n" || stderr != "" {
		t.Errorf("good: %v, %q, %q", err, out, stderr)
	}
	_, stderr, err = run(t, t.Context(), newNode, "config", "check", "--config", write(t, "[cluster]\ninsecure = true\n"))
	if err != nil || !strings.Contains(stderr, "warning: cluster.insecure") {
		t.Errorf("doubtful: %v, %q", err, stderr)
	}
	// What is wrong with the file and what is wrong with the values, in one go.
	_, _, err = run(t, t.Context(), newNode, "config", "check", "--config", write(t, "log_level = \"loud\"\nrot = 1\n"))
	for _, want := range []string{":2:1: unknown key rot", "log_level: \"loud\"", "cluster: no identity"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q is missing in: %v", want, err)
		}
	}
	// What could not be read is not judged: what is missed may well be in it.
	for _, file := range []string{"/nonexistent/c.toml", write(t, "[cluster")} {
		_, _, err = run(t, t.Context(), newNode, "config", "check", "--config", file)
		if err == nil || strings.Contains(err.Error(), "identity") {
			t.Errorf("%s: %v", file, err)
		}
	}
	// A key that no cluster has is found before the daemon finds it.
	_, _, err = run(t, t.Context(), newNode, "config", "check", "--config", write(t, "[cluster]\ncluster_key = \"iwk1-typo\"\n"))
	if err == nil || !strings.Contains(err.Error(), "cluster key") || strings.Contains(err.Error(), "typo") {
		t.Errorf("bad key: %v", err)
	}
}

func TestEnvironmentIsRead(t *testing.T) {
	file := write(t, "[cluster]\ninsecure = true\n")
	clean(t)
	t.Setenv("IMAGEWOLF_CONFIG", file)
	t.Setenv("IMAGEWOLF_LOG_LEVEL", "loud")
	app := newApp(newNode)
	app.Writer, app.ErrWriter = &bytes.Buffer{}, &bytes.Buffer{}
	err := app.RunContext(t.Context(), []string{"imagewolf", "config", "check"})
	if err == nil || !strings.Contains(err.Error(), "log_level: \"loud\"") || strings.Contains(err.Error(), "identity") {
		t.Errorf("got %v", err)
	}
}

func TestGeneratedKeyIsAnIdentity(t *testing.T) {
	out, _, err := run(t, t.Context(), newNode, "cluster-key", "generate")
	if err != nil {
		t.Fatal(err)
	}
	key := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(key, []byte(out), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err = run(t, t.Context(), newNode, "config", "check", "--config", write(t, "[cluster]\ncluster_key_file = \""+key+"\"\n")); err != nil {
		t.Error(err)
	}
}

func TestVersion(t *testing.T) {
	out, _, err := run(t, t.Context(), newNode, "version")
	if err != nil || !strings.HasPrefix(out, "imagewolf ") || !strings.Contains(out, "\ncommit ") ||
		!strings.Contains(out, runtime.Version()+" "+runtime.GOOS+"/"+runtime.GOARCH) {
		t.Errorf("%v, %q", err, out)
	}
}

func TestUnknownCommand(t *testing.T) {
	if _, _, err := run(t, t.Context(), newNode, "deamon"); err == nil || !strings.Contains(err.Error(), "deamon") {
		t.Errorf("got %v", err)
	}
}

func TestDemoIsSoughtBesideTheProgramThenInPath(t *testing.T) {
	beside, inPath := t.TempDir(), t.TempDir()
	t.Setenv("PATH", inPath)
	if _, err := findDemo(beside); err == nil || !strings.Contains(err.Error(), "make demo") {
		t.Errorf("without one: %v", err)
	}
	for _, dir := range []string{inPath, beside} {
		want := filepath.Join(dir, demoBinary)
		if err := os.WriteFile(want, []byte("#!/bin/sh\n"), 0o700); err != nil { //nolint:gosec // a program must be executable
			t.Fatal(err)
		}
		if got, err := findDemo(beside); err != nil || got != want {
			t.Errorf("got %q, %v", got, err)
		}
	}
}
