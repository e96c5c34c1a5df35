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
	to.acct.Lock()
	defer to.acct.Unlock()
	if !to.accounts[silent.addr].silent || to.accounts[good.addr].silent {
		t.Error("it is not remembered who was silent")
	}
}

// Where all peers take long, none is late so soon; nor where a segment gets bytes from
// others; and not much later, whatever one of them does.
func TestLateness(t *testing.T) {
	now := time.Now()
	for name, c := range map[string]struct {
		gap        time.Duration // of an honest peer
		ago, moved time.Duration // since it took that long, since the segment got a byte
		want       time.Duration
	}{
		"quick peers":                   {time.Second, 0, time.Minute, late},
		"slow peers":                    {4 * time.Second, gapFor, time.Minute, 8 * time.Second},
		"slow peers, long ago":          {4 * time.Second, gapFor + 1, time.Minute, late},
		"a very slow peer":              {time.Minute, 0, time.Hour, maxLate},
		"quick peers, and bytes come":   {time.Second, 0, late - 1, maxLate},
		"slow peers, and bytes come":    {4 * time.Second, 0, 8*time.Second - 1, maxLate},
		"slow peers, and none come now": {4 * time.Second, 0, 8 * time.Second, 8 * time.Second},
	} {
		b := &Blob{}
		b.took(c.gap, now.Add(-c.ago))
		b.took(time.Millisecond, now) // it does not make the other one forgotten
		if c.ago > gapFor {
			b.gapAt = now.Add(-c.ago)
		}
		if got := b.lateness(&segment{moved: now.Add(-c.moved)}, now); got != c.want {
			t.Errorf("%s: %v, should be %v", name, got, c.want)
		}
	}
	if got := new(Blob).lateness(&segment{}, now); got != late {
		t.Errorf("before anybody has sent anything: %v", got)
	}
	b := &Blob{}
	b.took(4*time.Second, now)
	for ago, want := range map[time.Duration]time.Duration{0: 8 * time.Second, gapFor: 8 * time.Second, gapFor + 1: 0} {
		if got := b.Slowness(now.Add(ago)); got != want {
			t.Errorf("%v after a peer took four seconds: %v, should be %v", ago, got, want)
		}
	}
}

// Who has sent no good piece yet says nothing about how long peers take: it may be
// one that holds up the others.
func TestOnlyProvenPeersMakeLateness(t *testing.T) {
	b := newBlob(&Swarm{opts: Options{Counter: noCounter{}}}, digest.FromString("x"), 2*minSegment, newMemory(2*minSegment))
	s := &segment{blob: b, senders: map[int]map[string]struct{}{}}
	for _, c := range []struct {
		peer string
		good int
		want time.Duration // about
	}{{"new", 0, 0}, {"proven", 1, 5 * time.Second}} {
		*b.account(c.peer) = account{owed: 1, since: time.Now().Add(-5 * time.Second), good: c.good}
		s.received(c.peer, 0, 1)
		if b.gap.Round(time.Second) != c.want {
			t.Errorf("%s: %v", c.peer, b.gap)
		}
	}
	if err := b.Close(); err != nil {
		t.Error(err)
	}
}

// Who was left out for its silence is waited for a second the next time, until it sends
// something.
func TestOverdue(t *testing.T) {
	b := newBlob(&Swarm{opts: Options{Counter: noCounter{}}}, digest.FromString("x"), 2*minSegment, newMemory(2*minSegment))
	s := &segment{blob: b, senders: map[int]map[string]struct{}{}}
	now := time.Now()
	for _, c := range []struct {
		name    string
		silent  bool
		owed    int
		since   time.Duration
		overdue bool
	}{
		{"late", false, 1, late, true},
		{"not late yet", false, 1, late - 1, false},
		{"late again", true, 1, isolation, true},
		{"again, and not late yet", true, 1, isolation - 1, false},
		{"owes nothing", true, 0, time.Minute, false},
	} {
		*b.account("p") = account{owed: c.owed, since: now.Add(-c.since), silent: c.silent}
		if got := b.overdue("p", late, now); got != c.overdue {
			t.Errorf("%s: overdue: %v, want %v", c.name, got, c.overdue)
		}
	}
	if b.overdue("nobody", late, now) {
		t.Error("one of whom nothing is known is overdue")
	}
	s.received("p", 0, 1)
	if b.account("p").silent {
		t.Error("silent, and has sent something")
	}
	if err := b.Close(); err != nil {
		t.Error(err)
	}
}
