// Package program holds what the command lines of both programs have in common.
package program

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/urfave/cli/v2"

	"github.com/imagewolf/imagewolf/internal/build"
)

// Run runs the command line with the arguments of the process until it is told to
// stop (SIGINT, SIGTERM), prints the error that it ends with, and returns what the
// process is to exit with: 0, or what statusOf makes of the error.
func Run(app *cli.App, statusOf func(error) int) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := app.RunContext(ctx, os.Args)
	stop()
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", app.Name, err)
		return statusOf(err)
	}
	return 0
}

// New returns the command line of a program, to which its commands are added. It
// knows the command version already.
func New(name, usage string) *cli.App {
	return &cli.App{
		Name: name, Usage: usage,
		// Errors are printed once, by Run; the library would exit on some.
		ExitErrHandler:  func(*cli.Context, error) {},
		HideVersion:     true,
		HideHelpCommand: true,
		Commands:        []*cli.Command{version(name)},
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return fmt.Errorf("there is no command %q; '%s help' names them all", c.Args().First(), name)
			}
			return cli.ShowAppHelp(c)
		},
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
		return fmt.Errorf("%s takes no argument, and was given %q", c.Command.HelpName, c.Args().First())
	}
	return nil
}

// NewLogger returns what logs to w as the settings log_level and log_format say.
func NewLogger(w io.Writer, level, format string) (*slog.Logger, error) {
	var least slog.Level
	if err := least.UnmarshalText([]byte(level)); err != nil {
		return nil, fmt.Errorf("log_level: %w", err)
	}
	o := &slog.HandlerOptions{Level: least}
	if format == "json" {
		return slog.New(slog.NewJSONHandler(w, o)), nil
	}
	return slog.New(slog.NewTextHandler(w, o)), nil
}
