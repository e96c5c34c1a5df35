package swarm

import (
	"bytes"
	"fmt"
	"testing"

	"github.com/opencontainers/go-digest"
)

// Pieces that are here by some hashes are right by others if these say the same.
func TestClash(t *testing.T) {
	const pieces = minSegment / minPiece
	m := newMemory(2 * minSegment)
	b := newPeer(t).open(t, digest.FromString("x"), m)
	if err := m.MarkPresent(minSegment+minPiece, minPiece); err != nil { // the second of segment 1
		t.Fatal(err)
	}
	hashes := func(piece int) []byte {
		h := make([]byte, pieces*20)
		h[piece*20+19] = 1
		return h
	}
	for _, c := range []struct {
		name       string
		seg        int
		one, other []byte
		want       bool
	}{
		{"nothing is here", 0, hashes(1), hashes(2), false},
		{"the same", 1, hashes(1), hashes(1), false},
		{"others of pieces that are not here", 1, hashes(0), hashes(2), false},
		{"another of the piece that is", 1, hashes(0), hashes(1), true},
		{"too few", 1, hashes(0), hashes(0)[20:], true},
		{"no segment", 2, hashes(0), nil, false},
		{"no segment", -1, nil, hashes(0), false},
	} {
		if got := b.Clash(c.seg, c.one, c.other); got != c.want {
			t.Errorf("%s: %v", c.name, got)
		}
	}
}

// Bytes of the registry are not sent on by hashes that they do not have: whoever got
// them would take this node for a liar.
func TestRegistryBytesByWrongHashes(t *testing.T) {
	data := content(minSegment, 3)
	from, other, to := newPeer(t), newPeer(t), newMemory(len(data))
	d := digest.FromBytes(data)
	mine := newMemory(len(data))
	fetcher, leecher := from.open(t, d, mine), other.open(t, d, to)
	fetcher.Fetching(true)
	lies := bytes.Repeat([]byte{9}, fetcher.layout.Pieces(0)*20)
	if err := fetcher.Leech(0, lies, []string{"127.0.0.1:1"}); err != nil {
		t.Fatal(err)
	}
	if err := leecher.Leech(0, lies, addrs(from)); err != nil {
		t.Fatal(err)
	}
	mine.fill(data, 0, len(data))
	eventually(t, "the torrent by wrong hashes is dropped", func() bool {
		fetcher.mu.Lock()
		defer fetcher.mu.Unlock()
		return fetcher.segs[0] == nil
	})
	if err := fetcher.Leech(0, lies, addrs(other)); err != nil {
		t.Fatal(err)
	}
	if fetcher.Ready(0) {
		t.Error("it is there again")
	}
	if bad, sent := leecher.BadSenders(0), fetcher.Stats().Uploaded; len(bad) > 0 || sent > 0 {
		t.Errorf("%d bytes were sent on; taken for liars: %v", sent, bad)
	}
	pieces, err := fetcher.Offer(t.Context(), 0, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := leecher.Leech(0, pieces, addrs(from)); err != nil {
		t.Fatal(err)
	}
	to.await(t, 0, minSegment)
}

// Who has wrong bytes from a registry that sends no more takes the rest by the hashes that
// it is told: it is the digest that says what was wrong. So does one that was fetching.
func TestWrongBytesAndNoMoreToCome(t *testing.T) {
	for _, began := range []bool{false, true} {
		t.Run(fmt.Sprint("was fetching: ", began), func(t *testing.T) {
			_, seeder, _, from, to, mine := pair(t, minSegment)
			pieces := offerAll(t, from)[0]
			to.Fetching(began)
			if err := to.Leech(0, pieces, []string{"127.0.0.1:1"}); err != nil {
				t.Fatal(err)
			}
			mine.fill(make([]byte, minSegment), 0, minPiece)
			eventually(t, "the piece is known, or the torrent dropped", func() bool {
				to.mu.Lock()
				defer to.mu.Unlock()
				s := to.segs[0]
				return s == nil || s.t.PieceState(0).Complete
			})
			if err := to.Leech(0, pieces, addrs(seeder)); err != nil {
				t.Fatal(err)
			}
			to.Fetching(false)
			mine.await(t, 0, minSegment)
		})
	}
}
