package queue

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
	"go.uber.org/goleak"

	"github.com/imagewolf/imagewolf/config"
	"github.com/imagewolf/imagewolf/notifier/event"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func settings(t *testing.T) config.NotifierQueue {
	t.Helper()
	c := config.DefaultNotifier().Queue
	c.File, c.Workers = filepath.Join(t.TempDir(), "queue.db"), 1
	return c
}

func open(t *testing.T, c config.NotifierQueue) *Queue {
	t.Helper()
	q, _ := openLogged(t, c)
	return q
}

// check holds the file against what it says of itself.
func (q *Queue) check(t *testing.T) {
	t.Helper()
	err := q.db.View(func(tx *bbolt.Tx) error {
		for _, name := range [][]byte{eventsBucket, seenAtBucket} {
			if n, said := tx.Bucket(name).Stats().KeyN, count(tx, name); n != said {
				t.Errorf("%s has %d keys, and says %d", name, n, said)
			}
		}
		return nil
	})
	if err != nil && !errors.Is(err, bolterrors.ErrDatabaseNotOpen) {
		t.Error(err)
	}
}

// openLogged is open, with what the queue logs.
func openLogged(t *testing.T, c config.NotifierQueue) (*Queue, *bytes.Buffer) {
	t.Helper()
	var log bytes.Buffer
	q, err := Open(c, Options{Log: slog.New(slog.NewTextHandler(&log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		q.check(t)
		if err := q.Close(); err != nil {
			t.Error(err)
		}
	})
	return q, &log
}

func push(name string) event.Event {
	return event.Event{Kind: event.Pushed, Registry: "r.example", Repository: name, Tag: "1", Digest: digest.FromString(name), DeliveryID: "id-" + name, Source: "it"}
}

func put(t *testing.T, q *Queue, events ...event.Event) {
	t.Helper()
	if err := q.Put(t.Context(), event.Result{Events: events}); err != nil {
		t.Fatal(err)
	}
}

// drain runs the queue until nothing waits, and returns what was handed out.
func drain(t *testing.T, q *Queue) []string {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var out []string
	n := q.Stats().Waiting
	if n == 0 {
		return nil
	}
	err := q.Run(ctx, func(_ context.Context, e event.Event) error {
		if out = append(out, e.Repository); len(out) == n {
			cancel()
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestEventsComeOutInOrderAndOnce(t *testing.T) {
	c := settings(t)
	q := open(t, c)
	put(t, q, push("a"), push("b"))
	put(t, q, push("c"))
	if got := drain(t, q); !slices.Equal(got, []string{"a", "b", "c"}) {
		t.Errorf("got %q", got)
	}
	if s := q.Stats(); s.Waiting != 0 || s.Taken != 3 || s.Done != 3 || len(s.Nothing) != 0 {
		t.Errorf("%+v", s)
	}
	q.Close()
	if s := open(t, c).Stats(); s.Waiting != 0 {
		t.Errorf("after a restart: %+v", s)
	}
}

func TestWhatWaitsSurvivesARestart(t *testing.T) {
	c := settings(t)
	q := open(t, c)
	want := push("a")
	want.MediaType, want.Time = "application/vnd.oci.image.index.v1+json", time.Date(2026, 8, 20, 9, 14, 26, 5, time.UTC)
	put(t, q, want, push("b"), push("c"))

	// The process is gone: nothing was closed, and what Put said is there.
	killed := c
	killed.File += ".killed"
	b, err := os.ReadFile(c.File)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(killed.File, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if got := drain(t, open(t, killed)); !slices.Equal(got, []string{"a", "b", "c"}) {
		t.Errorf("after a crash: %q", got)
	}

	q.Close()
	q = open(t, c)
	ctx, cancel := context.WithCancel(t.Context())
	err = q.Run(ctx, func(_ context.Context, e event.Event) error {
		cancel()
		if e != want {
			t.Errorf("got  %+v\nwant %+v", e, want)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	q.Close()
	if got := drain(t, open(t, c)); !slices.Equal(got, []string{"b", "c"}) {
		t.Errorf("the rest: %q", got)
	}
}

func TestAnEventWhoseWorkIsCutShortComesAgain(t *testing.T) {
	c := settings(t)
	q := open(t, c)
	put(t, q, push("a"), push("b"))
	for range 2 {
		ctx, cancel := context.WithCancel(t.Context())
		err := q.Run(ctx, func(ctx context.Context, e event.Event) error {
			if e.Repository != "a" {
				t.Errorf("handed out %s", e.Repository)
			}
			cancel()
			return ctx.Err()
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if s := q.Stats(); s.Waiting != 2 || s.Done != 0 {
		t.Errorf("%+v", s)
	}
	if got := drain(t, q); !slices.Equal(got, []string{"a", "b"}) {
		t.Errorf("got %q", got)
	}
}

func TestFailedWorkIsTriedAgainLaterAndGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := settings(t)
		c.RetryFor = config.Duration(20 * time.Minute)
		q, log := openLogged(t, c)
		put(t, q, push("bad"), push("good"))
		start := time.Now()
		var tries []time.Duration
		var good []time.Duration
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() {
			ended <- q.Run(ctx, func(_ context.Context, e event.Event) error {
				if e.Repository == "good" {
					good = append(good, time.Since(start).Round(time.Second))
					return nil
				}
				tries = append(tries, time.Since(start).Round(time.Second))
				return errors.New("no node answers")
			})
		}()
		time.Sleep(5 * time.Minute)
		put(t, q, push("bad"), func() event.Event { e := push("good"); e.Tag = "2"; e.DeliveryID = "other"; return e }())
		time.Sleep(2 * time.Hour)
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		s := time.Second
		want := []time.Duration{0, 1 * s, 3 * s, 7 * s, 15 * s, 31 * s, 63 * s, 127 * s, 255 * s, 511 * s, 811 * s, 1111 * s, 1411 * s}
		if !slices.Equal(tries, want) {
			t.Errorf("tried at %v, should be %v", tries, want)
		}
		if !slices.Equal(good, []time.Duration{0, 5 * time.Minute}) {
			t.Errorf("the others waited: %v", good)
		}
		if st := q.Stats(); st.Waiting != 0 || st.Done != 2 || st.Nothing[GaveUp] != 1 || st.Nothing[Duplicate] != 1 {
			t.Errorf("%+v", st)
		}
		if !strings.Contains(log.String(), "an event is given up") || !strings.Contains(log.String(), "r.example/bad:1@") {
			t.Errorf("log: %s", log)
		}
	})
}

// What images and their signatures hold is foreign: an event over which the work
// panics must not end the process, which would begin with it anew.
func TestWorkThatPanicsIsTriedAgainAndGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := settings(t)
		c.RetryFor = config.Duration(2 * time.Second)
		q, log := openLogged(t, c)
		put(t, q, push("bad"), push("good"))
		tries := 0
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() {
			ended <- q.Run(ctx, func(_ context.Context, e event.Event) error {
				if e.Repository == "good" {
					return nil
				}
				tries++
				panic("a signature of no length")
			})
		}()
		time.Sleep(time.Minute)
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if st := q.Stats(); tries != 3 || st.Waiting != 0 || st.Done != 1 || st.Nothing[GaveUp] != 1 || st.Panics != 3 {
			t.Errorf("%d tries, %+v", tries, st)
		}
		for _, want := range []string{"level=ERROR", "a signature of no length", "queue_test.go", "r.example/bad:1@", "an event is given up"} {
			if !strings.Contains(log.String(), want) {
				t.Errorf("no %q in the log: %s", want, log)
			}
		}
	})
}

func TestWhatWasGivenUpIsTakenWhenItComesAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := settings(t)
		c.DedupeWindow, c.RetryFor = config.Duration(24*time.Hour), config.Duration(time.Minute)
		q := open(t, c)
		put(t, q, push("a"))
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() {
			ended <- q.Run(ctx, func(context.Context, event.Event) error { return errors.New("no") })
		}()
		time.Sleep(time.Hour)
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		put(t, q, push("a"))
		if s := q.Stats(); s.Waiting != 1 || s.Nothing[Duplicate] != 0 || s.Nothing[GaveUp] != 1 {
			t.Errorf("%+v", s)
		}
	})
}

func TestWhichEventsAreTheSame(t *testing.T) {
	change := func(f func(*event.Event)) event.Event {
		e := push("a")
		f(&e)
		return e
	}
	noDigest := change(func(e *event.Event) { e.Digest = "" })
	for _, c := range []struct {
		name          string
		first, second event.Event
		after         time.Duration
		same          bool
	}{
		{"sent twice", push("a"), push("a"), 0, true},
		{"sent twice, just within the window", push("a"), push("a"), 10*time.Minute - time.Second, true},
		{"sent twice, after the window", push("a"), push("a"), 10 * time.Minute, false},
		{"of another delivery", push("a"), change(func(e *event.Event) { e.DeliveryID = "2" }), 0, true},
		{"of another receiver", push("a"), change(func(e *event.Event) { e.Source = "other" }), 0, true},
		{"another tag", push("a"), change(func(e *event.Event) { e.Tag = "2"; e.DeliveryID = "2" }), 0, false},
		{"another tag in the same delivery", push("a"), change(func(e *event.Event) { e.Tag = "2" }), 0, false},
		{"the digest alone, after a tag", push("a"), change(func(e *event.Event) { e.Tag = ""; e.DeliveryID = "2" }), 0, true},
		{"a tag, after the digest alone", change(func(e *event.Event) { e.Tag = ""; e.DeliveryID = "2" }), push("a"), 0, false},
		{"another digest", push("a"), change(func(e *event.Event) { e.Digest = digest.FromString("b"); e.DeliveryID = "2" }), 0, false},
		{"another repository", push("a"), change(func(e *event.Event) { e.Repository = "b" }), 0, false},
		{"another registry", push("a"), change(func(e *event.Event) { e.Registry = "s.example" }), 0, false},
		{"no digest, sent twice", noDigest, noDigest, 0, true},
		{"no digest, pushed again", noDigest, change(func(e *event.Event) { e.Digest = ""; e.DeliveryID = "2" }), 0, false},
		{"no digest, of another receiver", noDigest, change(func(e *event.Event) { e.Digest = ""; e.Source = "other" }), 0, false},
		{"nothing to know it by", change(func(e *event.Event) { e.Digest, e.DeliveryID = "", "" }), change(func(e *event.Event) { e.Digest, e.DeliveryID = "", "" }), 0, false},
	} {
		for _, restart := range []string{"", ", and a restart"} {
			for _, worked := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s%s, worked off %v", c.name, restart, worked), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						s := settings(t)
						q := open(t, s)
						put(t, q, c.first)
						if worked {
							drain(t, q)
						}
						if restart != "" {
							q.Close()
							q = open(t, s)
						}
						before := q.Stats().Waiting
						time.Sleep(c.after)
						put(t, q, c.second)
						if st := q.Stats(); (st.Waiting == before) != c.same || (st.Nothing[Duplicate] == 1) != c.same {
							t.Errorf("%+v", st)
						}
					})
				})
			}
		}
		t.Run(c.name+", in one body", func(t *testing.T) {
			if c.after > 0 {
				return
			}
			q := open(t, settings(t))
			put(t, q, c.first, c.second)
			if st := q.Stats(); (st.Waiting == 1) != c.same {
				t.Errorf("%+v", st)
			}
		})
	}
}

