package tracker

import (
	"bytes"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	api "github.com/imagewolf/imagewolf/api/v1"
)

const (
	mib       = 1 << 20
	testSize  = 4 * mib // four segments of the test layout
	testStall = 2 * time.Second
)

var (
	testDigest = digest.FromString("a layer")
	epoch      = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	smallBlob  = []byte(`{"schemaVersion":2}`)
)

// testLayout has segments of 1 MiB of one piece each.
func testLayout(size int64) Layout {
	return Layout{
		Segments:    int((size + mib - 1) / mib),
		SegmentSize: mib,
		Pieces:      func(int) int { return 1 },
	}
}

// script drives a Machine with lines of
//
//	<time> <event> [member] [args...] [> command, command...]
//
// Commands are compared as a sorted set; a line without > wants none. Events:
// join, status (key=value and flags), leave, move, announce <segment> [hashes],
// inline [text], ask [silent...], bad [own], badpieces <hashes> [peers...] of segment 0, seeder, unseeder, tick. Before a line's
// event the machine is ticked as it asks for; what that yields counts for a
// tick line and is an error before any other.
type script struct {
	t    *testing.T
	m    *Machine
	stat map[string]*api.Status
}

func runScript(t *testing.T, d digest.Digest, size int64, members int, lines string) *Machine {
	t.Helper()
	o := MachineOptions{StallTimeout: testStall, Layout: testLayout}
	if members > 0 {
		o.Members = func() int { return members }
	}
	return play(t, d, size, o, lines)
}

// play is runScript with options.
func play(t *testing.T, d digest.Digest, size int64, o MachineOptions, lines string) *Machine {
	t.Helper()
	s := &script{t: t, m: NewMachine(d, size, o), stat: map[string]*api.Status{}}
	for line := range strings.Lines(lines) {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		event, want, _ := strings.Cut(line, ">")
		f := strings.Fields(event)
		after, err := time.ParseDuration(f[0])
		if err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		got := s.tickTo(epoch.Add(after))
		if f[1] != "tick" && len(got) > 0 {
			t.Fatalf("%s: ticks before it gave %v", line, got)
		}
		got = append(got, show(s.event(epoch.Add(after), f[1:]))...)
		slices.Sort(got)
		var wants []string
		for w := range strings.SplitSeq(want, ",") {
			if w = strings.TrimSpace(w); w != "" {
				wants = append(wants, w)
			}
		}
		slices.Sort(wants)
		if !slices.Equal(got, wants) {
			t.Fatalf("%s\n got %v\nwant %v", line, got, wants)
		}
	}
	return s.m
}

func (s *script) tickTo(to time.Time) []string {
	var got []string
	for range 10_000 {
		next := s.m.Next()
		if next.IsZero() || next.After(to) {
			return got
		}
		got = append(got, show(s.m.Tick(next))...)
	}
	s.t.Fatal("Next does not move on")
	return nil
}

