package node

import (
	"bytes"
	"log/slog"
	"testing"

	apiv1 "github.com/imagewolf/imagewolf/api/v1"
	"github.com/imagewolf/imagewolf/swarm"
)

// TestReplacedHashes: a tracker that has other piece hashes for a segment is
// followed, but not once bytes of it have come: those would be handed on as if
// they were right by the new ones, and this node be banned for it.
func TestReplacedHashes(t *testing.T) {
	content := make([]byte, 2*mib)
	p := newZoned(t, content, 1, 1).peers[0]
	s := &session{
		blob: p.blob, layout: swarm.LayoutOf(int64(len(content))), log: slog.New(slog.DiscardHandler),
		pieces: map[int][]byte{}, peers: map[int][]string{}, announced: map[int]bool{},
	}
	hashes := func(with byte) []byte { return bytes.Repeat([]byte{with}, 20*s.layout.Pieces(0)) }
	told := func(seg int, pieces []byte) {
		s.segment(&apiv1.Segment{Segment: uint32(seg), Pieces: pieces, Peers: []*apiv1.Peer{{Address: "127.0.0.1:1"}}})
	}
	if err := p.data.MarkPresent(mib, unit); err != nil { // of segment 1
		t.Fatal(err)
	}
	for seg, want := range [][]byte{hashes(2), hashes(1)} {
		told(seg, hashes(1))
		told(seg, hashes(2))
		if !bytes.Equal(s.pieces[seg], want) {
			t.Errorf("segment %d goes by hashes of %d, want %d", seg, s.pieces[seg][0], want[0])
		}
	}
}
