// Package command is the command line of imagewolf-notifier: the program itself
// and what tries its settings. It turns arguments into calls of the other
// packages and does no work of its own.
package command

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"

	"github.com/urfave/cli/v2"

	"github.com/imagewolf/imagewolf/api/nodeapi"
	"github.com/imagewolf/imagewolf/config"
	"github.com/imagewolf/imagewolf/internal/build"
	"github.com/imagewolf/imagewolf/internal/program"
	"github.com/imagewolf/imagewolf/notifier"
)

const (
	configFlag = "config"
	configEnv  = "IMAGEWOLF_NOTIFIER_CONFIG"
)

// App returns the command line of imagewolf-notifier. The context it is run with
// ends the program.
func App() *cli.App {
	return program.New("imagewolf-notifier", "hears that an image was pushed, and has nodes pull it before anyone asks",
		runCommand(), rulesCommand(), configCommand())
}

func configFlags() []cli.Flag {
	return []cli.Flag{&cli.PathFlag{
		Name: configFlag, Aliases: []string{"c"}, EnvVars: []string{configEnv}, Value: config.DefaultNotifierFile, Usage: "`FILE` with the settings",
	}}
}

// load reads and checks the settings: its error says all that is wrong.
func load(c *cli.Context) (config.Notifier, error) {
	cfg, err := config.LoadNotifier(config.Sources{File: c.Path(configFlag), Env: os.LookupEnv})
	switch {
	case config.Unread(err) && errors.Is(err, fs.ErrNotExist) && !c.IsSet(configFlag):
		return cfg, fmt.Errorf("%w: docs/notifier.md has one to start from, and --%s names another", err, configFlag)
	case config.Unread(err):
		return cfg, err
	}
	return cfg, errors.Join(err, cfg.Validate())
}

func runCommand() *cli.Command {
	return &cli.Command{
		Name: "run", Usage: "take events and have images prefetched until told to stop (SIGINT, SIGTERM)",
		Flags: configFlags(), Before: program.NoArgs,
		Action: func(c *cli.Context) error {
			cfg, err := load(c)
			if err != nil {
				return err
			}
			log, err := program.NewLogger(c.App.ErrWriter, cfg.LogLevel, cfg.LogFormat)
			if err != nil {
				return err
			}
			for _, w := range cfg.Warnings() {
				log.Warn("setting", "warning", w)
			}
			n, stop, err := assemble(cfg, log)
			if err != nil {
				return err
			}
			log.Info("imagewolf-notifier starts", "version", build.Version())
			return errors.Join(n.Run(c.Context), stop())
		},
	}
}

// assemble makes a notifier of the settings, and what to call after it has run.
func assemble(cfg config.Notifier, log *slog.Logger) (*notifier.Notifier, func() error, error) {
	decide, err := newRules(cfg, log)
	if err != nil {
		return nil, nil, err
	}
	nodes, err := nodeapi.Dial(nodeapi.Options{Addresses: cfg.Nodes.Addresses, CAFile: cfg.Nodes.CAFile, TokenFile: cfg.Nodes.TokenFile})
	if err != nil {
		return nil, nil, fmt.Errorf("nodes: %w", err)
	}
	n, err := notifier.New(cfg, notifier.Options{Log: log, Rules: notifier.Decider{Rules: decide}, Nodes: nodes})
	if err != nil {
		return nil, nil, errors.Join(err, nodes.Close())
	}
	return n, nodes.Close, nil
}

func configCommand() *cli.Command {
	return &cli.Command{
		Name: "config", Usage: "check settings",
		Subcommands: []*cli.Command{{
			Name: "check", Usage: "say everything that is wrong with the settings; exit with 1 if anything is",
			Flags: configFlags(), Before: program.NoArgs,
			Action: func(c *cli.Context) error {
				cfg, err := load(c)
				if err != nil {
					return err
				}
				_, stop, err := assemble(cfg, slog.New(slog.DiscardHandler))
				if err != nil {
					return err
				}
				for _, w := range cfg.Warnings() {
					if _, err := fmt.Fprintln(c.App.ErrWriter, "warning:", w); err != nil {
						return errors.Join(err, stop())
					}
				}
				_, err = fmt.Fprintln(c.App.Writer, c.Path(configFlag)+": good")
				return errors.Join(err, stop())
			},
		}},
	}
}
