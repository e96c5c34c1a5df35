package tracker

import (
	"slices"
	"strconv"
	"testing"
	"time"

	api "github.com/imagewolf/imagewolf/api/v1"
)

// troubleTests are of members that are slow, of wrong bytes that come from the
// registry, and of promises that are not kept.
var troubleTests = []machineTest{
	{name: "a slow line does not fetch what another can", lines: `
			0s    join a can rank=1 line=0.125   > a wait
			1ms   join b can rank=1 line=64 registry=8 load=1 > b wait
			30ms  tick                           > b fetch`},
	{name: "a fetcher on a slow line gets one beside it, and one only", lines: `
			0s    join a can                     > a fetch
			0s    status a fetching -can
			1s    join b can line=64 registry=8  > b wait
			1.5s  status a prefix=0.05
			3s    status a prefix=0.1
			3.5s  join c can                     > c wait
			4.5s  status a prefix=0.15 line=0.125
			6.4s  status a prefix=0.2
			6.5s  tick                           > b fetch
			6.6s  status b fetching -can
			8s    status a prefix=0.3
			8s    status b prefix=1
			9.6s  status a prefix=0.4
			9.6s  status b prefix=2
			11s   status b prefix=3
			12s   announce b 0          > a seg0*(c), c seg0*(b)
			12s   announce b 1          > a seg1*(c), c seg1*(b)
			12s   announce b 2          > a seg2*(c), c seg2*(b)
			13s   announce b 3          > a seg3*(c), c seg3*(b)
			13s   status b prefix=4 whole -fetching`},
	{name: "a registry that is slow for all is not rushed at", lines: `
			0s    join a can                       > a fetch
			0s    status a fetching -can
			1s    join b can line=64 registry=0.5  > b wait
			3s    status a prefix=0.5 busy line=0.125
			7s    status a prefix=1 busy line=0.25
			11s   status a prefix=1.5 busy line=0.5
			15s   status a prefix=2 busy`},
	{name: "a fetcher whose line has been fast is not taken for slow", lines: `
			0s    join a can line=8                > a fetch
			0s    status a fetching -can
			1s    join b can line=64 registry=8    > b wait
			3s    status a prefix=0.5 busy
			7s    status a prefix=1 busy
			11s   status a prefix=1.5 busy`},
	{name: "a fetcher on a slow line that is nearly through is left alone", lines: `
			0s    join a can                       > a fetch
			0s    status a fetching -can
			1s    join b can line=64 registry=8    > b wait
			3s    status a prefix=3.5 busy line=0.125
			6s    status a prefix=3.8 busy
			7s    status a prefix=4 whole -fetching`},
	{name: "a fetcher whose line has become slow gets one beside it, and one only", lines: `
			0s    join a can line=8                > a fetch
			0s    status a fetching -can
			100ms join c can                       > c wait
			200ms join b can lately=8              > b wait
			200ms join d lately=8                  > d wait
			1s    status a busy
			2s    status a busy
			3s    status a busy
			3.5s  status a inflow=0.125            > b fetch
			3.7s  status b fetching -can
			4s    status a busy
			5s    status a busy
			5s    status b prefix=0.1
			6s    status a busy
			7s    status b prefix=0.2 inflow=0.125
			7.5s  status a busy
			9s    status a busy
			9s    status b prefix=0.3
			10.5s status a busy
			11s   status b prefix=0.4`},
	{name: "a fetcher of whose line nothing is known is measured against what registries have ever sent", lines: `
			0s    join a can                       > a fetch
			0s    status a fetching -can
			100ms join b can registry=8            > b wait
			1s    status a busy
			2s    status a busy
			3s    status a busy
			3.5s  status a inflow=0.125            > b fetch`},
	{name: "nor is one waited for whose line is known to be slow, once it is measured", lines: `
			0s    join a can                       > a fetch
			0s    status a fetching -can
			1s    join b can registry=8            > b wait
			1.5s  status a busy
			3s    status a busy line=0.125
			3.5s  status a inflow=0.125            > b fetch`},
	{name: "a line that was fast is slow now if its node says so, and it was the one that the registry was fast for", lines: `
			0s    join a can line=8 registry=8     > a fetch
			0s    status a fetching -can
			1s    join b can                       > b wait
			1.5s  status a busy
			3s    status a busy inflow=0.125
			3.5s  status a busy slow               > b fetch`},
	{name: "not if it gets no less than any ever had from a registry", lines: `
			0s    join a can line=8 registry=0.5   > a fetch
			0s    status a fetching -can
			1s    join b can                       > b wait
			1.5s  status a busy
			3s    status a busy slow inflow=0.125
			4s    status a busy`},
	{name: "whoever says that it is slow is sent last", lines: `
			0s    join a slow                      > a wait
			0s    join b slow                      > b wait
			0s    join c                           > c wait
			10ms  status a can rank=1
			10ms  status b can rank=1
			10ms  status c can rank=1
			110ms tick                             > c fetch`},
	{name: "a registry that was faster once is no measure for a line that was, too", lines: `
			0s    join a can line=8                > a fetch
			0s    status a fetching -can
			100ms join b can registry=8 lately=0.5 > b wait
			1s    status a busy
			2s    status a busy
			3s    status a busy
			3.5s  status a inflow=0.125
			5s    status a busy
			6.5s  status a busy
			8s    status a busy`},
	{name: "a first hop that others overtake is replaced, and is one only if there is no other", lines: `
			0s    join a can                       > a fetch
			0s    join b can                       > b wait
			0s    join c can                       > c wait
			0s    status a fetching -can
			0s    join d can                       > d wait
			10ms  announce a 0                     > b seg0*(c+d), c seg0*(b+d), d seg0*(a)
			20ms  announce a 1                     > b seg1*(a), c seg1*(b+d), d seg1*(b+c)
			30ms  announce b 1
			40ms  status b present=1
			50ms  announce a 2                     > b seg2*(c+d), c seg2*(a), d seg2*(b+c)
			60ms  announce c 2
			70ms  status c present=1
			80ms  announce a 3                     > b seg3*(a), c seg3*(b+d), d seg3*(b+c)
			90ms  announce b 3
			1.25s tick                             > c seg0(a), d seg0(c)
			1.3s  leave c                          > b seg0(a), b seg2(a), d seg0(b)`},
	{name: "what the registry sent wrong is thrown away by all, and fetched once more", lines: `
			0s    join a can            > a fetch
			0s    join b can            > b wait
			0s    join c can            > c wait
			1ms   status a fetching -can
			2ms   announce a 0 x        > b seg0*(a), c seg0*(b)
			3ms   announce b 0 x
			3ms   status b present=1 prefix=1
			4ms   bad a own             > a named, b retract, c retract
			4ms   status a -fetching    > b fetch
			# What c says of those bytes does not count any more.
			5ms   status c present=1.5 prefix=1.5
			5ms   announce c 0 x
			6ms   status c present=0 prefix=0 retracted=1
			6ms   status b present=0 prefix=0 fetching -can retracted=1
			7ms   announce b 0 y        > a seg0*(c), c seg0*(b)
			# The first fetcher is not shut out.
			8ms   status a can
			9ms   announce c 0 y
			10ms  leave b               > c fetch`},
	{name: "one that was sent behind bytes that are retracted waits for the right ones", lines: `
			0s    join a can            > a fetch
			0s    join b can            > b wait
			0s    join c can            > c wait
			1ms   status a fetching -can
			2ms   announce a 0 x        > b seg0*(a), c seg0*(b)
			3ms   announce b 0 x
			3ms   status b present=1 prefix=1
			4ms   status b fetching -can
			5ms   bad a own             > a named, b retract, c retract
			5ms   status a -fetching    > c fetch`},
	{name: "one that is told to fetch and does not is named, then shut out", lines: `
			0s    join a can            > a fetch
			4s    tick                  > a fetch, a named
			8s    tick                  > a fetch, a out`},
	{name: "one whose client had gone when it was told is not", lines: `
			0s    join a can            > a fetch
			1s    status a -can
			8s    status a can          > a fetch`},
	{name: "nor is one that registers again and again waited for again and again", lines: `
			0s    seeder s
			0s    join a can            > a wait, s serve
			1s    seeder s
			1.9s  seeder s
			2s    tick                  > a fetch, s named`},
	{name: "nor one that takes itself back in between", lines: `
			0s    seeder s
			0s    join a can            > a wait, s serve
			1s    unseeder s            > a fetch
			1.1s  leave a
			1.2s  seeder s
			1.3s  join b can            > b fetch`},
	{name: "one that has all and announces nothing is not waited for longer because it says more", lines: `
			0s    join s whole          > s wait
			0s    join a can            > a wait
			1.5s  inline s
			2s    tick                  > a fetch`},
	{name: "nor again when it comes again", lines: `
			0s    join s whole          > s wait
			1s    leave s
			1s    join s whole          > s wait
			1s    join a can            > a fetch`},
	{name: "or says again that it has all", lines: `
			0s    join s whole          > s wait
			1s    status s -whole
			1s    status s whole
			1s    join a can            > a fetch`},
	{name: "one that served and has gone is asked and waited for as before", lines: `
			0s    seeder s
			0s    join a can            > a wait, s serve
			1s    join s whole          > s wait
			1s    announce s 0          > a seg0*(s)
			1.1s  unseeder s
			1.2s  seeder s
			1.3s  status a whole prefix=4
			1.4s  leave s
			1.5s  leave a
			1.5s  join b                > b wait, s serve
			1.6s  join s whole          > s wait
			1.6s  status b can
			3.5s  tick
			3.6s  tick                  > b fetch`},
	{name: "a seeder that does not come is named", lines: `
			0s    seeder s
			0s    join a can            > a wait, s serve
			2s    tick                  > a fetch, s named`},
}

