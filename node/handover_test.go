package node

import (
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/imagewolf/imagewolf/config"
	"github.com/imagewolf/imagewolf/node/metrics"
)

// TestStoppedFetcherHandsOver: a node that is told to stop when its own pull is through
// stays until the others have what it fetched.
func TestStoppedFetcherHandsOver(t *testing.T) {
	r := newRegistry(t, 8*mib)
	nodes := startNodes(t, 3, func(c *config.Config) { c.Swarm.UploadLimit = 4 * mib })
	held, released := make(chan struct{}), make(chan struct{})
	first := make(chan error, 1)
	hold := sync.OnceFunc(func() { close(held) })
	r.gate = func(off int64) {
		if off >= mib {
			hold()
			<-released
		}
	}
	go func() { first <- nodes[0].pull(t.Context(), r, "default") }()
	<-held
	others := make(chan error, len(nodes))
	for _, tn := range nodes[1:] {
		go func() { others <- tn.pull(t.Context(), r, "default") }()
	}
	for _, tn := range nodes[1:] {
		tn.awaitOffset(t, r, mib)
	}
	close(released)
	if err := <-first; err != nil {
		t.Fatal(err)
	}
	nodes[0].end()
	for range nodes[1:] {
		if err := <-others; err != nil {
			t.Error(err)
		}
	}
	for _, tn := range nodes[1:] {
		tn.check(t, r)
	}
	wantSent(t, r, 1)
}

func TestLinger(t *testing.T) {
	for needed, want := range map[time.Duration]time.Duration{
		0: 0, 3 * handOverLook / 2: 2 * handOverLook, time.Hour: handOverTime,
	} {
		synctest.Test(t, func(t *testing.T) {
			began := time.Now()
			linger(func() bool { return time.Since(began) < needed }, handOverTime)
			if took := time.Since(began); took != want {
				t.Errorf("needed for %v: it took %v, want %v", needed, took, want)
			}
		})
	}
	synctest.Test(t, func(t *testing.T) {
		began, hang := time.Now(), make(chan struct{})
		defer close(hang)
		linger(func() bool { <-hang; return true }, handOverTime)
		if took := time.Since(began); took != handOverTime {
			t.Errorf("not known whether it is needed: it took %v, want %v", took, handOverTime)
		}
	})
}

// TestNeededPanics: a node that does not find out whether it is needed stops as others do.
func TestNeededPanics(t *testing.T) {
	n := &Node{log: testLog(t), stack: &stack{}} // without a swarm
	n.metrics = metrics.New(metrics.Now{})
	if n.needed() {
		t.Error("it is needed")
	}
}
