package tracker

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	api "github.com/imagewolf/imagewolf/api/v1"
)

// A blob with too few segments for its first hop to be overtaken gets another one when the
// first has taken as long as a slow line takes, as far as it is known how fast lines are.
func TestFirstHopOfShortBlob(t *testing.T) {
	for _, c := range []struct {
		registry string // MiB/s that one has had from a registry
		size     int64
		want     time.Duration
	}{
		{"8", mib, testStall},
		{"2", mib, 4 * time.Second},
		// Otherwise when it has stood still for long, though it says that bytes come.
		{"0.5", mib, 5 * time.Second},
		{"0", mib, 5 * time.Second},
		{"8", 8 * mib, 5 * time.Second},
	} {
		s := &script{t: t, m: NewMachine(testDigest, c.size, MachineOptions{Layout: testLayout, StallTimeout: testStall}), stat: map[string]*api.Status{}}
		s.event(epoch, []string{"join", "a", "can", "registry=" + c.registry})
		s.event(epoch, []string{"status", "a", "fetching", "-can"})
		s.event(epoch, []string{"join", "b", "can"})
		s.event(epoch, []string{"join", "c", "can"})
		first := show(s.event(epoch, []string{"announce", "a", "0"}))
		hop, other := "b", "c"
		if slices.Contains(first, "c seg0*(a)") {
			hop, other = other, hop
		}
		var got time.Duration
		for at := time.Duration(0); at < 20*time.Second && got == 0; at += 50 * time.Millisecond {
			if at%(500*time.Millisecond) == 0 {
				s.event(epoch.Add(at), []string{"status", hop, "busy"})
			}
			if slices.Contains(s.tickTo(epoch.Add(at)), other+" seg0(a)") {
				got = at
			}
		}
		if got < c.want || got > c.want+2*sweepEvery {
			t.Errorf("%s MiB/s, %d MiB: %s is sent to the holder after %v, want %v", c.registry, c.size/mib, other, got, c.want)
		}
	}
}

// A lone line that is slow costs the others no first hop, and a member is told once that
// it is slow.
func TestSlowMemberIsToldOnce(t *testing.T) {
	s := &script{t: t, m: NewMachine(testDigest, 64*mib, MachineOptions{Layout: testLayout, StallTimeout: testStall}), stat: map[string]*api.Status{}}
	s.event(epoch, []string{"join", "a", "can", "registry=8"})
	s.event(epoch, []string{"status", "a", "fetching", "-can"})
	s.event(epoch, []string{"join", "b", "can"})
	s.event(epoch, []string{"join", "c", "can", "line=0.5"})
	told := 0
	for i := range 60 {
		at := epoch.Add(time.Duration(i) * 100 * time.Millisecond)
		got := append(s.tickTo(at), show(s.event(at, []string{"announce", "a", fmt.Sprint(i)}))...)
		s.event(at, []string{"status", "a", "present=" + fmt.Sprint(i+1)})
		s.event(at, []string{"announce", "b", fmt.Sprint(i)})
		for _, g := range got {
			if g == "c slow" {
				told++
			}
			if strings.HasPrefix(g, "c seg") && strings.HasSuffix(g, "*(a)") {
				t.Fatalf("%v: the slow one is a first hop: %s", at.Sub(epoch), g)
			}
		}
	}
	if told != 1 {
		t.Errorf("told %d times that it is slow, want once", told)
	}
}

