package swarm

import (
	"reflect"
	"slices"
	"time"
	"unsafe"

	"github.com/anacrolix/chansync"
	"github.com/anacrolix/torrent"
)

// The torrent client's (v1.61) writer of a connection looks for what to ask, then
// waits to be woken. Who wakes it between the two is not heard, and as what is to be
// done is noted already, it is not woken for that again: not by what the peer says it
// has later on, either. Only while the peer is known to have something that is wanted
// does the writer look again by itself (keepAlive). So a connection that was idle
// when the peer let us ask may stand still for ever; and where it is the only way to
// a segment, as a first hop's or a zone's entry's is, a whole zone does.
//
// So where a segment stands still, here or at those that are connected to get it from
// here, the writers of those connections are woken once more. The client has no
// method for that.

// rousing is how long a segment stands still until connections of it are roused, and
// then from one time to the next. A holder waits for twice as long: those that are
// connected to it may have what they want from others.
const rousing = 2 * pace

// rouse wakes the writer of a connection, as the client itself does for reasons of
// its own. A client without such a writer is left alone.
func rouse(c *torrent.PeerConn) {
	if w := writerOf(c); w != nil {
		w.Broadcast()
	}
}

// writerOf returns what the writer of a connection waits for; nil if the client is of
// a version that has none.
func writerOf(c *torrent.PeerConn) *chansync.BroadcastCond {
	w := reflect.ValueOf(c).Elem().FieldByName("messageWriter")
	if !w.IsValid() || w.Kind() != reflect.Struct {
		return nil
	}
	f := w.FieldByName("writeCond")
	if !f.IsValid() || f.Type() != reflect.TypeFor[chansync.BroadcastCond]() {
		return nil
	}
	// It is for use by many goroutines, and as it should be for as long as there is
	// the connection: what the client lists has been made ready.
	return (*chansync.BroadcastCond)(unsafe.Pointer(f.UnsafeAddr())) //nolint:gosec // of the type that was asked for
}

// due says whether it is time to rouse connections of a segment of which the last
// byte went at the given moment. b.mu must be held.
func (s *segment) due(last, now time.Time, after time.Duration) bool {
	if now.Sub(last) < after || now.Sub(s.roused) < after {
		return false
	}
	s.roused = now
	return true
}

// rouseIdle rouses the connections of a segment that has got no byte for a while with
// peers that have what is missing. b.mu must be held.
func (b *Blob) rouseIdle(s *segment, now time.Time) {
	b.acct.Lock()
	last := s.moved
	b.acct.Unlock()
	if !s.due(last, now, rousing) {
		return
	}
	var missing []uint32
	for i := range s.t.NumPieces() {
		if !s.t.Piece(i).State().Complete {
			missing = append(missing, uint32(i))
		}
	}
	for _, c := range s.t.PeerConns() {
		if slices.ContainsFunc(missing, c.PeerPieces().Contains) {
			rouse(c)
		}
	}
}
