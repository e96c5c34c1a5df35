package queue

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.etcd.io/bbolt"

	"github.com/imagewolf/imagewolf/config"
	"github.com/imagewolf/imagewolf/notifier/event"
)

func openHistory(t *testing.T, c config.NotifierQueue, n int) *Queue {
	t.Helper()
	q, err := Open(c, Options{History: n, Record: func(e event.Event) bool { return e.Source != "poll.x" }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { q.Close() })
	return q
}

// names returns the page's events as "sequence repository".
func names(p Page) []string {
	out := []string{}
	for _, r := range p.Events {
		out = append(out, fmt.Sprint(r.Sequence, " ", r.Event.Repository))
	}
	return out
}

func pageOf(t *testing.T, p Page, err error) Page {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestHistoryHasWhatWasTakenLast(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := settings(t)
		q := openHistory(t, c, 3)
		p, err := q.Newest(10)
		first := pageOf(t, p, err)
		if first.ID == "" || first.First != 1 || first.Last != 0 || !first.Changed.Equal(time.Now()) || len(first.Events) != 0 {
			t.Errorf("empty: %+v", first)
		}
		time.Sleep(time.Hour)
		polled := push("polled")
		polled.Source = "poll.x"
		put(t, q, push("a"), push("b"), push("a"), polled)
		put(t, q, push("b"))
		drain(t, q) // what is done stays in the history
		p, err = q.Newest(10)
		if got := pageOf(t, p, err); !slices.Equal(names(got), []string{"1 a", "2 b"}) || got.ID != first.ID || !got.Changed.Equal(got.Events[1].Taken) {
			t.Errorf("%+v", got)
		}
		q.Close()
		q = openHistory(t, c, 3)
		put(t, q, push("c"), push("d"), push("e"))
		for _, k := range []struct {
			ask  func() (Page, error)
			want []string
		}{
			{func() (Page, error) { return q.Newest(10) }, []string{"3 c", "4 d", "5 e"}},
			{func() (Page, error) { return q.Newest(1) }, []string{"5 e"}},
			{func() (Page, error) { return q.Newest(0) }, []string{}},
			{func() (Page, error) { return q.After(0, 2) }, []string{"3 c", "4 d"}},
			{func() (Page, error) { return q.After(3, 2) }, []string{"4 d", "5 e"}},
			{func() (Page, error) { return q.After(5, 2) }, []string{}},
			{func() (Page, error) { return q.After(1<<64-1, 2) }, []string{}},
		} {
			p, err := k.ask()
			if got := pageOf(t, p, err); !slices.Equal(names(got), k.want) || got.First != 3 || got.Last != 5 || got.ID != first.ID {
				t.Errorf("%+v, should have %q", got, k.want)
			}
		}
		// A smaller bound holds from the next event on.
		q.Close()
		q = openHistory(t, c, 2)
		put(t, q, push("f"))
		p, err = q.Newest(10)
		if got := pageOf(t, p, err); !slices.Equal(names(got), []string{"5 e", "6 f"}) || got.First != 5 {
			t.Errorf("%+v", got)
		}
		err = q.db.View(func(tx *bbolt.Tx) error {
			if n := count(tx, historyBucket); n != 2 {
				t.Errorf("%d are counted", n)
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	})
}

// What was taken while there was no history would be a gap that nobody sees.
func TestAHistoryThatWasOffBeginsAnew(t *testing.T) {
	c := settings(t)
	q := openHistory(t, c, 5)
	put(t, q, push("a"))
	p, err := q.Newest(1)
	before := pageOf(t, p, err)
	q.Close()
	q = openHistory(t, c, 0)
	put(t, q, push("b"))
	if _, err := q.Newest(1); err == nil || !strings.Contains(err.Error(), "no history") {
		t.Errorf("got %v", err)
	}
	q.Close()
	q = openHistory(t, c, 5)
	put(t, q, push("c"))
	p, err = q.Newest(5)
	if got := pageOf(t, p, err); got.ID == before.ID || !slices.Equal(names(got), []string{"1 c"}) {
		t.Errorf("%+v", got)
	}
}

func TestPositionsSurviveARestart(t *testing.T) {
	c := settings(t)
	q := open(t, c)
	if p, err := q.Position("a"); err != nil || p != nil {
		t.Errorf("%q, %v", p, err)
	}
	for _, s := range []string{"one", "two"} {
		if err := q.SetPosition("a", []byte(s)); err != nil {
			t.Fatal(err)
		}
	}
	q.Close()
	q = open(t, c)
	if p, err := q.Position("a"); err != nil || string(p) != "two" {
		t.Errorf("%q, %v", p, err)
	}
	if p, err := q.Position("b"); err != nil || p != nil {
		t.Errorf("%q, %v", p, err)
	}
}

// As many events are worked on at the same time as is said, and not one more;
// one that takes long does not keep the others from being done.
func TestEventsAreWorkedOnAtTheSameTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := settings(t)
		c.Workers = 3
		q := open(t, c)
		for i := range 10 {
			put(t, q, push(fmt.Sprint("n", i)))
		}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		release := make(chan struct{})
		go func() {
			ended <- q.Run(ctx, func(ctx context.Context, e event.Event) error {
				switch e.Repository {
				case "n0":
					<-release
				case "n1", "n2":
					<-ctx.Done()
					return ctx.Err()
				}
				return errors.New("this one fails")
			})
		}()
		synctest.Wait()
		if n := q.Stats().Waiting; n != 7 {
			t.Errorf("%d wait, and 3 are worked on", n)
		}
		time.Sleep(time.Minute)
		close(release)
		time.Sleep(flushAfter + time.Second)
		if s := q.Stats(); s.Waiting != 8 {
			t.Errorf("%+v: all but two have failed, and wait again", s)
		}
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if s := q.Stats(); s.Waiting != 10 || s.Done != 0 {
			t.Errorf("%+v", s)
		}
	})
}

// What is done is on disk soon, though other work goes on.
func TestWhatIsDoneIsFlushedWhileOtherWorkGoesOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := settings(t)
		c.Workers = 2
		q := open(t, c)
		put(t, q, push("slow"), push("quick"))
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() {
			ended <- q.Run(ctx, func(ctx context.Context, e event.Event) error {
				if e.Repository == "slow" {
					<-ctx.Done()
				}
				return ctx.Err()
			})
		}()
		time.Sleep(flushAfter + time.Second)
		err := q.db.View(func(tx *bbolt.Tx) error {
			if n := count(tx, eventsBucket); n != 1 {
				t.Errorf("%d events are on disk, should be 1", n)
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}
