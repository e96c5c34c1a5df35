// Package program holds what the command lines of both programs have in common.
package program

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	containerdlog "github.com/containerd/log"
	"github.com/urfave/cli/v2"

	"github.com/imagewolf/imagewolf/internal/build"
)

// statusUsage is the exit status of a command line that makes no sense.
const statusUsage = 2

// UsageError says what is wrong with a command line, as opposed to what it asks for.
type UsageError struct {
	err     error
	command string // whose --help helps
}

// Error implements error.
func (e *UsageError) Error() string {
	return fmt.Sprintf("%v; '%s --help' shows what there is", e.err, e.command)
}

// Unwrap returns what is wrong.
func (e *UsageError) Unwrap() error { return e.err }

// ExitStatus returns what the process is to exit with.
func (*UsageError) ExitStatus() int { return statusUsage }

// Usage returns the UsageError of a command.
func Usage(c *cli.Context, err error) error { return &UsageError{err, c.Command.HelpName} }

// ExitStatus returns what a process is to exit with for the error that its command
// line ends with: 0 without one, what the error's own method ExitStatus says if it has
// one, else 1.
func ExitStatus(err error) int {
	var own interface{ ExitStatus() int }
	switch {
	case err == nil:
		return 0
	case errors.As(err, &own):
		return own.ExitStatus()
	}
	return 1
}

// Run runs the command line with the arguments of the process until it is told to
// stop (SIGINT, SIGTERM), prints the error that it ends with, and returns what the
// process is to exit with, as ExitStatus says.
func Run(app *cli.App) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := app.RunContext(ctx, os.Args)
	stop()
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", app.Name, err)
	}
	return ExitStatus(err)
}

// New returns the command line of a program with its commands, and the command
// version. What is wrong with a command line is a UsageError.
func New(name, usage string, commands ...*cli.Command) *cli.App {
	app := &cli.App{
		Name: name, Usage: usage,
		// Errors are printed once, by Run; the library would exit on some.
		ExitErrHandler:  func(*cli.Context, error) {},
		HideVersion:     true,
		HideHelpCommand: true,
		Commands:        append(commands, version(name)),
		OnUsageError:    usageError(name),
		Action:          group(name, cli.ShowAppHelp),
	}
	strict(name, app.Commands)
	return app
}

// strict has commands refuse what they do not know in one line, in place of the
// library's page of help. name is what goes before theirs.
func strict(name string, commands []*cli.Command) {
	for _, c := range commands {
		name := name + " " + c.Name
		c.OnUsageError = usageError(name)
		if c.Action == nil {
			c.Action, c.HideHelpCommand = group(name, cli.ShowSubcommandHelp), true
		}
		strict(name, c.Subcommands)
	}
}

// usageError is called with what is wrong with the flags of a command.
func usageError(name string) cli.OnUsageErrorFunc {
	return func(_ *cli.Context, err error, _ bool) error { return &UsageError{err, name} }
}

// group is the action of what only has commands: it shows them.
func group(name string, help func(*cli.Context) error) cli.ActionFunc {
	return func(c *cli.Context) error {
		if word := c.Args().First(); word != "" && word != "help" {
			return &UsageError{fmt.Errorf("there is no command %q", word), name}
		}
		return help(c)
	}
}

func version(name string) *cli.Command {
	return &cli.Command{
		Name: "version", Usage: "print what this program was built from", Before: NoArgs,
		Action: func(c *cli.Context) error {
			_, err := io.WriteString(c.App.Writer, build.Describe(name))
			return err
		},
	}
}

// NoArgs refuses arguments that would otherwise be overlooked.
func NoArgs(c *cli.Context) error {
	if c.Args().Present() {
		return Usage(c, fmt.Errorf("%s takes no argument, and was given %q", c.Command.HelpName, c.Args().First()))
	}
	return nil
}

// NewLogger returns what logs to w as the settings log_level and log_format say. What
// other packages log of themselves (containerd's, and all that use log or slog) goes
// there from then on, too, one level lower: none of it ends anything here.
func NewLogger(w io.Writer, level, format string) (*slog.Logger, error) {
	var least slog.Level
	if err := least.UnmarshalText([]byte(level)); err != nil {
		return nil, fmt.Errorf("log_level: %w", err)
	}
	var h slog.Handler
	o := &slog.HandlerOptions{Level: least}
	if format == "json" {
		h = slog.NewJSONHandler(w, o)
	} else {
		h = slog.NewTextHandler(w, o)
	}
	slog.SetDefault(slog.New(libraries{h}))
	containerdlog.UseSlog()
	return slog.New(h), nil
}

// libraries is a handler for what is no message of ours.
type libraries struct{ slog.Handler }

// lower is the level that a library's message has here.
func lower(l slog.Level) slog.Level { return l - (slog.LevelError - slog.LevelWarn) }

// Enabled implements slog.Handler.
func (l libraries) Enabled(ctx context.Context, level slog.Level) bool {
	return l.Handler.Enabled(ctx, lower(level))
}

// Handle implements slog.Handler.
func (l libraries) Handle(ctx context.Context, r slog.Record) error {
	r.Level = lower(r.Level)
	return l.Handler.Handle(ctx, r)
}

// WithAttrs implements slog.Handler.
func (l libraries) WithAttrs(a []slog.Attr) slog.Handler { return libraries{l.Handler.WithAttrs(a)} }

// WithGroup implements slog.Handler.
func (l libraries) WithGroup(name string) slog.Handler { return libraries{l.Handler.WithGroup(name)} }
