package credentials

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// auth is an entry as 'docker login' writes it.
func auth(user, secret string) string {
	return fmt.Sprintf(`{"auth":%q}`, base64.StdEncoding.EncodeToString([]byte(user+":"+secret)))
}

// files writes each text into a file and returns their paths.
func files(t *testing.T, texts ...string) []string {
	t.Helper()
	var out []string
	for i, text := range texts {
		path := filepath.Join(t.TempDir(), fmt.Sprintf("%d.json", i))
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		out = append(out, path)
	}
	return out
}

func discard() *slog.Logger { return slog.New(slog.DiscardHandler) }

func TestTheEntryThatIsMeant(t *testing.T) {
	k := New(files(t,
		`{"auths":{
			"registry.example.com": `+auth("whole", "1")+`,
			"registry.example.com/team": `+auth("team", "2")+`,
			"https://registry.example.com/v2/team/app": `+auth("app", "3")+`,
			"*.cloud.example.com": `+auth("any", "4")+`,
			"eu.cloud.example.com": `+auth("eu", "5")+`,
			"ported.example.com:5000": `+auth("ported", "6")+`,
			"https://index.docker.io/v1/": `+auth("hub", "7")+`,
			"token.example.com": {"auth":"`+base64.StdEncoding.EncodeToString([]byte("00000000-0000:"))+`","identitytoken":"refresh"},
			"plain.example.com": {"username":"plain","password":"8"},
			"[::1]:5000": `+auth("six", "9")+`,
			"nothing.example.com": {}
		}}`,
		// as .dockercfg has it
		`{"http://registry.example.com": `+auth("second", "10")+`, "old.example.com": `+auth("old", "11")+`, "registry.example.com/team/app/deep": `+auth("deep", "12")+`}`,
		"", "no JSON", `{"auths":{"x":{"auth":"%%%"}}}`, `[1]`), discard())
	for _, c := range []struct {
		host, repository, user, secret string
	}{
		{"registry.example.com", "other", "whole", "1"},
		{"registry.example.com", "team", "team", "2"},
		{"registry.example.com", "team/x", "team", "2"},
		{"registry.example.com", "team2/x", "whole", "1"},
		{"registry.example.com", "team/app", "app", "3"},
		{"registry.example.com", "team/app/deep/er", "deep", "12"},
		{"us.cloud.example.com", "x", "any", "4"},
		{"eu.cloud.example.com", "x", "eu", "5"},
		{"a.b.cloud.example.com", "x", "", ""},
		{"cloud.example.com", "x", "", ""},
		{"ported.example.com:5000", "x", "ported", "6"},
		{"ported.example.com", "x", "", ""},
		{"registry.example.com:5000", "x", "", ""},
		{"registry-1.docker.io", "library/x", "hub", "7"},
		{"docker.io", "library/x", "hub", "7"},
		{"token.example.com", "x", "", "refresh"},
		{"plain.example.com", "x", "plain", "8"},
		{"[::1]:5000", "x", "six", "9"},
		{"[::2]:5000", "x", "", ""},
		{"old.example.com", "x", "old", "11"},
		{"nothing.example.com", "x", "", ""},
		{"evil.com", "registry.example.com/team", "", ""},
		{"registry.example.com.evil.com", "x", "", ""},
		{"evil.registry.example.com", "x", "", ""},
	} {
		got, err := k.Lookup(t.Context(), c.host, c.repository)
		if c.secret == "" {
			if !errors.Is(err, ErrNone) {
				t.Errorf("%s/%s: %v, %v", c.host, c.repository, got, err)
			}
			continue
		}
		if err != nil || got.Username != c.user || got.Secret != c.secret {
			t.Errorf("%s/%s: user %q secret %q of %s, %v; want user %q", c.host, c.repository, got.Username, got.Secret, got, err, c.user)
		}
	}
}

