package harness

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
)

// reaperEnv makes a process of this package's importers a reaper of the
// directory that it names.
const reaperEnv = "IMAGEWOLF_HARNESS_REAP"

// A reaper is this very program started once more, to wait for the death of the
// first and to clean up after it. In init, because a test binary that is started
// again would run its tests again.
func init() {
	root := os.Getenv(reaperEnv)
	if root == "" {
		return
	}
	if !strings.HasPrefix(filepath.Base(root), "iw") {
		os.Exit(2)
	}
	_, _ = io.Copy(io.Discard, os.Stdin) //nolint:errcheck // error or EOF: the owner is gone either way
	if _, err := os.Stat(root); err != nil {
		os.Exit(0) // the owner has cleaned up
	}
	if err := sweep(root); err != nil {
		fmt.Fprintln(os.Stderr, "cleaning up:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// reaper is the owner's end of a reaper process.
type reaper struct {
	cmd *exec.Cmd
	in  io.WriteCloser
}

func startReaper(root string) (*reaper, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("reaper: %w", err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), reaperEnv+"="+root)
	cmd.Stderr = os.Stderr
	// A group of its own: a ctrl-C is for the owner.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("reaper: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("reaper: %w", err)
	}
	return &reaper{cmd: cmd, in: in}, nil
}

func (r *reaper) stop() error {
	_ = r.in.Close() // a second Close, or a reaper that is gone: both harmless
	if r.cmd.ProcessState != nil {
		return nil
	}
	if err := r.cmd.Wait(); err != nil {
		return fmt.Errorf("reaper: %w", err)
	}
	return nil
}