// A member that has announced a blob and sends nothing is named when one says so,
// and shut out when two do; one of whom somebody had a segment is neither.
func TestComplaints(t *testing.T) {
	for _, c := range []struct {
		name   string
		proven bool          // a has got a segment
		at     time.Duration // of the complaints
		want   []string
	}{
		{"too early", false, 2700 * time.Millisecond, nil},
		{"in time", false, 3100 * time.Millisecond, []string{"s named", "s out"}},
		{"of one that has sent something", true, 8 * time.Second, nil},
	} {
		m := NewMachine(testDigest, testSize, MachineOptions{StallTimeout: testStall, Layout: testLayout})
		for _, name := range []string{"s", "a", "b", "c"} {
			hello := &api.Hello{Size: testSize, Self: &api.Peer{Name: name, Address: name}, Status: &api.Status{CanFetch: true}}
			if name == "s" {
				hello.Status = &api.Status{Prefix: testSize, Present: testSize, Whole: true}
				for i := range 4 {
					hello.Announced = append(hello.Announced, segmentOf(i, 1))
				}
			}
			if _, err := m.Join(epoch, hello); err != nil {
				t.Fatal(err)
			}
		}
		say := func(name string, msg *api.MemberMessage) []string {
			return show(m.Message(epoch.Add(c.at), name, msg))
		}
		if c.proven {
			m.Message(epoch, "a", &api.MemberMessage{Message: &api.MemberMessage_Announce{Announce: segmentOf(0, 1)}})
		}
		for next := m.Next(); !next.IsZero() && next.Before(epoch.Add(c.at)); next = m.Next() {
			m.Tick(next)
		}
		ask := &api.MemberMessage{Message: &api.MemberMessage_Ask{Ask: &api.Ask{Silent: []string{"s", "who"}}}}
		var got []string
		for _, from := range []string{"a", "a", "b", "c"} {
			for _, line := range say(from, ask) {
				if line == "s named" || line == "s out" {
					got = append(got, line)
				}
			}
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

func TestPatienceEndsWellBeforeAllGiveUp(t *testing.T) {
	for _, c := range []struct {
		maxWait, want time.Duration
		receiving     bool
	}{
		{0, busyStalls * 2 * time.Second, false},
		{30 * time.Second, busyStalls * 2 * time.Second, false},
		{6 * time.Second, 4 * time.Second, false},
		{2 * time.Second, 2 * time.Second, false},
		{0, receivingStalls * 2 * time.Second, true},
		{30 * time.Second, 24 * time.Second, true},
		{time.Second, 2 * time.Second, true},
	} {
		m := NewMachine(testDigest, testSize, MachineOptions{Layout: testLayout, StallTimeout: 2 * time.Second, MaxWait: c.maxWait})
		if got := m.patience(epoch, &member{fetching: true, moved: epoch, busy: true, busyAt: epoch, receiving: c.receiving}); got != c.want {
			t.Errorf("%v with max_wait %v, want %v", got, c.maxWait, c.want)
		}
	}
}

// Who gets no bytes at all goes by itself after max_wait: one more is sent before.
func TestPatienceWithThoseThatWait(t *testing.T) {
	const maxWait = 30 * time.Second
	for _, c := range []struct {
		after, want time.Duration
		busy        bool
	}{
		{time.Second, maxWait * 4 / 5, true},
		{maxWait * 4 / 5, maxWait * 8 / 5, true},
		{maxWait * 4 / 5, maxWait * 4 / 5, false},
	} {
		m := NewMachine(testDigest, testSize, MachineOptions{Layout: testLayout, StallTimeout: testStall, MaxWait: maxWait})
		now := epoch.Add(c.after)
		m.list = []*member{{class: leecher, busy: c.busy, busyAt: now}}
		if got := m.patience(now, &member{fetching: true, moved: epoch, busy: true, busyAt: now, receiving: true}); got != c.want {
			t.Errorf("after %v, with one that waits (busy: %v): %v, want %v", c.after, c.busy, got, c.want)
		}
	}
}

// One that says it has the whole blob, and announces a segment before each wait for it is
// over, is not waited for until all go to the registry by themselves.
func TestOneThatAnnouncesOnAndOnIsNotWaitedForForever(t *testing.T) {
	for _, c := range []struct {
		fetcher bool // beside one that stands still
		want    time.Duration
	}{
		{true, 8 * time.Second},   // two stall timeouts more than without
		{false, 20 * time.Second}, // of a max_wait of 30 s
	} {
		s := &script{t: t, m: NewMachine(testDigest, 64*mib, MachineOptions{
			Layout: testLayout, StallTimeout: testStall, MaxWait: 30 * time.Second,
		}), stat: map[string]*api.Status{}}
		if c.fetcher {
			s.event(epoch, []string{"join", "a", "can"})
			s.event(epoch, []string{"status", "a", "fetching", "-can"})
		}
		s.event(epoch, []string{"join", "l", "whole"})
		s.event(epoch, []string{"join", "b", "can"})
		var told time.Duration
		for at, i := time.Duration(0), 0; at < 40*time.Second && told == 0; at += 100 * time.Millisecond {
			got := s.tickTo(epoch.Add(at))
			if at%(1900*time.Millisecond) == 0 {
				got = append(got, show(s.event(epoch.Add(at), []string{"announce", "l", strconv.Itoa(i)}))...)
				i++
			}
			if slices.Contains(got, "b fetch") {
				told = at
			}
		}
		if told != c.want {
			t.Errorf("beside a fetcher: %v: another is sent to the registry after %v, want %v", c.fetcher, told, c.want)
		}
	}
}