func (s *script) event(now time.Time, f []string) []Command {
	name := ""
	if len(f) > 1 {
		name = f[1]
	}
	msg := &api.MemberMessage{}
	switch f[0] {
	case "tick":
		return s.m.Tick(now)
	case "leave":
		return s.m.Leave(now, name)
	case "move":
		return s.m.Move(now, name)
	case "here", "elsewhere":
		return s.m.Tracks(now, f[0] == "here")
	case "seeder":
		zone := ""
		if len(f) > 2 {
			zone = f[2]
		}
		return s.m.SeederAdded(now, name, zone)
	case "unseeder":
		return s.m.SeederRemoved(now, name)
	case "join":
		h := &api.Hello{Digest: s.m.digest.String(), Size: s.m.size, Self: &api.Peer{Name: name, Address: name + ":1"}}
		s.stat[name] = &api.Status{}
		s.status(s.stat[name], f[2:], h)
		h.Status = s.stat[name]
		out, err := s.m.Join(now, h)
		if err != nil {
			s.t.Fatal(err)
		}
		return out
	case "status":
		s.status(s.stat[name], f[2:], nil)
		msg.Message = &api.MemberMessage_Status{Status: s.stat[name]}
	case "announce":
		hashes := byte(1)
		if len(f) > 3 {
			hashes = f[3][0]
		}
		i, _ := strconv.Atoi(f[2])
		msg.Message = &api.MemberMessage_Announce{Announce: segmentOf(i, hashes)}
	case "inline":
		data := smallBlob
		if len(f) > 2 {
			data = []byte(f[2])
		}
		msg.Message = &api.MemberMessage_Inline{Inline: &api.Inline{Data: data}}
	case "ask":
		msg.Message = &api.MemberMessage_Ask{Ask: &api.Ask{Silent: f[2:]}}
	case "badpieces":
		hashes := segmentOf(0, f[2][0]).GetPieces()
		msg.Message = &api.MemberMessage_BadPieces{BadPieces: &api.BadPieces{Pieces: hashes, Peers: f[3:]}}
	case "bad":
		msg.Message = &api.MemberMessage_Bad{Bad: &api.Bad{Own: slices.Contains(f, "own")}}
	default:
		s.t.Fatalf("unknown event %q", f[0])
	}
	return s.m.Message(now, name, msg)
}

// status applies words to a status: can, fetching, busy, slow, whole (each negated by a
// leading -), prefix= and present= in MiB, line= and registry= in MiB/s, load=,
// rank=, retracted=; and to a hello:
// zone=, resumed, has=0+1+2.
func (s *script) status(st *api.Status, words []string, h *api.Hello) {
	for _, w := range words {
		k, v, _ := strings.Cut(w, "=")
		n, _ := strconv.ParseFloat(v, 64)
		on := !strings.HasPrefix(k, "-")
		switch strings.TrimPrefix(k, "-") {
		case "can":
			st.CanFetch = on
		case "fetching":
			st.Fetching = on
		case "busy":
			st.Busy = on
		case "slow":
			st.Slow = on
		case "whole":
			st.Whole = on
		case "prefix":
			st.Prefix = int64(n * mib)
			st.Present = max(st.Present, st.Prefix)
		case "present":
			st.Present = int64(n * mib)
		case "load":
			st.Load = uint32(n)
		case "line":
			st.Line = int64(n * mib)
		case "registry":
			st.Registry = int64(n * mib)
		case "inflow":
			st.Inflow = int64(n * mib)
		case "lately":
			st.Lately = int64(n * mib)
		case "retracted":
			st.Retracted = uint32(n)
		case "rank":
			st.Rank = uint32(n)
		case "zone":
			h.Zone = v
		case "resumed":
			h.Resumed = true
		case "has":
			for i := range strings.SplitSeq(v, "+") {
				i, _ := strconv.Atoi(i)
				h.Announced = append(h.Announced, segmentOf(i, 1))
			}
		default:
			s.t.Fatalf("unknown word %q", w)
		}
	}
}

func segmentOf(i int, hashes byte) *api.Announce {
	return &api.Announce{Segment: uint32(i), Pieces: bytes.Repeat([]byte{hashes}, sha1Size)}
}

// show writes commands as "a wait", "a fetch", "a inline", "a serve" and
// "a seg0*(b+c)", the star if piece hashes are in it.
func show(out []Command) []string {
	var lines []string
	for _, c := range out {
		what := ""
		switch t := c.Msg.GetMessage().(type) {
		case *api.TrackerMessage_Wait:
			what = "wait"
		case *api.TrackerMessage_Fetch:
			what = "fetch"
		case *api.TrackerMessage_Inline:
			what = "inline"
		case *api.TrackerMessage_Retract:
			what = "retract"
		case *api.TrackerMessage_Segment:
			var names []string
			for _, p := range t.Segment.GetPeers() {
				names = append(names, p.GetName())
			}
			slices.Sort(names)
			star := ""
			if t.Segment.GetPieces() != nil {
				star = "*"
			}
			what = fmt.Sprintf("seg%d%s(%s)", t.Segment.GetSegment(), star, strings.Join(names, "+"))
		}
		if c.Serve {
			what += "serve"
		}
		switch {
		case c.Outcast:
			what += "out"
		case c.Reason != "":
			what += "named"
		}
		lines = append(lines, c.To+" "+what)
	}
	return lines
}

