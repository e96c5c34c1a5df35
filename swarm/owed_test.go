package swarm

import (
	"errors"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// A peer that is asked and sends nothing does not keep the others from sending
// the same.
func TestSilentPeer(t *testing.T) {
	// The second segment is one chunk: the client takes a chunk from a peer that it
	// has asked only for another that would have less to do.
	const first, rest = minSegment, 1500
	data := content(first+rest, 21)
	d := digest.FromBytes(data)
	good, silent, leecher := newPeer(t), newPeer(t), newPeer(t)
	hang := make(chan struct{})
	mute := wholeMemory(data)
	mute.reading = func() error {
		<-hang
		return errors.New("never sent")
	}
	from := good.open(t, d, wholeMemory(data))
	pieces := offerAll(t, from)[1]
	if _, err := silent.open(t, d, mute).Offer(t.Context(), 1, pieces); err != nil {
		t.Fatal(err)
	}
	sink := newMemory(len(data))
	to := leecher.open(t, d, sink)
	t.Cleanup(func() { close(hang) }) // first of all
	began := time.Now()
	if err := to.Leech(1, pieces, addrs(silent)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "asked", func() bool { return !to.Owed(silent.addr).IsZero() })
	if since := to.Owed(silent.addr); since.Before(began) || !to.Owed(good.addr).IsZero() {
		t.Errorf("silent since %v, of a leecher since %v", since, began)
	}
	if err := to.Leech(1, pieces, addrs(good)); err != nil {
		t.Fatal(err)
	}
	sink.await(t, first, rest)
	if took := time.Since(began); took > 4*late {
		t.Errorf("it took %v", took)
	}
	eventually(t, "nothing owed", func() bool { return to.Owed(good.addr).IsZero() })
}

// Where all peers take long, none is late so soon; and not much later, whatever one
// of them does.
func TestLateness(t *testing.T) {
	now := time.Now()
	at := func(d time.Duration) time.Time { return now.Add(d) }
	b := &Blob{}
	if got := b.lateness(now); got != late {
		t.Errorf("before anybody has sent anything: %v", got)
	}
	b.took(time.Second, at(0))
	if got := b.lateness(at(0)); got != late {
		t.Errorf("with quick peers: %v", got)
	}
	b.took(4*time.Second, at(0))
	b.took(time.Millisecond, at(gapFor))
	if got := b.lateness(at(gapFor)); got != 8*time.Second {
		t.Errorf("with slow peers: %v", got)
	}
	if got := b.lateness(at(gapFor + 1)); got != late {
		t.Errorf("long after: %v", got)
	}
	b.took(time.Millisecond, at(gapFor+1))
	b.took(time.Minute, at(gapFor+2))
	if got := b.lateness(at(gapFor + 2)); got != maxLate {
		t.Errorf("with a very slow peer: %v", got)
	}
}
