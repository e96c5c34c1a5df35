package fanout

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"

	imagewolfv1 "github.com/imagewolf/imagewolf/api/v1"
)

const image = "registry.example.com/team/app:1"

func TestSelectedNodesPull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		a, b, c := w.add("a", map[string]string{"zone": "a"}), w.add("b", map[string]string{"zone": "a"}), w.add("c", map[string]string{"zone": "b"})
		st := prefetchOn(t, c, &imagewolfv1.PrefetchRequest{Image: image, Nodes: &imagewolfv1.NodeSelection{Labels: "zone=a"}})
		if statesOf(st) != "a:pulling b:pulling" && statesOf(st) != "a:queued b:queued" || st.Request.Id == "" || time.Since(time.UnixMilli(st.Created)) > time.Second {
			t.Errorf("at once: %v", st)
		}
		time.Sleep(500 * time.Millisecond)
		if st := wants(t, a, st.Request.Id, "a:pulling b:pulling"); st.Nodes[0].Bytes != 1 || st.Nodes[0].Total != 10 {
			t.Errorf("half way: %v", st)
		}
		time.Sleep(time.Second)
		for _, n := range []*testNode{a, b, c} { // any node tells
			st := wants(t, n, st.Request.Id, "a:done b:done")
			if d := st.Nodes[1]; d.Bytes != 10 || d.Digest != testDigest || d.Ended == 0 {
				t.Errorf("%s tells %v", n.name, d)
			}
		}
		if len(a.images()) != 1 || len(b.images()) != 1 || len(c.images()) != 0 || c.count("requested") != 1 || a.count("done") != 1 {
			t.Errorf("pulled %q %q %q, counted %v", a.images(), b.images(), c.images(), c.count("requested"))
		}
		if _, err := a.Node().GetPrefetch(t.Context(), &imagewolfv1.GetPrefetchRequest{Id: "nobody-s"}); code(err) != codes.NotFound {
			t.Errorf("unknown: %v", err)
		}
	})
}

func TestSelectionTakesAPart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		nodes := w.addAll(10)
		selected := func(image string, s *imagewolfv1.NodeSelection) []string {
			var names []string
			for _, n := range prefetchOn(t, nodes[3], &imagewolfv1.PrefetchRequest{Image: image, Nodes: s}).Nodes {
				names = append(names, n.Node)
			}
			return names
		}
		three := selected("r/app:1", &imagewolfv1.NodeSelection{Count: 3})
		if again := selected("r/app:2", &imagewolfv1.NodeSelection{Count: 3}); len(three) != 3 || !slices.Equal(three, again) {
			t.Errorf("of one repository: %q, then %q", three, again)
		}
		differ := 0
		for i := range 5 {
			if !slices.Equal(three, selected(fmt.Sprintf("r/other%d", i), &imagewolfv1.NodeSelection{Count: 3})) {
				differ++
			}
		}
		if differ == 0 {
			t.Error("every repository has the same nodes")
		}
		for percent, want := range map[uint32]int{1: 1, 10: 1, 11: 2, 25: 3, 100: 10} {
			if got := selected("r/app", &imagewolfv1.NodeSelection{Percent: percent}); len(got) != want {
				t.Errorf("%d %%: %q, want %d", percent, got, want)
			}
		}
		if got := selected("r/app", &imagewolfv1.NodeSelection{Percent: 50, Count: 2}); len(got) != 2 {
			t.Errorf("both: %q", got)
		}
		nodes[1].has["r/app:3"], nodes[7].has["r/app:3"], nodes[8].has["r/app:3"] = true, true, true
		nodes[8].set(func() { nodes[8].deaf = true })
		if got := selected("r/app:3", &imagewolfv1.NodeSelection{RunningRepository: true}); !slices.Equal(got, []string{"n01", "n07"}) {
			t.Errorf("running: %q", got)
		}
		if got := selected("r/app:4", &imagewolfv1.NodeSelection{RunningRepository: true}); len(got) != 0 {
			t.Errorf("running nothing: %q", got)
		}
	})
}

func TestKnownRequestChangesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		nodes := w.addAll(3)
		first := prefetchOn(t, nodes[0], &imagewolfv1.PrefetchRequest{Id: "x", Image: image, Nodes: &imagewolfv1.NodeSelection{Count: 1}})
		second := prefetchOn(t, nodes[1], &imagewolfv1.PrefetchRequest{Id: "x", Image: "r/another"})
		if second.Request.Image != image || len(second.Nodes) != 1 || second.Nodes[0].Node != first.Nodes[0].Node {
			t.Errorf("first %v, second %v", first, second)
		}
	})
}

func TestPriorityThenAge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newWorld(t).add("a", nil)
		for i, p := range []int32{0, 0, 0, 5, -1, 5, 0} {
			prefetchOn(t, n, &imagewolfv1.PrefetchRequest{Image: fmt.Sprintf("r/i%d", i), Priority: p})
			synctest.Wait()
			time.Sleep(time.Millisecond)
		}
		if queued, pulling := n.Load(); queued != 5 || pulling != 2 {
			t.Errorf("%d wait, %d are pulled", queued, pulling)
		}
		time.Sleep(10 * time.Second)
		want := []string{"r/i0", "r/i1", "r/i3", "r/i5", "r/i2", "r/i6", "r/i4"}
		if !slices.Equal(n.images(), want) || n.w.peak() != 2 {
			t.Errorf("pulled %q, want %q; at the same time %d", n.images(), want, n.w.peak())
		}
	})
}

func TestFailedPullIsTriedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newWorld(t).add("a", nil)
		var at []time.Duration
		began := time.Now()
		n.do = func(context.Context, *imagewolfv1.PrefetchRequest, func(bytes, total int64)) (string, error) {
			at = append(at, time.Since(began).Round(100*time.Millisecond))
			return "", errors.New("the registry is down")
		}
		id := prefetchOn(t, n, &imagewolfv1.PrefetchRequest{Image: image}).Request.Id
		time.Sleep(time.Second)
		if st := wants(t, n, id, "a:queued"); !strings.Contains(st.Nodes[0].Reason, "try 1 failed: the registry is down") {
			t.Errorf("reason %q", st.Nodes[0].Reason)
		}
		time.Sleep(time.Minute)
		st := wants(t, n, id, "a:failed")
		if st.Nodes[0].Reason != "the registry is down" || st.Nodes[0].TimedOut || !slices.Equal(at, []time.Duration{0, 2 * time.Second, 10 * time.Second, 40 * time.Second}) {
			t.Errorf("%v, tried at %v", st.Nodes[0], at)
		}
		if n.count("retried") != 3 || n.count("failed") != 1 {
			t.Errorf("counted %d retries, %d failures", n.count("retried"), n.count("failed"))
		}
		// What is wrong as it is, is not; and neither does a panic end anything.
		n.do = func(context.Context, *imagewolfv1.PrefetchRequest, func(bytes, total int64)) (string, error) {
			return "", fmt.Errorf("no such platform: %w", errdefs.ErrInvalidArgument)
		}
		id = prefetchOn(t, n, &imagewolfv1.PrefetchRequest{Image: image}).Request.Id
		time.Sleep(time.Second)
		wants(t, n, id, "a:failed")
		n.do = func(context.Context, *imagewolfv1.PrefetchRequest, func(bytes, total int64)) (string, error) {
			panic("oh")
		}
		id = prefetchOn(t, n, &imagewolfv1.PrefetchRequest{Image: image}).Request.Id
		time.Sleep(time.Minute)
		wants(t, n, id, "a:failed")
	})
}

func TestTimeIsUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newWorld(t).add("a", nil)
		n.do = pause(time.Hour)
		var ids []string
		for range 3 { // two are pulled, one waits
			ids = append(ids, prefetchOn(t, n, &imagewolfv1.PrefetchRequest{Image: image, TimeoutSeconds: 30}).Request.Id)
		}
		time.Sleep(29 * time.Second)
		wants(t, n, ids[0], "a:pulling")
		wants(t, n, ids[2], "a:queued")
		time.Sleep(2 * time.Second)
		for _, id := range ids {
			if st := wants(t, n, id, "a:failed"); !st.Nodes[0].TimedOut || !strings.Contains(st.Nodes[0].Reason, "30s") {
				t.Errorf("%v", st.Nodes[0])
			}
		}
	})
}

func TestRestartsLoseNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		nodes := w.addAll(3)
		nodes[2].set(func() { nodes[2].gone = true })
		for _, n := range nodes {
			n.slots = 1
			n.stop()
			n.start()
		}
		var ids []string
		for i := range 3 {
			ids = append(ids, prefetchOn(t, nodes[0], &imagewolfv1.PrefetchRequest{Image: fmt.Sprintf("r/i%d", i)}).Request.Id)
			time.Sleep(time.Millisecond)
		}
		time.Sleep(1500 * time.Millisecond)
		wants(t, nodes[1], ids[0], "n00:done n01:done")
		wants(t, nodes[1], ids[1], "n00:pulling n01:pulling")
		wants(t, nodes[1], ids[2], "n00:queued n01:queued")
		for _, n := range nodes[:2] { // the one that took them, too
			n.stop()
		}
		if _, err := nodes[0].Node().Prefetch(t.Context(), &imagewolfv1.PrefetchRequest{Image: image}); code(err) != codes.Unavailable {
			t.Errorf("while it is down: %v", err)
		}
		for _, n := range nodes[:2] {
			n.start()
		}
		st := wants(t, nodes[1], ids[0], "n00:done n01:done")
		if st.Nodes[0].Digest != testDigest || st.Request.Image != "r/i0" {
			t.Errorf("after the restart: %v", st)
		}
		time.Sleep(3 * time.Second)
		for _, id := range ids {
			wants(t, nodes[0], id, "n00:done n01:done")
		}
		if got := nodes[1].images(); !slices.Equal(got, []string{"r/i0", "r/i1", "r/i1", "r/i2"}) {
			t.Errorf("pulled %q", got)
		}
		// They are remembered for a day, also over a restart, and no longer.
		time.Sleep(23 * time.Hour)
		nodes[1].stop()
		nodes[1].start()
		wants(t, nodes[1], ids[2], "n00:done n01:done")
		time.Sleep(90 * time.Minute)
		if nodes[1].held() != 0 || nodes[0].held() != 0 || nodes[0].places != 0 {
			t.Errorf("a day later: %d and %d, with %d places", nodes[0].held(), nodes[1].held(), nodes[0].places)
		}
		nodes[1].stop()
		nodes[1].start()
		if n := nodes[1].held(); n != 0 {
			t.Errorf("%d are on disk", n)
		}
	})
}

// A node that is silent when a request comes is told of it when it is back, also
// by a node that was restarted meanwhile. Nobody waits long for it.
func TestSilentNodeIsToldLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		nodes := w.addAll(3)
		deaf := nodes[2]
		deaf.set(func() { deaf.deaf = true })
		began := time.Now()
		id := prefetchOn(t, nodes[0], &imagewolfv1.PrefetchRequest{Image: image}).Request.Id
		if took := time.Since(began); took > 2*callTimeout {
			t.Errorf("it took %v", took)
		}
		time.Sleep(5 * time.Second)
		began = time.Now()
		wants(t, nodes[1], id, "n00:done n01:done n02:unreachable")
		if took := time.Since(began); took > callTimeout {
			t.Errorf("it took %v", took)
		}
		nodes[0].stop()
		nodes[0].start()
		time.Sleep(time.Minute)
		if len(deaf.images()) != 0 {
			t.Error("who could have told it?")
		}
		deaf.set(func() { deaf.deaf = false })
		wants(t, nodes[1], id, "n00:done n01:done n02:queued") // not told yet
		time.Sleep(10 * time.Second)
		wants(t, nodes[1], id, "n00:done n01:done n02:done")
	})
}

func TestNodeThatIsNeverToldHasFailedInTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		nodes := w.addAll(2)
		nodes[1].set(func() { nodes[1].deaf = true })
		id := prefetchOn(t, nodes[0], &imagewolfv1.PrefetchRequest{Image: image, TimeoutSeconds: 10}).Request.Id
		var last *imagewolfv1.PrefetchStatus
		began := time.Now()
		if err := nodes[0].watch(t.Context(), id, func(st *imagewolfv1.PrefetchStatus) error { last = st; return nil }); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); statesOf(last) != "n00:done n01:unreachable" || took < 8*time.Second || took > 12*time.Second {
			t.Errorf("after %v: %s", took, statesOf(last))
		}
		nodes[1].set(func() { nodes[1].deaf = false })
		time.Sleep(time.Minute)
		if st := wants(t, nodes[1], id, "n00:done n01:failed"); !st.Nodes[1].TimedOut {
			t.Errorf("%v", st)
		}
	})
}

