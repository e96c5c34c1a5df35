package store

import (
	"bytes"
	"errors"
	"sync/atomic"
	"syscall"
	"testing"
)

// tally is a Counter.
type tally struct{ fetched, completed, failed, mismatched atomic.Int64 }

func (c *tally) Fetched(n int) { c.fetched.Add(int64(n)) }
func (c *tally) Completed()    { c.completed.Add(1) }
func (c *tally) Failed()       { c.failed.Add(1) }
func (c *tally) Mismatched()   { c.mismatched.Add(1) }

func (c *tally) want(t *testing.T, fetched, completed, failed, mismatched int64) {
	t.Helper()
	got := [4]int64{c.fetched.Load(), c.completed.Load(), c.failed.Load(), c.mismatched.Load()}
	if got != [4]int64{fetched, completed, failed, mismatched} {
		t.Errorf("fetched, completed, failed, mismatched: %d", got)
	}
}

func TestCounted(t *testing.T) {
	var c tally
	s := open(t, Options{Counter: &c})
	b, d := random(size, 1)
	// Half from a peer, half from the registry; and wrong.
	w := writer(t, s, refFor("a", d), size)
	in := w.(*stream).in
	peer(t, in, bytes.Repeat([]byte{1}, size), 0, size/2)
	wait(t, w)
	if _, err := w.Write(b[size/2:]); err == nil {
		t.Fatal("wrong bytes were taken")
	}
	c.want(t, size-size/2, 0, 1, 1)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	// A disk that is full, for two chunks and a peer.
	w = writer(t, s, refFor("a", d), size)
	wait(t, w)
	restore := fullDisk(t, w.(*stream).in)
	if _, err := w.(*stream).in.WriteAt(b[:10], 0); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("peer's write: %v", err)
	}
	if _, err := w.Write(b); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("write: %v", err)
	}
	restore()
	c.want(t, size-size/2+size, 0, 2, 1)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	w = writer(t, s, refFor("a", d), size)
	write(t, w, b)
	commit(t, w, size, d)
	c.want(t, size-size/2+2*size, 1, 2, 1)
}
