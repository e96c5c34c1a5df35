package cluster

import (
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// setTCP bounds how long sent bytes may stay unconfirmed, and how many may wait
// in the kernel to be sent at all: many exchanges share a connection, and what
// waits there goes before all that comes later. Best effort: without it the
// kernel takes a quarter of an hour, and megabytes.
func setTCP(conn *net.TCPConn, unconfirmed time.Duration, unsent int) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(unconfirmed.Milliseconds()))
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, unsent)
	})
}
