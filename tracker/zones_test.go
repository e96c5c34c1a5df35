package tracker

import (
	"fmt"
	"testing"
	"time"
)

// Zones with slow lines between them: each byte crosses into a zone once,
// and nobody is left without a source.
func TestZones(t *testing.T) {
	thirds := func(i int) int { return i % 3 }
	for _, c := range []struct {
		name    string
		members int
		sources int
		zones   int              // 3
		zoneOf  func(i int) int  // by turns
		line    float64          // of a zone to the others, in uplinks of one node: 1
		dies    func(*model) int // twelve times
		stagger time.Duration
		blocked func(v *model, a, b int) bool
		says    bool
		limit   float64 // of the last member's time
		copies  float64 // over the lines; zones - 1
	}{
		{name: "many members", members: 90, limit: 1.6},
		{name: "few members", members: 8, limit: 1.3},
		{name: "a member each", members: 3, limit: 1.3},
		{name: "half an uplink", members: 30, line: 0.5, limit: 2.7},
		{name: "uneven", members: 60, limit: 1.5, zoneOf: func(i int) int {
			return map[int]int{0: 0, 1: 0, 2: 1, 3: 1, 4: 1}[i] + map[bool]int{true: 2}[i > 4]
		}},
		{name: "one after the other", members: 60, stagger: 2 * time.Second, limit: 1.6},
		{name: "sources in one of them", members: 45, sources: 5, limit: 1.6, zoneOf: func(i int) int {
			if i >= 45 {
				return 1
			}
			return thirds(i)
		}},
		{name: "sources in none of them", members: 45, sources: 5, zones: 4, limit: 2, zoneOf: func(i int) int {
			if i >= 45 {
				return 3
			}
			return thirds(i)
		}},
		{name: "sources in all of them", members: 45, sources: 6, limit: 1.5, copies: 0.05},
		{name: "five zones", members: 50, zones: 5, limit: 1.7},
		{name: "many zones", members: 48, zones: 24, line: 10, limit: 1.7},
		{name: "all members far from each other", members: 48, zones: 48, line: 10, limit: 1.9},
		// The zone of one that cannot reach the others waits a while, then asks
		// wherever it can.
		{name: "one that reaches nobody far", members: 30, limit: 3, copies: 3, blocked: func(v *model, a, b int) bool {
			return (a == 4 || b == 4) && v.nodes[a].zone != v.nodes[b].zone
		}},
		// Deaths cost: what was under way over the line comes again.
		{name: "entries die", members: 60, dies: entryAtWork, limit: 2, copies: 2.2},
		{name: "some get bytes, and say so", members: 30, line: 0.5, says: true, limit: 2.7},
		{name: "five zones that say so", members: 50, zones: 5, says: true, limit: 1.7},
		{name: "one that gets bytes and reaches nobody far", members: 30, says: true, limit: 3.7, copies: 2.5, blocked: func(v *model, a, b int) bool {
			return (a == 4 || b == 4) && v.nodes[a].zone != v.nodes[b].zone
		}},
		{name: "entries that get bytes die", members: 60, says: true, dies: entryAtWork, limit: 2, copies: 2.2},
		{name: "any die", members: 60, dies: func(v *model) int { return v.r.IntN(v.members) }, limit: 1.7, copies: 2.2},
	} {
		t.Run(c.name, func(t *testing.T) {
			v := newModel(c.members, 128*mib, 200)
			v.zones, v.zoneOf, v.stagger, v.sources = max(c.zones, 1), c.zoneOf, c.stagger, c.sources
			if c.zones == 0 {
				v.zones = 3
			}
			v.blocked, v.says = c.blocked, c.says
			if c.dies != nil {
				v.deaths, v.dies = 12, c.dies
			}
			if c.line == 0 {
				c.line = 1
			}
			if c.copies == 0 {
				c.copies = float64(v.zones - 1)
			}
			v.far, v.line = 10*time.Millisecond, c.line*v.rate
			if err := v.run(); err != nil {
				t.Fatal(err)
			}
			crossed := float64(v.crossed) / float64(v.size)
			t.Logf("last %.2f, over the lines %.2f copies", v.ratio(), crossed)
			if v.ratio() > c.limit || crossed > c.copies*1.05 {
				t.Errorf("last %.2f, over the lines %.2f copies", v.ratio(), crossed)
			}
		})
	}
}

