package swarm

import (
	"context"
	"crypto/sha1"
	"fmt"
	"io"
	"strconv"

	"github.com/anacrolix/torrent/bencode"
	"github.com/anacrolix/torrent/metainfo"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// source keeps the torrents apart from all others there are. It follows from no
// key of the cluster: while keys are exchanged, nodes with the one and with the
// other would be in two swarms. Strangers have no use for an infohash, since
// they do not get to speak of it.
const source = "imagewolf"

// infoBytes returns the bencoded info dict of one segment's torrent, whose
// SHA-1 is the infohash. Nothing in it differs from node to node.
func infoBytes(d digest.Digest, l Layout, seg int, pieces []byte) ([]byte, error) {
	_, n := l.Segment(seg)
	private := true
	b, err := bencode.Marshal(metainfo.Info{
		Name:        d.String() + "." + strconv.Itoa(seg),
		Length:      n,
		PieceLength: l.PieceSize,
		Pieces:      pieces,
		Private:     &private,
		Source:      source,
	})
	if err != nil {
		return nil, fmt.Errorf("info dict of segment %d of %s: %w", seg, d, err)
	}
	return b, nil
}

// checkSegment says whether the blob has a segment of that number.
func checkSegment(l Layout, seg int) error {
	if n := l.Segments(); seg < 0 || seg >= n {
		return fmt.Errorf("segment %d of a blob with %d: %w", seg, n, errdefs.ErrOutOfRange)
	}
	return nil
}

// checkPieces says whether pieces can be the piece hashes of the segment. They
// come from peers.
func checkPieces(l Layout, seg int, pieces []byte) error {
	if err := checkSegment(l, seg); err != nil {
		return err
	}
	if want := sha1.Size * l.Pieces(seg); len(pieces) != want {
		return fmt.Errorf("piece hashes of segment %d are %d bytes, want %d: %w", seg, len(pieces), want, errdefs.ErrInvalidArgument)
	}
	return nil
}

// hashPieces returns the SHA-1 hashes of the segment's pieces, 20 bytes each,
// in order. It ends early when ctx does.
func hashPieces(ctx context.Context, r io.ReaderAt, l Layout, seg int) ([]byte, error) {
	off, n := l.Segment(seg)
	buf := getBuffer()
	defer putBuffer(buf)
	pieces := make([]byte, 0, sha1.Size*l.Pieces(seg))
	for at := int64(0); at < n; at += l.PieceSize {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		h := sha1.New()
		// Hiding WriterTo and ReaderFrom makes the copy use the buffer.
		piece := io.NewSectionReader(r, off+at, min(l.PieceSize, n-at))
		copied, err := io.CopyBuffer(struct{ io.Writer }{h}, struct{ io.Reader }{piece}, *buf)
		if err == nil && copied != piece.Size() {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return nil, fmt.Errorf("hash pieces of segment %d: %w", seg, err)
		}
		pieces = h.Sum(pieces)
	}
	return pieces, nil
}
