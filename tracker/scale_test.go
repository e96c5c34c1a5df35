package tracker

import (
	"fmt"
	"runtime"
	"testing"
	"time"

	api "github.com/imagewolf/imagewolf/api/v1"
	"github.com/imagewolf/imagewolf/swarm"
)

// productLayout cuts a blob as nodes do.
func productLayout(size int64) (Layout, int64) {
	l := swarm.LayoutOf(size)
	return Layout{Segments: l.Segments(), SegmentSize: l.SegmentSize, Pieces: l.Pieces}, l.PieceSize
}

// cut cuts a blob into segments of seg and pieces of piece bytes.
func cut(size, seg, piece int64) (Layout, int64) {
	return Layout{
		Segments: int((size + seg - 1) / seg), SegmentSize: seg,
		Pieces: func(i int) int { return int((min(seg, size-int64(i)*seg) + piece - 1) / piece) },
	}, piece
}

// newModel is a blob of size bytes that members pull at once, each with an
// uplink and a downlink of mbits Mbit/s.
func newModel(members int, size int64, mbits float64) *model {
	v := &model{members: members, size: size, rate: mbits * 1e6 / 8, near: 200 * time.Microsecond}
	v.layout, v.piece = productLayout(size)
	return v
}

// ratio is the time of the last member over that of the blob over one link.
func (v *model) ratio() float64 { return v.last.Seconds() / v.ideal() }

// copies is what has left those that have the blob from outside.
func (v *model) copies() float64 {
	var sent int64
	for _, n := range v.nodes {
		if n.fetch || n.source {
			sent += n.sent
		}
	}
	return float64(sent) / float64(v.size)
}

// The model gives what was measured with real peers, each limited to 10 MB/s.
func TestModelIsRight(t *testing.T) {
	for _, c := range []struct {
		leechers                int
		mebi, segment, piece256 int64
		measured                float64
	}{
		{7, 128, 16, 4, 1.38}, {7, 128, 8, 1, 1.21}, {7, 128, 4, 1, 1.17},
		{15, 128, 4, 1, 1.18}, {31, 64, 4, 1, 1.5},
	} {
		v := newModel(c.leechers+1, c.mebi*mib, 80)
		v.layout, v.piece = cut(v.size, c.segment*mib, c.piece256*256<<10)
		if err := v.run(); err != nil {
			t.Fatal(err)
		}
		t.Logf("%d leechers, %d MiB in segments of %d: %.2f, measured %.2f", c.leechers, c.mebi, c.segment, v.ratio(), c.measured)
		if v.ratio() < c.measured/1.1 || v.ratio() > c.measured*1.1 {
			t.Errorf("the model says %.2f", v.ratio())
		}
		if v.copies() > 1.05 {
			t.Errorf("%.2f copies were sent", v.copies())
		}
	}
}

// The speed that is asked of a few nodes, also where a segment takes longer
// than a leecher is left without new peers, and where all segments are there
// at once.
func TestFewMembers(t *testing.T) {
	for _, c := range []struct {
		members, sources int
		mebi             int64
		mbits            float64
		limit            float64
	}{
		{members: 8, mebi: 256, mbits: 200, limit: 1.2},
		{members: 16, mebi: 256, mbits: 100, limit: 1.2},
		{members: 32, mebi: 128, mbits: 50, limit: 1.4},
		{members: 32, mebi: 32, mbits: 50, limit: 1.6},
		{members: 8, mebi: 32, mbits: 10, limit: 1.4},
		{members: 7, sources: 1, mebi: 256, mbits: 200, limit: 1.2},
		{members: 31, sources: 1, mebi: 128, mbits: 50, limit: 1.4},
	} {
		v := newModel(c.members, c.mebi*mib, c.mbits)
		v.sources = c.sources
		if err := v.run(); err != nil {
			t.Fatal(err)
		}
		t.Logf("%+v: last %.2f, copies %.2f", c, v.ratio(), v.copies())
		if v.ratio() > c.limit || v.copies() > 1.02 {
			t.Errorf("%+v: last %.2f, copies %.2f", c, v.ratio(), v.copies())
		}
	}
}

