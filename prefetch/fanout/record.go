package fanout

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"
	"unique"

	"go.etcd.io/bbolt"
	"google.golang.org/protobuf/proto"

	imagewolfv1 "github.com/imagewolf/imagewolf/api/v1"
	"github.com/imagewolf/imagewolf/internal/database"
)

// keepFor is how long a request is remembered after its end on this node.
const keepFor = 24 * time.Hour

var requestsBucket = []byte("requests")

const (
	dbVersion  = "1"
	batchDelay = 2 * time.Millisecond // how long a write waits for others to share its fsync
)

// record is one request as this node knows it. Fields without another word are
// guarded by Fanout.mu.
type record struct {
	start *imagewolfv1.StartRequest // never changed, and neither is what it points to
	born  time.Time                 // when the request was made, by this node's clock; never changed
	made  int64                     // when the request was made, for telling the younger of two, in milliseconds since 1970; never changed
	index int                       // this node's place among the selected; -1 if it is not; never changed
	name  string                    // of the image record that it moves, as Puller.Record has it; never changed

	state    *imagewolfv1.NodePrefetch // of this node; nil if it is not selected
	canceled bool
	untold   map[string]bool // nodes that this one is still to tell of the request or of its end
	changed  time.Time       // when it last was ended or told; for how long it is kept
	asked    int64           // when the pull that last moved the image record to what the tag said began, in milliseconds since 1970; 0: none did

	// Not kept over restarts.
	waits   bool                    // for a node before it, as concurrency has it
	ahead   string                  // says what node it waits for; "": none, or it is not known yet
	behind  string                  // says what request of the same image record it waits for; "": none
	failure string                  // says how the last try failed; "": none did
	silent  time.Time               // since when none before it is known to pull; zero: one is
	tries   int                     // that failed
	after   time.Time               // when it may be tried again
	endPull context.CancelCauseFunc // of the pull under way; nil if there is none
}

// newRecord makes a record, and the names in it one with those in others.
func newRecord(start *imagewolfv1.StartRequest, born time.Time, self string) *record {
	dropUnknown(start, start.Request, start.Request.Nodes)
	for i, n := range start.Nodes {
		start.Nodes[i] = unique.Make(n).Value()
	}
	here := born.UnixMilli()
	r := &record{
		start: start, born: born, made: min(max(start.Created, here-maxSkew.Milliseconds()), here+maxSkew.Milliseconds()), index: position(start.Nodes, self), canceled: start.Canceled,
		untold: map[string]bool{}, changed: born,
	}
	if r.index >= 0 {
		r.state = &imagewolfv1.NodePrefetch{Node: self, State: imagewolfv1.PrefetchState_PREFETCH_STATE_QUEUED}
		c := start.Request.Concurrency
		r.waits = c > 0 && uint64(r.index) >= uint64(c)
	}
	return r
}

// dropUnknown takes out of messages what no check knows the size of.
func dropUnknown(messages ...proto.Message) {
	for _, m := range messages {
		if r := m.ProtoReflect(); len(r.GetUnknown()) > 0 {
			r.SetUnknown(nil)
		}
	}
}

func (r *record) id() string { return r.start.Request.Id }

// timeout is how long after born what has not ended is given up.
func timeout(r *imagewolfv1.PrefetchRequest) time.Duration {
	if r.TimeoutSeconds > 0 {
		return time.Duration(r.TimeoutSeconds) * time.Second
	}
	return maxTimeout
}

func (r *record) deadline() time.Time { return r.born.Add(timeout(r.start.Request)) }

// finished says that this node has nothing left to do. Fanout.mu must be held.
func (r *record) finished() bool {
	return (r.state == nil || ended(r.state.State)) && r.endPull == nil && len(r.untold) == 0
}

// end sets how the request ended on this node. Fanout.mu must be held.
func (r *record) end(s imagewolfv1.PrefetchState, reason string, now time.Time) {
	r.state.State, r.state.Reason, r.state.Ended = s, cut(reason), now.UnixMilli()
	r.changed = now
}

// explain sets why a request that waits does so, whatever of it has changed.
// Fanout.mu must be held.
func (r *record) explain() {
	if r.state.State == imagewolfv1.PrefetchState_PREFETCH_STATE_QUEUED {
		r.state.Reason = cut(r.reason())
	}
}

// reason says what a request waits for, and what went wrong before. Fanout.mu must be
// held.
func (r *record) reason() string {
	why := slices.DeleteFunc([]string{r.ahead, r.behind, r.failure}, func(s string) bool { return s == "" })
	return strings.Join(why, "; ")
}

// told returns the record for another node. Fanout.mu must be held.
func (r *record) told(now time.Time, withNodes bool) *imagewolfv1.StartRequest {
	out := &imagewolfv1.StartRequest{
		Request: r.start.Request, Created: r.start.Created, Coordinator: r.start.Coordinator,
		Age: max(0, now.Sub(r.born).Milliseconds()), Canceled: r.canceled,
	}
	if withNodes {
		out.Nodes = r.start.Nodes
	}
	return out
}