func TestCancel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		nodes := w.addAll(4)
		for _, n := range nodes {
			n.do = pause(time.Minute)
		}
		nodes[0].do = pause(time.Second)
		nodes[3].set(func() { nodes[3].deaf = true })
		for range 2 { // so that n01 has one that waits
			prefetchOn(t, nodes[1], &imagewolfv1.PrefetchRequest{Image: "r/other", Nodes: &imagewolfv1.NodeSelection{Labels: "none=such"}})
		}
		id := prefetchOn(t, nodes[0], &imagewolfv1.PrefetchRequest{Image: image}).Request.Id
		time.Sleep(5 * time.Second)
		wants(t, nodes[2], id, "n00:done n01:pulling n02:pulling n03:unreachable")
		// n03 hears of the request after all, and then of nothing more.
		nodes[3].set(func() { nodes[3].deaf = false })
		time.Sleep(5 * time.Second)
		wants(t, nodes[2], id, "n00:done n01:pulling n02:pulling n03:pulling")
		nodes[3].set(func() { nodes[3].deaf = true })
		st, err := nodes[1].Node().CancelPrefetch(t.Context(), &imagewolfv1.CancelPrefetchRequest{Id: id})
		if err != nil || statesOf(st) != "n00:done n01:canceled n02:canceled n03:unreachable" || !st.Canceled {
			t.Fatalf("%v, %v", st, err)
		}
		synctest.Wait()
		if _, pulling := nodes[2].Load(); pulling != 0 {
			t.Error("it still pulls")
		}
		nodes[1].stop() // who is to tell n03
		nodes[1].start()
		nodes[3].set(func() { nodes[3].deaf = false })
		time.Sleep(10 * time.Second)
		wants(t, nodes[2], id, "n00:done n01:canceled n02:canceled n03:canceled")
		if _, err := nodes[1].Node().CancelPrefetch(t.Context(), &imagewolfv1.CancelPrefetchRequest{Id: "unknown"}); code(err) != codes.NotFound {
			t.Errorf("unknown: %v", err)
		}
	})
}

// A request that is canceled before a node heard of it never reaches it, also if
// somebody else than who took it is told, and is none that knows it.
func TestCancelBeforeTheNodeHeard(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		a, b, c := w.add("a", nil), w.add("b", map[string]string{"pick": "me"}), w.add("c", nil)
		b.set(func() { b.deaf = true })
		id := prefetchOn(t, a, &imagewolfv1.PrefetchRequest{Image: image, Nodes: &imagewolfv1.NodeSelection{Labels: "pick"}}).Request.Id
		if _, err := c.Node().CancelPrefetch(t.Context(), &imagewolfv1.CancelPrefetchRequest{Id: id}); err != nil {
			t.Fatal(err)
		}
		b.set(func() { b.deaf = false })
		time.Sleep(time.Minute)
		wants(t, c, id, "b:canceled")
		if len(b.images()) != 0 {
			t.Errorf("b pulled %q", b.images())
		}
	})
}

func TestFewAtATime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		nodes := w.addAll(10)
		id := prefetchOn(t, nodes[4], &imagewolfv1.PrefetchRequest{Image: image, Concurrency: 3}).Request.Id
		// Whoever took it is not needed any more.
		time.Sleep(500 * time.Millisecond)
		nodes[4].set(func() { nodes[4].deaf = true })
		for range 200 {
			time.Sleep(100 * time.Millisecond)
			if w.peak() > 3 {
				t.Fatalf("%d at the same time", w.peak())
			}
		}
		nodes[4].set(func() { nodes[4].deaf = false })
		st := wants(t, nodes[0], id, "n00:done n01:done n02:done n03:done n04:done n05:done n06:done n07:done n08:done n09:done")
		if w.peak() != 3 || len(st.Nodes) != 10 {
			t.Errorf("%d at the same time", w.peak())
		}
	})
}