// A thousand members are served as a dozen are. The blob is small, so that
// the test is quick; what the tracker sends then takes half as long as the blob.
func TestThousandMembers(t *testing.T) {
	const members = 1000
	v := newModel(members, 32*mib, 1000)
	if err := v.run(); err != nil {
		t.Fatal(err)
	}
	t.Logf("last %.2f, copies %.2f, messages %d in and %d out, machine %v", v.ratio(), v.copies(), v.in, v.out, v.busy)
	if v.ratio() > 2.2 || v.copies() > 1.05 {
		t.Errorf("last %.2f, copies %.2f", v.ratio(), v.copies())
	}
	// Per member: hello, whole, each segment, and a status now and then; an
	// answer, and each segment.
	n := v.layout.Segments
	if v.in > members*(2*n+4) || v.out > members*(n+2) {
		t.Errorf("%d messages in, %d out", v.in, v.out)
	}
}

// BenchmarkMembers is the model at full size: what it reports is of the
// members and their tracker, not of the time that the model takes.
func BenchmarkMembers(b *testing.B) {
	for _, c := range []struct {
		members int
		mebi    int64
	}{{100, 256}, {100, 1024}, {1000, 256}, {1000, 1024}, {1000, 10240}, {5000, 256}, {5000, 1024}, {10000, 1024}} {
		b.Run(fmt.Sprintf("%d/%dMiB", c.members, c.mebi), func(b *testing.B) {
			for b.Loop() {
				v := newModel(c.members, c.mebi*mib, 1000)
				if err := v.run(); err != nil {
					b.Fatal(err)
				}
				b.ReportMetric(0, "ns/op")
				b.ReportMetric(v.ratio(), "last/T")
				b.ReportMetric(v.copies(), "copies")
				b.ReportMetric(float64(v.in)/float64(c.members), "in/member")
				b.ReportMetric(float64(v.out)/float64(c.members), "out/member")
				b.ReportMetric(float64(v.inB)/float64(c.members)/1e3, "inKB/member")
				b.ReportMetric(float64(v.outB)/float64(c.members)/1e3, "outKB/member")
				b.ReportMetric(v.busy.Seconds()/v.ideal(), "cores")
			}
		})
	}
}

// BenchmarkHeap reports what a member costs its tracker while every segment
// is being spread.
func BenchmarkHeap(b *testing.B) {
	for _, members := range []int{1000, 5000} {
		b.Run(fmt.Sprint(members), func(b *testing.B) {
			for b.Loop() {
				before := liveHeap()
				m := crowd(b, members)
				for i := range len(m.segs) {
					m.Message(epoch, m.fetchers[0].name, &api.MemberMessage{Message: &api.MemberMessage_Announce{Announce: segmentOf(i, 1)}})
				}
				b.ReportMetric(float64(liveHeap()-before)/float64(members)/1024, "KiB/member")
				runtime.KeepAlive(m)
			}
		})
	}
}

// BenchmarkLeave is members that go one after the other, from the middle of
// a blob.
func BenchmarkLeave(b *testing.B) {
	const members = 5000
	m := crowd(b, members)
	for i := range len(m.segs) {
		m.Message(epoch, m.fetchers[0].name, &api.MemberMessage{Message: &api.MemberMessage_Announce{Announce: segmentOf(i, 1)}})
	}
	k := 0
	for b.Loop() {
		name := fmt.Sprint(k % members)
		m.Leave(epoch, name)
		b.StopTimer()
		join(b, m, name)
		b.StartTimer()
		k++
	}
}

// crowd is a blob of 64 segments with members that have nothing yet.
func crowd(b *testing.B, members int) *Machine {
	m := NewMachine(testDigest, 64*mib, MachineOptions{Layout: testLayout})
	for k := range members {
		join(b, m, fmt.Sprint(k))
	}
	m.Tick(epoch.Add(decideGrace))
	return m
}

func join(b *testing.B, m *Machine, name string) {
	if _, err := m.Join(epoch, &api.Hello{Size: m.size, Self: &api.Peer{Name: name, Address: name}, Status: &api.Status{CanFetch: true}}); err != nil {
		b.Fatal(err)
	}
}

func liveHeap() int64 {
	runtime.GC()
	var s runtime.MemStats
	runtime.ReadMemStats(&s)
	return int64(s.HeapAlloc)
}