// ended says whether a node has nothing more to do.
func ended(s imagewolfv1.PrefetchState) bool {
	switch s {
	case imagewolfv1.PrefetchState_PREFETCH_STATE_DONE, imagewolfv1.PrefetchState_PREFETCH_STATE_FAILED, imagewolfv1.PrefetchState_PREFETCH_STATE_CANCELED:
		return true
	}
	return false
}

// before orders what waits: higher priority, then older.
func before(a, b *record) int {
	return cmp.Or(
		cmp.Compare(b.start.Request.Priority, a.start.Request.Priority),
		a.born.Compare(b.born), cmp.Compare(a.id(), b.id()),
	)
}

// newer orders what is told of: the newest first.
func newer(a, b *imagewolfv1.StartRequest) int {
	return cmp.Or(cmp.Compare(b.Created, a.Created), cmp.Compare(a.Request.Id, b.Request.Id))
}

// stored is a record as it is on disk. Times are milliseconds since 1970.
type stored struct {
	Start    []byte   `json:"start"`           // protobuf of StartRequest
	State    []byte   `json:"state,omitempty"` // protobuf of NodePrefetch
	Born     int64    `json:"born"`
	Changed  int64    `json:"changed"`
	Canceled bool     `json:"canceled,omitempty"`
	Untold   []string `json:"untold,omitempty"`
	Asked    int64    `json:"asked,omitempty"`
}

// encode returns what is kept of a record. Fanout.mu must be held.
func (r *record) encode() ([]byte, error) {
	start, err := proto.Marshal(r.start)
	if err != nil {
		return nil, err
	}
	s := stored{Start: start, Born: r.born.UnixMilli(), Changed: r.changed.UnixMilli(), Canceled: r.canceled, Asked: r.asked}
	if r.state != nil {
		if s.State, err = proto.Marshal(r.state); err != nil {
			return nil, err
		}
	}
	for n := range r.untold {
		s.Untold = append(s.Untold, n)
	}
	return json.Marshal(s)
}

// decode is the inverse of encode. What was being pulled waits again.
func decode(value []byte, self string) (*record, error) {
	var s stored
	if err := json.Unmarshal(value, &s); err != nil {
		return nil, err
	}
	start := &imagewolfv1.StartRequest{}
	if err := proto.Unmarshal(s.Start, start); err != nil {
		return nil, err
	}
	if err := errors.Join(check(start.GetRequest()), checkNodes(start)); err != nil {
		return nil, err
	}
	r := newRecord(start, time.UnixMilli(s.Born), self)
	r.canceled, r.changed, r.asked = s.Canceled, time.UnixMilli(s.Changed), s.Asked
	for _, n := range s.Untold {
		r.untold[n] = true
	}
	if r.state == nil || s.State == nil {
		return r, nil
	}
	state := &imagewolfv1.NodePrefetch{}
	if err := proto.Unmarshal(s.State, state); err != nil {
		return nil, err
	}
	if ended(state.State) {
		r.state = state
	}
	r.state.Digest = state.Digest // the image record points to it, though the request may go on
	return r, nil
}

// openDB opens the file and returns what is in it. One that cannot be read is
// set aside: a day's requests are not worth a node that takes none.
func openDB(path, self string, log *slog.Logger) (*bbolt.DB, map[string]*record, error) {
	var records map[string]*record
	db, err := database.Open(path, dbVersion, log, func(tx *bbolt.Tx) error {
		records = map[string]*record{}
		b, err := tx.CreateBucketIfNotExists(requestsBucket)
		if err != nil {
			return err
		}
		return b.ForEach(func(k, v []byte) error {
			r, err := decode(v, self)
			if err != nil {
				return fmt.Errorf("request %s: %w", k, err)
			}
			records[strings.Clone(string(k))] = r
			return nil
		})
	})
	if err != nil {
		return nil, nil, err
	}
	db.MaxBatchDelay = batchDelay
	return db, records, nil
}

// save writes records as they are now, and takes from the file those that are
// forgotten.
func (f *Fanout) save(rs ...*record) error {
	f.mu.Lock()
	db := f.db
	f.mu.Unlock()
	if db == nil {
		return errNotRunning
	}
	write := func(tx *bbolt.Tx) error {
		b := tx.Bucket(requestsBucket)
		for _, r := range rs {
			// Inside the transaction: what changes after this look is written after it.
			f.mu.Lock()
			known := f.records[r.id()]
			value, err := r.encode()
			f.mu.Unlock()
			switch {
			case known == nil:
				err = b.Delete([]byte(r.id()))
			case known == r && err == nil:
				err = b.Put([]byte(r.id()), value)
			}
			if err != nil {
				return err
			}
		}
		return nil
	}
	var err error
	if len(rs) == 1 {
		err = db.Batch(write)
	} else {
		err = db.Update(write)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", f.o.Path, err)
	}
	return nil
}