// A first hop lags where others have what was sent on its way later.
func TestOvertaken(t *testing.T) {
	for _, c := range []struct {
		name  string
		order []int // in which the segments are announced by the fetcher, 0 is not had by its first hop
		want  bool
	}{
		{"by later ones", []int{0, 1, 2, 3, 4, 5}, true},
		{"not by earlier ones", []int{1, 2, 3, 4, 5, 0}, false},
		{"not by few", []int{1, 2, 3, 0, 4, 5}, false},
	} {
		s := &script{t: t, m: NewMachine(testDigest, 7*mib, MachineOptions{Layout: testLayout, StallTimeout: testStall}), stat: map[string]*api.Status{}}
		s.event(epoch, []string{"join", "a", "can"})
		s.event(epoch, []string{"status", "a", "fetching", "-can"})
		s.event(epoch, []string{"join", "b", "can"})
		s.event(epoch, []string{"join", "c", "can"})
		for k, i := range c.order {
			at := epoch.Add(time.Duration(10*k) * time.Millisecond)
			s.event(at, []string{"announce", "a", fmt.Sprint(i)})
			s.event(at, []string{"status", "a", fmt.Sprint("present=", k+1)})
			for _, x := range []string{"b", "c"} {
				if i != 0 && s.m.segs[i].hops[s.m.members["a"]] == s.m.members[x] {
					s.event(at.Add(time.Millisecond), []string{"announce", x, fmt.Sprint(i)})
				}
			}
		}
		origin := s.m.members["a"]
		hop := s.m.segs[0].hops[origin]
		s.tickTo(epoch.Add(1300 * time.Millisecond))
		if now := s.m.segs[0].hops[origin]; (now != hop) != c.want {
			t.Errorf("%s: replaced: %v, want %v", c.name, now != hop, c.want)
		}
		if !c.want || !hop.lags {
			continue
		}
		s.event(epoch.Add(1300*time.Millisecond), []string{"announce", "a", "6"})
		s.event(epoch.Add(1310*time.Millisecond), []string{"announce", hop.name, "6"})
		if hop.lags {
			t.Errorf("%s: it still lags, though it has got a segment in the meantime", c.name)
		}
	}
}

// What a fetcher's line brings is shared by all that it fetches.
func TestRestOfAFetcher(t *testing.T) {
	m := NewMachine(testDigest, 4*mib, MachineOptions{Layout: testLayout})
	f := &member{fetching: true, inflow: mib / 4, load: 3, present: mib}
	m.list = []*member{f, {lately: 8 * mib}}
	if got := m.restOf(f); got != 48*time.Second {
		t.Errorf("%v for 3 MiB at a quarter of 256 KiB/s, want 48 s", got)
	}
	f.inflow, f.line = 0, mib
	if got := m.restOf(f); got != 3*time.Second {
		t.Errorf("%v for 3 MiB at 1 MiB/s, want 3 s", got)
	}
}

// What only slow members have is brought from the registry once more, if it takes long to
// come from them; behind what others have.
func TestScarce(t *testing.T) {
	for _, c := range []struct {
		name  string
		line  string // MiB/s of the one that has all
		has   string // segments that another has, whose line is fast
		want  time.Duration
		bytes string // that come to the one that waits
	}{
		{"a slow holder", "0.125", "", testStall, "0.1"},
		{"who has gone on already", "0.125", "", testStall, "1.1"},
		{"of little", "0.5", "1+2+3", 0, "0.1"},
		{"slow, and others have more", "0.125", "0", testStall, "1"},
		{"a fast holder", "64", "", 0, "0.1"},
		{"not so slow that it takes long", "1", "", 0, "0.1"},
	} {
		s := &script{t: t, m: NewMachine(testDigest, testSize, MachineOptions{Layout: testLayout, StallTimeout: testStall}), stat: map[string]*api.Status{}}
		s.event(epoch, []string{"join", "s", "whole", "line=" + c.line, "has=0+1+2+3"})
		s.event(epoch, []string{"join", "q", "registry=8", "line=64"})
		if c.has != "" {
			s.event(epoch, []string{"leave", "q"})
			s.event(epoch, []string{"join", "q", "registry=8", "line=64", "has=" + c.has})
		}
		s.event(epoch, []string{"join", "b", "can", "line=64"})
		var told time.Duration
		for at := time.Duration(0); at < 4*time.Second && told == 0; at += 50 * time.Millisecond {
			got := s.tickTo(epoch.Add(at))
			if at == time.Second {
				got = append(got, show(s.event(epoch.Add(at), []string{"status", "b", "prefix=" + c.bytes, "busy"}))...)
			} else if at%(500*time.Millisecond) == 0 {
				got = append(got, show(s.event(epoch.Add(at), []string{"status", "b", "busy"}))...)
			}
			if slices.Contains(got, "b fetch") {
				told = at
			}
		}
		if told != c.want {
			t.Errorf("%s: one that waits is sent to the registry after %v, want %v", c.name, told, c.want)
		}
	}
}