// A node that is followed and dies holds up nobody for long.
func TestDeadNodeIsNotWaitedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		nodes := w.addAll(3)
		nodes[1].do = pause(time.Hour)
		id := prefetchOn(t, nodes[0], &imagewolfv1.PrefetchRequest{Image: image, Concurrency: 1}).Request.Id
		time.Sleep(10 * time.Second)
		if st := wants(t, nodes[2], id, "n00:done n01:pulling n02:queued"); st.Nodes[2].Reason != "waits for n01" {
			t.Errorf("reason %q", st.Nodes[2].Reason)
		}
		nodes[1].set(func() { nodes[1].gone = true })
		time.Sleep(patience + 5*time.Second)
		wants(t, nodes[2], id, "n00:done n01:unreachable n02:done")
	})
}

func TestWatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		nodes := w.addAll(3)
		nodes[1].do = func(_ context.Context, _ *imagewolfv1.PrefetchRequest, progress func(bytes, total int64)) (string, error) {
			for i := range int64(1000) { // far more often than anyone wants to hear
				progress(i, 1000)
				time.Sleep(5 * time.Millisecond)
			}
			return testDigest, nil
		}
		id := prefetchOn(t, nodes[0], &imagewolfv1.PrefetchRequest{Image: image}).Request.Id
		var got []time.Duration
		var last *imagewolfv1.PrefetchStatus
		began := time.Now()
		err := nodes[2].watch(t.Context(), id, func(st *imagewolfv1.PrefetchStatus) error {
			got = append(got, time.Since(began))
			last = st
			return nil
		})
		if err != nil || statesOf(last) != "n00:done n01:done n02:done" {
			t.Fatalf("%v, %v", last, err)
		}
		if n := len(got); got[0] != 0 || n < 15 || n > 23 {
			t.Errorf("%d messages in 5 s: %v", n, got)
		}
		// What does not change is not told, and a node that dies when it is done is.
		nodes[1].do = pause(20 * time.Second)
		id = prefetchOn(t, nodes[0], &imagewolfv1.PrefetchRequest{Image: image}).Request.Id
		got = nil
		go func() {
			time.Sleep(3 * time.Second)
			nodes[0].set(func() { nodes[0].gone = true })
		}()
		err = nodes[2].watch(t.Context(), id, func(st *imagewolfv1.PrefetchStatus) error {
			got = append(got, time.Since(began))
			last = st
			return nil
		})
		if err != nil || statesOf(last) != "n00:done n01:done n02:done" || len(got) > 5 {
			t.Errorf("%s after %d messages, %v", statesOf(last), len(got), err)
		}
		if nodes[2].watches != 0 {
			t.Errorf("%d watches are left", nodes[2].watches)
		}
	})
}

func TestWatchesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newWorld(t).add("a", nil)
		n.do = pause(time.Hour)
		id := prefetchOn(t, n, &imagewolfv1.PrefetchRequest{Image: image}).Request.Id
		ctx, cancel := context.WithCancel(t.Context())
		nothing := func(*imagewolfv1.PrefetchStatus) error { return nil }
		for range maxWatches {
			go n.watch(ctx, id, nothing) //nolint:errcheck // it ends with ctx
		}
		time.Sleep(time.Second)
		if err := n.watch(ctx, id, nothing); code(err) != codes.ResourceExhausted {
			t.Errorf("one more: %v", err)
		}
		cancel()
		synctest.Wait()
		n.do = nil
		if err := n.watch(t.Context(), "unknown", nothing); code(err) != codes.NotFound {
			t.Errorf("unknown: %v", err)
		}
		if n.watches != 0 {
			t.Errorf("%d are left", n.watches)
		}
	})
}

