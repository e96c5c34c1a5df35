package integration

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// fileCalls are the system calls that change files, and how they name the file: by
// descriptor (true) or by path (false: any path counts).
var fileCalls = map[uint64]struct {
	name string
	byFD bool
}{
	unix.SYS_WRITE: {"write", true}, unix.SYS_PWRITE64: {"write", true}, unix.SYS_FTRUNCATE: {"truncate", true},
	unix.SYS_FSYNC: {"fsync", true}, unix.SYS_FDATASYNC: {"fsync", true}, unix.SYS_FCHMOD: {"chmod", true},
	unix.SYS_RENAMEAT: {"rename", false}, unix.SYS_UNLINKAT: {"unlink", false}, unix.SYS_MKDIRAT: {"mkdir", false},
	// Of these only those that make the file matter.
	unix.SYS_OPENAT: {"open", false},
}

// callInfo is the kernel's struct ptrace_syscall_info, as far as it is of use here.
type callInfo struct {
	op   uint8
	_    [3]byte
	_    uint32    // architecture
	_, _ uint64    // instruction and stack pointer
	nr   uint64    // at entry
	args [6]uint64 // at entry
	_    [3]uint64
}

// stepThrough runs a command and calls at before each system call by which it
// changes a file below dir, with the call's name. The thread that makes the call
// stands still meanwhile. An error of at ends the command, which must not have been
// started.
//
// The command gets a process group of its own: the kernel is asked for what its
// threads do, and not for what befalls other children of this process.
func stepThrough(cmd *exec.Cmd, dir string, at func(call string) error) error {
	over := make(chan error, 1)
	go func() {
		// The kernel knows a tracer by its thread. It ends with this function.
		runtime.LockOSThread()
		over <- stepOnThisThread(cmd, dir, at)
	}()
	return <-over
}

func stepOnThisThread(cmd *exec.Cmd, dir string, at func(call string) error) (err error) {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Ptrace, cmd.SysProcAttr.Setpgid = true, true
	if err := cmd.Start(); err != nil {
		return err
	}
	pid := cmd.Process.Pid
	defer func() {
		if err != nil {
			err = errors.Join(err, cmd.Process.Kill())
			for e := error(nil); e == nil || errors.Is(e, unix.EINTR); { // it is ours to wait for, each thread
				_, e = unix.Wait4(-pid, nil, unix.WALL, nil)
			}
		}
		_ = cmd.Wait() //nolint:errcheck // has been waited for: this gives back what it holds
	}()
	var ws unix.WaitStatus
	if _, err := unix.Wait4(pid, &ws, unix.WALL, nil); err != nil {
		return fmt.Errorf("trace: %w", err)
	} else if !ws.Stopped() {
		return fmt.Errorf("the traced program does not stop: status %#x", ws)
	}
	const options = unix.PTRACE_O_TRACESYSGOOD | unix.PTRACE_O_TRACECLONE | unix.PTRACE_O_EXITKILL
	if err := unix.PtraceSetOptions(pid, options); err != nil {
		return fmt.Errorf("trace: %w", err)
	}
	for thread, signal := pid, 0; ; {
		// ESRCH here and below: when a program exits, its other threads are gone at once.
		if err := unix.PtraceSyscall(thread, signal); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("trace: %w", err)
		}
		if thread, err = unix.Wait4(-pid, &ws, unix.WALL, nil); errors.Is(err, unix.EINTR) {
			continue
		} else if err != nil {
			return fmt.Errorf("trace: %w", err)
		}
		signal = 0
		switch {
		case ws.Exited() || ws.Signaled():
			if thread != pid {
				continue
			}
			if ws.ExitStatus() != 0 {
				return fmt.Errorf("the traced program ended with status %#x", ws)
			}
			return nil
		case !ws.Stopped():
		case ws.StopSignal() == unix.SIGTRAP|0x80: // a system call: PTRACE_O_TRACESYSGOOD
			call, err := changes(thread, dir)
			if err == nil && call != "" {
				err = at(call)
			}
			if err != nil && !errors.Is(err, unix.ESRCH) {
				return err
			}
		case ws.StopSignal() != unix.SIGTRAP && ws.StopSignal() != unix.SIGSTOP: // those tell of new threads
			signal = int(ws.StopSignal())
		}
	}
}

// changes returns the name of the call that a stopped thread is about to make, if it
// changes a file below dir; else "".
func changes(thread int, dir string) (string, error) {
	var info callInfo
	n, _, errno := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_GET_SYSCALL_INFO, uintptr(thread), unsafe.Sizeof(info), uintptr(unsafe.Pointer(&info)), 0, 0)
	if errno != 0 {
		return "", fmt.Errorf("trace: %w", errno)
	}
	if n == 0 || info.op != unix.PTRACE_SYSCALL_INFO_ENTRY {
		return "", nil
	}
	call, ok := fileCalls[info.nr]
	if !ok || info.nr == unix.SYS_OPENAT && info.args[2]&unix.O_CREAT == 0 {
		return "", nil
	}
	if !call.byFD {
		return call.name, nil
	}
	path, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", thread, info.args[0]))
	if err != nil || !strings.HasPrefix(path, dir+string(filepath.Separator)) {
		return "", nil //nolint:nilerr // no file, or none that is open
	}
	return call.name, nil
}
