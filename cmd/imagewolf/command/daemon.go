package command

import (
	"log/slog"

	"github.com/urfave/cli/v2"

	"github.com/imagewolf/imagewolf/config"
	"github.com/imagewolf/imagewolf/internal/build"
	"github.com/imagewolf/imagewolf/internal/program"
	"github.com/imagewolf/imagewolf/node"
)

func newNode(cfg config.Config, log *slog.Logger) (runner, error) { return node.New(cfg, log) }

func daemonCommand(makeNode func(config.Config, *slog.Logger) (runner, error)) *cli.Command {
	return &cli.Command{
		Name: "daemon", Usage: "run a node until it is told to stop (SIGINT, SIGTERM)",
		Flags: settingFlags(), Before: program.NoArgs,
		Action: func(c *cli.Context) error {
			cfg, err := loadValid(c)
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
			n, err := makeNode(cfg, log)
			if err != nil {
				return err
			}
			log.Info("imagewolf starts", "version", build.Version())
			return n.Run(c.Context)
		},
	}
}