func TestList(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		nodes := w.addAll(4)
		var ids []string
		for i := range 5 {
			ids = append(ids, prefetchOn(t, nodes[i%2], &imagewolfv1.PrefetchRequest{Image: fmt.Sprintf("r/i%d", i), Nodes: &imagewolfv1.NodeSelection{Count: 2}}).Request.Id)
			time.Sleep(time.Millisecond)
		}
		time.Sleep(10 * time.Second)
		for _, n := range nodes {
			all, err := n.Node().ListPrefetches(t.Context(), &imagewolfv1.ListPrefetchesRequest{})
			if err != nil || len(all.Prefetches) != 5 {
				t.Fatalf("%s: %v, %v", n.name, all, err)
			}
			for i, st := range all.Prefetches {
				if want := statusOn(t, n, ids[4-i]); st.Request.Id != ids[4-i] || statesOf(st) != statesOf(want) || !strings.Contains(statesOf(st), ":done") {
					t.Errorf("%s, place %d: %s %s, want %s %s", n.name, i, st.Request.Id, statesOf(st), ids[4-i], statesOf(want))
				}
			}
		}
		two, err := nodes[3].Node().ListPrefetches(t.Context(), &imagewolfv1.ListPrefetchesRequest{Limit: 2})
		if err != nil || len(two.Prefetches) != 2 || two.Prefetches[1].Request.Id != ids[3] {
			t.Errorf("two: %v, %v", two, err)
		}
	})
}

func TestWhatIsRememberedIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newWorld(t).add("a", nil)
		n.do = pause(time.Hour)
		active := prefetchOn(t, n, &imagewolfv1.PrefetchRequest{Image: image}).Request.Id
		fill := func(state imagewolfv1.PrefetchState) {
			n.Fanout.mu.Lock()
			defer n.Fanout.mu.Unlock()
			for i := len(n.records); i < maxRequests; i++ {
				r := newRecord(&imagewolfv1.StartRequest{
					Request: &imagewolfv1.PrefetchRequest{Id: fmt.Sprint("r", i), Image: image}, Nodes: []string{"a"}, Coordinator: "a",
				}, time.Now(), "a")
				r.state.State, r.after, r.changed = state, time.Now().Add(time.Hour), time.Now().Add(time.Duration(i)*time.Millisecond)
				n.records[r.id()] = r
				n.places++
			}
		}
		fill(done)
		st := prefetchOn(t, n, &imagewolfv1.PrefetchRequest{Image: image})
		if len(n.records) != maxRequests || n.records["r1"] != nil || n.records["r2"] == nil || n.records[active] == nil || n.records[st.Request.Id] == nil {
			t.Errorf("%d are remembered, and not the right ones", len(n.records))
		}
		n.Fanout.mu.Lock()
		for id := range n.records {
			if id[0] == 'r' && n.records[id].state.State == done {
				delete(n.records, id)
			}
		}
		n.Fanout.mu.Unlock()
		fill(queued)
		_, err := n.Node().Prefetch(t.Context(), &imagewolfv1.PrefetchRequest{Image: image})
		if code(err) != codes.ResourceExhausted || !strings.Contains(err.Error(), "node a has 10000 requests that have not ended") {
			t.Errorf("when all are under way: %v", err)
		}
		n.Fanout.mu.Lock()
		clear(n.records)
		n.places = maxPlaces
		n.Fanout.mu.Unlock()
		_, err = n.Node().Prefetch(t.Context(), &imagewolfv1.PrefetchRequest{Image: image})
		if code(err) != codes.ResourceExhausted || !strings.Contains(err.Error(), "are of 1000000 nodes, and this one of 1, together more than 1000000") {
			t.Errorf("when they have too many nodes: %v", err)
		}
	})
}

// What a node no longer tries to tell others it has forgotten a day later, also if it
// is started anew in between.
func TestNobodyIsToldAfterTheTimeIsUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		a, b := w.add("a", nil), w.add("b", nil)
		b.set(func() { b.deaf = true })
		prefetchOn(t, a, &imagewolfv1.PrefetchRequest{Image: image, TimeoutSeconds: 30})
		time.Sleep(12 * time.Hour)
		a.stop()
		a.start()
		time.Sleep(12*time.Hour - time.Minute)
		if a.held() != 1 {
			t.Errorf("%d remembered within a day", a.held())
		}
		time.Sleep(3 * time.Minute)
		if a.held() != 0 {
			t.Errorf("%d remembered after a day", a.held())
		}
	})
}

func TestBrokenFileIsSetAside(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newWorld(t).add("a", nil)
		n.stop()
		if err := os.WriteFile(n.path, []byte(strings.Repeat("no database ", 2000)), 0o600); err != nil {
			t.Fatal(err)
		}
		n.start()
		prefetchOn(t, n, &imagewolfv1.PrefetchRequest{Image: image})
		if _, err := os.Stat(n.path + ".bad"); err != nil {
			t.Error(err)
		}
	})
}

