package node

import (
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestClientsThatVanish: a client of the network whose host is gone does not keep its
// place: neither while nothing is sent to it, nor while something is.
func TestClientsThatVanish(t *testing.T) {
	l, err := listenWatchful(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	client, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	raw, err := conn.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	err = raw.Control(func(fd uintptr) {
		if on, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_KEEPALIVE); on == 0 || err != nil {
			t.Errorf("no probes are sent (%v)", err)
		}
		ms, err := unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT)
		if limit := time.Duration(ms) * time.Millisecond; limit != apiSilent || err != nil {
			t.Errorf("what is sent may be unconfirmed for %v (%v), want %v", limit, err, apiSilent)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
}
