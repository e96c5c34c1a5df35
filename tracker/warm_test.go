package tracker

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/connectivity"

	api "github.com/imagewolf/imagewolf/api/v1"
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

// A tracker that could not be reached is joined again as soon as there is a connection to
// it, which a Warmer sees to, also where one was lost: all members are to meet there.
func TestReachedAgain(t *testing.T) {
	bubble(t, func(t *testing.T, n *testNet) {
		back := make(chan struct{})
		n.hold = back
		away := n.serve("t0", nil)
		n.hold = nil
		n.serve("t1", nil)
		c := n.client("m", "")
		w := NewWarmer(c)
		defer w.Close()
		at := func(want string) {
			t.Helper()
			ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
			defer cancel()
			s, err := c.Join(ctx, testDigest, says(&api.Hello{Size: testSize}), nil)
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			if got := s.Tracker().Name; got != want {
				t.Errorf("joined at %s, want %s", got, want)
			}
		}
		w.Keep(t.Context(), []string{away.peer.Address})
		at("t1")
		at("t1")
		close(back)
		synctest.Wait()
		at("t0")
		// What the Warmer holds may have been replaced, or lost.
		c.conns.mu.Lock()
		lost := c.conns.byAddr[away.peer.Address]
		c.conns.replaceLocked(away.peer.Address, lost)
		c.conns.mu.Unlock()
		w.Keep(t.Context(), []string{away.peer.Address})
		synctest.Wait()
		if got := lost.cc.GetState(); got != connectivity.Shutdown {
			t.Errorf("the connection that was replaced is %v", got)
		}
		if !c.conns.ready(away.peer.Address) {
			t.Error("there is none in its place")
		}
	})
}
