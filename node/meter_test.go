package node

import (
	"math"
	"testing"
	"time"
)

func TestMeter(t *testing.T) {
	const mib = 1 << 20
	start := time.Unix(1_800_000_000, 0)
	at := func(seconds float64) time.Time { return start.Add(time.Duration(seconds * float64(time.Second))) }
	for _, c := range []struct {
		name           string
		feed           func(m *meter)
		after          float64 // seconds
		line, registry int64
	}{
		{"nothing", func(*meter) {}, 1, 0, 0},
		{"a burst says nothing of the line", func(m *meter) {
			m.received(8*mib, true, at(0), at(0.5))
		}, 1, 0, 8 * mib},
		{"a registry's bytes, lump by lump on a slow line", func(m *meter) {
			for i := range 4 {
				m.received(mib, true, at(float64(8*i)), at(float64(8*i+8)))
			}
		}, 33, mib / 8, mib / 8},
		{"beside them other bytes, piece by piece", func(m *meter) {
			for i := range 40 {
				m.received(mib/80, false, at(float64(i)/5), at(float64(i+1)/5))
			}
			m.received(mib/2, true, at(0), at(8))
		}, 9, mib / 8, mib / 16},
		{"all that comes in at the same time is one line's", func(m *meter) {
			for i := range 5 {
				m.received(mib, true, at(float64(i)), at(float64(i+1)))
				m.received(3*mib, false, at(float64(i)), at(float64(i+1)))
			}
		}, 6, 4 * mib, mib},
		{"what goes out counts, but for what buffers take", func(m *meter) {
			m.sent(6*mib, at(0), at(0.1))
			m.sent(1, at(1), at(1))
			m.sent(1, at(2), at(2))
		}, 3, 2 * mib, 0},
		{"for half an hour", func(m *meter) {
			m.received(40*mib, true, at(0), at(10))
		}, 29 * 60, 4 * mib, 4 * mib},
		{"no longer", func(m *meter) {
			m.received(40*mib, true, at(0), at(10))
		}, 36 * 60, 0, 0},
		{"of a long wait only the last minute counts", func(m *meter) {
			m.received(62*mib, true, at(0), at(3600))
		}, 3601, mib, mib},
	} {
		m := &meter{}
		c.feed(m)
		if line, registry := m.rates(at(c.after)); line != c.line || registry != c.registry {
			t.Errorf("%s: line %d, registry %d; want %d, %d", c.name, line, registry, c.line, c.registry)
		}
	}
}

// What comes in now is of the last seconds; what registries have sent just now, of the
// best of the last ten.
func TestMeterNow(t *testing.T) {
	const mib = 1 << 20
	start := time.Unix(1_800_000_000, 0)
	at := func(seconds float64) time.Time { return start.Add(time.Duration(seconds * float64(time.Second))) }
	m := &meter{}
	if peers, registry := m.now(at(0)); peers != 0 || registry != 0 {
		t.Errorf("before the first byte: %v, %d", peers, registry)
	}
	m.received(30*mib, true, at(0), at(3))
	m.received(9*mib, false, at(0), at(9))
	for _, c := range []struct {
		after    float64
		peers    float64
		registry int64
	}{{2.99, 1 * mib, 8 * mib}, {8.99, 1 * mib, 8 * mib}, {10.5, mib / 2.5, 8 * mib}, {11.5, 0, 8 * mib}, {12.5, 0, 0}} {
		peers, registry := m.now(at(c.after))
		if math.Abs(peers-c.peers) > mib/10 || registry != c.registry {
			t.Errorf("after %v s: %.2f MiB/s from peers, %d from registries; want %.2f, %d", c.after, peers/mib, registry, c.peers/mib, c.registry)
		}
	}
}
