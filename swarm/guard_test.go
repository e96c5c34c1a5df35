package swarm

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"strconv"
	"sync"
	"testing"
	"time"

	pp "github.com/anacrolix/torrent/peer_protocol"
	"github.com/opencontainers/go-digest"
	"github.com/xtaci/smux"
)

// evil is a peer that speaks for itself.
type evil struct {
	net.Conn
	r *bufio.Reader
}

// shake does the peer protocol's handshake over c, on behalf of a node that
// has connected to, or was dialed by, one of ours.
func shake(c net.Conn, hash [20]byte) (evil, error) {
	e, _, err := shakeAs(c, hash, pp.NewPeerExtensionBytes(pp.ExtensionBitFast))
	return e, err
}

// shakeAs is shake by a peer that can do more. It returns what the node can.
func shakeAs(c net.Conn, hash [20]byte, can pp.PeerExtensionBits) (e evil, theirs pp.PeerExtensionBits, err error) {
	e = evil{c, bufio.NewReader(c)}
	_ = c.SetDeadline(time.Now().Add(patience)) // a failure shows at the read
	hello := append([]byte(pp.Protocol), can[:]...)
	hello = append(hello, hash[:]...)
	hello = append(hello, "-EV0001-abcdefghijkl"...)
	if _, err := c.Write(hello); err != nil {
		return e, theirs, err
	}
	reply := make([]byte, len(hello))
	_, err = io.ReadFull(e.r, reply)
	copy(theirs[:], reply[len(pp.Protocol):])
	return e, theirs, err
}

func (e evil) send(ms ...pp.Message) {
	for _, m := range ms {
		_, _ = e.Write(m.MustMarshalBinary()) // it may have been hung up on
	}
}

// hungUp waits until the other side closes the connection.
func (e evil) hungUp() error {
	_, err := io.Copy(io.Discard, e.r)
	return err
}

// victim is a node with one segment half here.
func victim(t testing.TB) (*peer, *Blob, *segment) {
	data := content(minSegment, 8)
	p, m := newPeer(t), newMemory(len(data))
	m.fill(data, 0, len(data)/2)
	b := p.open(t, digest.FromBytes(data), m)
	pieces, err := hashPieces(t.Context(), bytes.NewReader(data), b.layout, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Leech(0, pieces, nil); err != nil {
		t.Fatal(err)
	}
	return p, b, b.segs[0]
}

// reach opens a stream to the victim, over which nothing has been said.
func reach(t testing.TB, p *peer) net.Conn {
	c, err := net.Dial("tcp", p.addr)
	if err != nil {
		t.Fatal(err)
	}
	session, err := smux.Client(c, &trunkConfig)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = session.Close() })
	stream, err := session.OpenStream()
	if err != nil {
		t.Fatal(err)
	}
	return stream
}

