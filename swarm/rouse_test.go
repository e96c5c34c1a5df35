package swarm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"reflect"
	"slices"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"

	"github.com/anacrolix/torrent"
	"github.com/anacrolix/torrent/metainfo"
	pp "github.com/anacrolix/torrent/peer_protocol"
	"github.com/opencontainers/go-digest"
)

// A connection whose writer has missed that it was woken asks all the same.
func TestLostWakeUp(t *testing.T) {
	p, b, s := victim(t)
	e := attack(t, p, s)
	e.send(pp.Message{Type: pp.HaveNone})
	time.Sleep(2 * keepAlive) // the writer does not look by itself any more
	loseWakeUp(t, b, s)
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

// loseWakeUp leaves the one connection of a segment as it is when it was noted that
// there is something to do, and the writer was not awake to hear of it.
func loseWakeUp(t *testing.T, b *Blob, s *segment) {
	t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	conns := s.t.PeerConns()
	if len(conns) != 1 {
		t.Fatalf("%d connections", len(conns))
	}
	f := reflect.ValueOf(conns[0]).Elem().FieldByName("needRequestUpdate")
	reflect.NewAt(f.Type(), unsafe.Pointer(f.UnsafeAddr())).Elem().SetString("lost")
	conns[0].PeerPieces() // takes the client's lock: others see it from now on
}

// Who waits for a node that has missed that it was asked gets its answer.
func TestIdleHolderIsRoused(t *testing.T) {
	data := content(minSegment, 8)
	p := newPeer(t)
	b := p.open(t, digest.FromBytes(data), wholeMemory(data))
	if _, err := b.Offer(t.Context(), 0, nil); err != nil {
		t.Fatal(err)
	}
	s := b.segs[0]
	e := attack(t, p, s)
	e.send(pp.Message{Type: pp.HaveNone})
	limit := time.Now().Add(patience)
	roused := func() bool {
		b.mu.Lock()
		defer b.mu.Unlock()
		return slices.ContainsFunc(s.t.PeerConns(), interested)
	}
	for !roused() {
		if time.Now().After(limit) {
			t.Fatal("the connection was left alone")
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// interested says whether the client has heard that the peer wants something.
func interested(c *torrent.PeerConn) bool {
	c.PeerPieces() // as above
	return reflect.ValueOf(c).Elem().FieldByName("peerInterested").Bool()
}

// What is put in comes between messages, wherever they are cut and whenever it is
// asked for, and nothing else changes.
func TestPutInBetweenMessages(t *testing.T) {
	for seed := range uint64(200) {
		synctest.Test(t, func(t *testing.T) { putIn(t, rand.New(rand.NewPCG(seed, 0))) })
	}
}

func putIn(t *testing.T, r *rand.Rand) {
	ours, theirs := net.Pipe()
	c := &conn{Conn: ours, swarm: &Swarm{}}
	var hash metainfo.Hash
	for i := range hash {
		hash[i] = byte(r.Uint32())
	}
	stream := append([]byte(pp.Protocol), 0, 0, 0, 0, 0, 0, 0, 4)
	stream = append(stream, hash[:]...)
	stream = append(stream, "-EV0001-abcdefghijkl"...)
	var sent [][]byte
	for range 20 {
		body := make([]byte, r.IntN(4)*r.IntN(100))
		for i := range body {
			body[i] = 0xee // none of them is what is put in
		}
		m := append(binary.BigEndian.AppendUint32(nil, uint32(len(body))), body...)
		sent = append(sent, m)
		stream = append(stream, m...)
	}
	buf := make([]byte, 5+r.IntN(100))
	dice := rand.New(rand.NewPCG(r.Uint64(), 1))
	go func() {
		for len(stream) > 0 {
			n := min(len(stream), 1+dice.IntN(40))
			if _, err := theirs.Write(stream[:n]); err != nil {
				t.Error(err)
			}
			stream = stream[n:]
			time.Sleep(time.Millisecond)
			if c.hash.Load() != nil && dice.IntN(2) == 0 {
				c.rouse()
			}
		}
		c.rouse()
		synctest.Wait()
		_ = theirs.Close()
	}()
	got, put := bytes.Buffer{}, 0
	if _, err := io.CopyBuffer(struct{ io.Writer }{&got}, struct{ io.Reader }{connReader{c}}, buf); err != nil && !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	rest := got.Bytes()[handshakeSize:]
	for len(rest) > 0 {
		n := 4 + int(binary.BigEndian.Uint32(rest))
		switch m := rest[:n]; {
		case bytes.Equal(m, wake):
			put++
		case len(sent) == 0 || !bytes.Equal(m, sent[0]):
			t.Fatalf("%x came, %d are missing", m, len(sent))
		default:
			sent = sent[1:]
		}
		rest = rest[n:]
	}
	if len(sent) > 0 || put == 0 || *c.hash.Load() != hash {
		t.Errorf("%d messages are missing, %d were put in, hash %v", len(sent), put, c.hash.Load())
	}
}

type connReader struct{ c *conn }

func (r connReader) Read(p []byte) (int, error) { return r.c.receive(p) }

// However the bytes of a peer are cut, its messages end where they end.
func FuzzParser(f *testing.F) {
	f.Add([]byte{0, 0, 0, 1, 2, 0, 0, 0, 0, 0, 0, 0, 5, 4, 0, 0, 0, 3}, uint8(3))
	f.Fuzz(func(t *testing.T, messages []byte, cut uint8) {
		stream := append(make([]byte, handshakeSize), messages...)
		ends := map[int]bool{}
		for at := handshakeSize; at <= len(stream); {
			ends[at] = true
			if at+4 > len(stream) {
				break
			}
			at += 4 + int(binary.BigEndian.Uint32(stream[at:]))
		}
		var p parser
		for at := 0; at < len(stream); {
			n := min(len(stream)-at, int(cut)+1)
			p.pass(stream[at : at+n])
			if at += n; p.between() != ends[at] {
				t.Fatalf("at %d: %v", at, p.between())
			}
		}
	})
}
