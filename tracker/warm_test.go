package tracker

import (
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/connectivity"
)

// A connection that is kept is there before anybody joins, outlives idleness,
// and goes when it is not to be kept any more.
func TestWarmerKeepsConnections(t *testing.T) {
	bubble(t, func(t *testing.T, n *testNet) {
		a := n.serve("a", nil)
		c := n.client("m", "")
		w := NewWarmer(c)
		w.Keep(t.Context(), []string{a.peer.Address})
		synctest.Wait()
		c.conns.mu.Lock()
		k := c.conns.byAddr[a.peer.Address]
		c.conns.mu.Unlock()
		if k == nil || k.cc.GetState() != connectivity.Ready {
			t.Fatal("not connected before the first join")
		}
		time.Sleep(3 * connIdle)
		w.Keep(t.Context(), []string{a.peer.Address})
		synctest.Wait()
		if got := k.cc.GetState(); got != connectivity.Ready {
			t.Errorf("kept connection is %v after idleness", got)
		}
		w.Close()
		time.Sleep(2 * connIdle)
		synctest.Wait()
		if got := k.cc.GetState(); got != connectivity.Shutdown {
			t.Errorf("connection is %v after it was given back", got)
		}
	})
}
