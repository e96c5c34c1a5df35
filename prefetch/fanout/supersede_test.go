package fanout

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"

	imagewolfv1 "github.com/imagewolf/imagewolf/api/v1"
)

var d1, d2 = "sha256:" + strings.Repeat("1", 64), "sha256:" + strings.Repeat("2", 64)

// tags are the image records of a node, by the request's namespace and image, and
// what pulls of a digest do before the record is moved, and after it.
type tags struct {
	*testNode
	at            map[string]string                          // guarded by mu
	before, after map[string]func(ctx context.Context) error // by digest
}

// tagged has a node's pulls take a second each and move records.
func tagged(n *testNode) *tags {
	tg := &tags{testNode: n, at: map[string]string{}, before: map[string]func(context.Context) error{}, after: map[string]func(context.Context) error{}}
	n.do = func(ctx context.Context, r *imagewolfv1.PrefetchRequest, _ func(bytes, total int64)) (string, error) {
		step := func(f func(context.Context) error) error {
			if f == nil {
				return nil
			}
			return f(ctx)
		}
		if err := step(tg.before[r.Digest]); err != nil {
			return "", err
		}
		if err := takes(time.Second)(ctx); err != nil {
			return "", err
		}
		n.set(func() { tg.at[n.Record(r)] = r.Digest })
		return r.Digest, step(tg.after[r.Digest])
	}
	return tg
}

func takes(d time.Duration) func(context.Context) error {
	return func(ctx context.Context) error {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(d):
			return nil
		}
	}
}

// once fails the first time.
func once() func(context.Context) error {
	left := 1
	return func(context.Context) error {
		if left--; left >= 0 {
			return errors.New("the registry is down")
		}
		return nil
	}
}

// request asks for the tag pinned to a digest.
func (tg *tags) request(t *testing.T, id, d string) {
	t.Helper()
	prefetchOn(t, tg.testNode, &imagewolfv1.PrefetchRequest{Id: id, Image: image, Digest: d})
	time.Sleep(time.Millisecond) // of two in the same one the ids decide
}

// wantsTag fails the test unless the tag's record points to a digest.
func (tg *tags) wantsTag(t *testing.T, d string) {
	t.Helper()
	tg.mu.Lock()
	defer tg.mu.Unlock()
	if got := tg.at[" "+image]; got != d {
		t.Errorf("the tag's record points to %.12s, want %.12s", got, d)
	}
}

// cancelOn cancels a request, and fails the test if that is refused.
func (tg *tags) cancelOn(t *testing.T, id string) {
	if _, err := tg.Node().CancelPrefetch(context.Background(), &imagewolfv1.CancelPrefetchRequest{Id: id}); err != nil {
		t.Error(err)
	}
}

// isSuperseded fails the test unless a has ended in favor of b.
func (tg *tags) isSuperseded(t *testing.T, a, b string) {
	t.Helper()
	st := wants(t, tg.testNode, a, "a:canceled")
	if r := st.Nodes[0].Reason; !st.Nodes[0].Superseded || !strings.HasPrefix(r, "superseded: request "+b+",") || st.Canceled || tg.count("superseded") != 1 || tg.count("canceled") != 0 {
		t.Errorf("reason %q, canceled %t, counted %d as superseded", r, st.Canceled, tg.count("superseded"))
	}
}

func TestRetryDoesNotMoveATagBack(t *testing.T) {
	for name, between := range map[string]func(*tags){
		"":                   func(*tags) {},
		"also over restarts": func(tg *tags) { tg.stop(); tg.start() },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				tg := tagged(newWorld(t).add("a", nil))
				tg.before[d1] = once()
				tg.request(t, "older", d1)
				synctest.Wait()
				wants(t, tg.testNode, "older", "a:queued")
				tg.request(t, "younger", d2)
				time.Sleep(1500 * time.Millisecond) // the retry is due after two seconds
				wants(t, tg.testNode, "younger", "a:done")
				between(tg)
				time.Sleep(time.Minute)
				tg.wantsTag(t, d2)
				tg.isSuperseded(t, "older", "younger")
				tg.stop()
				tg.start()
				wants(t, tg.testNode, "older", "a:canceled")
			})
		})
	}
}

