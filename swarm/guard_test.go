package swarm

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
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
	e := evil{c, bufio.NewReader(c)}
	_ = c.SetDeadline(time.Now().Add(patience)) // a failure shows at the read
	hello := append([]byte(pp.Protocol), 0, 0, 0, 0, 0, 0, 0, 4)
	hello = append(hello, hash[:]...)
	hello = append(hello, "-EV0001-abcdefghijkl"...)
	if _, err := c.Write(hello); err != nil {
		return e, err
	}
	_, err := io.ReadFull(e.r, make([]byte, len(hello)))
	return e, err
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

// attack connects to the victim.
func attack(t testing.TB, p *peer, s *segment) evil {
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
	e, err := shake(stream, s.hash)
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