// A tag that is moved back is no duplicate: nodes have it where it was in between.
func TestATagThatIsMovedBackIsTaken(t *testing.T) {
	pushed := func(id, of string) event.Event {
		e := push("a")
		e.DeliveryID, e.Digest = id, digest.FromString(of)
		return e
	}
	all := []event.Event{pushed("1", "old"), pushed("2", "new"), pushed("3", "old"), pushed("4", "old"), pushed("2", "new")}
	for name, bodies := range map[string][][]event.Event{
		"each alone": {all[:1], all[1:2], all[2:3], all[3:4], all[4:]}, "in one body": {all}, "in two": {all[:2], all[2:]},
	} {
		q := open(t, settings(t))
		for _, b := range bodies {
			put(t, q, b...)
		}
		if st := q.Stats(); st.Waiting != 3 || st.Nothing[Duplicate] != 2 {
			t.Errorf("%s: %+v", name, st)
		}
	}
}

// What led to nothing may lead to something when the push is told anew, such as once
// it is signed. The delivery itself is known, and a newer push of the tag.
func TestAPushThatLedToNothingIsTakenAnew(t *testing.T) {
	tell := func(delivery, tag, of string) event.Event {
		e := push("a")
		e.DeliveryID, e.Tag, e.Digest = delivery, tag, digest.FromString(of)
		return e
	}
	first := tell("1", "1", "image")
	for name, c := range map[string]struct {
		between *event.Event // taken while the first is worked on, and led to something
		again   event.Event
		taken   bool
	}{
		"told anew":                      {nil, tell("2", "1", "image"), true},
		"told anew, the digest alone":    {nil, tell("2", "", "image"), true},
		"the same delivery":              {nil, first, false},
		"behind a newer push of the tag": {new(tell("2", "1", "newer")), tell("3", "1", "newer"), false},
	} {
		for _, restart := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, restart %v", name, restart), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					s := settings(t)
					q := open(t, s)
					put(t, q, first)
					ctx, cancel := context.WithCancel(t.Context())
					ended := make(chan error, 1)
					go func() {
						ended <- q.Run(ctx, func(_ context.Context, e event.Event) error {
							if e.DeliveryID != "1" {
								return nil
							}
							if c.between != nil {
								time.Sleep(time.Second)
								put(t, q, *c.between)
							}
							return event.ErrNothing
						})
					}()
					time.Sleep(time.Minute)
					cancel()
					if err := <-ended; err != nil {
						t.Error(err)
					}
					if st := q.Stats(); st.Waiting != 0 || st.Done != st.Taken {
						t.Errorf("it was not worked off once: %+v", st)
					}
					if restart {
						q.Close()
						q = open(t, s)
					}
					put(t, q, c.again)
					if st := q.Stats(); (st.Waiting == 1) != c.taken || (st.Nothing[Duplicate] == 0) != c.taken {
						t.Errorf("%+v", st)
					}
				})
			})
		}
	}
}

