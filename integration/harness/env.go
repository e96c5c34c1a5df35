package harness

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Versions of containerd that ImageWolf is tested with.
const (
	V2  = "2.4.2"
	V17 = "1.7.35"
)

// Binaries says where the programs under test are.
type Binaries struct {
	// ImageWolf is the imagewolf binary.
	ImageWolf string
	// Notifier is the imagewolf-notifier binary.
	Notifier string
	// Containerd is the directory that holds one directory
	// containerd-<version> per version, each with containerd, ctr and
	// containerd-shim-runc-v2.
	Containerd string
}

// FindBinaries takes the places from IMAGEWOLF_BIN, IMAGEWOLF_NOTIFIER_BIN (the
// two binaries) and CONTAINERD_BIN (the directory of containerd-<version>
// directories), for those that are not set from bin, and makes sure that all of them are there.
func FindBinaries(bin string, versions ...string) (Binaries, error) {
	b := Binaries{
		ImageWolf:  firstOf(os.Getenv("IMAGEWOLF_BIN"), filepath.Join(bin, "imagewolf")),
		Notifier:   firstOf(os.Getenv("IMAGEWOLF_NOTIFIER_BIN"), filepath.Join(bin, "imagewolf-notifier")),
		Containerd: firstOf(os.Getenv("CONTAINERD_BIN"), bin),
	}
	for _, p := range []*string{&b.ImageWolf, &b.Notifier, &b.Containerd} {
		abs, err := filepath.Abs(*p)
		if err != nil {
			return Binaries{}, fmt.Errorf("place of a binary: %w", err)
		}
		*p = abs
	}
	var errs []error
	need := []string{b.ImageWolf, b.Notifier}
	for _, v := range versions {
		for _, name := range []string{"containerd", "ctr", "containerd-shim-runc-v2"} {
			need = append(need, b.containerd(v, name))
		}
	}
	for _, p := range need {
		if _, err := os.Stat(p); err != nil {
			errs = append(errs, err)
		}
	}
	return b, errors.Join(errs...)
}

// containerd returns the path of one of containerd's programs.
func (b Binaries) containerd(version, name string) string {
	return filepath.Join(b.Containerd, "containerd-"+version, name)
}

// RuncPath returns the path of runc, or "" when the machine has none. Images
// are run only where it is there; pulling and unpacking need none.
func RuncPath() string {
	p, err := exec.LookPath("runc")
	if err != nil {
		return ""
	}
	return p
}

// Env owns a temporary directory, the processes started in it, and what they
// mount. Its methods may be called from several goroutines.
type Env struct {
	// Root is the directory. Its path is short, since unix sockets below it
	// must not exceed 108 bytes.
	Root string
	// Bin holds the programs to run.
	Bin Binaries

	reaper *reaper

	mu    sync.Mutex // guards what follows
	procs []*Process // in the order they were started
	undo  []func()   // run at Close, last first
	done  bool       // closed, nothing may be started any more
}

// NewEnv makes the directory, and a watcher that cleans up should this process
// die before Close.
func NewEnv(bin Binaries) (*Env, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("root is needed: containerd mounts snapshots")
	}
	base := os.TempDir()
	if len(base) > 40 {
		base = "/tmp"
	}
	root, err := os.MkdirTemp(base, "iw")
	if err != nil {
		return nil, fmt.Errorf("temporary directory: %w", err)
	}
	r, err := startReaper(root)
	if err != nil {
		_ = os.RemoveAll(root) //nolint:errcheck // nothing is in it yet
		return nil, err
	}
	return &Env{Root: root, Bin: bin, reaper: r}, nil
}

// Dir makes a directory below the root and returns its path.
func (e *Env) Dir(elem ...string) (string, error) {
	p := filepath.Join(append([]string{e.Root}, elem...)...)
	if err := os.MkdirAll(p, 0o755); err != nil {
		return "", fmt.Errorf("directory of the environment: %w", err)
	}
	return p, nil
}

// OnClose has f called by Close, before processes are ended.
func (e *Env) OnClose(f func()) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.undo = append(e.undo, f)
}

// Close ends every process, last started first, unmounts what they mounted and
// removes the directory. It is safe to call it twice.
func (e *Env) Close() error {
	e.mu.Lock()
	procs, undo := e.procs, e.undo
	e.procs, e.undo, e.done = nil, nil, true
	e.mu.Unlock()
	for i := len(undo) - 1; i >= 0; i-- {
		undo[i]()
	}
	for i := len(procs) - 1; i >= 0; i-- {
		procs[i].Kill()
	}
	return errors.Join(sweep(e.Root), e.reaper.stop())
}

// add enters a process that is to be ended at Close. It reports whether the
// environment still takes any.
func (e *Env) add(p *Process) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.done {
		return false
	}
	e.procs = append(e.procs, p)
	return true
}

// sweep kills what still runs out of root, unmounts what is mounted below it,
// and removes it.
func sweep(root string) error {
	deadline := time.Now().Add(5 * time.Second)
	for killAll(root) > 0 && time.Now().Before(deadline) {
		time.Sleep(20 * time.Millisecond)
	}
	return errors.Join(unmountAll(root), removeAll(root))
}

// removeAll removes root. It tries again for a moment: a killed process may
// hold on to a mount until the kernel has buried it.
func removeAll(root string) error {
	var err error
	for range 50 {
		if err = os.RemoveAll(root); err == nil {
			return nil
		}
		time.Sleep(20 * time.Millisecond)
	}
	return fmt.Errorf("left behind: %w", err)
}

// killAll kills the processes, but this one, that name root on their command
// line or run in it (shims and containers, which outlive containerd by
// design), and returns how many it found. Root is a fresh temporary
// directory's name, so that no one else's process can match.
func killAll(root string) int {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return 0 // the pattern is constant
	}
	found := 0
	for _, d := range dirs {
		var pid int
		if _, err := fmt.Sscanf(filepath.Base(d), "%d", &pid); err != nil || pid == os.Getpid() {
			continue
		}
		cmd, _ := os.ReadFile(filepath.Join(d, "cmdline")) //nolint:errcheck // a process that has just ended has no files: no match
		cwd, _ := os.Readlink(filepath.Join(d, "cwd"))     //nolint:errcheck // as above
		if !strings.Contains(string(cmd), root+"/") && !strings.HasPrefix(cwd+"/", root+"/") {
			continue
		}
		if unix.Kill(pid, unix.SIGKILL) == nil {
			found++
		}
	}
	return found
}

// unmountAll detaches every mount below root, innermost first.
func unmountAll(root string) error {
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return fmt.Errorf("mounts: %w", err)
	}
	var points []string
	for line := range strings.Lines(string(data)) {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], root+"/") {
			points = append(points, f[4])
		}
	}
	var errs []error
	for i := len(points) - 1; i >= 0; i-- {
		if err := unix.Unmount(points[i], unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) {
			errs = append(errs, fmt.Errorf("unmount %s: %w", points[i], err))
		}
	}
	return errors.Join(errs...)
}

func firstOf(s ...string) string {
	for _, v := range s {
		if v != "" {
			return v
		}
	}
	return ""
}