type machineTest struct {
	name    string
	small   bool
	members int // of the cluster, 0 unknown
	lines   string
}

var machineTests = []machineTest{
	{name: "the first idle member fetches at once, the others wait", lines: `
			0s    join a can            > a fetch
			1ms   join b can            > b wait
			2ms   join c can rank=1     > c wait`},
	{name: "a busy first member waits for others, the least loaded is sent", lines: `
			0s    join a can rank=1 load=1 > a wait
			10ms  join b can rank=1        > b wait
			29ms  tick
			30ms  tick                     > b fetch`},
	{name: "an idle member that comes in the grace is sent at once", lines: `
			0s    join a can rank=2     > a wait
			10ms  join b can            > b fetch`},
	{name: "no grace when the cluster is this one node", members: 1, lines: `
			0s    join a can rank=2     > a fetch`},
	{name: "no grace when all nodes are here", members: 2, lines: `
			0s    join a can rank=2 load=1 > a wait
			5ms   join b can rank=2        > b fetch`},
	{name: "members that cannot fetch are not sent", lines: `
			0s    join a                > a wait
			1s    status a can          > a fetch`},
	{name: "members with three fetches are passed over for the stall time", lines: `
			0s    join a can load=4     > a wait
			1s    join b can load=3     > b wait
			1.9s  tick
			2s    tick                  > b fetch`},
	{name: "an idle member is preferred over the wait for loaded ones", lines: `
			0s    join a can load=3     > a wait
			1s    join b can            > b fetch`},
	{name: "a resumed member holds the decision until the fetcher comes", lines: `
			0s    join a can resumed has=0+1 prefix=2      > a wait
			500ms join b fetching prefix=3 has=0+1+2 resumed > b wait, a seg2*(b)
			1s    status b prefix=4 whole -fetching`},
	{name: "a resumed member holds the decision for a second only", lines: `
			0s    join a can resumed    > a wait
			990ms tick
			1s    tick                  > a fetch`},
	{name: "one leecher gets the source of all segments", lines: `
			0s    join a can            > a fetch
			0s    join b can            > b wait
			0s    status a fetching -can
			1ms   announce a 0          > b seg0*(a)
			2ms   announce a 1          > b seg1*(a)
			2ms   announce b 0`},
	{name: "a late joiner is sent to holders, not to the fetcher", lines: `
			0s    join a can            > a fetch
			0s    join b can            > b wait
			0s    status a fetching -can
			1ms   announce a 0          > b seg0*(a)
			2ms   announce b 0
			3ms   announce a 1          > b seg1*(a)
			4ms   join c can            > c seg0*(b), c seg1*(b)`},
	{name: "a late joiner gets the fetcher where nobody else has it", lines: `
			0s    join a can            > a fetch
			0s    status a fetching -can
			1ms   announce a 0
			4ms   join c can            > c seg0*(a)
			5ms   join d can            > d seg0*(c)`},
	{name: "a leecher without progress gets more peers", lines: `
			0s    join a can            > a fetch
			0s    status a fetching -can
			1ms   announce a 0
			4ms   join c can            > c seg0*(a)
			4ms   join d can            > d seg0*(c)
			5ms   announce c 0
			6ms   join e can            > e seg0*(c+d)
			9ms   announce e 0
			500ms status c present=1
			990ms status a present=2 prefix=2
			1010ms tick                 > d seg0(e)
			1900ms status a prefix=3
			2900ms tick
			3010ms tick                 > d seg0(a)
			3100ms status d present=0.5
			3800ms tick`},
	{name: "asking is answered at once, but not all the time", lines: `
			0s    join a can            > a fetch
			0s    status a fetching -can
			1ms   announce a 0
			4ms   join c can            > c seg0*(a)
			4ms   join d can            > d seg0*(c)
			100ms status d present=0.5
			900ms ask d                 > d wait
			1900ms status a prefix=3
			3110ms ask d                > d seg0(a)
			3120ms ask d
			3400ms ask d                > d wait`},
	{name: "the first hop's death passes its job on", lines: `
			0s    join a can            > a fetch
			0s    status a fetching -can
			1ms   announce a 0
			4ms   join c can            > c seg0*(a)
			4ms   join d can            > d seg0*(c)
			5ms   leave c               > d seg0(a)`},
	{name: "the fetcher's death: the longest prefix goes on", lines: `
			0s    join a can            > a fetch
			0s    join b can            > b wait
			0s    status a fetching -can
			1ms   announce a 0          > b seg0*(a)
			5ms   announce b 0
			6ms   status b prefix=1.5
			6ms   join c can            > c seg0*(b)
			7ms   leave a               > b fetch`},
	{name: "nobody goes on before the best has what the others hold", lines: `
			0s    join a can            > a fetch
			0s    join b can            > b wait
			0s    join c                > c wait
			0s    status a fetching -can
			1ms   announce a 0          > b seg0*(a), c seg0*(b)
			5ms   announce b 0
			5ms   announce c 0
			6ms   status b prefix=1
			6ms   status c prefix=1
			7ms   announce a 1          > b seg1*(a), c seg1*(b)
			8ms   announce c 1
			8ms   leave a               > b seg1(c)
			100ms status b prefix=1.5
			200ms status b prefix=2     > b fetch`},
	{name: "but when nobody gets on, somebody goes", lines: `
			0s    join a can resumed    > a wait
			0s    join c has=0+1 prefix=2 > c wait, a seg0*(c), a seg1*(c)
			1990ms tick
			2010ms tick                 > a fetch`},
	{name: "a fetcher that stops is followed, also by itself", lines: `
			0s    join a can            > a fetch
			0s    status a fetching -can
			1s    status a -fetching
			2s    status a can          > a fetch`},
	{name: "a fetcher whose client is gone before it began is released", lines: `
			0s    join a can            > a fetch
			0s    join b can            > b wait
			1s    status a -can         > b fetch`},
	{name: "hedging: one more per stall, three at most", lines: `
			0s    join a can            > a fetch
			0s    join b can            > b wait
			0s    join c can            > c wait
			0s    join d can            > d wait
			0s    join e can            > e wait
			0s    status a fetching -can
			0s    status c prefix=0.5
			1s    status a prefix=1
			2990ms tick
			3s    tick                  > c fetch
			3s    status c fetching -can
			6990ms tick
			7s    tick                  > d fetch
			7s    status d fetching -can
			20s   tick`},
	{name: "no hedge while one of the fetchers gets on", lines: `
			0s    join a can            > a fetch
			0s    join b can            > b wait
			0s    join c can            > c wait
			0s    status a fetching -can
			4s    tick                  > b fetch
			4s    status b fetching -can
			5s    status b prefix=1
			5900ms status b prefix=2
			7s    status b prefix=2.5
			8.9s  tick`},
	{name: "no hedge beside one that is gone while another that has all has yet to announce it", lines: `
			0s    join a can            > a fetch
			0s    join b can            > b wait
			0s    join c can            > c wait
			0s    status a fetching -can
			4s    tick                  > b fetch
			4s    status b fetching -can
			5s    status b prefix=2
			6.5s  status b -fetching whole
			8.4s  tick
			8.5s  tick                  > c fetch`},
	{name: "a busy fetcher is given more time, until it is idle", lines: `
			0s    join a can            > a fetch
			0s    join b can            > b wait
			0s    status a fetching -can busy
			1.5s  status a
			3s    status a
			4.5s  status a
			6s    status a
			7.5s  status a
			9s    status a
			9s    tick
			9.5s  status a -busy        > b fetch`},
	{name: "a busy fetcher that is not heard any more is not waited for", lines: `
			0s    join a can            > a fetch
			0s    join b can            > b wait
			0s    status a fetching -can busy
			1s    status a
			3.9s  tick
			4s    tick                  > b fetch`},
	{name: "a slow fetcher is given time for the next MiB", lines: `
			0s    join a can            > a fetch
			0s    join b can            > b wait
			0s    status a fetching -can
			3s    status a prefix=0.25
			7900ms tick
			7900ms status a prefix=0.5
			12.8s tick
			12.9s tick                  > b fetch`},
	{name: "no hedge when nobody waits, or the bytes are being checked", lines: `
			0s    join a can            > a fetch
			0s    status a fetching -can
			10s   join b can            > b fetch
			10s   status b fetching -can
			11s   join c can            > c wait
			11s   status a prefix=4
			30s   tick`},
	{name: "told and silent: hedged, then out of the role, then last choice", lines: `
			0s    join a can            > a fetch
			0s    join b can            > b wait
			2s    tick                  > b fetch, a named
			2s    status b fetching -can
			3900ms status b prefix=2
			5s    leave b               > a fetch`},
	{name: "a small blob travels inline", small: true, lines: `
			0s    join a can            > a fetch
			0s    join b can            > b wait
			1ms   status a fetching -can
			2ms   inline b nonsense
			3ms   inline a              > b inline
			4ms   status a -fetching whole
			5ms   join c can            > c inline
			6ms   ask c                 > c inline
			6ms   announce a 0`},
	{name: "a seeder is asked for a small blob", small: true, lines: `
			0s    seeder s
			0s    join a can            > a wait, s serve
			1ms   join s whole          > s wait
			2ms   inline s              > a inline`},
	{name: "seeders are asked and their segments given", lines: `
			0s    seeder s
			0s    join a can            > a wait, s serve
			9ms   join s whole          > s wait
			10ms  announce s 0          > a seg0*(s)
			11ms  announce s 1          > a seg1*(s)`},
	{name: "more leechers, more seeders; the leecher's zone first", lines: `
			0s    seeder s1 x
			0s    seeder s2 y
			0s    seeder s3 y
			0s    join a can zone=y     > a wait, s3 serve
			0s    join b can zone=y     > b wait
			0s    join c can zone=x     > c wait, s1 serve
			0s    join d can zone=y     > d wait
			0s    join e can zone=y     > e wait, s2 serve
			0s    join f can zone=y     > f wait`},
	{name: "a seeder that does not come is followed by the next, then a fetcher", lines: `
			0s    seeder s1
			0s    seeder s2
			0s    join a can            > a wait, s1 serve
			1990ms tick
			2s    tick                  > s2 serve, s1 named
			4s    tick                  > a fetch, s2 named`},
	{name: "a seeder that comes and announces nothing is no source", lines: `
			0s    seeder s1
			0s    join a can            > a wait, s1 serve
			1s    join s1 whole         > s1 wait
			2990ms tick
			3s    tick                  > a fetch`},
	{name: "a seeder that takes itself back is not waited for", lines: `
			0s    seeder s1
			0s    join a can            > a wait, s1 serve
			1s    unseeder s1           > a fetch`},
	{name: "several sources: a first hop each, another leecher", lines: `
			0s    join s1 whole         > s1 wait
			0s    join s2 whole         > s2 wait
			0s    join a can            > a wait
			0s    join b can            > b wait
			0s    announce s1 0         > a seg0*(b), b seg0*(s1)
			1ms   announce s2 0         > a seg0(s2)`},
	{name: "whole members that stop delivering are given up after two stalls", lines: `
			0s    join s whole has=0+1+2+3 > s wait
			0s    join a can            > a seg0*(s), a seg1*(s)
			2990ms tick
			3s    tick                  > a seg2*(s), a seg3*(s)
			3990ms tick
			4s    tick                  > a fetch`},
	{name: "what a holder has follows little by little", lines: `
			0s    join s whole load=3 has=0+1+2+3 > s wait
			0s    join a can            > a seg0*(s), a seg1*(s)
			0s    join b can            > b seg0*(a), b seg1*(a)
			100ms announce b 1
			200ms announce a 1          > a seg2*(b), b seg2*(s)
			900ms announce a 0          > a seg3*(b), b seg3*(s)`},
	{name: "who comes after all were served is told little by little again", lines: `
			0s    join s whole has=0+1+2+3 > s wait
			0s    join a can            > a seg0*(s), a seg1*(s)
			1s    leave a
			2s    join b can            > b seg0*(s), b seg1*(s)`},
	{name: "first hashes win while their announcer lives", lines: `
			0s    join a fetching       > a wait
			0s    join b can            > b wait
			0s    join c                > c wait
			1ms   announce c 0 x        > a seg0*(b+c), b seg0*(c)
			2ms   announce a 0 y
			3ms   leave c               > b seg0*(a)
			4ms   announce a 0 y`},
	{name: "a status that cannot be is cut to the blob's size", lines: `
			0s    join a can            > a fetch
			0s    join b can            > b wait
			1ms   status a prefix=-1 present=1000000`},
	{name: "one reporter bans for itself, two for all", lines: `
			0s    join s whole has=0    > s wait
			0s    join a can            > a seg0*(s)
			0s    join b can            > b seg0*(a)
			500ms bad a                 > b seg0(s), s named
			501ms ask a                 > a wait
			502ms bad a
			503ms bad b                 > b fetch, s out
			504ms join c               > c wait
			505ms status s -whole can  > s fetch`},
	{name: "one that found hashes wrong brings others", lines: `
			0s    join a can            > a fetch
			0s    join b can            > b wait
			0s    join c can            > c wait
			1ms   status a fetching
			2ms   announce a 0 x        > b seg0*(a), c seg0*(b)
			3ms   announce b 0 x
			4ms   announce c 0 x
			5ms   leave a               > b fetch
			6ms   status b fetching -can present=1 prefix=1
			7ms   bad b                 > a named
			8ms   status b present=0 prefix=0
			9ms   announce b 0 y        > c seg0*(b)`},
	{name: "one that went on behind wrong bytes is spared", lines: `
			0s    join a can            > a fetch
			0s    join b can            > b wait
			0s    join c can            > c wait
			0s    join d can            > d wait
			1ms   status a fetching
			2ms   announce a 0 x        > b seg0*(c+d), c seg0*(b+d), d seg0*(a)
			3ms   announce b 0 x
			4ms   leave a               > b fetch, d seg0(b)
			5ms   status b fetching -can present=1 prefix=1
			6ms   announce b 1 x        > c seg1*(b), d seg1*(c)
			7ms   bad b                 > d fetch, a named
			8ms   bad c
			9ms   leave d               > c fetch`},
	{name: "a member that throws its bytes away is no holder any more", lines: `
			0s    join s whole has=0    > s wait
			0s    join a can            > a seg0*(s)
			0s    status a present=4 prefix=4
			1s    announce a 0
			1s    join b can            > b seg0*(a+s)
			2s    status a present=0 prefix=0 > a seg0*(b)`},
	{name: "a member whose client has gone is no first hop", lines: `
			0s    join s whole has=0    > s wait
			0s    join a can            > a seg0*(s)
			0s    join b can            > b seg0*(a)
			10ms  status a -can         > b seg0(s)`},
	{name: "a member of the same name replaces the old one", lines: `
			0s    join a can            > a fetch
			0s    join b can            > b wait
			1s    join a                > a wait, b fetch`},
}

func TestMachine(t *testing.T) {
	for _, c := range append(machineTests, troubleTests...) {
		t.Run(c.name, func(t *testing.T) {
			d, size := testDigest, int64(testSize)
			if c.small {
				d, size = digest.FromBytes(smallBlob), int64(len(smallBlob))
			}
			runScript(t, d, size, c.members, c.lines)
		})
	}
}
