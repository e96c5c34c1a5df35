package tracker

import "context"

// Warmer keeps connections to trackers open before anybody joins there: what
// a first connection takes, TLS and all, is a large part of the time in which
// a tracker has to answer. It belongs to one goroutine.
type Warmer struct {
	c    *Client
	held map[string]func() // address -> gives the connection back
}

// NewWarmer returns a Warmer that holds nothing. Close it before c.
func NewWarmer(c *Client) *Warmer { return &Warmer{c: c, held: map[string]func(){}} }

// Keep holds connections to just these addresses from now on, and begins to
// connect to new ones. It does not wait for them.
func (w *Warmer) Keep(ctx context.Context, addresses []string) {
	keep := map[string]bool{}
	for _, a := range addresses {
		keep[a] = true
		if w.held[a] != nil {
			continue
		}
		conn, release, err := w.c.conns.get(ctx, a)
		if err != nil {
			continue // Join will find out, and say so
		}
		conn.Connect()
		w.held[a] = release
	}
	for a, release := range w.held {
		if !keep[a] {
			release()
			delete(w.held, a)
		}
	}
}

// Close gives all connections back.
func (w *Warmer) Close() { w.Keep(context.Background(), nil) }
