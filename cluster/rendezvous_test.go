package cluster

import (
	"fmt"
	"maps"
	"slices"
	"testing"

	"github.com/opencontainers/go-digest"
)

func crowd(n int) []Member {
	out := make([]Member, n)
	for i := range out {
		out[i] = Member{Name: fmt.Sprintf("node-%d", i)}
	}
	return out
}

func names(ms []Member) []string {
	out := make([]string, len(ms))
	for i, m := range ms {
		out[i] = m.Name
	}
	return out
}

func without(ms []Member, name string) []Member {
	return slices.DeleteFunc(slices.Clone(ms), func(m Member) bool { return m.Name == name })
}

// The order must be the same in every version to come, or a cluster that is
// being upgraded has two trackers for one blob.
func TestRankIsStable(t *testing.T) {
	got := names(rank("sha256:00", crowd(5)))
	want := []string{"node-3", "node-0", "node-4", "node-2", "node-1"}
	if !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestRankMovesOnlyWhatItMust(t *testing.T) {
	for _, n := range []int{1, 2, 3, 10, 33} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			members := crowd(n)
			for blob := range 200 {
				key := digest.FromString(fmt.Sprint(blob)).String()
				all := rank(key, members)
				turned := slices.Clone(members)
				slices.Reverse(turned)
				if !slices.Equal(names(rank(key, turned)), names(all)) {
					t.Fatal("the order depends on the order of the members")
				}
				gone := all[blob%n].Name
				if got, want := names(rank(key, without(members, gone))), names(without(all, gone)); !slices.Equal(got, want) {
					t.Fatalf("without %s: %v, want %v", gone, got, want)
				}
			}
		})
	}
}

func TestRankSpreads(t *testing.T) {
	members, first := crowd(8), map[string]int{}
	for blob := range 8000 {
		first[rank(digest.FromString(fmt.Sprint(blob)).String(), members)[0].Name]++
	}
	for name, n := range first {
		if n < 800 || n > 1200 {
			t.Errorf("%s is first for %d of 8000 blobs", name, n)
		}
	}
	if len(first) != 8 {
		t.Errorf("only %v are ever first", slices.Collect(maps.Keys(first)))
	}
}

// A slow member stands in for all others, as long as such are few.
func TestSlowMembersComeLast(t *testing.T) {
	slow := func(members []Member, names ...string) []Member {
		out := slices.Clone(members)
		for i := range out {
			out[i].Slow = slices.Contains(names, out[i].Name)
		}
		return out
	}
	for _, c := range []struct {
		members, slow int
		heeded        bool
	}{{2, 1, true}, {3, 1, true}, {5, 2, false}, {6, 2, true}, {6, 3, false}, {8, 2, true}, {8, 3, false}, {100, 33, true}, {100, 34, false}} {
		members := crowd(c.members)
		var few []string
		for i := range c.slow {
			few = append(few, members[i].Name)
		}
		before, after := names(trackersOf(members)), names(trackersOf(slow(members, few...)))
		for blob := range 200 {
			key := digest.FromString(fmt.Sprint(blob)).String()
			plain, order := names(rank(key, members)), names(rank(key, slow(members, few...)))
			want := plain
			if c.heeded {
				isSlow := func(name string) bool { return slices.Contains(few, name) }
				want = slices.DeleteFunc(slices.Clone(plain), isSlow)
				want = append(want, slices.DeleteFunc(plain, func(name string) bool { return !isSlow(name) })...)
			}
			if !slices.Equal(order, want) {
				t.Fatalf("%d of %d are slow: %v, want %v", c.slow, c.members, order, want)
			}
		}
		if c.members > maxTrackers && slices.ContainsFunc(few, func(name string) bool { return slices.Contains(after, name) }) == c.heeded {
			t.Errorf("%d of %d are slow: %v track", c.slow, c.members, after)
		}
		if !c.heeded && !slices.Equal(before, after) {
			t.Errorf("%d of %d are slow: %v track, %v did before", c.slow, c.members, after, before)
		}
	}
}

func TestTrackerNodes(t *testing.T) {
	members := crowd(100)
	before := names(trackersOf(members))
	if len(before) != maxTrackers {
		t.Fatalf("%d tracker nodes", len(before))
	}
	if n := len(trackersOf(crowd(5))); n != 5 {
		t.Errorf("%d tracker nodes of 5 members", n)
	}
	for _, m := range members {
		after := names(trackersOf(without(members, m.Name)))
		missing := 0
		for _, name := range before {
			if !slices.Contains(after, name) {
				missing++
			}
		}
		want := 0
		if slices.Contains(before, m.Name) {
			want = 1
		}
		if missing != want {
			t.Errorf("without %s, %d trackers changed, want %d", m.Name, missing, want)
		}
	}
}
