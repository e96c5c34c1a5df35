package swarm

import (
	"net"
	"testing"
)

// broken is a listener that panics once.
type broken struct{ net.Listener }

func (broken) Accept() (net.Conn, error) { panic("no such luck") }

// The panic of a goroutine of the swarm's own comes to Contain.
func TestPanicIsContained(t *testing.T) {
	caught := make(chan any, 1)
	newPeer(t, func(o *Options) {
		o.Listener = broken{o.Listener}
		o.Contain = func(f func()) {
			defer func() {
				if p := recover(); p != nil {
					caught <- p
				}
			}()
			f()
		}
	})
	if p := <-caught; p != "no such luck" {
		t.Error(p)
	}
}
