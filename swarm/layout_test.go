package swarm

import (
	"math"
	"testing"
)

func TestLayoutOf(t *testing.T) {
	const mib = 1 << 20
	for _, c := range []struct {
		name            string
		size, seg, pc   int64
		segments, first int // pieces of the first segment
	}{
		{"negative", -1, 0, 0, 0, 0},
		{"empty", 0, 0, 0, 0, 0},
		{"one byte", 1, mib, 256 << 10, 1, 1},
		{"one piece and a byte", 256<<10 + 1, mib, 256 << 10, 1, 2},
		{"one segment", mib, mib, 256 << 10, 1, 4},
		{"one segment and a byte", mib + 1, mib, 256 << 10, 2, 4},
		{"largest with the smallest segment", 64 * mib, mib, 256 << 10, 64, 4},
		{"largest with the smallest piece", 256 * mib, 4 * mib, 256 << 10, 64, 16},
		{"a byte more", 256*mib + 1, 8 * mib, 512 << 10, 33, 16},
		{"1 GiB", 1 << 30, 16 * mib, mib, 64, 16},
		{"4 GiB", 4 << 30, 64 * mib, 4 * mib, 64, 16},
		{"5 GiB", 5 << 30, 64 * mib, 4 * mib, 80, 16},
		{"largest", math.MaxInt64, 64 * mib, 4 * mib, 1 << 37, 16},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := LayoutOf(c.size)
			if l.SegmentSize != c.seg || l.PieceSize != c.pc || l.Segments() != c.segments || l.Pieces(0) != c.first {
				t.Errorf("got %+v, %d segments, %d pieces in the first", l, l.Segments(), l.Pieces(0))
			}
		})
	}
}

func FuzzLayout(f *testing.F) {
	for _, size := range []int64{-1, 0, 1, 1 << 20, 1<<20 + 1, 1 << 30, 1<<40 + 7, math.MaxInt64} {
		f.Add(size)
	}
	f.Fuzz(func(t *testing.T, size int64) {
		l := LayoutOf(size)
		n := l.Segments()
		if size <= 0 {
			if n != 0 {
				t.Fatalf("%d segments in nothing", n)
			}
			return
		}
		for _, v := range []int64{l.SegmentSize, l.PieceSize} {
			if v <= 0 || v&(v-1) != 0 {
				t.Fatalf("%d is no power of two", v)
			}
		}
		if l.SegmentSize < minSegment || l.SegmentSize > maxSegment || l.PieceSize != max(l.SegmentSize/piecesPerSegment, minPiece) {
			t.Fatalf("out of bounds: %+v", l)
		}
		if l.SegmentSize < maxSegment && n > segmentsAim {
			t.Fatalf("%d segments", n)
		}
		// Segments are contiguous and end where the blob does; looking at the
		// ends is enough, all others are whole.
		for _, i := range []int{0, n / 2, n - 1} {
			off, length := l.Segment(i)
			if off != int64(i)*l.SegmentSize || length <= 0 || length > l.SegmentSize {
				t.Fatalf("segment %d of %d: %d+%d", i, n, off, length)
			}
			if i < n-1 && length != l.SegmentSize || i == n-1 && off+length != size {
				t.Fatalf("segment %d of %d: %d+%d of %d", i, n, off, length, size)
			}
			if p := int64(l.Pieces(i)); (p-1)*l.PieceSize >= length || p*l.PieceSize < length {
				t.Fatalf("%d pieces for %d bytes", p, length)
			}
		}
		for _, i := range []int{-1, n} {
			if off, length := l.Segment(i); off != 0 || length != 0 || l.Pieces(i) != 0 {
				t.Fatalf("segment %d of %d: %d+%d", i, n, off, length)
			}
		}
	})
}
