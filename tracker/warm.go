package tracker

import (
	"context"

	"google.golang.org/grpc"
)

// Warmer keeps connections to trackers open before anybody joins there: what
// a first connection takes, TLS and all, is a large part of the time in which
// a tracker has to answer. It belongs to one goroutine.
type Warmer struct {
	c    *Client
	held map[string]warm // by address
}

type warm struct {
	cc      *grpc.ClientConn
	release func() // gives it back
}

// NewWarmer returns a Warmer that holds nothing. Close it before c.
func NewWarmer(c *Client) *Warmer { return &Warmer{c: c, held: map[string]warm{}} }

// Keep holds connections to just these addresses from now on, and begins to connect
// to new ones, and again where a connection is lost. It does not wait for them. To be
// called now and then.
func (w *Warmer) Keep(ctx context.Context, addresses []string) {
	keep := map[string]bool{}
	for _, a := range addresses {
		keep[a] = true
		h, ok := w.held[a]
		if ok && !w.c.conns.current(a, h.cc) {
			h.release()
			delete(w.held, a)
			ok = false
		}
		if !ok {
			conn, release, err := w.c.conns.get(ctx, a)
			if err != nil {
				continue // Join will find out, and say so
			}
			h = warm{conn, release}
			w.held[a] = h
		}
		h.cc.Connect()
	}
	for a, h := range w.held {
		if !keep[a] {
			h.release()
			delete(w.held, a)
		}
	}
}

// Close gives all connections back.
func (w *Warmer) Close() { w.Keep(context.Background(), nil) }
