package queue

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"go.etcd.io/bbolt"

	"github.com/imagewolf/imagewolf/config"
	"github.com/imagewolf/imagewolf/notifier/event"
)

func TestWhatWasSeenIsForgottenInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := settings(t)
		c.MaxEvents, c.DedupeWindow = 50, config.Duration(time.Minute)
		q := open(t, c)
		seen := func() (n int) {
			if err := q.db.View(func(tx *bbolt.Tx) error {
				n = max(tx.Bucket(seenBucket).Stats().KeyN, tx.Bucket(seenAtBucket).Stats().KeyN)
				return nil
			}); err != nil {
				t.Fatal(err)
			}
			return n
		}
		for i := range 400 {
			put(t, q, push(fmt.Sprintf("repo-%d", i)))
			drain(t, q)
			if n := seen(); n > seenPerEvent*c.MaxEvents+3 {
				t.Fatalf("%d entries after %d events within the window", n, i)
			}
		}
		time.Sleep(time.Minute)
		for i := range 10 {
			put(t, q, push(fmt.Sprintf("later-%d", i)))
		}
		if n := seen(); n != 30 {
			t.Errorf("%d entries after the window", n)
		}
		put(t, q, push("later-0"))
		if s := q.Stats(); s.Waiting != 10 {
			t.Errorf("%+v", s)
		}
	})
}

// However many events one delivery has, and whatever they come to.
func TestWhatWasSeenIsBoundedWithLargeDeliveries(t *testing.T) {
	for name, outcome := range map[string]error{"done": nil, "led to nothing": event.ErrNothing} {
		t.Run(name, func(t *testing.T) {
			c := settings(t)
			c.MaxEvents, c.DedupeWindow = 250, config.Duration(24*time.Hour)
			q := open(t, c)
			for i := range 8 {
				var events []event.Event
				for j := range 80 {
					events = append(events, push(fmt.Sprintf("repo-%d-%d", i, j)))
				}
				put(t, q, events...)
				ctx, cancel := context.WithCancel(t.Context())
				n := 0
				if err := q.Run(ctx, func(context.Context, event.Event) error {
					if n++; n == len(events) {
						cancel()
					}
					return outcome
				}); err != nil {
					t.Fatal(err)
				}
				if err := q.db.View(func(tx *bbolt.Tx) error {
					seen, at := tx.Bucket(seenBucket).Stats().KeyN, tx.Bucket(seenAtBucket).Stats().KeyN
					if most := seenPerEvent*c.MaxEvents + 3*len(events); seen != at || at > most {
						t.Errorf("after %d deliveries: %d entries by %d times, at most %d", i+1, seen, at, most)
					}
					return nil
				}); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}
