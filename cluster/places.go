package cluster

import (
	"net"
	"sync"
)

// maxConns bounds the connections of one peer that are open at the data port, which
// has a few of each protocol from an honest one. A peer is a key at a host: where
// certificates are the user's own, all nodes may have the same.
const maxConns = 256

// places counts the connections that are open, by peer. It is safe for concurrent use.
type places struct {
	max int

	mu   sync.Mutex
	open map[place]int // guarded by mu
}

type place struct{ key, host string }

// take counts a connection of a peer until its Close, and says whether there is room
// for it. It is to be called once for each, before others use it.
func (p *places) take(key string, c *placedConn) bool {
	at := place{key, hostOf(c)}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.open[at] >= p.max {
		return false
	}
	if p.open == nil {
		p.open = map[place]int{}
	}
	p.open[at]++
	c.leave = func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.open[at]--; p.open[at] == 0 {
			delete(p.open, at)
		}
	}
	return true
}

// placedConn gives its place back when it is closed.
type placedConn struct {
	net.Conn
	once  sync.Once
	leave func() // nil before take
}

// Close implements net.Conn.
func (c *placedConn) Close() error {
	err := c.Conn.Close()
	c.once.Do(func() {
		if c.leave != nil {
			c.leave()
		}
	})
	return err
}
