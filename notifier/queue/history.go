package queue

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"

	"github.com/imagewolf/imagewolf/notifier/event"
)

// pruneHistory bounds what one Put throws away, beside as much as it adds.
const pruneHistory = 64

var (
	historyBucket   = []byte("history")
	feedBucket      = []byte("feed")
	positionsBucket = []byte("positions")
	feedIDKey       = []byte("id")
	feedMadeKey     = []byte("made")
)

// Recorded is an event of the history.
type Recorded struct {
	Sequence uint64 // of the event before, plus 1
	Event    event.Event
	Taken    time.Time
}

// Page is a part of the history.
type Page struct {
	ID          string // of the history: another one if it was lost and began anew
	First, Last uint64 // sequences of the oldest and the newest that there are; Last is First-1 if there are none
	Changed     time.Time
	Events      []Recorded // by sequence
}

// openHistory makes the buckets, or removes them: a history that is not kept on
// would have a gap that nobody could see.
func (q *Queue) openHistory(tx *bbolt.Tx) error {
	if q.history == 0 {
		for _, name := range [][]byte{historyBucket, feedBucket} {
			if err := tx.DeleteBucket(name); err != nil && !errors.Is(err, bolterrors.ErrBucketNotFound) {
				return err
			}
		}
		return tx.Bucket(countsBucket).Delete(historyBucket)
	}
	if _, err := tx.CreateBucketIfNotExists(historyBucket); err != nil {
		return err
	}
	b, err := tx.CreateBucketIfNotExists(feedBucket)
	if err != nil || b.Get(feedIDKey) != nil {
		return err
	}
	return errors.Join(
		b.Put(feedIDKey, []byte(strings.ToLower(rand.Text()))),
		b.Put(feedMadeKey, bytesOf(uint64(time.Now().UnixNano()))))
}

// record adds an event to the history, which it keeps within its bound.
func (q *Queue) record(tx *bbolt.Tx, events []event.Event, now time.Time) error {
	if q.history == 0 {
		return nil
	}
	b := tx.Bucket(historyBucket)
	added := 0
	for _, e := range events {
		if !q.keep(e) {
			continue
		}
		seq, err := b.NextSequence()
		if err != nil {
			return err
		}
		v, err := json.Marshal(record{Event: e, Taken: now})
		if err != nil {
			return err
		}
		if err := b.Put(bytesOf(seq), v); err != nil {
			return err
		}
		added++
	}
	if added == 0 {
		return nil
	}
	over := min(count(tx, historyBucket)+added-q.history, added+pruneHistory)
	for range over {
		k, _ := b.Cursor().First()
		if err := b.Delete(k); err != nil {
			return err
		}
	}
	return add(tx, historyBucket, added-max(0, over))
}

// After returns the n oldest events of the history that come after a sequence.
func (q *Queue) After(sequence uint64, n int) (Page, error) {
	return q.page(n, func(Page) uint64 { return sequence })
}

// Newest returns the n newest events of the history.
func (q *Queue) Newest(n int) (Page, error) {
	return q.page(n, func(p Page) uint64 { return p.Last - min(p.Last, uint64(max(0, n))) })
}

func (q *Queue) page(n int, after func(Page) uint64) (Page, error) {
	var p Page
	err := q.db.View(func(tx *bbolt.Tx) error {
		b, feed := tx.Bucket(historyBucket), tx.Bucket(feedBucket)
		if b == nil || feed == nil {
			return errors.New("no history is kept")
		}
		p = Page{ID: string(feed.Get(feedIDKey)), Changed: time.Unix(0, int64(number(feed.Get(feedMadeKey))))}
		p.Last = b.Sequence()
		p.First = p.Last + 1
		c := b.Cursor()
		if k, _ := c.First(); k != nil {
			p.First = number(k)
			_, v := c.Last()
			r, err := recorded(p.Last, v)
			if err != nil {
				return err
			}
			p.Changed = r.Taken
		}
		if n <= 0 {
			return nil
		}
		from := after(p)
		if from >= p.Last {
			return nil
		}
		for k, v := c.Seek(bytesOf(from + 1)); k != nil && len(p.Events) < n; k, v = c.Next() {
			r, err := recorded(number(k), v)
			if err != nil {
				return err
			}
			p.Events = append(p.Events, r)
		}
		return nil
	})
	if err != nil {
		return Page{}, fmt.Errorf("queue.file: the history: %w", err)
	}
	return p, nil
}

func recorded(seq uint64, v []byte) (Recorded, error) {
	var r record
	if err := json.Unmarshal(v, &r); err != nil {
		return Recorded{}, fmt.Errorf("event %d: %w", seq, err)
	}
	return Recorded{Sequence: seq, Event: r.Event, Taken: r.Taken}, nil
}

// Position returns what SetPosition kept under a name, or nil.
func (q *Queue) Position(name string) ([]byte, error) {
	var out []byte
	err := q.db.View(func(tx *bbolt.Tx) error {
		out = append(out, tx.Bucket(positionsBucket).Get([]byte(name))...)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("queue.file: %w", err)
	}
	return out, nil
}

// SetPosition keeps how far something outside was read. It is on disk when it
// returns nil.
func (q *Queue) SetPosition(name string, position []byte) error {
	err := q.db.Update(func(tx *bbolt.Tx) error {
		return tx.Bucket(positionsBucket).Put([]byte(name), position)
	})
	if err != nil {
		return fmt.Errorf("queue.file: %w", err)
	}
	return nil
}
