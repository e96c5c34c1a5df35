package queue

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"time"

	"go.etcd.io/bbolt"

	"github.com/imagewolf/imagewolf/notifier/event"
)

const (
	marksOfEvent = 3  // at most that keys returns of one event
	pruneAtOnce  = 64 // entries thrown away by one Put at most, beside as many as it may add
	seenPerEvent = 4  // entries at most, for each event that the queue may hold
)

// key is a hash by which an event is known again.
type key [16]byte

func keyOf(parts ...string) key {
	h := sha256.New()
	for _, p := range parts {
		var n [8]byte
		binary.BigEndian.PutUint64(n[:], uint64(len(p)))
		h.Write(n[:])
		h.Write([]byte(p))
	}
	return key(h.Sum(nil))
}

// mark is what is kept in mind of an event: a key, and for a tag the digest that
// it pointed to last, which must be the same for an event to be known by it.
type mark struct {
	key
	digest string
}

// keys returns by what an event is known if it was seen before, and what to
// keep in mind of it. An event of a digest without a tag is known from one that
// had a tag too. A tag is known with its last digest only: one that is moved back
// was moved. An event without a digest is known by its delivery only: the tag may
// have been pushed anew. A key that there is none of is zero.
func keys(e event.Event) (known [2]mark, marks []mark) {
	if e.DeliveryID != "" {
		known[0] = mark{key: keyOf("delivery", e.Source, e.DeliveryID, e.Image())}
		marks = append(marks, known[0])
	}
	if e.Digest != "" {
		content := mark{key: keyOf("content", e.Registry, e.Repository, e.Digest.String(), "")}
		known[1] = content
		marks = append(marks, content)
		if e.Tag != "" {
			known[1] = mark{keyOf("tag", e.Registry, e.Repository, e.Tag), e.Digest.String()}
			marks = append(marks, known[1])
		}
	}
	return known, marks
}

// memory is what a transaction knows of events that were seen.
type memory struct {
	tx       *bbolt.Tx
	now      time.Time
	window   time.Duration
	most     int
	seen, at *bbolt.Bucket
}

func (q *Queue) memory(tx *bbolt.Tx, now time.Time) memory {
	return memory{
		tx: tx, now: now, window: q.config.DedupeWindow.Duration(), most: seenPerEvent * q.config.MaxEvents,
		seen: tx.Bucket(seenBucket), at: tx.Bucket(seenAtBucket),
	}
}

// fresh tells whether something seen then counts now. A clock that was set back
// makes it neither older nor younger than the window.
func (m memory) fresh(then uint64) bool {
	return m.now.Sub(time.Unix(0, int64(then))).Abs() < m.window
}

func (m memory) knows(k mark) bool {
	v := m.seen.Get(k.key[:])
	return len(v) >= 8 && m.fresh(number(v)) && string(v[8:]) == k.digest
}

func (m memory) mark(marks []mark) error {
	if m.window == 0 {
		return nil
	}
	now := bytesOf(uint64(m.now.UnixNano()))
	added := 0
	for _, k := range marks {
		at := append(append([]byte{}, now...), k.key[:]...)
		if m.at.Get(at) == nil {
			added++
		}
		if err := m.at.Put(at, []byte{0}); err != nil { // an empty value is read as none before it is on disk
			return err
		}
		if err := m.seen.Put(k.key[:], append(append([]byte{}, now...), k.digest...)); err != nil {
			return err
		}
	}
	return add(m.tx, seenAtBucket, added)
}

// forget takes back what mark has kept in mind of an event that was taken then, but
// for what a later one is known by as well.
func (m memory) forget(marks []mark, taken time.Time) error {
	removed := 0
	for _, k := range marks {
		v := m.seen.Get(k.key[:])
		if len(v) < 8 || number(v) != uint64(taken.UnixNano()) || string(v[8:]) != k.digest {
			continue
		}
		at := append(append([]byte{}, v[:8]...), k.key[:]...)
		if m.at.Get(at) != nil {
			removed++
		}
		if err := errors.Join(m.seen.Delete(k.key[:]), m.at.Delete(at)); err != nil {
			return err
		}
	}
	return add(m.tx, seenAtBucket, -removed)
}

// prune throws away some of what is too old, or too much, before a number of events
// is added.
func (m memory) prune(events int) error {
	most := events*marksOfEvent + pruneAtOnce
	n := count(m.tx, seenAtBucket)
	var old [][]byte
	c := m.at.Cursor()
	for k, _ := c.First(); k != nil && len(old) < most; k, _ = c.Next() {
		if m.fresh(number(k)) && n-len(old) <= m.most {
			break
		}
		old = append(old, append([]byte{}, k...))
	}
	for _, k := range old {
		hash := k[8:]
		if v := m.seen.Get(hash); v != nil && number(v) == number(k) { // else it was seen again since
			if err := m.seen.Delete(hash); err != nil {
				return err
			}
		}
		if err := m.at.Delete(k); err != nil {
			return err
		}
	}
	if len(old) == 0 {
		return nil
	}
	return add(m.tx, seenAtBucket, -len(old))
}

// count returns how many keys a bucket has: to count them takes too long.
func count(tx *bbolt.Tx, bucket []byte) int {
	return int(number(tx.Bucket(countsBucket).Get(bucket)))
}

func add(tx *bbolt.Tx, bucket []byte, n int) error {
	if n == 0 {
		return nil
	}
	return tx.Bucket(countsBucket).Put(bucket, bytesOf(uint64(max(0, count(tx, bucket)+n))))
}

// number reads the first 8 bytes; of none it is 0.
func number(b []byte) uint64 {
	if len(b) < 8 {
		return 0
	}
	return binary.BigEndian.Uint64(b)
}

func bytesOf(n uint64) []byte { return binary.BigEndian.AppendUint64(nil, n) }