func TestStartChecksWhatAMemberSays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newWorld(t).add("a", nil)
		good := func() *imagewolfv1.StartRequest {
			return &imagewolfv1.StartRequest{Request: &imagewolfv1.PrefetchRequest{Id: "x", Image: image}, Nodes: []string{"a", "b"}, Coordinator: "b"}
		}
		for name, change := range map[string]func(*imagewolfv1.StartRequest){
			"no request":     func(in *imagewolfv1.StartRequest) { in.Request = nil },
			"no id":          func(in *imagewolfv1.StartRequest) { in.Request.Id = "" },
			"bad image":      func(in *imagewolfv1.StartRequest) { in.Request.Image = "A" },
			"another's":      func(in *imagewolfv1.StartRequest) { in.Nodes = []string{"b"} },
			"out of order":   func(in *imagewolfv1.StartRequest) { in.Nodes = []string{"b", "a"} },
			"twice":          func(in *imagewolfv1.StartRequest) { in.Nodes = []string{"a", "a"} },
			"long name":      func(in *imagewolfv1.StartRequest) { in.Nodes[1] = strings.Repeat("b", 254) },
			"no coordinator": func(in *imagewolfv1.StartRequest) { in.Coordinator = "" },
			"from tomorrow":  func(in *imagewolfv1.StartRequest) { in.Age = -1 },
			"too many":       func(in *imagewolfv1.StartRequest) { in.Nodes = make([]string, maxNodes+1) },
		} {
			in := good()
			change(in)
			if _, err := n.Prefetcher().Start(t.Context(), in); code(err) != codes.InvalidArgument {
				t.Errorf("%s: %v", name, err)
			}
		}
		if _, err := n.Prefetcher().Start(t.Context(), nil); code(err) != codes.InvalidArgument {
			t.Errorf("nothing: %v", err)
		}
		if _, err := n.Prefetcher().Start(t.Context(), good()); err != nil {
			t.Error(err)
		}
	})
}

// One that was not told of a request hears that it is canceled from another node
// than the one that took it, which does not know yet.
func TestCancelOvertakesTheRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		pick := map[string]string{"pick": "me"}
		a, b, c := w.add("a", nil), w.add("b", pick), w.add("c", pick)
		c.set(func() { c.do = pause(time.Hour) })
		b.set(func() { b.deaf = true })
		id := prefetchOn(t, a, &imagewolfv1.PrefetchRequest{Image: image, Nodes: &imagewolfv1.NodeSelection{Labels: "pick"}}).Request.Id
		synctest.Wait() // a tells b once more, at once: that one is to be lost, too
		a.set(func() { a.deaf = true })
		b.set(func() { b.deaf = false })
		if _, err := c.Node().CancelPrefetch(t.Context(), &imagewolfv1.CancelPrefetchRequest{Id: id}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		if len(b.images()) != 0 {
			t.Errorf("b pulled %q", b.images())
		}
		a.set(func() { a.deaf = false })
		wants(t, c, id, "b:canceled c:canceled")
	})
}

// One that lies about states is not believed more than can be.
func TestLyingMemberIsPutRight(t *testing.T) {
	answer := &imagewolfv1.ReportResponse{
		Requests: []*imagewolfv1.StartRequest{nil, {Request: &imagewolfv1.PrefetchRequest{Id: "x"}}},
		States:   []*imagewolfv1.NodePrefetch{nil, {Node: "another", State: done, Bytes: -1, Reason: strings.Repeat("é", 10_000)}},
	}
	s := stateIn(answer, "b", "x")
	if s.Node != "b" || s.Bytes != 0 || len(s.Reason) > maxReason {
		t.Errorf("%v", s)
	}
	answer.States[1].Superseded = true
	if s := stateIn(answer, "b", "x"); s.Superseded {
		t.Errorf("done, and superseded: %v", s)
	}
	answer.States[1].State = 77
	if s := stateIn(answer, "b", "x"); s != nil {
		t.Errorf("%v", s)
	}
	answer.States = nil
	if s := stateIn(answer, "b", "x"); s != nil {
		t.Errorf("%v", s)
	}
}
