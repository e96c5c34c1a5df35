package harness

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Process is a daemon that the harness started.
type Process struct {
	name string
	log  string // path of its log
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended and been waited for
}

// spawner starts every daemon from one OS thread that never ends: the kernel
// sends Pdeathsig when the starting THREAD ends, and Go ends threads at will.
var spawner = sync.OnceValue(func() chan func() {
	c := make(chan func())
	go func() {
		runtime.LockOSThread()
		for f := range c {
			f()
		}
	}()
	return c
})

// start runs a daemon in a process group of its own, with its output appended
// to logPath.
func (e *Env) start(name, logPath string, env []string, argv ...string) (*Process, error) {
	return e.startOn(nil, name, logPath, env, nil, argv...)
}

// startOn is start on a machine of a Network; nil for this one. The process gets
// files from descriptor 3 on.
func (e *Env) startOn(m *Machine, name, logPath string, env []string, files []*os.File, argv ...string) (*Process, error) {
	out, err := os.OpenFile(logPath, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, fmt.Errorf("log of %s: %w", name, err)
	}
	p := &Process{name: name, log: logPath, cmd: exec.Command(argv[0], argv[1:]...), done: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = out, out
	p.cmd.Env = append(os.Environ(), env...)
	p.cmd.ExtraFiles = files
	p.cmd.Dir = filepath.Dir(logPath)
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if m != nil {
		err = m.space.in(p.cmd.Start) // that thread stays as long as the machine
	} else {
		started := make(chan error)
		spawner() <- func() { started <- p.cmd.Start() }
		err = <-started
	}
	// The child has its own copy.
	if cerr := out.Close(); err == nil && cerr != nil {
		err = cerr
	}
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	go func() {
		_ = p.cmd.Wait() //nolint:errcheck // how it ended is in ProcessState
		close(p.done)
	}()
	if !e.add(p) {
		p.Kill()
		return nil, fmt.Errorf("start %s: the environment is closed", name)
	}
	return p, nil
}

// Pid returns the process id.
func (p *Process) Pid() int { return p.cmd.Process.Pid }

// Running reports whether the process has not ended.
func (p *Process) Running() bool {
	if p == nil {
		return false
	}
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// Kill ends the process at once, as kill -9 does, and waits for its end.
func (p *Process) Kill() {
	if !p.Running() {
		return
	}
	_ = p.cmd.Process.Kill() //nolint:errcheck // only fails when it has ended
	<-p.done
}

// Stop asks the process to end, kills it after limit, and reports whether it
// had to.
func (p *Process) Stop(limit time.Duration) error {
	if !p.Running() {
		return nil
	}
	_ = p.cmd.Process.Signal(syscall.SIGTERM) //nolint:errcheck // only fails when it has ended
	select {
	case <-p.done:
		return nil
	case <-time.After(limit):
		p.Kill()
		return fmt.Errorf("%s did not end within %s of SIGTERM", p.name, limit)
	}
}

// RSS returns the resident memory of the process, in bytes.
func (p *Process) RSS() (int64, error) { return p.memory("VmRSS") }

// PeakRSS returns the most resident memory that the process has had, in bytes.
func (p *Process) PeakRSS() (int64, error) { return p.memory("VmHWM") }

// ForgetPeak has PeakRSS begin anew, at what is resident now.
func (p *Process) ForgetPeak() error {
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", p.Pid()), []byte("5"), 0); err != nil {
		return fmt.Errorf("peak memory of %s: %w", p.name, err)
	}
	return nil
}

func (p *Process) memory(field string) (int64, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.Pid()))
	if err != nil {
		return 0, fmt.Errorf("memory of %s: %w", p.name, err)
	}
	for line := range strings.Lines(string(data)) {
		var kb int64
		if _, err := fmt.Sscanf(line, field+": %d kB", &kb); err == nil {
			return kb << 10, nil
		}
	}
	return 0, fmt.Errorf("memory of %s: %w", p.name, errors.ErrUnsupported)
}

// CPU returns the processor time that the process has used, its own children
// left out.
func (p *Process) CPU() (time.Duration, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.Pid()))
	if err != nil {
		return 0, fmt.Errorf("processor time of %s: %w", p.name, err)
	}
	// The program's name, in parentheses, may hold blanks.
	_, rest, _ := strings.Cut(string(data), ") ")
	f := strings.Fields(rest)
	if len(f) < 13 {
		return 0, fmt.Errorf("processor time of %s: %w", p.name, errors.ErrUnsupported)
	}
	var ticks int64
	for _, v := range f[11:13] { // utime and stime
		n, err := strconv.ParseInt(v, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("processor time of %s: %w", p.name, err)
		}
		ticks += n
	}
	return time.Duration(ticks) * time.Second / userHz, nil
}

// userHz is the unit of processor times that Linux shows, per second, on all
// architectures that Go knows.
const userHz = 100

// Tail returns the last n bytes of a log, and what could not be read instead.
func Tail(path string, n int64) string {
	f, err := os.Open(path)
	if err != nil {
		return err.Error()
	}
	defer f.Close() //nolint:errcheck // opened for reading
	if end, err := f.Seek(0, io.SeekEnd); err == nil && end > n {
		_, _ = f.Seek(end-n, io.SeekStart) //nolint:errcheck // worst case: too much is shown
	} else {
		_, _ = f.Seek(0, io.SeekStart) //nolint:errcheck // as above
	}
	data, err := io.ReadAll(f)
	if err != nil {
		return err.Error()
	}
	return string(data)
}

// run runs a command to its end and returns its standard output; the error
// holds the end of what it said on both outputs.
func run(ctx context.Context, stdin io.Reader, env []string, argv ...string) (string, error) {
	return runOn(ctx, nil, stdin, env, argv...)
}

// runOn is run on a machine of a Network; nil for this one.
func runOn(ctx context.Context, m *Machine, stdin io.Reader, env []string, argv ...string) (string, error) {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env = append(os.Environ(), env...)
	cmd.Stdin = stdin
	cmd.WaitDelay = 5 * time.Second
	// Its own group, so that a ctrl-C is for the harness alone.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	var out, errs strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := m.in(cmd.Start)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		if ctx.Err() != nil {
			err = errors.Join(err, context.Cause(ctx))
		}
		// Apart: ctr's progress on the one does not push its error on the other out
		// of sight. The two are read side by side, in no order.
		err = fmt.Errorf("%s: %w\n%s\n%s", strings.Join(argv[:min(len(argv), 8)], " "), err, lastOf(out.String()), lastOf(errs.String()))
	}
	return out.String(), err
}

// lastOf returns what matters of what a command said: its end.
func lastOf(said string) string {
	const most = 2000
	if len(said) > most {
		return "..." + said[len(said)-most:]
	}
	return said
}

// Poll calls f every interval until it returns nil or ctx ends, and then
// returns f's last error.
func Poll(ctx context.Context, interval time.Duration, f func() error) error {
	for {
		err := f()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(context.Cause(ctx), err)
		case <-time.After(interval):
		}
	}
}
