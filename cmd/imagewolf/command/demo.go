package command

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"github.com/urfave/cli/v2"
)

const demoBinary = "imagewolf-demo"

// demoCommand hands over to a binary of its own: the demo carries a registry
// and an image builder, which have no place in a daemon that runs on every
// node (docs/decisions/0001).
func demoCommand() *cli.Command {
	return &cli.Command{
		Name:            "demo",
		Usage:           "pull an image on four nodes at once on this machine and show what the registry had to send",
		ArgsUsage:       "[arguments of " + demoBinary + "]",
		SkipFlagParsing: true,
		Action: func(c *cli.Context) error {
			exe, err := os.Executable()
			if err != nil {
				return fmt.Errorf("find this program's own place: %w", err)
			}
			path, err := findDemo(filepath.Dir(exe))
			if err != nil {
				return err
			}
			// The demo becomes this process, so that ctrl-C and the exit code are
			// its own.
			err = syscall.Exec(path, append([]string{demoBinary}, c.Args().Slice()...), os.Environ())
			return fmt.Errorf("start %s: %w", path, err)
		},
	}
}

// findDemo looks beside this program, then in PATH.
func findDemo(dir string) (string, error) {
	path, beside := exec.LookPath(filepath.Join(dir, demoBinary))
	if beside == nil {
		return path, nil
	}
	path, err := exec.LookPath(demoBinary)
	if err != nil {
		return "", errors.Join(
			fmt.Errorf("the demo is a program of its own, %s, and it is neither in %s nor in PATH: 'make demo' in the source tree builds and runs it", demoBinary, dir),
			err)
	}
	return path, nil
}