// A file may come, change, be replaced as Kubernetes replaces a secret, break and
// go while the node runs.
func TestFilesAreReadAgainWhenTheyChange(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "config.json")
	var log bytes.Buffer
	k := New([]string{path}, slog.New(slog.NewTextHandler(&log, nil)))
	user := func() string {
		t.Helper()
		c, err := k.Lookup(t.Context(), "r.example.com", "x")
		if err != nil && !errors.Is(err, ErrNone) {
			t.Fatal(err)
		}
		return c.Username
	}
	write := func(name, text string) string {
		t.Helper()
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	if got := user(); got != "" {
		t.Errorf("%q before there is a file", got)
	}
	if user(); strings.Count(log.String(), "level=WARN") != 1 {
		t.Errorf("an absent file is told of not just once:\n%s", log.String())
	}
	write("config.json", `{"auths":{"r.example.com":`+auth("one", "s3cret")+`}}`)
	if got := user(); got != "one" {
		t.Errorf("%q once the file is there", got)
	}
	// The same size and inode: only the time tells. (An hour is as good as a moment.)
	write("config.json", `{"auths":{"r.example.com":`+auth("two", "s3cret")+`}}`)
	if err := os.Chtimes(path, time.Time{}, time.Now().Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	if got := user(); got != "two" {
		t.Errorf("%q after a change", got)
	}
	// Only the size tells, and that it is longer than any credential file.
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	write("config.json", `{"auths":{"r.example.com":`+auth("thirteen", "s3cret")+`}}`)
	if err := os.Chtimes(path, time.Time{}, info.ModTime()); err != nil {
		t.Fatal(err)
	}
	if got := user(); got != "thirteen" {
		t.Errorf("%q after a change of the size", got)
	}
	write("config.json", `{"auths":{"r.example.com":`+auth("huge", "s3cret")+`}}`+strings.Repeat(" ", maxFile))
	if got := user(); got != "" || !strings.Contains(log.String(), "this is no credential file") {
		t.Errorf("%q of a huge file\n%s", got, log.String())
	}
	other := write("..data", `{"auths":{"r.example.com":`+auth("six", "s3cret")+`}}`)
	// Only the inode tells.
	then := time.Now().Add(time.Hour)
	if err := errors.Join(os.Chtimes(path, then, then), os.Chtimes(other, then, then)); err != nil {
		t.Fatal(err)
	}
	user()
	if err := os.Rename(other, path); err != nil {
		t.Fatal(err)
	}
	if got := user(); got != "six" {
		t.Errorf("%q after it was replaced", got)
	}
	write("config.json", `{"auths":{"r.example.com":{"auth":"czNjcmV0"}}}`) // base64, without a colon
	if got := user(); got != "" {
		t.Errorf("%q of a broken file", got)
	}
	write("config.json", `{"auths":{"r.example.com":`+auth("seven", "s3cret")+`}}`)
	if got := user(); got != "seven" {
		t.Errorf("%q of a file that is whole again", got)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if got := user(); got != "" {
		t.Errorf("%q of a file that is gone", got)
	}
	if strings.Contains(log.String(), "s3cret") || strings.Contains(log.String(), "czNjcmV0") {
		t.Errorf("the log tells:\n%s", log.String())
	}
}

// asNobody calls f with the rights of somebody who owns nothing here.
func asNobody(t *testing.T, f func()) {
	t.Helper()
	if os.Getuid() != 0 { // then a mode is enough
		f()
		return
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // for good: the thread ends with this goroutine, and its rights with it
		if err := unix.Setfsuid(65534); err != nil {
			t.Error(err)
			return
		}
		f()
	}()
	<-done
}

// The mode of a file or of its directory is often set after it was looked for.
func TestAFileThatMayNotBeReadIsToldOfOnce(t *testing.T) {
	for name, deny := range map[string]func(path string) string{
		"the file":      func(path string) string { return path },
		"its directory": filepath.Dir,
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "secrets", "config.json")
			if err := errors.Join(os.Chmod(filepath.Dir(filepath.Dir(filepath.Dir(path))), 0o755), os.Mkdir(filepath.Dir(path), 0o755),
				os.WriteFile(path, []byte(`{"auths":{"r.example.com":`+auth("one", "s3cret")+`}}`), 0o644)); err != nil { //nolint:gosec // for others too
				t.Fatal(err)
			}
			var log bytes.Buffer
			k := New([]string{path}, slog.New(slog.NewTextHandler(&log, nil)))
			mode := func(m os.FileMode) {
				t.Helper()
				if err := os.Chmod(deny(path), m); err != nil {
					t.Fatal(err)
				}
			}
			lookups := func(want string, warnings, news int) {
				t.Helper()
				for range 3 {
					var c Credential
					var err error
					asNobody(t, func() { c, err = k.Lookup(t.Context(), "r.example.com", "x") })
					if c.Username != want || (want == "") != errors.Is(err, ErrNone) {
						t.Errorf("%q, %v; want %q", c.Username, err, want)
					}
				}
				if w, n := strings.Count(log.String(), "level=WARN"), strings.Count(log.String(), "level=INFO"); w != warnings || n != news {
					t.Errorf("%d warnings and %d that it is over, want %d and %d:\n%s", w, n, warnings, news, log.String())
				}
			}
			mode(0)
			lookups("", 1, 0)
			mode(0o755)
			lookups("one", 1, 1)
			mode(0)
			// What was read is known; a directory hides whether it still holds.
			if name == "its directory" {
				lookups("", 2, 1)
			}
			mode(0o755)
			lookups("one", strings.Count(log.String(), "level=WARN"), strings.Count(log.String(), "level=WARN"))
		})
	}
}

