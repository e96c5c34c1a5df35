package store

import "sort"

// span is the bytes from lo up to, not including, hi.
type span struct{ lo, hi int64 }

// ranges is a set of bytes, kept as sorted spans that neither overlap nor
// touch. The zero value is empty. It is not safe for concurrent use.
type ranges struct {
	spans []span
	total int64 // bytes in all spans
}

// from returns the index of the first span that ends at or after lo.
func (r *ranges) from(lo int64) int {
	return sort.Search(len(r.spans), func(i int) bool { return r.spans[i].hi >= lo })
}

// add puts the bytes from lo to hi into the set.
func (r *ranges) add(lo, hi int64) {
	if lo >= hi {
		return
	}
	i := r.from(lo)
	j := i
	for ; j < len(r.spans) && r.spans[j].lo <= hi; j++ {
		lo, hi = min(lo, r.spans[j].lo), max(hi, r.spans[j].hi)
		r.total -= r.spans[j].hi - r.spans[j].lo
	}
	r.total += hi - lo
	if i == j {
		r.spans = append(r.spans, span{})
		copy(r.spans[i+1:], r.spans[i:])
	} else {
		r.spans = append(r.spans[:i+1], r.spans[j:]...)
	}
	r.spans[i] = span{lo, hi}
}

// has reports whether every byte from lo to hi is in the set.
func (r *ranges) has(lo, hi int64) bool {
	if lo >= hi {
		return true
	}
	i := r.from(lo + 1)
	return i < len(r.spans) && r.spans[i].lo <= lo && hi <= r.spans[i].hi
}

// gaps returns the spans from lo to hi that are not in the set.
func (r *ranges) gaps(lo, hi int64) []span {
	var out []span
	for i := r.from(lo); i < len(r.spans) && r.spans[i].lo < hi; i++ {
		if lo < r.spans[i].lo {
			out = append(out, span{lo, r.spans[i].lo})
		}
		lo = max(lo, r.spans[i].hi)
	}
	if lo < hi {
		out = append(out, span{lo, hi})
	}
	return out
}

// prefix returns how many bytes from 0 on are in the set without a gap.
func (r *ranges) prefix() int64 {
	if len(r.spans) == 0 || r.spans[0].lo > 0 {
		return 0
	}
	return r.spans[0].hi
}

// clone returns a copy that shares nothing with r.
func (r *ranges) clone() ranges {
	return ranges{spans: append([]span(nil), r.spans...), total: r.total}
}