// What a node is told late is no younger for that.
func TestOlderRequestThatComesLateIsSuperseded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tg := tagged(newWorld(t).add("a", nil))
		tg.request(t, "younger", d2)
		time.Sleep(time.Minute)
		_, err := tg.Prefetcher().Start(t.Context(), &imagewolfv1.StartRequest{
			Request: &imagewolfv1.PrefetchRequest{Id: "older", Image: image, Digest: d1}, Nodes: []string{"a"}, Coordinator: "b",
			Created: time.Now().Add(-2 * time.Minute).UnixMilli(), Age: (2 * time.Minute).Milliseconds(),
		})
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		tg.wantsTag(t, d2)
		tg.isSuperseded(t, "older", "younger")
	})
}

func TestPullsOfOneTagFollowEachOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tg := tagged(newWorld(t).add("a", nil))
		tg.before[d1] = takes(10 * time.Second)
		tg.request(t, "older", d1)
		tg.request(t, "younger", d2)
		time.Sleep(5 * time.Second)
		wants(t, tg.testNode, "older", "a:pulling")
		if st := wants(t, tg.testNode, "younger", "a:queued"); !strings.Contains(st.Nodes[0].Reason, "waits for request older") {
			t.Errorf("reason %q", st.Nodes[0].Reason)
		}
		time.Sleep(time.Minute)
		wants(t, tg.testNode, "older", "a:done")
		wants(t, tg.testNode, "younger", "a:done")
		tg.wantsTag(t, d2)
	})
}

// What the tag says is as new as the moment it is asked, which after a retry is late.
func TestTagThatWasAskedLateIsNotMovedBack(t *testing.T) {
	for name, between := range map[string]func(*tags){
		"":                   func(*tags) {},
		"also over restarts": func(tg *tags) { tg.stop(); tg.start() },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				tg := tagged(newWorld(t).add("a", nil))
				tg.before[""] = once()
				do := tg.do
				tg.do = func(ctx context.Context, r *imagewolfv1.PrefetchRequest, p func(bytes, total int64)) (string, error) {
					d, err := do(ctx, r, p)
					if r.Digest == "" && err == nil {
						d = d2
						tg.set(func() { tg.at[" "+image] = d2 })
					}
					return d, err
				}
				tg.request(t, "tag", "") // fails, and asks again after two seconds
				time.Sleep(time.Minute)
				wants(t, tg.testNode, "tag", "a:done")
				between(tg)
				told := func(id string, age time.Duration) {
					t.Helper()
					if _, err := tg.Prefetcher().Start(t.Context(), &imagewolfv1.StartRequest{
						Request: &imagewolfv1.PrefetchRequest{Id: id, Image: image, Digest: d1}, Nodes: []string{"a"}, Coordinator: "b",
						Created: time.Now().Add(-age).UnixMilli(), Age: age.Milliseconds(),
					}); err != nil {
						t.Fatal(err)
					}
					time.Sleep(10 * time.Second)
				}
				told("before", 59*time.Second) // of between the first try and the second
				tg.wantsTag(t, d2)
				tg.isSuperseded(t, "before", "tag")
				told("after", 60*time.Second)
				tg.wantsTag(t, d1)
				wants(t, tg.testNode, "after", "a:done")
			})
		})
	}
}

// Of three the youngest wants what the oldest wants, and so ends only the one between.
func TestNoneWaitsForOneThatIsSuperseded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tg := tagged(newWorld(t).add("a", nil))
		failsOnce := once()
		tg.before[d1] = func(ctx context.Context) error { return errors.Join(failsOnce(ctx), takes(10*time.Second)(ctx)) }
		tg.before[d2] = once()
		tg.request(t, "oldest", d1)
		time.Sleep(10500 * time.Millisecond) // it has failed, and so does the next
		tg.request(t, "middle", d2)
		synctest.Wait()
		tg.request(t, "youngest", d1)
		time.Sleep(time.Minute)
		tg.isSuperseded(t, "middle", "youngest")
		wants(t, tg.testNode, "youngest", "a:done")
		wants(t, tg.testNode, "oldest", "a:done")
		tg.wantsTag(t, d1)
	})
}

