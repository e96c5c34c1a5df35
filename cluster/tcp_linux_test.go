package cluster

import (
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestRestingConnectionsSurviveLostProbes: the kernel ends a connection at rest at the
// first moment to probe that is not before TCP_USER_TIMEOUT, if a probe is out then.
func TestRestingConnectionsSurviveLostProbes(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for limit, noticed := range map[time.Duration]time.Duration{
		deafAfter: 4 * time.Second, deadAfter: 11 * time.Second, 12 * time.Second: 13 * time.Second,
	} {
		conn, err := dialTCP(t.Context(), l.Addr().String(), limit)
		if err != nil {
			t.Fatal(err)
		}
		raw, err := conn.(*net.TCPConn).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		var on int
		var idle, interval, unconfirmed time.Duration
		err = raw.Control(func(fd uintptr) {
			get := func(level, option int) int {
				n, err := unix.GetsockoptInt(int(fd), level, option)
				if err != nil {
					t.Error(err)
				}
				return n
			}
			on = get(unix.SOL_SOCKET, unix.SO_KEEPALIVE)
			idle = time.Duration(get(unix.IPPROTO_TCP, unix.TCP_KEEPIDLE)) * time.Second
			interval = time.Duration(get(unix.IPPROTO_TCP, unix.TCP_KEEPINTVL)) * time.Second
			unconfirmed = time.Duration(get(unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT)) * time.Millisecond
		})
		if err != nil {
			t.Fatal(err)
		}
		if on == 0 || unconfirmed != limit {
			t.Errorf("%v: probes are on: %d, bytes may be unconfirmed for %v", limit, on, unconfirmed)
		}
		probes, over := 1, idle+interval
		for over < unconfirmed {
			probes, over = probes+1, over+interval
		}
		if probes != lostProbes || over != noticed {
			t.Errorf("%v: ends after %d lost probes and %v, want %d and %v", limit, probes, over, lostProbes, noticed)
		}
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
	}
}
