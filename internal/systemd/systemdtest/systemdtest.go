// Package systemdtest is systemd's side of what a program tells it.
package systemdtest

import (
	"net"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"
)

// patience is how long something that will be told may take.
const patience = 10 * time.Second

// Socket is where this process tells how it is, until the test ends.
type Socket struct{ l *net.UnixConn }

// Listen has this process believe that systemd started it, with a watchdog of
// that time.
func Listen(t *testing.T, watchdog time.Duration) *Socket {
	t.Helper()
	path := filepath.Join(t.TempDir(), "notify")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: path})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	t.Setenv("NOTIFY_SOCKET", path)
	t.Setenv("WATCHDOG_USEC", strconv.FormatInt(watchdog.Microseconds(), 10))
	t.Setenv("WATCHDOG_PID", strconv.Itoa(os.Getpid()))
	return &Socket{l}
}

// Next returns what is told next.
func (s *Socket) Next(t *testing.T) string {
	t.Helper()
	if err := s.l.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 100)
	n, err := s.l.Read(buf)
	if err != nil {
		t.Fatalf("systemd is told nothing: %v", err)
	}
	return string(buf[:n])
}

// Until waits until something is told, whatever is told before.
func (s *Socket) Until(t *testing.T, want string) {
	t.Helper()
	for got := ""; got != want; {
		got = s.Next(t)
	}
}