func TestTheLogHasDuplicates(t *testing.T) {
	var log bytes.Buffer
	q, err := Open(settings(t), Options{Log: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))})
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	put(t, q, push("a"), push("b"))
	put(t, q, push("b"))
	if s := log.String(); strings.Count(s, "\n") != 1 || !strings.Contains(s, "kind=duplicate image=r.example/b:1") {
		t.Errorf("%s", s)
	}
}

func TestAFullQueueRefusesAllOfADelivery(t *testing.T) {
	c := settings(t)
	c.MaxEvents = 3
	q := open(t, c)
	put(t, q, push("a"), push("b"))
	ignored := event.Ignored{Kind: event.Deleted, Reason: "a delete", More: 2}
	err := q.Put(t.Context(), event.Result{Events: []event.Event{push("c"), push("d")}, Ignored: []event.Ignored{ignored}})
	if !errors.Is(err, ErrFull) {
		t.Errorf("two too many: %v", err)
	}
	put(t, q, push("c"), push("a"))
	if err := q.Put(t.Context(), event.Result{Events: []event.Event{push("d")}}); !errors.Is(err, ErrFull) {
		t.Errorf("one too many: %v", err)
	}
	put(t, q, push("a")) // is known, and needs no room
	if err := q.Put(t.Context(), event.Result{Ignored: []event.Ignored{ignored}}); err != nil {
		t.Errorf("nothing to keep: %v", err)
	}
	if s := q.Stats(); s.Waiting != 3 || s.Taken != 3 || s.Nothing[Full] != 3 || s.Nothing[event.Deleted] != 3 || s.Nothing[Duplicate] != 2 {
		t.Errorf("%+v", s)
	}
	if got := drain(t, q); !slices.Equal(got, []string{"a", "b", "c"}) {
		t.Errorf("got %q", got)
	}
	put(t, q, push("d"))
}

