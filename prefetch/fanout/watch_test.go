package fanout

import (
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"

	imagewolfv1 "github.com/imagewolf/imagewolf/api/v1"
)

// However many watch a request on a node, its nodes are asked as often as for one.
func TestThoseWhoWatchShareWhatIsSeen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		nodes := w.addAll(2)
		nodes[1].do = pause(10 * time.Second)
		id := prefetchOn(t, nodes[0], &imagewolfv1.PrefetchRequest{Image: image}).Request.Id
		synctest.Wait()
		nodes[1].set(func() { nodes[1].called = 0 })
		began := time.Now()
		var wg sync.WaitGroup
		for i := range 100 {
			wg.Go(func() {
				time.Sleep(time.Duration(i) * 7 * time.Millisecond)
				first, last := time.Duration(0), ""
				err := nodes[0].watch(t.Context(), id, func(st *imagewolfv1.PrefetchStatus) error {
					if first == 0 {
						first = time.Since(began) + 1
					}
					last = statesOf(st)
					return nil
				})
				if took := time.Since(began); err != nil || last != "n00:done n01:done" || took < 10*time.Second || took > 10*time.Second+2*watchEvery {
					t.Errorf("%q after %s: %v", last, took, err)
				}
				if first-1 != time.Duration(i)*7*time.Millisecond {
					t.Errorf("the first was told after %s", first)
				}
			})
		}
		wg.Wait()
		if n := nodes[1].called; n < 35 || n > 45 {
			t.Errorf("asked %d times in 10 s", n)
		}
		if nodes[0].watches != 0 || len(nodes[0].scenes) != 0 {
			t.Errorf("%d watches of %d requests are left", nodes[0].watches, len(nodes[0].scenes))
		}
	})
}

// Who asks for what nobody knows makes members no more work than others leave them.
func TestUnknownIDsDoNotFloodMembers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		nodes := w.addAll(2)
		nodes[1].set(func() { nodes[1].deaf = true })
		var wg sync.WaitGroup
		for range 5 * maxFinds {
			wg.Go(func() {
				if _, err := nodes[0].Node().GetPrefetch(t.Context(), &imagewolfv1.GetPrefetchRequest{Id: "unknown"}); code(err) != codes.NotFound {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if nodes[1].most != maxFinds || nodes[1].called != 5*maxFinds {
			t.Errorf("%d calls, %d of them at the same time", nodes[1].called, nodes[1].most)
		}
	})
}
