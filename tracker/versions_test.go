package tracker

import (
	"fmt"
	"testing"

	api "github.com/imagewolf/imagewolf/api/v1"
)

// versionTests are of members that announce what cannot be, other hashes than others
// do, or send pieces that do not have theirs. l is the one that lies.
var versionTests = []machineTest{
	{name: "one that announces what is no segment is shut out, and what else it said forgotten", lines: `
			0s    join l                > l wait
			0s    announce l 1 x
			0s    announce l 4          > l out
			0s    announce l 4000000000
			1ms   join a can            > a fetch
			1ms   join b can            > b wait
			2ms   status a fetching -can
			3ms   announce a 1 y        > b seg1*(a)
			4ms   leave l
			5ms   join l has=0          > l out, l wait`},
	{name: "one that announces too many hashes is shut out, and the other version is there at once", lines: `
			0s    join l                > l wait
			0s    announce l 1 x
			1ms   join a can resumed    > a seg1*(l)
			1ms   join b fetching       > b seg1*(a+l)
			3ms   announce b 1 y
			4ms   announce l 9          > l out, a seg1*(b)`},
	{name: "who was sent to the registry is believed rather than who was first", lines: `
			0s    join l                > l wait
			0s    announce l 1 x
			1ms   join a can            > a fetch, a seg1*(l)
			1ms   join b can            > b seg1*(l)
			2ms   status a fetching -can
			3ms   announce a 1 y        > b seg1*(a), l seg1*(b)`},
	{name: "but not once another had the segment by the first hashes", lines: `
			0s    join s whole has=1    > s wait
			0s    join b can            > b seg1*(s)
			0s    join l can            > l seg1*(b)
			1ms   announce b 1
			2ms   status b -can
			2s    tick                  > l fetch
			2.1s  status l fetching -can
			2.1s  announce l 1 x        > l named`},
	{name: "whole blobs speak against other hashes: one names, two shut out", lines: `
			0s    join a can            > a fetch
			0s    join l                > l wait
			0s    join b can            > b wait
			1ms   status a fetching -can
			2ms   announce a 0 y        > l seg0*(b), b seg0*(a)
			3ms   announce l 0 x
			4ms   announce b 0 y
			5ms   status a prefix=4 whole -fetching > l named
			6ms   status b prefix=4 whole > l out`},
	{name: "who is whole when it hears other hashes speaks as well, and a version is kept until it is needed", lines: `
			0s    join l whole          > l wait
			0s    announce l 0 x
			1ms   join s whole has=0    > s wait, s named, l named
			2ms   join t whole has=0    > t wait, l out`},
	{name: "a version comes back when the current one's holder has gone", lines: `
			0s    join l whole          > l wait
			0s    announce l 0 x
			1ms   join a can            > a seg0*(l)
			1ms   join s                > s seg0*(a)
			2ms   announce s 0 y        > s named
			3ms   leave l               > a seg0(s), a seg0*(s)`},
	{name: "nor is who has bytes by them, and finds others with the registry's rest behind", lines: `
			0s    join l whole          > l wait
			0s    announce l 0 x
			0s    announce l 1 x
			0s    join a can            > a seg0*(l), a seg1*(l)
			0s    join c can            > c seg0*(a), c seg1*(a)
			1ms   status c present=1
			2ms   bad a                 > a fetch, c seg0(l), c seg1(l), l named
			2ms   status a fetching -can
			3ms   announce c 1 z
			4ms   announce a 1 y        > c seg1*(a)
			5ms   status a whole prefix=4 -fetching`},
	{name: "who got a wrong blob by hashes that were superseded blames their author, not who superseded them", lines: `
			0s    join l                > l wait
			0s    announce l 1 x
			1ms   join a can            > a fetch, a seg1*(l)
			1ms   join b can            > b seg1*(l)
			1ms   join c can            > c seg1*(b+l)
			2ms   status a fetching -can
			2ms   status b present=1
			2ms   status c present=1
			3ms   announce a 1 y        > b seg1*(a), c seg1*(b+l), l seg1*(b+c)
			4ms   bad b                 > b seg1*(c), c seg1(a), l named
			5ms   bad c                 > b seg1(a), c seg1*(b), l out`},
	{name: "also not once their author has spoken against them", lines: `
			0s    join l whole          > l wait
			0s    announce l 1 x
			1ms   join a can            > a seg1*(l)
			1ms   join b                > b seg1*(a)
			2ms   status b present=1
			3s    tick                  > a fetch, b seg1(l)
			3s    status a fetching -can
			3.1s  announce a 1 y        > b seg1*(), a named
			3.2s  bad b                 > b seg1*(), l named`},
	{name: "of several by whose hashes one got a wrong blob, the one that is blamed already is it", lines: `
			0s    join l whole          > l wait
			0s    announce l 1 x
			0s    join a can            > a seg1*(l)
			0s    join b can            > b seg1*(a)
			1ms   status b prefix=2
			2ms   bad a                 > a fetch, b seg1(l), l named
			3ms   join k whole          > k wait
			4ms   announce k 0 y        > a seg0*(b), b seg0*(k)
			5ms   bad b                 > b seg0*(k), l out`},
	{name: "who has bytes by superseded hashes may announce what follows from them", lines: `
			0s    join l                > l wait
			0s    announce l 1 x
			1ms   join a can            > a fetch, a seg1*(l)
			1ms   join b can            > b seg1*(l)
			2ms   status a fetching -can
			2ms   status b present=1
			3ms   announce a 1 y        > b seg1*(a), l seg1*(b)
			4ms   announce a 0 y        > b seg0*(a), l seg0*(b)
			5ms   announce b 0 x
			6ms   status a whole prefix=4 -fetching > l named`},
	{name: "nor those whose bytes were thrown away since", lines: `
			0s    join l                > l wait
			0s    announce l 1 x
			1ms   join a can            > a fetch, a seg1*(l)
			1ms   join b can            > b seg1*(l)
			2ms   status a fetching -can
			2ms   status b present=1
			3ms   announce a 1 y        > b seg1*(a), l seg1*(b)
			4ms   status b present=0    > b seg1(l), b seg1*(a)
			5ms   status b present=1
			6ms   bad b                 > a named`},
	{name: "who claims to have the whole blob, by whose hashes another got a wrong one, is no witness", lines: `
			0s    join l whole          > l wait
			0s    announce l 1 x
			1ms   join a can            > a seg1*(l)
			1ms   join b can            > b seg1*(a)
			2ms   status b prefix=4
			3ms   bad b                 > b fetch, l named
			4ms   status b fetching -can
			5ms   announce b 1 y        > a seg1*(b)
			6ms   announce b 2 y        > a seg2*(b)
			7ms   announce l 2 x`},
	{name: "a version that came back when its holder had gone, and was wrong, is what is blamed", lines: `
			0s    join a can            > a fetch
			0s    join b can            > b wait
			0s    join c can            > c wait
			0s    join d can            > d wait
			1ms   status a fetching -can
			2ms   announce a 0 y        > b seg0*(c+d), c seg0*(b+d), d seg0*(a)
			3ms   status b present=0.5
			3ms   status c present=0.5
			3ms   status d present=0.5
			4ms   join l                > l seg0*(b+c+d)
			5ms   announce l 0 x
			6ms   leave a               > b seg0*(l), c seg0*(b+d+l), d seg0(l), d seg0*(b+c+l)
			7ms   join a can            > a seg0*(b+c+l)
			8ms   bad b                 > b fetch, l named
			9ms   bad c                 > l out, d retract`},
	{name: "one that is reported itself is not excused by wrong hashes of another", lines: `
			0s    join l                > l wait
			0s    announce l 0 x
			0s    join a can            > a seg0*(l)
			0s    join b can            > b seg0*(a+l)
			1ms   status a fetching -can
			2ms   announce a 1 y        > b seg1*(a), l seg1*(b)
			3ms   status l present=0.1
			3ms   status b present=1
			4ms   bad b                 > a named, l named
			5ms   join s whole          > s wait
			6ms   announce s 0 y        > a seg0*(b), b seg0*(s), l out`},
	{name: "nor one that has found out that it has the whole blob", lines: `
			0s    join l                > l wait
			0s    announce l 1 x
			0s    join a can            > a fetch, a seg1*(l)
			0s    join k                > k seg1*(l)
			1ms   status a fetching -can
			1ms   status k present=1
			2ms   announce a 1 y        > k seg1*(l), l seg1*(k)
			3ms   status k whole prefix=4
			3ms   announce k 0 z        > a seg0*(k+l), l seg0*(k)
			4ms   join s whole          > s wait
			5ms   announce s 0 y        > s named, k named`},
	{name: "also before its hashes were superseded", lines: `
			0s    join l                > l wait
			0s    announce l 1 x
			0s    join a can            > a fetch, a seg1*(l)
			0s    join k                > k seg1*(l)
			1ms   status a fetching -can
			1ms   status k whole prefix=4
			2ms   announce a 1 y        > l seg1*(k)
			3ms   announce k 0 z        > a seg0*(k+l), l seg0*(k)
			4ms   join s whole          > s wait
			5ms   announce s 0 y        > s named, k named`},
	{name: "what one that is shut out said of a whole one does not keep that from speaking", lines: `
			0s    join s whole          > s wait
			0s    announce s 0 y
			0s    join l can            > l seg0*(s)
			0s    join b can            > b seg0*(l)
			1ms   status l present=0.1
			2ms   bad l                 > b seg0(s), s named
			3ms   announce l 9          > l fetch, l out
			4ms   join k                > k seg0*(b)
			5ms   announce k 0 x        > k named`},
	{name: "one that is shut out itself keeps what it has", lines: `
			0s    join l whole          > l wait
			0s    announce l 1 x
			0s    join a can            > a seg1*(l)
			0s    join b can            > b seg1*(a)
			0s    join o                > o seg1*(a+b)
			1ms   status o present=1
			2ms   announce o 9          > o out
			3ms   bad a                 > b fetch, b seg1(l), l named
			4ms   bad b                 > b fetch, l out`},
	{name: "one that gets a byte now and then does not keep those with doubtful bytes from the registry", lines: `
			0s    join l                > l wait
			0s    announce l 1 x
			0s    join a can            > a fetch, a seg1*(l)
			0s    join b can            > b seg1*(l)
			1ms   status a fetching -can
			2ms   status b present=0.5
			3ms   announce a 1 y        > b seg1*(a), l seg1*(b)
			4ms   leave a               > b seg1(l), b seg1*(l)
			1s    status l present=0.01
			2s    status l present=0.02
			2.1s  tick                  > b fetch`},
	{name: "a retraction reaches those that have bytes by superseded hashes of the one that takes them back", lines: `
			0s    join a can            > a fetch
			0s    join b can            > b wait
			0s    join c can            > c wait
			1ms   status a fetching -can
			2ms   announce a 0 y        > b seg0*(a), c seg0*(b)
			3ms   status b present=0.5
			3ms   status c present=0.5
			4ms   leave a               > b fetch, b seg0(c)
			5ms   status b fetching -can
			6ms   announce b 0 z        > c seg0*(b)
			7ms   join a can            > a seg0*(c)
			8ms   bad a own             > a named, b retract, c retract`},
	{name: "of two that were sent to the registry the first is believed", lines: `
			0s    join a can            > a fetch
			0s    join b can            > b wait
			0s    status a fetching -can
			1ms   announce a 1 x        > b seg1*(a)
			4.1s  tick                  > b fetch
			4.1s  status b fetching -can
			4.1s  announce b 1 y`},
	{name: "of several versions the one that most hold comes back", lines: `
			0s    join l                > l wait
			0s    announce l 0 x
			0s    join a                > a seg0*(l)
			0s    join b                > b seg0*(a+l)
			0s    join c                > c seg0*(a+b+l)
			1ms   announce c 0 z
			1ms   announce a 0 y
			1ms   announce b 0 y
			2ms   leave l               > a seg0(c), b seg0(c), b seg0*(a+c), c seg0*(a+b)`},
	{name: "but none whose author is shut out, whoever holds it", lines: `
			0s    join l                > l wait
			0s    announce l 0 x
			0s    join k                > k seg0*(l)
			0s    join a                > a seg0*(k+l)
			0s    join b                > b seg0*(a+k+l)
			0s    join c                > c seg0*(a+b+l)
			1ms   announce k 0 z
			1ms   announce a 0 z
			1ms   announce b 0 z
			1ms   announce c 0 y
			2ms   announce k 9          > a seg0(c), b seg0(c), k out
			3ms   leave l               > a seg0(b), a seg0*(b+c), b seg0*(a+c)`},
	{name: "who passed on wrong hashes is not to blame for them", lines: `
			0s    join l                > l wait
			0s    announce l 1 x
			1ms   join a can            > a fetch, a seg1*(l)
			1ms   join b can            > b seg1*(l)
			2ms   status a fetching -can
			3ms   announce a 1 y        > b seg1*(a), l seg1*(b)
			4ms   announce b 1 x
			5ms   status a prefix=4 whole -fetching > l named`},
	{name: "who brings the same segment from the registry, having reported the author, still has it when that is shut out", lines: `
			0s    join l whole          > l wait
			0s    announce l 0 x
			0s    join a can            > a seg0*(l)
			0s    join b can            > b seg0*(a)
			0s    join c can            > c seg0*(a+b)
			1ms   announce c 0 x
			1ms   status b prefix=3
			1ms   status c prefix=3
			2ms   bad a                 > l named, a fetch
			3ms   status a fetching -can
			4ms   announce a 0 x
			5ms   bad b                 > l out, c retract, b seg0*(a), c seg0*(b)
			6ms   status b prefix=0
			7ms   status a prefix=1 -fetching can > a fetch`},
	{name: "who finds a wrong blob just when it is told to throw the bytes away blames nobody who has the right ones", lines: `
			0s    join l whole          > l wait
			0s    announce l 0 x
			0s    join a can            > a seg0*(l)
			0s    join b can            > b seg0*(a)
			0s    join c can            > c seg0*(a+b)
			1ms   status b prefix=3
			1ms   status c prefix=3
			2ms   bad a                 > l named, b seg0(l), a fetch
			3ms   status a fetching -can
			4ms   announce a 0 x
			5ms   bad b                 > l out, c retract, b seg0*(c), c seg0*(a)
			# It was on its way when c was told.
			6ms   bad c
			7ms   status c prefix=0 retracted=1
			8ms   announce a 1 y        > b seg1*(a), c seg1*(b)
			9ms   status a whole prefix=4 -fetching
			# What c says of the bytes that it has since counts.
			10ms  status c prefix=3
			11ms  bad c                 > a named, b seg0(a)`},
	{name: "who fetched all has what was forgotten with its author as soon as it is whole", lines: `
			0s    join a can            > a fetch
			0s    join l whole          > l wait
			0s    join b can            > b wait
			0s    join c can            > c wait
			1ms   status a fetching -can
			1ms   announce l 0 x        > a seg0*(b+c), b seg0*(l), c seg0*(b)
			2ms   announce a 0 x        > c seg0(a)
			3ms   status b prefix=4
			3ms   status c prefix=4
			4ms   bad b                 > l named
			5ms   bad c                 > l out
			6ms   status a whole prefix=4 -fetching > b seg0*(a), c seg0*(b)`},
	{name: "but not if it was not sent there", lines: `
			0s    join l whole          > l wait
			0s    announce l 0 x
			0s    join a can            > a seg0*(l)
			0s    join b can            > b seg0*(a)
			0s    join c can            > c seg0*(a+b)
			1ms   status a fetching -can > b seg0(l)
			2ms   announce a 0 x
			3ms   status b prefix=4
			3ms   status c prefix=4
			4ms   bad b                 > l named
			5ms   bad c                 > l out
			6ms   status a whole prefix=4 -fetching`},
	{name: "nor if it has lost its bytes since", lines: `
			0s    join a can            > a fetch
			0s    join l whole          > l wait
			0s    join b can            > b wait
			0s    join c can            > c wait
			1ms   status a fetching -can
			1ms   announce l 0 x        > a seg0*(b+c), b seg0*(l), c seg0*(b)
			1ms   status a present=1 fetching -can
			2ms   announce a 0 x        > c seg0(a)
			3ms   status b prefix=4
			3ms   status c prefix=4
			4ms   bad b                 > l named
			5ms   bad c                 > l out
			6ms   status a fetching present=0 -can
			7ms   status a whole prefix=4 -fetching`},
	{name: "those that are whole keep what another takes back that the registry has sent other bytes", lines: `
			0s    join a can            > a fetch
			0s    join b can            > b wait
			1ms   status a fetching -can
			2ms   announce a 0          > b seg0*(a)
			3ms   join s whole has=0    > s wait, b seg0(s)
			4ms   bad a own             > a named, a seg0*(b), b retract, b seg0*(s)
			5ms   join c can            > c seg0*(b)`},
	{name: "those that are whole still have what they announced as one that is shut out did", lines: `
			0s    join l whole          > l wait
			0s    announce l 0
			0s    announce l 1 x
			1ms   join s whole has=0+1  > s wait, s named, l named
			2ms   join t whole has=0+1  > t wait, l out
			3ms   join a can            > a seg0(t), a seg0*(s), a seg1(t), a seg1*(s)`},
	{name: "who took a segment of one that sends bad pieces has it still; for what nobody has one is sent", lines: `
			0s    join l whole          > l wait
			0s    announce l 0 x
			0s    announce l 1 x
			0s    join a can            > a seg0*(l), a seg1*(l)
			0s    join b can            > b seg0*(a), b seg1*(a)
			1ms   announce a 1 x
			2ms   badpieces a x l       > a seg0(b), b seg0(l), l named
			3ms   badpieces b x l       > l out, b fetch`},
	{name: "nor who has it from one that it reports after it threw away what another had brought", lines: `
			0s    join l whole          > l wait
			0s    announce l 1 x
			0s    join a can            > a seg1*(l)
			0s    join b can            > b seg1*(a)
			1ms   status a prefix=4
			2ms   bad a                 > l named, b seg1(l), b fetch
			3ms   join k whole          > k wait
			3ms   announce k 0 x        > b seg0*(a), a seg0*(k)
			4ms   badpieces a x k       > k named
			4ms   join c can            > c seg0*(a+k), c seg1*(a+l)
			5ms   announce a 0 x
			6ms   badpieces c x k       > k out`},
	{name: "nor who has it from one that two others report", lines: `
			0s    join l whole          > l wait
			0s    announce l 1 x
			0s    join a can            > a seg1*(l)
			0s    join b can            > b seg1*(a)
			1ms   status a prefix=4
			2ms   bad a                 > l named, b seg1(l), b fetch
			2ms   status b fetching -can
			3ms   join k whole          > k wait
			3ms   announce k 0 x        > b seg0*(a), a seg0*(k)
			4ms   join c can            > c seg0*(a), c seg1*(a+l)
			5ms   announce a 0 x
			6ms   bad b                 > k named, l out
			7ms   bad c                 > k out, a retract, a fetch`},
	{name: "bad pieces: one says so and brings others, two shut out", lines: `
			0s    join l whole          > l wait
			0s    announce l 0 x
			0s    join a can            > a seg0*(l)
			0s    join b can            > b seg0*(a)
			1ms   badpieces a x l b nobody a > a seg0(b), b seg0(l), l named
			2ms   badpieces a x l
			3ms   badpieces b x l       > l out, b fetch`},
	{name: "bad pieces by other hashes, or of one that the member was not told of, do not count", lines: `
			0s    join l whole          > l wait
			0s    announce l 0 x
			0s    join a can            > a seg0*(l)
			0s    join k                > k seg0*(a)
			1ms   badpieces a y l
			1ms   badpieces k x l`},
	{name: "the word of one that is shut out does not count", lines: `
			0s    join s whole          > s wait
			0s    announce s 0 x
			0s    join l can            > l seg0*(s)
			0s    join k can            > k seg0*(l)
			1ms   announce l 7          > l out, k seg0(s), l fetch
			2ms   badpieces l x s
			3ms   badpieces k x s       > s named, k fetch
			4ms   bad l`},
	{name: "nor does what it had said before", lines: `
			0s    join s whole          > s wait
			0s    announce s 0 x
			0s    join l can            > l seg0*(s)
			0s    join k can            > k seg0*(l)
			1ms   badpieces l x s       > k seg0(s), l seg0(k), s named
			2ms   announce l 7          > l out, l fetch
			3ms   badpieces k x s       > k fetch, s named`},
	{name: "bad pieces: what another holds stays, and nobody is sent to the registry", lines: `
			0s    join s whole          > s wait
			0s    announce s 0 x
			0s    announce s 1 x
			0s    announce s 2 x
			0s    announce s 3 x
			0s    join t whole          > t wait
			0s    announce t 0 x
			0s    announce t 1 x
			0s    announce t 2 x
			0s    announce t 3 x
			0s    join a can            > a seg0*(s), a seg1*(s), a seg0(t), a seg1(t)
			0s    join b can            > b seg0*(a), b seg1*(a)
			1s    announce a 0 x        > a seg2*(b), a seg3*(b), a seg2(t), a seg3(t), b seg2*(s), b seg3*(s)
			1s    announce b 0 x
			1s    status a prefix=1
			1s    status b prefix=1
			1.1s  badpieces a x s       > a seg1(b), s named
			1.2s  badpieces b x s       > b seg2(a), b seg3(a), s out
			1.5s  status a prefix=1 present=2
			1.5s  status b prefix=1 present=2
			2s    status a prefix=1 present=3
			2s    status b prefix=1 present=3
			2.5s  tick
			3.5s  join c can            > c seg0*(a+b+t), c seg1*(a+b), c seg2*(a+b), c seg3*(a+b)
			4s    bad c                 > c fetch, t named`},
	{name: "bad pieces of one who has all, with nobody else to take it: who says so fetches", lines: `
			0s    join s whole          > s wait
			0s    announce s 0 x
			0s    join a can            > a seg0*(s)
			1ms   badpieces a x s       > a fetch, s named`},
}

