package cluster

import (
	"net"
	"syscall"
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

// kernelSocket asks the kernel about a TCP connection.
type kernelSocket struct{ raw syscall.RawConn }

// socketOf returns the socket beneath a connection, false if it is none of TCP.
func socketOf(conn net.Conn) (socket, bool) {
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return nil, false
	}
	raw, err := tcp.SyscallConn()
	return kernelSocket{raw}, err == nil
}

// count implements socket (tcp(7), TCP_INFO). Kernels before 4.19 do not count what was
// sent.
func (s kernelSocket) count() (sent, confirmed uint64, ok bool) {
	var info *unix.TCPInfo
	var err error
	if s.raw.Control(func(fd uintptr) { info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO) }) != nil || err != nil {
		return 0, 0, false
	}
	return info.Bytes_sent - info.Bytes_retrans, info.Bytes_acked, true
}
