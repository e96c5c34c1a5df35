package cluster

import (
	"net"
	"slices"
	"sync"
)

// maxHandshakes bounds the connections that have not proved themselves. Members take
// milliseconds, so only strangers ever fill it.
const maxHandshakes = 512

// handshakes are the connections that have not proved themselves yet. Where there are too
// many, the oldest of the host that has the most is closed: a stranger that keeps many
// open and says nothing keeps nobody out. It is safe for concurrent use.
type handshakes struct {
	max int

	mu   sync.Mutex
	open []*handshake // oldest first; guarded by mu
}

type handshake struct {
	conn net.Conn
	host string
}

// begin adds a connection until the returned function is called, and says whether another
// was closed for it.
func (h *handshakes) begin(conn net.Conn) (end func(), crowded bool) {
	one := &handshake{conn, hostOf(conn)}
	h.mu.Lock()
	defer h.mu.Unlock()
	if crowded = len(h.open) >= h.max; crowded {
		oldest := h.crowder()
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

// crowder is the index of the oldest of the host that has the most. h.mu must be held,
// and one be open.
func (h *handshakes) crowder() int {
	count, most := map[string]int{}, 0
	for _, o := range h.open {
		count[o.host]++
		most = max(most, count[o.host])
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