// Puts share a transaction: one that is refused must not undo the others.
func TestManySendersAtOnceAndAQueueThatIsFull(t *testing.T) {
	c := settings(t)
	c.MaxEvents = 100
	q := open(t, c)
	var wg sync.WaitGroup
	var mu sync.Mutex
	taken := map[string]bool{}
	for i := range 300 {
		wg.Go(func() {
			e := push(fmt.Sprintf("repo-%03d", i))
			switch err := q.Put(t.Context(), event.Result{Events: []event.Event{e}}); {
			case err == nil:
				mu.Lock()
				taken[e.Repository] = true
				mu.Unlock()
			case !errors.Is(err, ErrFull):
				t.Error(err)
			}
		})
	}
	wg.Wait()
	got := drain(t, q)
	for _, name := range got {
		if !taken[name] {
			t.Errorf("%s was refused and kept, or came twice", name)
		}
		delete(taken, name)
	}
	if len(got) != 100 || len(taken) != 0 {
		t.Errorf("%d came out, %d are lost", len(got), len(taken))
	}
}

func TestNoWindowKnowsNothing(t *testing.T) {
	c := settings(t)
	c.DedupeWindow = 0
	q := open(t, c)
	put(t, q, push("a"))
	put(t, q, push("a"))
	if s := q.Stats(); s.Waiting != 2 {
		t.Errorf("%+v", s)
	}
}