// Over slow lines a segment takes longer than members go without one. Those that are
// known to get bytes meanwhile are waited for: taken again from elsewhere, the same bytes
// would fill the line for longer (3.9 copies, and the last member at 6.5).
func TestZonesOverSlowLines(t *testing.T) {
	v := newModel(9, 16*mib, 6)
	v.layout, v.piece = cut(v.size, mib, 256<<10)
	v.zones, v.says = 3, true
	v.far, v.line = 10*time.Millisecond, v.rate/2
	if err := v.run(); err != nil {
		t.Fatal(err)
	}
	crossed := float64(v.crossed) / float64(v.size)
	t.Logf("last %.2f, over the lines %.2f copies", v.ratio(), crossed)
	if v.ratio() > 5.6 || crossed > 3.1 {
		t.Errorf("last %.2f, over the lines %.2f copies", v.ratio(), crossed)
	}
}

// A member that says that it gets bytes, and connects to nobody, holds its zone up once.
func TestZoneWaitsInVainOnce(t *testing.T) {
	v := newModel(12, 128*mib, 1000)
	v.zones, v.says, v.boaster = 3, true, 4
	v.far, v.line = 10*time.Millisecond, v.rate
	if err := v.run(); err != nil {
		t.Fatal(err)
	}
	if v.now > 30*time.Second { // 20 s of it until its zone has had enough
		t.Errorf("the last was done after %v", v.now)
	}
}

// entryAtWork is a member on which the rest of its zone waits.
func entryAtWork(v *model) int {
	for i := range v.m.segs {
		for _, zone := range v.m.zonesInOrder(i) {
			if e := v.m.segs[i].entries[zone]; e != nil && v.m.lacks(i, e) {
				return v.byName[e.name]
			}
		}
	}
	return 1
}

// Who a zone waits for is replaced, whatever becomes of it.
func TestEntryIsReplaced(t *testing.T) {
	const begin = `
			0s    join a can zone=x     > a fetch
			0s    status a fetching -can
			0s    join b can zone=x     > b wait
			0s    join b2 can zone=x    > b2 wait
			0s    join c can zone=y     > c wait
			0s    join d can zone=y     > d wait
			0s    join e can zone=y     > e wait
			1ms   announce a 0          > b seg0*(a), b2 seg0*(b), c seg0*(d+e), d seg0*(b), e seg0*(c+d)
	`
	for _, c := range []struct{ name, lines string }{
		{"the entry dies", `
			2ms   leave d               > e seg0(b)`},
		{"its client goes", `
			2ms   status d -can         > e seg0(b)`},
		{"the first hop dies", `
			2ms   leave b               > b2 seg0(a), d seg0(b2)`},
		{"the zone has it", `
			2ms   announce d 0
			3ms   leave d               > e seg0(b)`},
		{"another joins", `
			2ms   join f can zone=y     > f seg0*(c+d+e)`},
		{"the first of a new zone joins, then the second", `
			2ms   join g can zone=z     > g seg0*(b)
			3ms   join h can zone=z     > h seg0*(g)`},
		{"it finds the hashes wrong", `
			2ms   bad d                 > e seg0(b), a named`},
	} {
		t.Run(c.name, func(t *testing.T) { runScript(t, testDigest, testSize, 0, begin+c.lines) })
	}
}