// helper puts a credential helper of that name, a shell script, into PATH.
func helper(t *testing.T, name, script string) {
	t.Helper()
	dir := t.TempDir()
	path := filepath.Join(dir, "docker-credential-"+name)
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+script), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

func TestHelpers(t *testing.T) {
	helper(t, "wolf", `
[ "$1" = get ] || exit 2
read -r server
case $server in
*helped.example.com|https://index.docker.io/v1/) echo '{"Username":"of '$server'","Secret":"s"}' ;;
token.example.com) echo '{"Username":"<token>","Secret":"refresh"}' ;;
broken.example.com) echo 's3cret: the vault is closed'; exit 1 ;;
*) echo 'credentials not found in native keychain'; exit 1 ;;
esac`)
	k := New(files(t, `{
		"auths": {"helped.example.com": `+auth("written", "1")+`, "helped.example.com/team": `+auth("team", "2")+`, "fallback.example.com": `+auth("fallback", "3")+`, "https://zhelped.example.com": `+auth("written", "4")+`},
		"credHelpers": {"helped.example.com": "wolf", "zhelped.example.com": "wolf", "fallback.example.com": "wolf", "broken.example.com": "wolf", "missing.example.com": "no-such", "bad.example.com": "../x"}
	}`, `{"credsStore": "wolf"}`), discard())
	for _, c := range []struct {
		host, repository, user string
		fails                  string
	}{
		{"helped.example.com", "x", "of helped.example.com", ""},
		{"helped.example.com", "team/x", "team", ""},
		{"zhelped.example.com", "x", "of zhelped.example.com", ""},
		{"fallback.example.com", "x", "fallback", ""},
		{"registry-1.docker.io", "library/x", "of https://index.docker.io/v1/", ""},
		{"token.example.com", "x", "", ""},
		{"unknown.example.com", "x", "", ErrNone.Error()},
		{"broken.example.com", "x", "", "docker-credential-wolf gives no credential for broken.example.com"},
		{"missing.example.com", "x", "", "not found"},
		{"bad.example.com", "x", "", "no name of a credential helper"},
	} {
		got, err := k.Lookup(t.Context(), c.host, c.repository)
		if c.fails != "" {
			if err == nil || !strings.Contains(err.Error(), c.fails) || strings.Contains(err.Error(), "s3cret") {
				t.Errorf("%s: %v, want %q", c.host, err, c.fails)
			}
			continue
		}
		if err != nil || got.Username != c.user || got.Secret == "" {
			t.Errorf("%s/%s: %q, %v", c.host, c.repository, got.Username, err)
		}
	}
}