// The older one waits for what becomes of the younger one.
func TestOnlyAYoungerOneThatMovedTheTagSupersedes(t *testing.T) {
	for name, c := range map[string]struct {
		younger func(*testing.T, *tags)
		older   string // its state then
	}{
		"that failed": {func(_ *testing.T, tg *tags) {
			tg.before[d2] = func(context.Context) error { return errors.New("no such image") }
		}, "a:done"},
		"that was canceled": {func(t *testing.T, tg *tags) {
			tg.before[d2] = takes(time.Hour)
			time.AfterFunc(5*time.Second, func() { tg.cancelOn(t, "younger") })
		}, "a:done"},
		"that failed after it moved the tag": {func(_ *testing.T, tg *tags) {
			tg.after[d2] = func(context.Context) error { return errors.New("no referrers") }
		}, "a:canceled"},
		"that was canceled after it moved the tag": {func(t *testing.T, tg *tags) {
			tg.after[d2] = takes(time.Hour)
			time.AfterFunc(5*time.Second, func() { tg.cancelOn(t, "younger") })
		}, "a:canceled"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				tg := tagged(newWorld(t).add("a", nil))
				tg.before[d1] = once()
				c.younger(t, tg)
				tg.request(t, "older", d1)
				synctest.Wait()
				tg.request(t, "younger", d2)
				time.Sleep(500 * time.Millisecond)
				if st := wants(t, tg.testNode, "older", "a:queued"); !strings.Contains(st.Nodes[0].Reason, "waits for request younger") {
					t.Errorf("reason %q", st.Nodes[0].Reason)
				}
				time.Sleep(2 * time.Minute)
				wants(t, tg.testNode, "older", c.older)
				if c.older == "a:done" {
					tg.wantsTag(t, d1)
				} else {
					tg.wantsTag(t, d2)
				}
				tg.stop()
				tg.start()
				time.Sleep(time.Minute)
				wants(t, tg.testNode, "older", c.older)
			})
		})
	}
}

func TestRequestsThatDoNotMoveATagBackAreNotSuperseded(t *testing.T) {
	for name, older := range map[string]*imagewolfv1.PrefetchRequest{
		"of the same digest":    {Image: image, Digest: d2},
		"of what the tag says":  {Image: image},
		"of another tag":        {Image: image + "0", Digest: d1},
		"of another namespace":  {Image: image, Digest: d1, Namespace: "other"},
		"of a digest by itself": {Image: strings.TrimSuffix(image, ":1") + "@" + d1},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				tg := tagged(newWorld(t).add("a", nil))
				tg.before[older.Digest] = once()
				older.Id = "older"
				prefetchOn(t, tg.testNode, older)
				synctest.Wait()
				tg.request(t, "younger", d2)
				time.Sleep(time.Minute)
				wants(t, tg.testNode, "older", "a:done")
				wants(t, tg.testNode, "younger", "a:done")
			})
		})
	}
}

// A node that is not selected by the younger request has nothing of it.
func TestOtherNodesRequestSupersedesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		tg := tagged(w.add("a", map[string]string{"zone": "a"}))
		tagged(w.add("b", map[string]string{"zone": "b"}))
		tg.before[d1] = once()
		for _, r := range []*imagewolfv1.PrefetchRequest{{Id: "a", Digest: d1}, {Id: "b", Digest: d2}} {
			r.Image, r.Nodes = image, &imagewolfv1.NodeSelection{Labels: "zone=" + r.Id}
			prefetchOn(t, tg.testNode, r)
		}
		time.Sleep(time.Minute)
		wants(t, tg.testNode, "a", "a:done")
		wants(t, tg.testNode, "b", "b:done")
		tg.wantsTag(t, d1)
	})
}

// What a node before this one answers comes a second late, and finds the request ended.
func TestReasonOfTheEndStays(t *testing.T) {
	for at := time.Duration(0); at < 9*time.Second; at += 300 * time.Millisecond {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			a, tg := w.add("a", map[string]string{"zone": "a"}), tagged(w.add("b", map[string]string{"zone": "b"}))
			a.set(func() { a.deaf = true })
			tg.before[d1] = takes(time.Hour)
			prefetchOn(t, tg.testNode, &imagewolfv1.PrefetchRequest{Id: "older", Image: image, Digest: d1, Concurrency: 1})
			time.Sleep(at)
			prefetchOn(t, tg.testNode, &imagewolfv1.PrefetchRequest{Id: "younger", Image: image, Digest: d2, Nodes: &imagewolfv1.NodeSelection{Labels: "zone=b"}})
			time.Sleep(10 * time.Second)
			a.set(func() { a.deaf = false })
			st := statusOn(t, tg.testNode, "older").Nodes[1]
			if st.State == canceled && !st.Superseded {
				t.Errorf("the younger one came %s later: reason %q", at, st.Reason)
			}
			if tg.stop(); at == 0 && st.State != canceled {
				t.Errorf("state %s", st.State)
			}
		})
	}
}