// A zone whose entry gets bytes has a full line, and waits longer before it takes the
// same over it from elsewhere; the entry half as long, if it has an address there.
func TestZoneWaitsForItsEntry(t *testing.T) {
	m := runScript(t, testDigest, testSize, 0, `
			0s    join a can zone=x     > a fetch
			0s    status a fetching -can
			0s    join b can zone=x     > b wait
			0s    join c can zone=y     > c wait
			0s    join d can zone=y     > d wait
			1ms   announce a 0          > b seg0*(a), c seg0*(d), d seg0*(b)
			2ms   status d busy`)
	entry, other := m.members["d"], m.members["c"]
	for _, c := range []struct {
		x            *member
		heard, still time.Duration // since d said that it gets bytes; for how long x has had none
		want         bool
	}{
		{other, 0, busyStalls*testStall - 1, true},
		{other, 0, busyStalls * testStall, false},
		{other, testStall, 1900 * time.Millisecond, true},
		{other, testStall, 2 * time.Second, false},
		{entry, 0, busyStalls*testStall/2 - 1, true},
		{entry, 0, busyStalls * testStall / 2, false},
		{entry, testStall, 0, false},
	} {
		entry.vain = false
		if got := m.comes(entry.busyAt.Add(c.heard), 0, c.x, c.still); got != c.want {
			t.Errorf("%s, after %v without a byte, the entry heard %v ago: waits is %v", c.x.name, c.still, c.heard, got)
		}
	}
	m.comes(entry.busyAt, 0, other, busyStalls*testStall)
	for _, c := range []struct {
		x    *member
		want bool
	}{{entry, false}, {other, true}} {
		if got := m.comes(entry.busyAt, 0, c.x, time.Second); got != c.want {
			t.Errorf("waited for in vain: %s waits is %v", c.x.name, got)
		}
	}
	if m.comes(entry.busyAt, 0, other, 2*time.Second) {
		t.Error("an entry that was waited for in vain is again")
	}
	entry.vain, entry.given[0] = false, nil
	if m.comes(entry.busyAt, 0, entry, 0) {
		t.Error("an entry without an address in another zone waits for itself")
	}
}

// An entry that gets bytes is given no second address in another zone while its line
// may be full, and is given one after that; one that gets none is given it at once.
func TestEntryHasOneAddressElsewhere(t *testing.T) {
	const begin = `
			0s      join a whole zone=x   > a wait
			0s      join b can zone=x     > b wait
			0s      join c can zone=x     > c wait
			0s      join d can zone=y     > d wait
			1ms     announce a 0          > b seg0*(a), c seg0*(b), d seg0*(b)
			500ms   announce b 0
			500ms   status b whole -can
			600ms   announce c 0
			600ms   status c whole -can
	`
	busy := ""
	for at := time.Second; at < busyStalls*testStall/2; at += testStall / 4 {
		busy += fmt.Sprintln(at, "status d busy")
	}
	for _, c := range []struct{ name, lines string }{
		{"it gets bytes", busy + `
			10s     tick
			10250ms tick                  > d seg0(c)`},
		{"it gets none", `
			1s      tick
			1250ms  tick                  > d seg0(c)`},
	} {
		t.Run(c.name, func(t *testing.T) { runScript(t, testDigest, mib, 0, begin+c.lines) })
	}
}

// One more fetcher is sent from another zone: the same line to the registry may be
// what makes the first one slow.
func TestOneMoreFetcherIsElsewhere(t *testing.T) {
	for _, zones := range [][2]string{{"x", "y"}, {"y", "x"}} {
		far := map[string]string{zones[0]: "b", zones[1]: "c"}["y"]
		runScript(t, testDigest, testSize, 0, `
			0s     join a can zone=x               > a fetch
			0s     join b can zone=`+zones[0]+`    > b wait
			0s     join c can zone=`+zones[1]+`    > c wait
			0s     status a fetching -can
			3990ms tick
			4s     tick                            > `+far+` fetch`)
	}
}
