package cluster

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/memberlist"
)

func TestPause(t *testing.T) {
	const long = 20 * time.Second
	for name, c := range map[string]struct {
		event     func(g *gossip) // after one second
		least     time.Duration
		most      time.Duration
		wantsLost bool
	}{
		"nothing happens": {func(*gossip) {}, long * 3 / 4, long * 5 / 4, false},
		"one joins": {func(g *gossip) {
			g.NotifyJoin(&memberlist.Node{Name: "b", Addr: []byte{10, 0, 0, 2}, Port: 7946, Meta: []byte(`{"p":1}`)})
		}, long * 3 / 4, long * 5 / 4, false},
		"one is lost": {func(g *gossip) { g.NotifyLeave(&memberlist.Node{Name: "a"}) }, time.Second, 3 * time.Second, true},
		"who was never known is lost": {func(g *gossip) {
			g.NotifyLeave(&memberlist.Node{Name: "x"})
		}, long * 3 / 4, long * 5 / 4, false},
		"what comes too late": {func(g *gossip) {
			g.over = true
			g.NotifyLeave(&memberlist.Node{Name: "a"})
		}, long * 3 / 4, long * 5 / 4, false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				node := nodeOn(t, GenerateKey(), "self", "127.0.0.1:0", nil)
				node.wait = defaultWaits
				g := &gossip{c: node}
				g.NotifyJoin(&memberlist.Node{Name: "a", Addr: []byte{10, 0, 0, 1}, Port: 7946, Meta: []byte(`{"p":1}`)})
				if got := names(node.Members()); len(got) != 2 {
					t.Fatalf("members %v", got)
				}
				go func() {
					time.Sleep(time.Second)
					c.event(g)
				}()
				began := time.Now()
				lost := node.pause(t.Context(), long)
				if took := time.Since(began); lost != c.wantsLost || took < c.least || took > c.most {
					t.Errorf("lost %v after %v; want %v between %v and %v", lost, took, c.wantsLost, c.least, c.most)
				}
			})
		})
	}
	synctest.Test(t, func(t *testing.T) {
		node := nodeOn(t, GenerateKey(), "self", "127.0.0.1:0", nil)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		began := time.Now()
		node.pause(ctx, long)
		if took := time.Since(began); took != time.Second {
			t.Errorf("a pause whose context ended took %v", took)
		}
	})
}

func TestSenselessNodesStayOut(t *testing.T) {
	g := &gossip{c: nodeOn(t, GenerateKey(), "self", "127.0.0.1:0", nil)}
	for name, n := range map[string]*memberlist.Node{
		"no metadata": {Name: "a"},
		"bad name":    {Name: "a\nb", Meta: []byte(`{"p":1}`)},
		"no port":     {Name: "a", Meta: []byte(`{"p":0}`)},
	} {
		n.Addr = []byte{10, 0, 0, 1}
		if err := g.NotifyAlive(n); err == nil {
			t.Errorf("%s: let in", name)
		}
	}
	if err := g.NotifyAlive(&memberlist.Node{Name: "a", Meta: []byte(`{"p":1,"new":{}}`)}); err != nil {
		t.Errorf("a node of a later version: %v", err)
	}
}
