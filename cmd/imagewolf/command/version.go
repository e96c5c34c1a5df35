package command

import (
	"io"

	"github.com/urfave/cli/v2"

	"github.com/imagewolf/imagewolf/internal/build"
)

func versionCommand() *cli.Command {
	return &cli.Command{
		Name: "version", Usage: "print what this program was built from", Before: noArgs,
		Action: func(c *cli.Context) error {
			_, err := io.WriteString(c.App.Writer, build.Describe("imagewolf"))
			return err
		},
	}
}