// Whatever a request waited for at last, the registry's word is what helps.
func TestOutOfTimeSaysWhatFailed(t *testing.T) {
	for name, c := range map[string]struct {
		cancel bool // the younger one, so that the older one is pulled again
		want   []string
	}{
		"in a pull":      {true, []string{"try 1 failed: the registry is down"}},
		"behind another": {false, []string{"waits for request younger", "try 1 failed: the registry is down"}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				tg := tagged(newWorld(t).add("a", nil))
				failsOnce := once()
				tg.before[d1] = func(ctx context.Context) error {
					if err := failsOnce(ctx); err != nil {
						return err
					}
					return takes(time.Hour)(ctx)
				}
				tg.before[d2] = takes(time.Hour)
				prefetchOn(t, tg.testNode, &imagewolfv1.PrefetchRequest{Id: "older", Image: image, Digest: d1, TimeoutSeconds: 20})
				synctest.Wait()
				tg.request(t, "younger", d2)
				time.Sleep(5 * time.Second)
				if c.cancel {
					if _, err := tg.Node().CancelPrefetch(t.Context(), &imagewolfv1.CancelPrefetchRequest{Id: "younger"}); err != nil {
						t.Fatal(err)
					}
				}
				time.Sleep(time.Minute)
				st := wants(t, tg.testNode, "older", "a:failed").Nodes[0]
				for _, want := range append(c.want, "not done within") {
					if !strings.Contains(st.Reason, want) || !st.TimedOut {
						t.Errorf("reason %q, want %q", st.Reason, want)
					}
				}
			})
		})
	}
}

func TestPanicOverARecordsNameStopsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newWorld(t).add("a", nil)
		prefetchOn(t, n, &imagewolfv1.PrefetchRequest{Id: "before", Image: image})
		n.stop()
		n.broken.Store(true)
		n.start() // it goes on with what it knows
		if _, err := n.Node().Prefetch(t.Context(), &imagewolfv1.PrefetchRequest{Id: "now", Image: image}); code(err) != codes.Internal {
			t.Errorf("%v, want Internal", err)
		}
		n.broken.Store(false)
		prefetchOn(t, n, &imagewolfv1.PrefetchRequest{Id: "then", Image: image})
		time.Sleep(time.Minute)
		wants(t, n, "before", "a:done")
		wants(t, n, "then", "a:done")
	})
}

// Clocks of the nodes that take requests may be wrong: a node believes them as far
// as its own lets it, and all nodes do alike where they are right.
func TestYoungerIsByTheStampWithinReason(t *testing.T) {
	now := time.Now()
	at := func(id string, born, stamp time.Duration) *record {
		return newRecord(&imagewolfv1.StartRequest{
			Request: &imagewolfv1.PrefetchRequest{Id: id, Image: image}, Created: now.Add(stamp).UnixMilli(), Nodes: []string{"a"},
		}, now.Add(born), "a")
	}
	for name, pair := range map[string][2]*record{ // older, younger
		"told late":            {at("x", time.Second, 0), at("y", 900*time.Millisecond, time.Millisecond)},
		"clock an hour ahead":  {at("x", 0, time.Hour), at("y", 5*time.Second, 5*time.Second)},
		"clock an hour behind": {at("x", 0, 0), at("y", 5*time.Second, -time.Hour)},
		"no clock at all":      {at("x", 0, 1<<62), at("y", 5*time.Second, -1<<62)},
		"at the same time":     {at("x", 0, 0), at("y", 0, 0)},
	} {
		t.Run(name, func(t *testing.T) {
			if younger(pair[0], pair[1]) || !younger(pair[1], pair[0]) {
				t.Errorf("made at %d and %d", pair[0].made, pair[1].made)
			}
		})
	}
}