func TestAnEventThatCannotBeReadIsPassedOver(t *testing.T) {
	q := open(t, settings(t))
	put(t, q, push("a"), push("b"))
	if err := q.db.Update(func(tx *bbolt.Tx) error { return tx.Bucket(eventsBucket).Put(bytesOf(1), []byte("junk")) }); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var got []string
	if err := q.Run(ctx, func(_ context.Context, e event.Event) error {
		got = append(got, e.Repository)
		cancel()
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if s := q.Stats(); !slices.Equal(got, []string{"b"}) || s.Nothing[event.Unreadable] != 1 || s.Waiting != 0 {
		t.Errorf("%q, %+v", got, s)
	}
}

func TestAFileThatCannotBeUsed(t *testing.T) {
	c := settings(t)
	q := open(t, c)
	if _, err := Open(c, Options{}); err == nil || !strings.Contains(err.Error(), "in use by another process") {
		t.Errorf("a second one: %v", err)
	}
	put(t, q, push("a"))
	if err := q.Close(); err != nil {
		t.Fatal(err)
	}
	if err := q.Put(t.Context(), event.Result{Events: []event.Event{push("b")}}); err == nil || !strings.HasPrefix(err.Error(), "queue.file: ") {
		t.Errorf("Put after Close: %v", err)
	}
	if err := os.WriteFile(c.File, bytes.Repeat([]byte("no database "), 1000), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{c.File, filepath.Join(c.File, "below"), t.TempDir()} {
		if q, err := Open(config.NotifierQueue{File: file}, Options{}); err == nil || !strings.HasPrefix(err.Error(), "queue.file: ") {
			q.Close()
			t.Errorf("%s: %v", file, err)
		}
	}
}

func TestRunEndsWhenTheFileCannotBeWritten(t *testing.T) {
	q := open(t, settings(t))
	put(t, q, push("a"))
	err := q.Run(t.Context(), func(context.Context, event.Event) error { return q.db.Close() })
	if err == nil || !strings.HasPrefix(err.Error(), "queue.file: ") {
		t.Errorf("got %v", err)
	}
}

// Whatever is put while Run runs comes out once, in the order of each sender.
func TestPutWhileRunning(t *testing.T) {
	q := open(t, settings(t))
	const senders, each = 8, 50
	ctx, cancel := context.WithCancel(t.Context())
	next := make([]int, senders)
	n := 0
	ended := make(chan error, 1)
	go func() {
		ended <- q.Run(ctx, func(_ context.Context, e event.Event) error {
			var s, i int
			if _, err := fmt.Sscanf(e.Repository, "s%d/e%d", &s, &i); err != nil || next[s] != i {
				t.Errorf("%s came, should be %d", e.Repository, next[s])
			}
			next[s] = i + 1
			if n++; n == senders*each {
				cancel()
			}
			return nil
		})
	}()
	var wg sync.WaitGroup
	for s := range senders {
		wg.Go(func() {
			for i := range each {
				if err := q.Put(t.Context(), event.Result{Events: []event.Event{push(fmt.Sprintf("s%d/e%d", s, i))}}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if s := q.Stats(); s.Done != senders*each || s.Waiting != 0 {
		t.Errorf("%+v", s)
	}
}