// attack connects to the victim.
func attack(t testing.TB, p *peer, s *segment) evil {
	e, err := shake(reach(t, p), s.hash)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// Without the guard each of these makes the library panic, here or in Close.
func TestEvilPeers(t *testing.T) {
	for _, c := range []struct {
		name string
		msgs []pp.Message
	}{
		{"everything, nothing, something", []pp.Message{{Type: pp.HaveAll}, {Type: pp.HaveNone}, {Type: pp.Have, Index: 3}}},
		{"metadata piece -1", []pp.Message{{Type: pp.Extended, ExtendedID: 1, ExtendedPayload: []byte("d8:msg_typei0e5:piecei-1ee")}}},
		{"piece out of range", []pp.Message{{Type: pp.Have, Index: 16}}},
		{"request over the end", []pp.Message{{Type: pp.Interested}, {Type: pp.Request, Index: 0, Begin: 1, Length: 256 << 10}}},
		{"request of nothing", []pp.Message{{Type: pp.Interested}, {Type: pp.Request}}},
		{"hashes", []pp.Message{{Type: pp.HashRequest}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			p, b, s := victim(t)
			e := attack(t, p, s)
			e.send(c.msgs...)
			if err := e.hungUp(); err != nil && isTimeout(err) {
				t.Error("the connection was not closed")
			}
			if err := b.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

func isTimeout(err error) bool {
	var n net.Error
	return errors.As(err, &n) && n.Timeout()
}

// A chunk that begins late runs over the end of its piece.
func TestEvilChunk(t *testing.T) {
	p, b, s := victim(t)
	e := attack(t, p, s)
	e.send(pp.Message{Type: pp.HaveAll}, pp.Message{Type: pp.Unchoke})
	d := pp.Decoder{R: e.r, MaxLength: 1 << 20}
	for {
		var m pp.Message
		if err := d.Decode(&m); err != nil {
			t.Fatal(err)
		}
		if m.Type != pp.Request {
			continue
		}
		if m.Begin+m.Length != 256<<10 {
			// More is not asked for before this is answered.
			e.send(pp.Message{Type: pp.Piece, Index: m.Index, Begin: m.Begin, Piece: make([]byte, m.Length)})
			continue
		}
		e.send(pp.Message{Type: pp.Piece, Index: m.Index, Begin: m.Begin + 1, Piece: make([]byte, minChunk)})
		break
	}
	if err := e.hungUp(); err != nil && isTimeout(err) {
		t.Error("the connection was not closed")
	}
	if err := b.Close(); err != nil {
		t.Error(err)
	}
}

// TestMetadataIsNotTaken: what a torrent is follows from the blob and its hashes, and
// never from a peer. A node cannot do the extension by which peers exchange info dicts,
// asks for none, and hangs up on who sends one all the same.
func TestMetadataIsNotTaken(t *testing.T) {
	const inBencode = "d6:lengthi1e4:name1:x12:piece lengthi262144e6:pieces20:aaaaaaaaaaaaaaaaaaaae"
	for name, m := range map[string]pp.Message{
		"offered":   {Type: pp.Extended, ExtendedPayload: []byte("d1:md11:ut_metadatai1ee13:metadata_sizei" + strconv.Itoa(len(inBencode)) + "ee")},
		"sent":      {Type: pp.Extended, ExtendedID: 1, ExtendedPayload: []byte("d8:msg_typei1e5:piecei0e10:total_sizei" + strconv.Itoa(len(inBencode)) + "ee" + inBencode)},
		"asked for": {Type: pp.Extended, ExtendedID: 1, ExtendedPayload: []byte("d8:msg_typei0e5:piecei0ee")},
	} {
		p, b, s := victim(t)
		e, theirs, err := shakeAs(reach(t, p), s.hash, pp.NewPeerExtensionBytes(pp.ExtensionBitFast, pp.ExtensionBitLtep))
		if err != nil {
			t.Fatal(err)
		}
		if theirs.SupportsExtended() {
			t.Errorf("%s: the node can do extensions: %x", name, theirs)
		}
		e.send(m)
		for d := (pp.Decoder{R: e.r, MaxLength: 1 << 20}); ; {
			var got pp.Message
			if err = d.Decode(&got); err != nil {
				break
			}
			if got.Type == pp.Extended {
				t.Errorf("%s: it says %q", name, got.ExtendedPayload)
			}
		}
		if isTimeout(err) {
			t.Errorf("%s: the connection was not closed", name)
		}
		b.mu.Lock()
		if have := s.t.Info(); have == nil || !bytes.Equal(have.Pieces, s.pieces) || have.Length != s.n {
			t.Errorf("%s: the torrent has become %+v", name, have)
		}
		b.mu.Unlock()
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	}
}

// FuzzAllows: of whatever comes, the torrent client sees only what stays within the
// segment, chunk by chunk, and says at most once, first, what the peer has.
func FuzzAllows(f *testing.F) {
	wire := func(ms ...pp.Message) (out []byte) {
		for _, m := range ms {
			out = append(out, m.MustMarshalBinary()...)
		}
		return out
	}
	f.Add(int64(minSegment), wire(pp.Message{Type: pp.HaveAll}, pp.Message{Type: pp.Unchoke}, pp.Message{Type: pp.Request, Index: 1, Begin: minChunk, Length: minChunk}))
	f.Add(int64(minSegment-1), wire(pp.Message{Type: pp.Bitfield, Bitfield: make([]bool, 8)}, pp.Message{Type: pp.Have, Index: 3}, pp.Message{Type: pp.Piece, Index: 3, Piece: make([]byte, minChunk)}))
	f.Add(int64(1), wire(pp.Message{Type: pp.Piece, Piece: []byte("x")}, pp.Message{Type: pp.Extended, ExtendedPayload: []byte("de")}))
	f.Add(int64(minSegment), wire(pp.Message{Type: pp.Request, Length: minChunk + 1}, pp.Message{Type: pp.Request, Begin: minChunk}, pp.Message{Type: pp.Request, Begin: 1, Length: minChunk}))
	f.Add(int64(1<<40+7), wire(pp.Message{Type: pp.Cancel, Index: 15, Begin: 1 << 31, Length: 1 << 31}, pp.Message{Type: pp.HaveNone}, pp.Message{Type: pp.HaveAll}))
	f.Fuzz(func(t *testing.T, size int64, wire []byte) {
		l := LayoutOf(size)
		if l.Segments() == 0 {
			return
		}
		_, n := l.Segment(l.Segments() - 1)
		g, told := &guard{}, false
		d := pp.Decoder{R: bufio.NewReader(bytes.NewReader(wire)), MaxLength: 1 << 20, Pool: &sync.Pool{New: func() any {
			b := make([]byte, 1<<20)
			return &b
		}}}
		for {
			var m pp.Message
			if d.Decode(&m) != nil {
				return
			}
			if m.Keepalive || !g.allows(&m, n, l) {
				continue
			}
			index, begin, length := int64(m.Index), int64(m.Begin), int64(m.Length)
			switch m.Type {
			case pp.Choke, pp.Unchoke, pp.Interested, pp.NotInterested:
			case pp.HaveAll, pp.HaveNone, pp.Bitfield:
				if told {
					t.Fatalf("%v comes late", m.Type)
				}
				told = true
			case pp.Have:
				if told = true; index*l.PieceSize >= n {
					t.Fatalf("piece %d of %d bytes", index, n)
				}
			case pp.Piece, pp.Request, pp.Cancel, pp.Reject:
				if m.Type == pp.Piece {
					length = int64(len(m.Piece))
				}
				end := begin + length
				if length <= 0 || length > l.ChunkSize() || begin%l.ChunkSize() != 0 || end > l.PieceSize || index*l.PieceSize+end > n {
					t.Fatalf("%v of %d bytes at %d of piece %d of %d bytes", m.Type, length, begin, index, n)
				}
			default:
				t.Fatalf("%v is let through", m.Type)
			}
		}
	})
}

// FuzzGuard sends arbitrary messages to a node that is alive: it must neither
// fall over nor stop serving.
func FuzzGuard(f *testing.F) {
	for _, m := range []pp.Message{
		{Type: pp.HaveAll},
		{Type: pp.Bitfield, Bitfield: make([]bool, 16)},
		{Type: pp.Request, Index: 1, Begin: minChunk, Length: minChunk},
		{Type: pp.Piece, Index: 9, Piece: []byte("x")},
		{Type: pp.Extended, ExtendedID: 1, ExtendedPayload: []byte("d8:msg_typei0e5:piecei-1ee")},
	} {
		f.Add(m.MustMarshalBinary())
	}
	f.Add(binary.BigEndian.AppendUint32(nil, 1<<31))
	p, _, s := victim(f)
	f.Fuzz(func(t *testing.T, wire []byte) {
		e := attack(t, p, s)
		_, _ = e.Write(wire) // it may have been hung up on
		if err := e.Close(); err != nil {
			t.Fatal(err)
		}
		_ = attack(t, p, s).Close()
	})
}

func FuzzLeech(f *testing.F) {
	f.Add(0, make([]byte, 80), "127.0.0.1:1", "")
	f.Add(-1, []byte{}, ":0", "[::1]:99999")
	f.Add(1, make([]byte, 20), "host:http", "a:1")
	p := newPeer(f)
	f.Fuzz(func(t *testing.T, seg int, pieces []byte, a, b string) {
		const size = minSegment + 1
		blob, err := p.Open(digest.FromString("x"), size, newMemory(size))
		if err != nil {
			t.Fatal(err)
		}
		// Nobody is dialed: what is taken is looked at, not who answers.
		p.mu.Lock()
		for _, addr := range []string{a, b} {
			p.unreachable[addr] = unreachable{until: time.Now().Add(time.Hour)}
		}
		p.mu.Unlock()
		err = blob.Leech(seg, pieces, []string{a, b, a})
		valid := seg == 0 && len(pieces) == 80 || seg == 1 && len(pieces) == 20
		if valid != (err == nil) {
			t.Errorf("segment %d with %d bytes of hashes: %v", seg, len(pieces), err)
		}
		if err == nil {
			for _, got := range blob.segs[seg].peers {
				if host, port, err := net.SplitHostPort(got); err != nil || host == "" || port == "" {
					t.Errorf("peer %q was taken", got)
				}
			}
		}
		if err := blob.Close(); err != nil {
			t.Error(err)
		}
	})
}
