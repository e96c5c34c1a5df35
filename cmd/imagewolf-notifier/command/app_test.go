package command

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// run runs the command line and returns what it printed.
func run(t *testing.T, ctx context.Context, stdin string, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	for _, kv := range os.Environ() {
		if name, _, _ := strings.Cut(kv, "="); strings.HasPrefix(name, "IMAGEWOLF_") {
			t.Setenv(name, "")
		}
	}
	var out, errOut bytes.Buffer
	app := App()
	app.Reader, app.Writer, app.ErrWriter = strings.NewReader(stdin), &out, &errOut
	err = app.RunContext(ctx, append([]string{"imagewolf-notifier"}, args...))
	return out.String(), errOut.String(), err
}

func write(t *testing.T, name, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func settings(t *testing.T) string {
	t.Helper()
	return write(t, "notifier.toml", `
listen = "127.0.0.1:0"
allow_registries = ["ghcr.io", "quay.io"]
[registry]
check_tags = false
[queue]
file = "`+filepath.Join(t.TempDir(), "queue.db")+`"
[receiver.github]
type = "ghcr"
secret = "0123456789abcdef"
[receiver.quay]
type = "quay"
secret = "0123456789abcdef"
[[rule]]
name = "tests"
images = ["**/test-*"]
skip = true
[[rule]]
name = "web"
images = ["ghcr.io/acme/**"]
nodes = "zone=a"
`)
}

func TestRulesAreTried(t *testing.T) {
	file := settings(t)
	quay := `{"name":"web","repository":"acme/test-web","docker_url":"quay.io/acme/test-web","updated_tags":["1","2"]}`
	github := `{"action":"published","package":{"name":"web","package_type":"CONTAINER","package_version":{"package_url":"ghcr.io/acme/web:1",` +
		`"container_metadata":{"tag":{"name":"1","digest":"sha256:4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945"}}}}}`
	for _, c := range []struct {
		name, stdin string
		args        []string
		said        []string
	}{
		{"our own form", `{"image": "ghcr.io/acme/web:1@sha256:4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945"}`, nil, []string{"- rule tests: ", "+ rule web: ", "requested: "}},
		{"not allowed", `{"image": "evil.example/acme/web:1"}`, nil, []string{"not_allowed: "}},
		{"no match", `{"image": "ghcr.io/other/web:1"}`, nil, []string{"- rule tests: ", "- rule web: ", "no_match: "}},
		{"no image", `{}`, nil, []string{"foreign: no image in it"}},
		{"a webhook", quay, []string{"--receiver", "quay"}, []string{"quay.io/acme/test-web:1\n", "quay.io/acme/test-web:2\n", "+ rule tests: ", "skipped: "}},
		{"a webhook with a header", github, []string{"--receiver=github", "--header", "X-GitHub-Event: package"}, []string{"ghcr.io/acme/web:1@sha256:4f", "+ rule web: "}},
		{"a webhook without its header", github, []string{"--receiver=github"}, []string{"foreign: foreign event"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, from := range []string{"-", write(t, "event.json", c.stdin)} {
				args := append([]string{"rules", "test", "--config", file}, c.args...)
				out, _, err := run(t, t.Context(), c.stdin, append(args, from)...)
				if err != nil {
					t.Error(err)
				}
				for _, s := range c.said {
					if !strings.Contains(out, s) {
						t.Errorf("no %q in\n%s", s, out)
					}
				}
			}
		})
	}
	for body, said := range map[string]string{
		`[]`: "the whole is of the wrong type (array)", `{"image":1}`: "image is of the wrong type (number)", `{"image":`: "unexpected end",
	} {
		if _, _, err := run(t, t.Context(), body, "rules", "test", "--config", file, "-"); err == nil || !strings.Contains(err.Error(), said) || strings.Contains(err.Error(), "Go ") {
			t.Errorf("%s: %v, should say %q", body, err, said)
		}
	}
	for name, args := range map[string][]string{
		"give one file":        {"rules", "test", "--config", file},
		"no [receiver.x]":      {"rules", "test", "--config", file, "--receiver", "x", "-"},
		"write NAME: VALUE":    {"rules", "test", "--config", file, "--header", "x", "-"},
		"not what type":        {"rules", "test", "--config", file, "-"},
		"no such file":         {"rules", "test", "--config", file, "/nonexistent/event"},
		"there is no command":  {"start"},
		"takes no argument":    {"version", "x"},
		"notifier.toml: no su": {"run", "--config", "/nonexistent/notifier.toml"},
	} {
		if _, _, err := run(t, t.Context(), "nothing", args...); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%q: %v, should say %q", args, err, name)
		}
	}
}

func TestSettingsAreChecked(t *testing.T) {
	file := settings(t)
	out, stderr, err := run(t, t.Context(), "", "config", "check", "--config", file)
	if err != nil || out != file+": good\n" || stderr != "" {
		t.Errorf("%q %q %v", out, stderr, err)
	}
	for content, said := range map[string]string{
		"lisen = 1":        "unknown key lisen (did you mean listen?)",
		"listen = \"x\"":   "allow_registries: empty",
		"\n[api]\ntoken=1": "api.token: must be text",
		"lisen = 2":        "allow_registries: empty",
	} {
		if _, _, err := run(t, t.Context(), "", "config", "check", "--config", write(t, "bad.toml", content)); err == nil || !strings.Contains(err.Error(), said) {
			t.Errorf("%q: %v, should say %q", content, err, said)
		}
	}
}

// What could not be read is not judged: what is missed may well be in it.
func TestSettingsThatCannotBeRead(t *testing.T) {
	for _, file := range []string{"/nonexistent/notifier.toml", write(t, "bad.toml", "[queue")} {
		if _, _, err := run(t, t.Context(), "", "run", "--config", file); err == nil || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v", file, err)
		}
	}
}

// It runs until it is told to stop.
func TestRun(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	out := &untilSaid{text: "msg=serving", then: cancel}
	app := App()
	app.Writer, app.ErrWriter = out, out
	if err := app.RunContext(ctx, []string{"imagewolf-notifier", "run", "--config", settings(t)}); err != nil {
		t.Error(err)
	}
	if said := out.String(); !strings.Contains(said, "imagewolf-notifier starts") || !strings.Contains(said, "receivers=2") {
		t.Errorf("said\n%s", said)
	}
}

// untilSaid is a writer that does something once when a text is written.
type untilSaid struct {
	bytes.Buffer
	text string
	then func()
}

func (u *untilSaid) Write(b []byte) (int, error) {
	if strings.Contains(string(b), u.text) {
		u.then()
	}
	return u.Buffer.Write(b)
}

func TestVersion(t *testing.T) {
	out, _, err := run(t, t.Context(), "", "version")
	if err != nil || !strings.HasPrefix(out, "imagewolf-notifier ") || !strings.Contains(out, "\ncommit ") {
		t.Errorf("%q, %v", out, err)
	}
}
