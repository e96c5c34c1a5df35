package fanout

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	imagewolfv1 "github.com/imagewolf/imagewolf/api/v1"
)

// Of all that members tell only the newest is held, and that as a whole.
func TestListsHoldOnlyTheNewest(t *testing.T) {
	const requests, nodes, limit, most = 60, 20, 10, 120
	type told struct{ request, node int }
	var all []told
	for r := range requests {
		for n := range nodes {
			all = append(all, told{r, n})
		}
	}
	random := rand.New(rand.NewPCG(1, 2))
	random.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	n := newNewest(limit, most)
	for _, a := range all {
		k, ok := knownFrom(&imagewolfv1.StartRequest{
			Request: &imagewolfv1.PrefetchRequest{Id: fmt.Sprintf("r%03d", a.request), Image: image}, Created: int64(a.request), Coordinator: "c",
		}, time.Now())
		if !ok {
			t.Fatal("not known")
		}
		node := fmt.Sprint("n", a.node)
		n.add(k, node, &imagewolfv1.NodePrefetch{Node: node, State: done})
		if len(n.found) > 2*limit || n.states > 2*most {
			t.Fatalf("%d requests with %d states are held", len(n.found), n.states)
		}
	}
	got := n.cut()
	if len(got) != most/nodes {
		t.Errorf("%d requests", len(got))
	}
	for i, l := range got {
		if want := fmt.Sprintf("r%03d", requests-1-i); l.known.start.Request.Id != want || len(l.states) != nodes || len(l.from) != maxSources {
			t.Errorf("place %d: %s with %d states, want %s", i, l.known.start.Request.Id, len(l.states), want)
		}
	}
}

func TestListsHaveOnlySoManyNodes(t *testing.T) {
	of := func(nodes ...int) (all []*listed) {
		for _, n := range nodes {
			all = append(all, &listed{known: known{start: &imagewolfv1.StartRequest{Nodes: make([]string, n)}}})
		}
		return all
	}
	for _, c := range []struct {
		all  []*listed
		want int
	}{{of(), 0}, {of(50, 50), 2}, {of(50, 51), 1}, {of(101, 1), 1}, {of(30, 30, 30, 30), 3}} {
		if got := len(fitting(c.all, 100)); got != c.want {
			t.Errorf("%d requests, want %d", got, c.want)
		}
	}
}

// A panic over one request of a list costs the list that request's nodes, and nothing else.
func TestListContainsPanics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		a, b := w.add("a", nil), w.add("b", map[string]string{"is": "b"})
		id := prefetchOn(t, b, &imagewolfv1.PrefetchRequest{Image: image, Nodes: &imagewolfv1.NodeSelection{Labels: "is=b"}}).Request.Id
		asked := 0
		a.asks = func(string) {
			if asked++; asked == 2 { // first for the list, then for the request's nodes
				panic("oh")
			}
		}
		all, err := a.Node().ListPrefetches(t.Context(), &imagewolfv1.ListPrefetchesRequest{})
		if err != nil || asked != 2 || len(all.Prefetches) != 1 || all.Prefetches[0].Request.Id != id {
			t.Errorf("%v, %v, asked %d times", all, err, asked)
		}
	})
}