// A helper that never answers is ended when its time is up, also where a child of it
// holds its output open.
func TestAHelperThatHangsIsEnded(t *testing.T) {
	k := New(files(t, `{"credHelpers": {"r.example.com": "stuck"}}`), discard())
	if k.limit != 15*time.Second {
		t.Errorf("a helper has %v, the documentation says 15 s", k.limit)
	}
	for name, child := range map[string]string{"alone": "", "with a child": "sleep 60 &\n"} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "pids")
			helper(t, "stuck", child+"echo $$ $! >"+file+"\nexec sleep 60")
			var pids []string
			for k.limit = 100 * time.Millisecond; len(pids) == 0; k.limit *= 2 { // until it gets as far as to hang
				began := time.Now()
				_, err := k.Lookup(t.Context(), "r.example.com", "x")
				if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "docker-credential-stuck gives no credential for r.example.com") {
					t.Fatalf("%v", err)
				}
				if took := time.Since(began); took > k.limit+10*time.Second {
					t.Errorf("it took %v", took)
				}
				b, err := os.ReadFile(file)
				if err != nil && !errors.Is(err, os.ErrNotExist) {
					t.Fatal(err)
				}
				pids = strings.Fields(string(b))
			}
			if err := signal(t, pids[0], 0); !errors.Is(err, os.ErrProcessDone) {
				t.Errorf("the helper still runs: %v", err)
			}
			for _, pid := range pids[1:] {
				if err := signal(t, pid, unix.SIGKILL); err != nil {
					t.Errorf("its child: %v", err)
				}
			}
		})
	}
}

// signal sends a process a signal.
func signal(t *testing.T, pid string, s unix.Signal) error {
	t.Helper()
	n, err := strconv.Atoi(pid)
	if err != nil {
		t.Fatal(err)
	}
	p, err := os.FindProcess(n)
	if err != nil {
		t.Fatal(err)
	}
	return p.Signal(s)
}

// A credential does not get into a log or a message by accident.
func TestCredentialsAreNotPrinted(t *testing.T) {
	c := Credential{"wolf", "s3cret", "entry of a file"}
	var log bytes.Buffer
	slog.New(slog.NewTextHandler(&log, nil)).Info("it", "credential", c)
	for _, text := range []string{log.String(), fmt.Sprintf("%v %+v %#v %s", c, c, c, &c), fmt.Sprint([]any{c})} {
		if strings.Contains(text, "s3cret") || !strings.Contains(text, "entry of a file") {
			t.Errorf("%q", text)
		}
	}
}

// An empty helper is none: it must not stand for an empty credential.
func TestAHelperWithoutANameIsNone(t *testing.T) {
	k := New(files(t, `{"auths":{"r.example.com":`+auth("joe", "s")+`},"credHelpers":{"r.example.com":"","other.example.com":""}}`), discard())
	if c, err := k.Lookup(t.Context(), "r.example.com", "x"); err != nil || c.Username != "joe" {
		t.Errorf("%v, %v", c, err)
	}
	if c, err := k.Lookup(t.Context(), "other.example.com", "x"); !errors.Is(err, ErrNone) {
		t.Errorf("%v, %v", c, err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(`{"auths":{"registry.example.com/team":` + auth("a", "b") + `},"credHelpers":{"x":"y"},"credsStore":"z"}`))
	f.Add([]byte(`{"registry.example.com":` + auth("a", "b") + `}`))
	f.Add([]byte(`{"auths":null}`))
	f.Add([]byte(`{"*.[a-":{"identitytoken":"x"}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := parse(data)
		if s == nil || err != nil && (len(s.entries) > 0 || s.store != "") {
			t.Fatalf("%v beside %v", s, err)
		}
		for _, e := range s.entries {
			e.matches("registry.example.com:5000", "team/app")
			if e.helper == "" && e.secret == "" {
				t.Fatalf("an entry without a secret: %q", e.key)
			}
		}
	})
}
