package tracker

import (
	"fmt"
	"math"
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
		line     string // of the one that has it
		want     time.Duration
	}{
		{"8", mib, "64", testStall},
		{"2", mib, "64", 4 * time.Second},
		// Otherwise when it has stood still for long, though it says that bytes come.
		{"0.5", mib, "64", 5 * time.Second},
		{"0", mib, "64", 5 * time.Second},
		{"8", 8 * mib, "64", 5 * time.Second},
		// One more would get no more, and the first less.
		{"8", mib, "1", 5 * time.Second},
	} {
		s := &script{t: t, m: NewMachine(testDigest, c.size, MachineOptions{Layout: testLayout, StallTimeout: testStall}), stat: map[string]*api.Status{}}
		s.event(epoch, []string{"join", "a", "can", "registry=" + c.registry, "line=" + c.line})
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

// A lone line that is slow costs the others no first hop.
func TestSlowMemberIsNoFirstHop(t *testing.T) {
	s := &script{t: t, m: NewMachine(testDigest, 64*mib, MachineOptions{Layout: testLayout, StallTimeout: testStall}), stat: map[string]*api.Status{}}
	s.event(epoch, []string{"join", "a", "can", "registry=8"})
	s.event(epoch, []string{"status", "a", "fetching", "-can"})
	s.event(epoch, []string{"join", "b", "can"})
	s.event(epoch, []string{"join", "c", "can", "line=0.5"})
	for i := range 63 {
		at := epoch.Add(time.Duration(i) * time.Second)
		got := append(s.tickTo(at), show(s.event(at, []string{"announce", "a", fmt.Sprint(i)}))...)
		s.event(at, []string{"status", "a", "present=" + fmt.Sprint(i+1)})
		s.event(at, []string{"announce", "b", fmt.Sprint(i)})
		for _, g := range got {
			if strings.HasPrefix(g, "c seg") && strings.HasSuffix(g, "*(a)") {
				t.Fatalf("%v: the slow one is a first hop: %s", at.Sub(epoch), g)
			}
		}
	}
}

// A first hop lags where others have what was sent on its way later, until it has a segment
// in time.
func TestOvertaken(t *testing.T) {
	for _, c := range []struct {
		name    string
		order   []int // in which the segments are announced by the fetcher, 0 is not had by its first hop
		other   bool  // another has the later ones as well, from elsewhere
		laggard bool  // there is nobody else but one that lags as well
		had     bool  // somebody has got what the first hop has not
		want    bool
		getsOn  int // the segment that the first hop has after that, negative for none
		quickly bool
	}{
		{"by later ones", []int{0, 1, 2, 3, 4, 5}, false, false, false, true, -1, false},
		{"not by earlier ones", []int{1, 2, 3, 4, 5, 0}, false, false, false, false, -1, false},
		{"not by few", []int{1, 2, 3, 0, 4, 5}, false, false, false, false, -1, false},
		{"not by what others may have from elsewhere", []int{0, 1, 2, 3, 4, 5}, true, false, false, false, -1, false},
		{"and nobody else is quicker", []int{0, 1, 2, 3, 4, 5}, false, true, false, false, -1, false},
		{"and somebody has it", []int{0, 1, 2, 3, 4, 5}, false, false, true, false, -1, false},
		{"and gets on", []int{0, 1, 2, 3, 4, 5}, false, false, false, true, 0, false},
		{"and gets another segment late", []int{0, 1, 2, 3, 4, 5}, false, false, false, true, 5, false},
		{"and gets another segment in time", []int{0, 1, 2, 3, 4, 5}, false, false, false, true, 6, true},
	} {
		s := &script{t: t, m: NewMachine(testDigest, 7*mib, MachineOptions{Layout: testLayout, StallTimeout: testStall}), stat: map[string]*api.Status{}}
		at := func(ms int) time.Time { return epoch.Add(time.Duration(ms) * time.Millisecond) }
		s.event(epoch, []string{"join", "a", "can"})
		s.event(epoch, []string{"status", "a", "fetching", "-can"})
		if c.other {
			s.event(epoch, []string{"join", "o", "can"})
			s.event(epoch, []string{"status", "o", "fetching", "-can"})
		}
		s.event(epoch, []string{"join", "b", "can"})
		s.event(epoch, []string{"join", "c", "can"})
		for k, i := range c.order {
			s.event(at(10*k), []string{"announce", "a", fmt.Sprint(i)})
			if c.other && i != 0 {
				s.event(at(10*k), []string{"announce", "o", fmt.Sprint(i)})
			}
			for _, x := range []string{"b", "c"} {
				if i != 0 && s.m.segs[i].hops[s.m.members["a"]] == s.m.members[x] {
					s.event(at(10*k+1), []string{"announce", x, fmt.Sprint(i)})
				}
			}
		}
		origin := s.m.members["a"]
		hop := s.m.segs[0].hops[origin]
		if c.had {
			s.event(at(90), []string{"join", "r", "can"})
			s.event(at(91), []string{"announce", "r", "0"})
		}
		if c.laggard {
			for _, x := range s.m.list {
				x.lags = x != hop
			}
		}
		for ms := 100; ms < 3600; ms += 100 {
			s.tickTo(at(ms))
			s.event(at(ms), []string{"status", "a", fmt.Sprintf("present=%.3f", 6+float64(ms)/10000)})
			if ms == 1300 {
				if now := s.m.segs[0].hops[origin]; (now != hop) != c.want || hop.lags != (c.want || c.laggard) {
					t.Errorf("%s: replaced: %v, lags: %v; want %v", c.name, now != hop, hop.lags, c.want)
				}
			}
			if ms == 1400 && c.getsOn >= 0 {
				if c.quickly {
					s.event(at(ms), []string{"announce", "a", fmt.Sprint(c.getsOn)})
				}
				s.event(at(ms), []string{"announce", hop.name, fmt.Sprint(c.getsOn)})
			}
		}
		if c.want && hop.lags == c.quickly {
			t.Errorf("%s: in the end, it lags: %v", c.name, hop.lags)
		}
	}
}

// What a fetcher's line brings is shared by all that it fetches.
func TestRestOfAFetcher(t *testing.T) {
	m := NewMachine(testDigest, 4*mib, MachineOptions{Layout: testLayout})
	f := &member{fetching: true, present: mib}
	m.list = []*member{f, {lately: 8 * mib}}
	for _, c := range []struct {
		line, inflow int64
		load         uint32
		want         bool
	}{
		{64 * mib, mib, 0, false},    // 3 s
		{64 * mib, mib, 1, true},     // 6 s
		{64 * mib, mib / 2, 0, true}, // 6 s
		{mib, 0, 5, false},           // 3 s
		{mib / 2, 0, 0, true},        // 6 s
		{64 * mib, 1, math.MaxUint32, true},
		{0, 0, 0, true}, // nothing is known
	} {
		f.line, f.inflow, f.load = c.line, c.inflow, c.load
		if got := m.restsLong(f); got != c.want {
			t.Errorf("3 MiB at %d bytes/s, of late %d, shared by %d more: long: %v, want %v", c.line, c.inflow, c.load, got, c.want)
		}
	}
	if f.line, f.inflow = 64*mib, 1; !m.slowNow(f) {
		t.Error("a fetcher that gets next to nothing is not slow")
	}
	if f.fetching = false; m.slowNow(f) {
		t.Error("one that fetches nothing is slow since little comes in")
	}
}

// What has lately come from registries is that of others, and of those that are there.
func TestLatelyOfOthers(t *testing.T) {
	s := &script{t: t, m: NewMachine(testDigest, testSize, MachineOptions{Layout: testLayout, StallTimeout: testStall}), stat: map[string]*api.Status{}}
	check := func(what, name string, want int64) {
		t.Helper()
		if got := s.m.latelyBut(s.m.members[name]); got != want*mib {
			t.Errorf("%s: of others than %s: %d MiB/s, want %d", what, name, got/mib, want)
		}
	}
	s.event(epoch, []string{"join", "a", "can", "lately=4"})
	check("alone", "a", 0)
	s.event(epoch, []string{"join", "b", "lately=8"})
	check("one has come", "a", 8)
	check("one has come", "b", 4)
	s.event(epoch, []string{"join", "c", "lately=6"})
	check("another has come", "b", 6)
	s.event(epoch, []string{"status", "c", "lately=2"})
	check("it says otherwise", "b", 4)
	s.event(epoch, []string{"leave", "b"})
	check("the best has gone", "c", 4)
	s.event(epoch, []string{"status", "a", "lately=-1"})
	check("less than nothing", "c", 0)
}

// What those alone have that crept while they fetched it is fetched once more.
func TestCrept(t *testing.T) {
	for _, c := range []struct {
		name   string
		size   int64
		inflow string // MiB/s of the fetcher
		waits  []string
		more   []string
		want   time.Duration // after the fetcher is through
	}{
		{"a fetcher that crept", mib, "0.125", []string{"line=64"}, nil, testStall},
		{"one that did not", mib, "4", []string{"line=64"}, nil, 0},
		{"a blob so long that another is sent beside it", 4 * mib, "0.125", []string{"line=64"}, nil, 0},
		{"for one that is slow, too", mib, "0.125", []string{"line=0.125"}, nil, 0},
		{"and others have it", mib, "0.125", []string{"line=64"}, []string{"join", "h", "whole", "has=0"}, 0},
	} {
		s := &script{t: t, m: NewMachine(testDigest, c.size, MachineOptions{Layout: testLayout, StallTimeout: testStall}), stat: map[string]*api.Status{}}
		s.event(epoch, []string{"join", "a", "can", "line=64"})
		s.event(epoch, []string{"status", "a", "fetching", "-can"})
		s.event(epoch, []string{"join", "q", "registry=8", "lately=8", "line=64"})
		s.event(epoch.Add(4*time.Second), []string{"status", "a", "inflow=" + c.inflow})
		if c.more != nil {
			s.event(epoch.Add(4*time.Second), c.more)
		}
		through := epoch.Add(5 * time.Second)
		s.event(through, []string{"status", "a", "prefix=4", "whole", "-fetching", "inflow=0"})
		for i := range s.m.segs {
			s.event(through, []string{"announce", "a", fmt.Sprint(i)})
		}
		s.event(through, append([]string{"join", "b", "can"}, c.waits...))
		var told time.Duration
		for at := time.Duration(0); at < 3500*time.Millisecond && told == 0; at += 50 * time.Millisecond {
			switch {
			case at == time.Second:
				s.event(through.Add(at), []string{"status", "b", "busy", "prefix=0.2"})
			case at%(500*time.Millisecond) == 0:
				s.event(through.Add(at), []string{"status", "b", "busy"})
			}
			if slices.Contains(s.tickTo(through.Add(at)), "b fetch") {
				told = at
			}
		}
		if told != c.want {
			t.Errorf("%s: one that waits is sent to the registry after %v, want %v", c.name, told, c.want)
		}
	}
}
