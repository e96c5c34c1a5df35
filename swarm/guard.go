package swarm

import (
	"github.com/anacrolix/torrent"
	pp "github.com/anacrolix/torrent/peer_protocol"
)

// guard watches one connection for messages that no node of ours sends. Some
// of them make the torrent client panic, at once or when the torrent is
// dropped:
//   - a piece that begins inside a chunk and runs over the piece's end,
//   - HaveNone after HaveAll, followed by Have,
//   - a request for metadata piece -1.
//
// It is called with the client locked.
type guard struct {
	told bool // said which pieces it has: allowed once, and before any Have
}

// badMessage is of a type that does not exist: the client closes the
// connection it came from.
var badMessage = pp.Message{Type: 0xff}

// check is called for every message of every peer before the client acts on it.
func (s *Swarm) check(c *torrent.PeerConn, m *pp.Message) {
	if m.Keepalive {
		return
	}
	// The state is kept in the field for the client name that a peer sends in
	// an extended handshake, which never gets this far: so it lives exactly as
	// long as the connection.
	g, ok := c.PeerClientName.Load().(*guard)
	if !ok {
		g = &guard{}
		c.PeerClientName.Store(g)
	}
	v, _ := s.segments.Load(c.Torrent().InfoHash())
	seg, _ := v.(*segment)
	if seg == nil || !g.allows(m, seg.n, seg.blob.layout) {
		*m = badMessage
	}
}

// allows reports whether a node of ours could have sent m about a segment of
// size bytes.
func (g *guard) allows(m *pp.Message, size int64, l Layout) bool {
	pieceSize := l.PieceSize
	switch m.Type {
	case pp.Choke, pp.Unchoke, pp.Interested, pp.NotInterested:
		return true
	case pp.HaveAll, pp.HaveNone, pp.Bitfield:
		first := !g.told
		g.told = true
		// One bit per piece, rounded up to whole bytes.
		pieces := (size-1)/pieceSize + 1
		return first && (m.Type != pp.Bitfield || int64(len(m.Bitfield)) == (pieces+7)/8*8)
	case pp.Have:
		g.told = true
		return int64(m.Index) < (size-1)/pieceSize+1
	case pp.Request, pp.Cancel, pp.Reject:
		return isChunk(int64(m.Index), int64(m.Begin), int64(m.Length), size, l)
	case pp.Piece:
		return isChunk(int64(m.Index), int64(m.Begin), int64(len(m.Piece)), size, l)
	default:
		// Extensions, version 2 hashes, DHT ports, suggestions.
		return false
	}
}

// isChunk reports whether the range is one of the chunks that the segment's
// pieces are cut into.
func isChunk(index, begin, length, size int64, l Layout) bool {
	pieceSize, chunkSize := l.PieceSize, l.ChunkSize()
	if index >= (size-1)/pieceSize+1 {
		return false
	}
	left := min(pieceSize, size-index*pieceSize) - begin
	return begin%chunkSize == 0 && left > 0 && length == min(chunkSize, left)
}
