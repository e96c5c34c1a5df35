package proxy

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"golang.org/x/sys/unix"
)

// Listen returns the listener for the unix socket at path.
//
// If systemd passed sockets to the process, the one bound to path is taken, or
// else the first unix socket among them; the others are closed, so this is to
// be called once. systemd keeps its sockets when the process ends, and
// containerd's connections queue up meanwhile.
//
// Otherwise the socket is made, with mode 0600, below a directory made with
// mode 0711 if it is not there. A socket left over by a process that is gone is
// replaced; one that somebody answers on, or a file that is no socket, is left
// alone and is an error.
func Listen(path string) (net.Listener, error) {
	l, err := activated(path)
	if l != nil || err != nil {
		return l, err
	}
	return Bind(path)
}

// Bind makes the unix socket at path as Listen does where systemd passed none.
func Bind(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o711); err != nil {
		return nil, fmt.Errorf("make directory of socket: %w", err)
	}
	if err := removeStale(path); err != nil {
		return nil, err
	}
	// The mode of the file comes from the socket's before it is bound; chmod
	// afterwards would leave it open to others for a moment.
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		if cerr := c.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), 0o600) }); cerr != nil {
			return cerr
		}
		return err
	}}
	l, err := lc.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	return l, nil
}

// activated returns the listener that systemd passed for path; nil if it passed
// none at all.
func activated(path string) (net.Listener, error) {
	all, err := activation.Listeners()
	if err != nil {
		return nil, fmt.Errorf("sockets from systemd: %w", err)
	}
	if len(all) == 0 {
		return nil, nil
	}
	return choose(all, path)
}

// choose returns the listener for path and closes all others. all may hold nil.
func choose(all []net.Listener, path string) (net.Listener, error) {
	var chosen net.Listener
	for _, l := range all {
		if l == nil || l.Addr().Network() != "unix" {
			continue
		}
		if l.Addr().String() == path {
			chosen = l
			break
		}
		if chosen == nil {
			chosen = l
		}
	}
	for _, l := range all {
		if l != nil && l != chosen {
			_ = l.Close()
		}
	}
	if chosen == nil {
		return nil, fmt.Errorf("systemd passed %d sockets, none of them a unix stream socket for %s", len(all), path)
	}
	return chosen, nil
}

// removeStale removes the socket at path if nobody answers on it.
func removeStale(path string) error {
	fi, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return fmt.Errorf("look at socket: %w", err)
	case fi.Mode().Type() != fs.ModeSocket:
		return fmt.Errorf("%s is there and is not a socket", path)
	}
	c, err := (&net.Dialer{Timeout: time.Second}).DialContext(context.Background(), "unix", path)
	if err == nil {
		_ = c.Close()
		return fmt.Errorf("socket %s is in use: another process answers on it", path)
	}
	if !errors.Is(err, unix.ECONNREFUSED) {
		return fmt.Errorf("socket %s cannot be tried: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove stale socket: %w", err)
	}
	return nil
}
