package command

import (
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/urfave/cli/v2"
)

// Set by the linker (see the Makefile); a plain "go build" or "go install"
// leaves them empty and what Go recorded in the binary is shown instead.
var version, commit string

const unknown = "unknown"

type build struct{ version, commit, goVersion, platform string }

// thisBuild tells what is running.
func thisBuild() build {
	b := build{version: version, commit: commit, goVersion: runtime.Version(), platform: runtime.GOOS + "/" + runtime.GOARCH}
	info, ok := debug.ReadBuildInfo()
	if ok && b.version == "" {
		b.version = info.Main.Version
	}
	if ok && b.commit == "" {
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				b.commit = s.Value
			}
		}
	}
	if b.version == "" {
		b.version = unknown
	}
	if b.commit == "" {
		b.commit = unknown
	}
	return b
}

func versionCommand() *cli.Command {
	return &cli.Command{
		Name: "version", Usage: "print what this program was built from", Before: noArgs,
		Action: func(c *cli.Context) error {
			b := thisBuild()
			_, err := fmt.Fprintf(c.App.Writer, "imagewolf %s\ncommit %s\n%s %s\n", b.version, b.commit, b.goVersion, b.platform)
			return err
		},
	}
}
