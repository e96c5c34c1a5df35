package swarm

import "math/bits"

const (
	minSegment = 1 << 20
	maxSegment = 64 << 20
	minPiece   = 256 << 10
	maxPiece   = 4 << 20
	// minChunk and maxChunk bound the unit of a request. 128 KiB is refused; with
	// 16 KiB a fast link is used by half, with 64 KiB in a small segment too much
	// of it comes twice, from two peers.
	minChunk = 16 << 10
	maxChunk = 64 << 10
	// chunksPerSegment is how many chunks a whole segment has, if the bounds
	// allow.
	chunksPerSegment = 64
	// segmentsAim is how many segments a blob is cut into while the bounds
	// above allow: with fewer than about 16 the last one costs a tail.
	segmentsAim = 64
	// piecesPerSegment is how many pieces a whole segment has, if they are not
	// to be smaller than the smallest.
	piecesPerSegment = 16
)

// Layout says how a blob is cut into segments and these into pieces. It is a
// pure function of the blob's size, so that all nodes cut alike.
// All sizes are bytes. The zero Layout is that of an empty blob.
type Layout struct {
	Size        int64 // of the blob
	SegmentSize int64 // of every segment but the last; a power of two
	PieceSize   int64 // of every piece but a segment's last; a power of two
}

// LayoutOf returns the layout of a blob of size bytes. A size below 1 has no
// segments.
func LayoutOf(size int64) Layout {
	if size <= 0 {
		return Layout{}
	}
	seg := min(max(ceilPow2((size-1)/segmentsAim+1), minSegment), maxSegment)
	return Layout{
		Size:        size,
		SegmentSize: seg,
		PieceSize:   min(max(seg/piecesPerSegment, minPiece), maxPiece),
	}
}

// ceilPow2 returns the smallest power of two that is at least n, and maxSegment
// for anything larger than that.
func ceilPow2(n int64) int64 {
	if n > maxSegment {
		return maxSegment
	}
	if n <= 1 {
		return 1
	}
	return 1 << bits.Len64(uint64(n-1))
}

// Segments returns how many segments the blob has.
func (l Layout) Segments() int {
	if l.SegmentSize <= 0 {
		return 0
	}
	return int((l.Size-1)/l.SegmentSize + 1)
}

// Segment returns where segment i begins in the blob and how long it is.
// Outside [0, Segments()) it returns 0, 0.
func (l Layout) Segment(i int) (off, n int64) {
	if i < 0 || i >= l.Segments() {
		return 0, 0
	}
	off = int64(i) * l.SegmentSize
	return off, min(l.SegmentSize, l.Size-off)
}

// ChunkSize returns the size in bytes of every request but a piece's last.
func (l Layout) ChunkSize() int64 {
	return min(max(l.SegmentSize/chunksPerSegment, minChunk), maxChunk)
}

// Pieces returns how many pieces segment i has; 0 outside [0, Segments()).
func (l Layout) Pieces(i int) int {
	_, n := l.Segment(i)
	if n == 0 {
		return 0
	}
	return int((n-1)/l.PieceSize + 1)
}
