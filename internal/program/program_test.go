package program

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	containerdlog "github.com/containerd/log"
	"github.com/urfave/cli/v2"
)

// statusError is an error with an exit status of its own.
type statusError struct{ error }

func (statusError) ExitStatus() int { return 7 }

// A command line that makes no sense is answered in one line that names the word and
// where help is, and never by a page.
func TestUsage(t *testing.T) {
	for line, want := range map[string]struct {
		status int
		says   string
	}{
		"":                 {0, ""},
		"help":             {0, ""},
		"--help":           {0, ""},
		"some":             {0, ""},
		"some help":        {0, ""},
		"some thing":       {0, ""},
		"version":          {0, ""},
		"version x":        {2, `prog version takes no argument, and was given "x"; 'prog version --help' shows what there is`},
		"other":            {2, `there is no command "other"; 'prog --help' shows what there is`},
		"--odd":            {2, "flag provided but not defined: -odd; 'prog --help' shows what there is"},
		"some other":       {2, `there is no command "other"; 'prog some --help' shows what there is`},
		"some --odd":       {2, "flag provided but not defined: -odd; 'prog some --help' shows what there is"},
		"some thing --odd": {2, "flag provided but not defined: -odd; 'prog some thing --help' shows what there is"},
		"some thing --n=x": {2, "invalid value \"x\" for flag -n: parse error; 'prog some thing --help' shows what there is"},
		"fail":             {1, "no luck"},
		"own":              {7, "no luck"},
	} {
		luck := errors.New("no luck")
		app := New("prog", "does things",
			&cli.Command{Name: "some", Subcommands: []*cli.Command{{
				Name: "thing", Flags: []cli.Flag{&cli.UintFlag{Name: "n"}}, Action: func(*cli.Context) error { return nil },
			}}},
			&cli.Command{Name: "fail", Action: func(*cli.Context) error { return luck }},
			&cli.Command{Name: "own", Action: func(*cli.Context) error { return fmt.Errorf("%w", statusError{luck}) }},
		)
		var out, errOut bytes.Buffer
		app.Writer, app.ErrWriter = &out, &errOut
		err := app.Run(append([]string{"prog"}, strings.Fields(line)...))
		if ExitStatus(err) != want.status || err != nil && err.Error() != want.says || err != nil && out.Len()+errOut.Len() > 0 {
			t.Errorf("%q: exit status %d, %v, printed\n%s%s", line, ExitStatus(err), err, &out, &errOut)
		}
	}
}

// One log has one form, whoever writes.
func TestLibrariesLogAsTheProgramDoes(t *testing.T) {
	for _, level := range []string{"debug", "info", "warn"} {
		var out bytes.Buffer
		log, err := NewLogger(&out, level, "json")
		if err != nil {
			t.Fatal(err)
		}
		log.Warn("ours")
		containerdlog.L.WithField("path", "/x").Warn("theirs")
		containerdlog.L.Info("too much")
		var said []string
		for line := range strings.Lines(out.String()) {
			var m struct{ Level, Msg, Path string }
			if err := json.Unmarshal([]byte(line), &m); err != nil {
				t.Fatalf("%v in %s", err, line)
			}
			said = append(said, m.Level+" "+m.Msg+m.Path)
		}
		want := map[string]string{"debug": "WARN ours,INFO theirs/x,DEBUG too much", "info": "WARN ours,INFO theirs/x", "warn": "WARN ours"}[level]
		if got := strings.Join(said, ","); got != want {
			t.Errorf("%s: %s, want %s", level, got, want)
		}
	}
}
