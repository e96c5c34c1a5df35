package cluster

import (
	"net"
	"slices"
	"sync"
	"time"
)

// maxHandshakes bounds the connections that have not proved themselves. Members take
// milliseconds, so only strangers ever fill it.
const maxHandshakes = 512

const (
	// many is how many one host has at once that is not a member: those connect once for
	// each protocol, and again beside it where no answer comes.
	many = 8
	// young is how long a handshake is let go on whoever else comes.
	young = time.Second
)

// handshakes are the connections that have not proved themselves yet. Where there are too
// many, the oldest of the host that has the most is closed for one more: a stranger that
// keeps many open and says nothing keeps nobody out. Where no host has many, and all have
// just begun, it is the one more: that are members, all at once, and to begin with another
// would only waste what was done for the first. It is safe for concurrent use.
type handshakes struct {
	max int

	mu   sync.Mutex
	open []*handshake // oldest first; guarded by mu
}

type handshake struct {
	conn  net.Conn
	host  string
	since time.Time
}

// begin adds a connection until the returned function is called, and says whether there
// were too many. It may be this one that is closed then.
func (h *handshakes) begin(conn net.Conn) (end func(), crowded bool) {
	one := &handshake{conn, hostOf(conn), time.Now()}
	h.mu.Lock()
	defer h.mu.Unlock()
	if crowded = len(h.open) >= h.max; crowded {
		oldest := h.crowder(one.since)
		if oldest < 0 {
			_ = conn.Close()
			return func() {}, true
		}
		_ = h.open[oldest].conn.Close() // whoever reads from it finds out
		h.open = slices.Delete(h.open, oldest, oldest+1)
	}
	h.open = append(h.open, one)
	return func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.open = slices.DeleteFunc(h.open, func(o *handshake) bool { return o == one })
	}, crowded
}

// crowder is the index of the oldest of the host that has the most; -1 if no host has
// many and none is old. h.mu must be held, and one be open.
func (h *handshakes) crowder(now time.Time) int {
	count, most := map[string]int{}, 0
	for _, o := range h.open {
		count[o.host]++
		most = max(most, count[o.host])
	}
	if most < many && now.Sub(h.open[0].since) < young {
		return -1
	}
	return slices.IndexFunc(h.open, func(o *handshake) bool { return count[o.host] == most })
}

// hostOf is the host at the connection's other end.
func hostOf(conn net.Conn) string {
	remote := conn.RemoteAddr().String()
	if host, _, err := net.SplitHostPort(remote); err == nil {
		return host
	}
	return remote // none of TCP
}
