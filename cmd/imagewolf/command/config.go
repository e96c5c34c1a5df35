package command

import (
	"fmt"
	"log/slog"
	"os"

	"github.com/urfave/cli/v2"

	"github.com/imagewolf/imagewolf/config"
	"github.com/imagewolf/imagewolf/internal/program"
	"github.com/imagewolf/imagewolf/node"
)

func configCommand() *cli.Command {
	return &cli.Command{
		Name: "config", Usage: "print and check settings",
		Subcommands: []*cli.Command{
			{
				Name: "default", Usage: "print every setting with its meaning, limits and default, as a file to start from",
				Before: program.NoArgs,
				Action: func(c *cli.Context) error {
					b, err := config.Example()
					if err != nil {
						return err
					}
					_, err = c.App.Writer.Write(b)
					return err
				},
			},
			{
				Name: "check", Usage: "say everything that is wrong with the settings; exit with 1 if anything is",
				Flags: settingFlags(), Before: program.NoArgs, Action: checkConfig,
			},
		},
	}
}

// checkConfig says all that is wrong, with the file and with the values. Only
// when both are right does it look into keys and certificates, as the daemon
// would.
func checkConfig(c *cli.Context) error {
	cfg, err := loadValid(c)
	if err != nil {
		return err
	}
	if _, err := node.New(cfg, slog.New(slog.DiscardHandler)); err != nil {
		return err
	}
	for _, w := range cfg.Warnings() {
		if _, err := fmt.Fprintln(c.App.ErrWriter, "warning:", w); err != nil {
			return err
		}
	}
	_, err = fmt.Fprintln(c.App.Writer, describe(c)+": good")
	return err
}

// describe says what was checked: a default file that is absent is no news,
// but the operator should not believe that it was read.
func describe(c *cli.Context) string {
	path := c.Path(configFlag)
	if _, err := os.Stat(path); err != nil {
		return "defaults, environment and flags (no " + path + ")"
	}
	return path
}