func TestVersions(t *testing.T) {
	for _, c := range versionTests {
		t.Run(c.name, func(t *testing.T) { runScript(t, testDigest, testSize, c.members, c.lines) })
	}
}

// What one member says of one segment, however often and differently, is kept once,
// and what many say is bounded.
func TestVersionsAreBounded(t *testing.T) {
	m := NewMachine(testDigest, testSize, MachineOptions{StallTimeout: testStall, Layout: testLayout})
	join := func(name string) {
		hello := &api.Hello{Size: testSize, Self: &api.Peer{Name: name, Address: name}, Status: &api.Status{}}
		if _, err := m.Join(epoch, hello); err != nil {
			t.Fatal(err)
		}
	}
	say := func(name string, hashes int) {
		a := segmentOf(0, byte(hashes))
		m.Message(epoch, name, &api.MemberMessage{Message: &api.MemberMessage_Announce{Announce: a}})
	}
	join("first")
	say("first", 1)
	for k := range 60 {
		name := fmt.Sprint("n", k)
		join(name)
		for h := range 200 {
			say(name, 2+h) // never the first one's, which they would hold then
		}
		say(name, 2+k%6)
	}
	versions := m.segs[0].versions
	if len(versions) > maxVersions {
		t.Errorf("%d versions", len(versions))
	}
	seen := map[string]int{}
	for _, v := range versions {
		if len(v.who) > maxKept {
			t.Errorf("%d remembered that hold a version", len(v.who))
		}
		for _, x := range v.who {
			if seen[x.name]++; seen[x.name] > 1 {
				t.Errorf("%s is remembered to hold %d versions", x.name, seen[x.name])
			}
		}
	}
	if m.Mismatches() == 0 {
		t.Error("no contradiction was counted")
	}
}
