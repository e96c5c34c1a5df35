package cluster

import (
	"crypto/tls"
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
	for limit, c := range map[time.Duration]struct {
		probes  int
		noticed time.Duration
	}{
		deafAfter:        {lostProbes, 4 * time.Second},
		heldAfter:        {heldProbes, 5 * time.Second},
		deadAfter:        {lostProbes, 11 * time.Second},
		12 * time.Second: {lostProbes, 13 * time.Second},
	} {
		conn, err := dialTCP(t.Context(), l.Addr().String(), limit)
		if err != nil {
			t.Fatal(err)
		}
		tune(conn, limit, c.probes)
		on, idle, interval, unconfirmed := tuned(t, conn)
		if !on || unconfirmed != limit {
			t.Errorf("%v: probes are on: %t, bytes may be unconfirmed for %v", limit, on, unconfirmed)
		}
		probes, over := 1, idle+interval
		for over < unconfirmed {
			probes, over = probes+1, over+interval
		}
		if probes != c.probes || over != c.noticed {
			t.Errorf("%v: ends after %d lost probes and %v, want %d and %v", limit, probes, over, c.probes, c.noticed)
		}
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestTrackerGivesUpItsMembers: a tracker that holds members for long after their host is
// gone sends those that are left to them. For peers there is more time.
func TestTrackerGivesUpItsMembers(t *testing.T) {
	key := GenerateKey()
	port := openPort(t, keyed(t, key, "tracker"), nil)
	for proto, c := range map[string]struct {
		queue net.Listener
		limit time.Duration
	}{
		ProtoGRPC:       {port.GRPC(), heldAfter},
		ProtoBitTorrent: {port.BitTorrent(), deadAfter},
	} {
		dialed, err := keyed(t, key, "member").Dial(t.Context(), port.listener.Addr().String(), proto)
		if err != nil {
			t.Fatal(err)
		}
		accepted, err := c.queue.Accept()
		if err != nil {
			t.Fatal(err)
		}
		raw := accepted.(*tls.Conn).NetConn().(*placedConn).Conn
		if on, _, _, unconfirmed := tuned(t, raw); !on || unconfirmed != c.limit {
			t.Errorf("%s: probes are on: %t, bytes may be unconfirmed for %v, want %v", proto, on, unconfirmed, c.limit)
		}
		_, _ = accepted.Close(), dialed.Close() // the one that is second may find the other gone
	}
}

// tuned returns what a TCP connection has the kernel do: whether it probes, after what
// rest and how often, and for how long sent bytes may stay unconfirmed.
func tuned(t *testing.T, conn net.Conn) (on bool, idle, interval, unconfirmed time.Duration) {
	t.Helper()
	raw, err := conn.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := raw.Control(func(fd uintptr) {
		get := func(level, option int) int {
			n, err := unix.GetsockoptInt(int(fd), level, option)
			if err != nil {
				t.Error(err)
			}
			return n
		}
		on = get(unix.SOL_SOCKET, unix.SO_KEEPALIVE) != 0
		idle = time.Duration(get(unix.IPPROTO_TCP, unix.TCP_KEEPIDLE)) * time.Second
		interval = time.Duration(get(unix.IPPROTO_TCP, unix.TCP_KEEPINTVL)) * time.Second
		unconfirmed = time.Duration(get(unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT)) * time.Millisecond
	}); err != nil {
		t.Fatal(err)
	}
	return on, idle, interval, unconfirmed
}
