package swarm

import (
	"encoding/binary"
	"errors"
	"net"
	"slices"
	"time"

	"github.com/anacrolix/torrent/metainfo"
	pp "github.com/anacrolix/torrent/peer_protocol"
)

// The torrent client's (v1.61) writer of a connection looks for what to ask, then waits to
// be woken. Who wakes it between the two is not heard, and as what is to be done is
// noted already, it is not woken for that again: not by what the peer says it has
// later on, either. Only while the peer is known to have something that is wanted
// does the writer look again by itself (keepAlive). So a connection that was idle
// when the peer let us ask may stand still for ever; and where it is the only way to
// a segment, as a first hop's or a zone's entry's is, a whole zone does.
//
// One message wakes the writer whatever was noted before: that the peer is
// interested. So where a segment stands still, here or at those that are connected to
// get it from here, it is put in between the messages of its peers. It is true of who
// wants something, and nothing to who does not.

// rousing is how long a segment stands still until connections of it are roused, and
// then from one time to the next. A holder waits for twice as long: those that are
// connected to it may have what they want from others.
const rousing = 2 * pace

// wake is the message that wakes the writer, as it would come over the wire.
var wake = pp.Message{Type: pp.Interested}.MustMarshalBinary()

// handshakeSize is what comes before a connection's messages, in bytes, and
// hashAt where in it the torrent's hash is: BEP 3.
const (
	handshakeSize = 68
	hashAt        = 28
)

// parser finds out where in the bytes of a peer one message ends and the next
// begins. The zero value is for a new connection.
type parser struct {
	start  []byte // of the handshake, until it is whole
	shaken bool   // the handshake is through
	prefix [4]byte
	got    int   // bytes of prefix
	left   int64 // bytes of the message under way
}

// between says whether a message may be put in.
func (r *parser) between() bool { return r.shaken && r.got == 0 && r.left == 0 }

// pass takes what came next, and returns the torrent's hash when the handshake has
// become whole.
func (r *parser) pass(p []byte) (hash *metainfo.Hash) {
	if !r.shaken {
		n := min(len(p), handshakeSize-len(r.start))
		r.start = append(r.start, p[:n]...)
		if p = p[n:]; len(r.start) < handshakeSize {
			return nil
		}
		hash = new(metainfo.Hash)
		copy(hash[:], r.start[hashAt:])
		r.start, r.shaken = nil, true
	}
	for len(p) > 0 {
		if r.left > 0 {
			n := min(int64(len(p)), r.left)
			r.left -= n
			p = p[n:]
			continue
		}
		n := copy(r.prefix[r.got:], p)
		p = p[n:]
		if r.got += n; r.got == len(r.prefix) {
			r.got, r.left = 0, int64(binary.BigEndian.Uint32(r.prefix[:]))
		}
	}
	return hash
}

// receive reads what the peer has sent, and what rouse is to put in.
func (c *conn) receive(p []byte) (int, error) {
	for {
		if c.parser.between() && len(p) >= len(wake) && c.roused.Swap(false) {
			return copy(p, wake), nil
		}
		n, err := c.Conn.Read(p)
		if hash := c.parser.pass(p[:n]); hash != nil {
			c.hash.Store(hash)
		}
		// With the handshake behind it nobody but rouse sets a deadline, and it may
		// be late: after the message was put in.
		var late net.Error
		if n > 0 || !c.parser.shaken || !errors.As(err, &late) || !late.Timeout() {
			return n, err
		}
		if err := c.SetReadDeadline(time.Time{}); err != nil {
			return 0, err
		}
	}
}

// rouse has the client look again for what it can ask of the peer.
func (c *conn) rouse() {
	c.roused.Store(true)                   // first: who finds the deadline passed looks for it
	_ = c.SetReadDeadline(time.Unix(1, 0)) // a closed connection has nobody to be woken
}

// rouse rouses the connections with these peers, named as in Stats, by the torrent
// that they are about.
func (s *Swarm) rouse(still map[metainfo.Hash][]string) {
	var conns []*conn
	s.mu.Lock()
	for c := range s.conns {
		if h := c.hash.Load(); h != nil && slices.Contains(still[*h], c.face.peer) {
			conns = append(conns, c)
		}
	}
	s.mu.Unlock()
	for _, c := range conns {
		c.rouse()
	}
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

// unused returns the peers that are connected and have what is missing of a segment
// that has got no byte for a while. b.mu must be held.
func (b *Blob) unused(s *segment, now time.Time) (peers []string) {
	b.acct.Lock()
	last := s.moved
	b.acct.Unlock()
	if !s.due(last, now, rousing) {
		return nil
	}
	var missing []uint32
	for i := range s.t.NumPieces() {
		if !s.t.Piece(i).State().Complete {
			missing = append(missing, uint32(i))
		}
	}
	for _, c := range s.t.PeerConns() {
		f, ok := c.RemoteAddr.(*face)
		if ok && slices.ContainsFunc(missing, c.PeerPieces().Contains) {
			peers = append(peers, f.peer)
		}
	}
	return peers
}
