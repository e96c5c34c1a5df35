package swarm

import (
	"reflect"
	"testing"
	"time"
	"unsafe"

	pp "github.com/anacrolix/torrent/peer_protocol"
	"github.com/opencontainers/go-digest"
)

// A connection whose writer has missed that it was woken asks all the same.
func TestLostWakeUp(t *testing.T) {
	p, b, s := victim(t)
	e := attack(t, p, s)
	e.send(pp.Message{Type: pp.HaveNone})
	eventually(t, "connected", func() bool { return len(s.t.PeerConns()) == 1 })
	atRest(t)
	loseWakeUp(b, s)
	e.send(pp.Message{Type: pp.Unchoke}, pp.Message{Type: pp.Have, Index: 3})
	d := pp.Decoder{R: e.r, MaxLength: 1 << 20}
	for {
		var m pp.Message
		if err := d.Decode(&m); err != nil {
			t.Fatalf("nothing is asked: %v", err)
		}
		if m.Type == pp.Request && !m.Keepalive {
			return
		}
	}
}

// atRest waits until the writer of a connection that is of no use yet looks by itself
// no more, and whatever the client itself wakes it for is over. The client has no event
// for that: it is its timer that is waited for.
func atRest(t *testing.T) {
	t.Helper()
	began := time.Now()
	eventually(t, "at rest", func() bool { return time.Since(began) >= 2*keepAlive })
}

// loseWakeUp leaves the one connection of a segment as it is when it was noted that
// there is something to do, and the writer was not awake to hear of it.
func loseWakeUp(b *Blob, s *segment) {
	b.mu.Lock()
	defer b.mu.Unlock()
	c := s.t.PeerConns()[0]
	f := reflect.ValueOf(c).Elem().FieldByName("needRequestUpdate")
	reflect.NewAt(f.Type(), unsafe.Pointer(f.UnsafeAddr())).Elem().SetString("lost")
	c.PeerPieces() // takes the client's lock: others see it from now on
}

// A holder rouses the connections of those that wait for it, and no longer than they
// are there.
func TestIdleHolderRouses(t *testing.T) {
	data := content(minSegment, 8)
	p := newPeer(t)
	b := p.open(t, digest.FromBytes(data), wholeMemory(data))
	if _, err := b.Offer(t.Context(), 0, nil); err != nil {
		t.Fatal(err)
	}
	s := b.segs[0]
	e := attack(t, p, s)
	e.send(pp.Message{Type: pp.HaveNone})
	eventually(t, "connected", func() bool { return len(s.t.PeerConns()) == 1 })
	woken := writerOf(s.t.PeerConns()[0]).Signaled()
	atRest(t)
	for range 3 {
		select {
		case <-woken:
			woken = writerOf(s.t.PeerConns()[0]).Signaled()
		case <-time.After(patience):
			t.Fatal("the connection was left alone")
		}
	}
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "at rest", func() bool {
		b.mu.Lock()
		defer b.mu.Unlock()
		return s.parted
	})
}
