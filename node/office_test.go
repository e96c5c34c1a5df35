package node

import (
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/imagewolf/imagewolf/cluster"
)

// TestNewInOffice: a tracker is new in office after its start, after the one before
// it has gone, and for as long as it stands in for one.
func TestNewInOffice(t *testing.T) {
	const d = digest.Digest("sha256:0000")
	first, second := cluster.Member{Name: "a"}, cluster.Member{Name: "b"}
	if at, _ := cluster.TrackerOf(d, []cluster.Member{first, second}); at.Name != first.Name {
		first, second = second, first
	}
	third := cluster.Member{Name: "c"}
	for at, _ := cluster.TrackerOf(d, []cluster.Member{first, second, third}); at.Name == third.Name; at, _ = cluster.TrackerOf(d, []cluster.Member{first, second, third}) {
		third.Name += "c"
	}
	slow := first
	slow.Slow = true
	now := time.Now()
	var o office
	for _, step := range []struct {
		after    time.Duration
		trackers []cluster.Member // noted then; nil: nothing is
		wants    map[string]bool  // who is new
	}{
		{0, []cluster.Member{first}, map[string]bool{first.Name: true}},
		{time.Minute, []cluster.Member{first, second}, map[string]bool{first.Name: true, second.Name: true}},
		{officeNew, nil, map[string]bool{first.Name: true}},
		{time.Millisecond, nil, map[string]bool{first.Name: false, second.Name: true}},
		{time.Minute, []cluster.Member{first, second, third}, map[string]bool{first.Name: false, second.Name: true}},
		{time.Minute, []cluster.Member{second, third}, map[string]bool{first.Name: true}},
		{0, []cluster.Member{second, third}, map[string]bool{first.Name: true}},
		{officeNew, []cluster.Member{first, second, third}, map[string]bool{first.Name: true, second.Name: true}},
		{time.Second, []cluster.Member{first, second}, map[string]bool{first.Name: true}},
		{time.Second + time.Millisecond, nil, map[string]bool{first.Name: false, second.Name: true}},
		{time.Minute, []cluster.Member{slow, second}, map[string]bool{first.Name: true, second.Name: true}},
		{officeNew + time.Millisecond, nil, map[string]bool{first.Name: true, second.Name: false}},
	} {
		now = now.Add(step.after)
		if step.trackers != nil {
			o.note(now, step.trackers)
		}
		for name, want := range step.wants {
			if got := o.isNew(now, d, name); got != want {
				t.Errorf("after %v %s is new: %v, want %v", step.after, name, got, want)
			}
		}
	}
	if len(o.terms) > 3 {
		t.Errorf("%d terms are remembered", len(o.terms))
	}
}
