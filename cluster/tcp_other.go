//go:build !linux

package cluster

import (
	"net"
	"time"
)

// setUserTimeout is for Linux, the only system that nodes run on.
func setUserTimeout(*net.TCPConn, time.Duration) {}
