package store

import (
	"fmt"
	"testing"
)

func TestRangesAdd(t *testing.T) {
	for _, tc := range []struct {
		name  string
		add   []span
		want  string
		total int64
	}{
		{"empty", []span{{5, 5}, {7, 3}}, "[]", 0},
		{"apart", []span{{0, 2}, {4, 6}}, "[{0 2} {4 6}]", 4},
		{"reverse", []span{{4, 6}, {0, 2}}, "[{0 2} {4 6}]", 4},
		{"touching", []span{{0, 2}, {4, 6}, {2, 4}}, "[{0 6}]", 6},
		{"inside", []span{{0, 9}, {3, 4}}, "[{0 9}]", 9},
		{"over", []span{{2, 3}, {5, 6}, {8, 9}, {1, 8}}, "[{1 9}]", 8},
		{"same", []span{{2, 3}, {2, 3}}, "[{2 3}]", 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var r ranges
			for _, s := range tc.add {
				r.add(s.lo, s.hi)
			}
			if got := fmt.Sprint(r.spans); got != tc.want || r.total != tc.total {
				t.Errorf("got %s with %d bytes, want %s with %d", got, r.total, tc.want, tc.total)
			}
		})
	}
}

// FuzzRanges compares the set with a bitmap.
func FuzzRanges(f *testing.F) {
	f.Add([]byte{0, 2, 4, 6, 2, 4})
	f.Add([]byte{9, 1, 1, 9, 200, 255, 0, 255})
	f.Fuzz(func(t *testing.T, ops []byte) {
		var r ranges
		var bits [256]bool
		for i := 0; i+1 < len(ops) && i < 400; i += 2 {
			lo, hi := int64(ops[i]), int64(ops[i+1])
			var missing int64
			for b := lo; b < hi; b++ {
				if !bits[b] {
					missing++
				}
			}
			if r.has(lo, hi) != (missing == 0) {
				t.Fatalf("has(%d, %d) of %v", lo, hi, r.spans)
			}
			for _, g := range r.gaps(lo, hi) {
				missing -= g.hi - g.lo
				for b := g.lo; b < g.hi; b++ {
					if bits[b] || b < lo || b >= hi {
						t.Fatalf("gap %v in %d-%d of %v", g, lo, hi, r.spans)
					}
				}
			}
			if missing != 0 {
				t.Fatalf("gaps(%d, %d) of %v miss %d bytes", lo, hi, r.spans, missing)
			}
			r.add(lo, hi)
			for b := lo; b < hi; b++ {
				bits[b] = true
			}
		}
		var total, prefix int64
		whole := true
		for _, b := range bits {
			if b {
				total++
			}
			if whole = whole && b; whole {
				prefix++
			}
		}
		if r.total != total || r.prefix() != prefix {
			t.Fatalf("%v: total %d, prefix %d; want %d, %d", r.spans, r.total, r.prefix(), total, prefix)
		}
		for i, s := range r.spans {
			if s.lo >= s.hi || i > 0 && r.spans[i-1].hi >= s.lo {
				t.Fatalf("not normal: %v", r.spans)
			}
		}
	})
}
