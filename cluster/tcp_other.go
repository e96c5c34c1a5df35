//go:build !linux

package cluster

import (
	"net"
	"time"
)

// setTCP is for Linux, the only system that nodes run on.
func setTCP(*net.TCPConn, time.Duration, int) {}

// socketOf is as well.
func socketOf(net.Conn) (socket, bool) { return nil, false }
