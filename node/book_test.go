package node

import (
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

func TestBookStanding(t *testing.T) {
	a, b, c := digest.FromString("a"), digest.FromString("b"), digest.FromString("c")
	book := newBook()
	want := func(d digest.Digest, load, rank uint32) {
		t.Helper()
		if l, r := book.standing(d); l != load || r != rank {
			t.Errorf("standing is load %d, rank %d; want %d, %d", l, r, load, rank)
		}
	}
	book.enter(a)
	book.enter(b)
	book.enter(c)
	want(a, 0, 0)
	want(b, 0, 1)
	want(c, 0, 2) // two asked for before it, nobody knows yet who fetches them
	book.decided(a)
	want(c, 0, 1)
	book.fetching(a, true)
	want(b, 1, 1)
	want(a, 0, 0)
	book.fetching(a, false)
	want(b, 0, 0)
	book.leave(b)
	want(c, 0, 0)
	book.enter(b) // asks again, so stands behind c
	want(b, 0, 1)
}

func TestBookBusy(t *testing.T) {
	a, b := digest.FromString("a"), digest.FromString("b")
	book, now := newBook(), time.Now()
	book.enter(a)
	book.enter(b)
	book.moved(a, now)
	if book.busy(a, now) {
		t.Error("busy with its own bytes")
	}
	if !book.busy(b, now.Add(busyFor/2)) || book.busy(b, now.Add(busyFor)) {
		t.Error("busy neither with another blob's bytes nor for as long as said")
	}
}

func TestBookSends(t *testing.T) {
	a, b := digest.FromString("a"), digest.FromString("b")
	book, now := newBook(), time.Now()
	book.enter(a)
	book.enter(b)
	book.sending(a, now)
	if n := book.sends(a, now); n != 0 {
		t.Errorf("%d other blobs are sent beside the only one", n)
	}
	if n := book.sends(b, now.Add(busyFor/2)); n != 1 {
		t.Errorf("%d other blobs are sent, want 1", n)
	}
	if n := book.sends(b, now.Add(busyFor)); n != 0 {
		t.Errorf("%d other blobs are sent, long after the last byte", n)
	}
}
