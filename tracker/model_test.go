package tracker

import (
	"fmt"
	"math/bits"
	"math/rand/v2"
	"time"

	"google.golang.org/protobuf/proto"

	api "github.com/imagewolf/imagewolf/api/v1"
)

// This file models the network and the members of one blob, in virtual time,
// so that a Machine can be seen at work with thousands of them. What is
// modelled: every member's uplink and downlink, which its transfers share; the
// line that each zone has to the others; latency, and the round trips of
// a new connection; a peer that does not know the segment yet and is tried
// again; requests for the rarest piece first; the tracker's own uplink. What is
// not: the processor, losses, pieces that are sent twice.

const (
	// What a connection costs on top of its round trips: two TLS handshakes.
	modelDial = 3 * time.Millisecond
	// As swarm and node have them.
	modelRetry  = 250 * time.Millisecond
	modelLook   = 5 * time.Millisecond
	modelStatus = 200 * time.Millisecond
	modelBusy   = 3 * time.Second        // for how long after a byte a member says that it gets some
	modelRepeat = 500 * time.Millisecond // how often it says so
	// What a message costs on the wire beyond itself: gRPC, HTTP/2, TLS and
	// a part of a packet's head.
	modelFraming = 60
	modelBlocks  = 4 // a piece is sent in so many parts, in turn with others
	modelWindow  = 2 // pieces under way on one connection
	modelEnd     = time.Hour
)

// model is one run. Its network is described by the fields before run.
type model struct {
	members int     // that pull, the fetcher included
	sources int     // that hold the blob before, and are asked for it
	size    int64   // bytes of the blob
	rate    float64 // bytes/s of every uplink, downlink, and of the registry's to the fetcher
	layout  Layout
	piece   int64 // bytes
	near    time.Duration
	stagger time.Duration // members join within that time
	zones   int
	zoneOf  func(i int) int // nil: by turns
	far     time.Duration   // latency between zones
	line    float64         // bytes/s of each zone's line to the others, each way
	says    bool            // members say that they get bytes, as they do where blobs or zones share lines
	boaster int             // a member that reaches nobody, and says that it gets bytes; 0: none
	deaths  int             // members that die on the way
	dies    func(v *model) int
	blocked func(v *model, a, b int) bool // they cannot connect; nil: all can

	m      *Machine
	r      *rand.Rand
	now    time.Duration
	queue  eventQueue
	nodes  []modelNode
	byName map[string]int
	lines  []modelLine
	ticked time.Duration // when the next tick is on its way; 0 if none is
	trunk  time.Duration // when the tracker's uplink is free again
	living int           // members that are neither dead nor done

	// The outcome.
	last      time.Duration // when the last member was done
	in, out   int           // the tracker's messages
	inB, outB int64         // their bytes, framing included
	crossed   int64         // bytes between zones
	busy      time.Duration // of the machine, by the wall clock
	asks      int
}

type modelNode struct {
	name    string
	zone    int
	dead    bool
	joined  bool
	source  bool
	fetch   bool
	parts   []modelPart
	held    int // segments
	present int64
	bytes   time.Duration // when a block last came; 0: never
	status  bool          // a status is due, and on its way
	moved   time.Duration
	done    time.Duration
	sent    int64
	up      modelUplink
	down    time.Duration // when the downlink is free again
}

// modelPart is one member's part in one segment.
type modelPart struct {
	told        bool
	announced   bool
	have, asked uint32 // by piece
	links       []*modelLink
}

// modelLink is a connection for one segment.
type modelLink struct {
	ends   [2]int
	seg    int
	dead   bool
	flight [2]uint32 // pieces on their way to that end
}

type modelRequest struct {
	l     *modelLink
	to    int // which end
	piece int
	left  int
}

// modelUplink serves requests block by block, in turn.
type modelUplink struct {
	queue []modelRequest
	busy  bool
}

type modelLine struct{ out, in time.Duration } // when it is free again

// run runs the model until every member that lives is done.
func (v *model) run() error {
	v.r = rand.New(rand.NewPCG(1, uint64(v.members)))
	v.byName = map[string]int{}
	v.zones = max(v.zones, 1)
	v.lines = make([]modelLine, v.zones)
	v.nodes = make([]modelNode, v.members+v.sources)
	v.m = NewMachine(testDigest, v.size, MachineOptions{
		Layout:  func(int64) Layout { return v.layout },
		Members: func() int { return len(v.nodes) },
	})
	v.living = v.members
	if v.boaster > 0 {
		v.living--
		v.blocked = func(v *model, a, b int) bool { return a == v.boaster || b == v.boaster }
	}
	for i := range v.nodes {
		n := &v.nodes[i]
		n.name = fmt.Sprintf("node-%05d.cluster.local", i)
		n.zone = i % v.zones
		if v.zoneOf != nil {
			n.zone = v.zoneOf(i)
		}
		n.parts = make([]modelPart, v.layout.Segments)
		v.byName[n.name] = i
		if i >= v.members {
			n.source = true
			v.tell(v.m.SeederAdded(epoch, n.name, v.zone(n)))
			continue
		}
		at := time.Duration(0)
		if v.stagger > 0 && i > 0 {
			at = time.Duration(v.r.Int64N(int64(v.stagger)))
		}
		v.at(at, func() { v.join(i) })
	}
	for k := range v.deaths {
		// Spread over the time that the blob takes.
		v.at(time.Duration(float64(k+1)/float64(v.deaths+1)*v.ideal()*float64(time.Second)), func() { v.kill(v.dies(v)) })
	}
	for v.living > 0 && len(v.queue) > 0 && v.now < modelEnd {
		e := v.queue.pop()
		v.now = e.at
		v.handle(e)
	}
	if v.living > 0 {
		return fmt.Errorf("%d members are not done after %v", v.living, v.now)
	}
	return nil
}

// ideal is how long the blob takes to come over one link, in seconds.
func (v *model) ideal() float64 { return float64(v.size) / v.rate }

func (v *model) zone(n *modelNode) string {
	if v.zones < 2 {
		return ""
	}
	return fmt.Sprint("zone-", n.zone)
}

func (v *model) latency(a, b int) time.Duration {
	if v.nodes[a].zone != v.nodes[b].zone {
		return v.far
	}
	return v.near
}

func (v *model) wall() time.Time { return epoch.Add(v.now) }

// handle handles one event.
func (v *model) handle(e event) {
	switch e.kind {
	case eventCall:
		e.call()
	case eventSent:
		v.sentBlock(int(e.node))
	case eventArrived:
		n := &v.nodes[e.link.ends[e.side]]
		n.down = max(v.now, n.down+v.takes(v.blockLen(e.link.seg, int(e.piece)), v.rate))
		n.bytes = v.now
		if e.last {
			v.queue.push(event{at: n.down, kind: eventGot, link: e.link, side: e.side, piece: e.piece})
		}
	case eventGot:
		v.got(e.link, int(e.side), int(e.piece))
	case eventHave:
		v.have(int(e.node), e.link.seg)
	case eventTry:
		v.try(e.link, int(e.side))
	}
}

func (v *model) at(d time.Duration, f func()) {
	v.queue.push(event{at: v.now + d, kind: eventCall, call: f})
}

// tell delivers what the machine says, over the tracker's uplink.
func (v *model) tell(out []Command) {
	for _, c := range out {
		i, ok := v.byName[c.To]
		if !ok {
			panic("command to nobody: " + c.To)
		}
		size := int64(modelFraming)
		if c.Msg != nil {
			size += int64(proto.Size(c.Msg))
		}
		v.out++
		v.outB += size
		v.trunk = max(v.trunk, v.now) + v.takes(size, v.rate)
		v.at(v.trunk-v.now+v.near, func() { v.hear(i, c) })
	}
	if next := v.m.Next(); !next.IsZero() {
		due := max(next.Sub(epoch), v.now)
		if v.ticked <= v.now || due < v.ticked {
			v.ticked = due
			v.at(due-v.now, func() {
				if next := v.m.Next(); !next.IsZero() && !next.After(v.wall()) {
					v.ticked = 0
					v.event(func() []Command { return v.m.Tick(v.wall()) })
				}
			})
		}
	}
}

// event has the machine handle something and takes its time.
func (v *model) event(f func() []Command) {
	start := time.Now()
	out := f()
	v.busy += time.Since(start)
	v.tell(out)
}

// say sends a member's message to the tracker.
func (v *model) say(i int, msg *api.MemberMessage) {
	v.in++
	v.inB += int64(proto.Size(msg)) + modelFraming
	v.at(v.near, func() {
		if !v.nodes[i].dead {
			v.event(func() []Command { return v.m.Message(v.wall(), v.nodes[i].name, msg) })
		}
	})
}

func (v *model) state(n *modelNode) *api.Status {
	whole := n.present == v.size
	st := &api.Status{Present: n.present, Whole: whole, CanFetch: !whole && !n.fetch, Fetching: n.fetch && !whole}
	st.Busy = v.says && n.bytes > 0 && !whole && v.now-n.bytes < modelBusy || v.boaster > 0 && n == &v.nodes[v.boaster]
	seg, piece := v.prefix(n)
	st.Prefix = min(int64(seg)*v.layout.SegmentSize+int64(piece)*v.piece, v.size)
	return st
}

// prefix is where the first piece is that a member lacks, and behind the last
// segment if it lacks none.
func (v *model) prefix(n *modelNode) (seg, piece int) {
	if n.present == v.size {
		return len(n.parts), 0
	}
	for seg < len(n.parts) && n.parts[seg].have == v.all(seg) {
		seg++
	}
	if seg < len(n.parts) {
		piece = bits.TrailingZeros32(^n.parts[seg].have)
	}
	return seg, piece
}

func (v *model) join(i int) {
	n := &v.nodes[i]
	if n.joined || n.dead {
		return
	}
	n.joined, n.moved = true, v.now
	if n.source {
		n.present = v.size
	}
	hello := &api.Hello{
		Digest: testDigest.String(), Size: v.size, Zone: v.zone(n), Status: v.state(n),
		Self: &api.Peer{Name: n.name, Address: fmt.Sprintf("10.%d.%d.%d:7947", i>>16, i>>8&255, i&255)},
	}
	v.in++
	v.inB += int64(proto.Size(hello)) + modelFraming
	v.event(func() []Command {
		out, err := v.m.Join(v.wall(), hello)
		if err != nil {
			panic(err)
		}
		return out
	})
	if n.source {
		// As node does it: nodes that hold the same begin at different segments.
		first := v.r.IntN(len(n.parts))
		for k := range n.parts {
			seg := (first + k) % len(n.parts)
			v.at(time.Duration(k)*time.Millisecond, func() {
				n.parts[seg].told, n.parts[seg].have = true, v.all(seg)
				v.announce(i, seg)
			})
		}
		return
	}
	v.patience(i)
	if v.says {
		v.repeat(i)
	}
}

// repeat is the member's saying again and again that it gets bytes.
func (v *model) repeat(i int) {
	v.at(modelRepeat, func() {
		n := &v.nodes[i]
		if n.dead || n.done > 0 {
			return
		}
		if st := v.state(n); st.GetBusy() {
			v.say(i, &api.MemberMessage{Message: &api.MemberMessage_Status{Status: st}})
		}
		v.repeat(i)
	})
}

// patience is the member's look at its own progress.
func (v *model) patience(i int) {
	v.at(testStall, func() {
		n := &v.nodes[i]
		if n.dead || n.done > 0 {
			return
		}
		if !n.fetch && v.now-n.moved >= testStall {
			v.asks++
			v.say(i, &api.MemberMessage{Message: &api.MemberMessage_Ask{Ask: &api.Ask{}}})
		}
		v.patience(i)
	})
}

// hear has a member do what the tracker says.
func (v *model) hear(i int, c Command) {
	n := &v.nodes[i]
	if n.dead {
		return
	}
	if c.Serve {
		v.join(i)
		return
	}
	switch t := c.Msg.GetMessage().(type) {
	case *api.TrackerMessage_Fetch:
		if !n.fetch && n.done == 0 {
			n.fetch = true
			v.say(i, &api.MemberMessage{Message: &api.MemberMessage_Status{Status: v.state(n)}})
			seg, piece := v.prefix(n) // goes on there, by Range
			v.fetched(i, seg, piece)
		}
	case *api.TrackerMessage_Segment:
		seg := int(t.Segment.GetSegment())
		n.parts[seg].told = true
		for _, p := range t.Segment.GetPeers() {
			v.dial(i, v.byName[p.GetName()], seg)
		}
	}
}

// fetched has the fetcher receive piece after piece from the registry.
func (v *model) fetched(i, seg, piece int) {
	n := &v.nodes[i]
	if n.dead {
		return
	}
	v.at(v.takes(v.pieceLen(seg, piece), v.rate), func() {
		p := &n.parts[seg]
		if p.have>>piece&1 == 0 {
			p.have |= 1 << piece
			n.present += v.pieceLen(seg, piece)
			v.progress(i)
		}
		if piece++; piece == v.layout.Pieces(seg) {
			p.told = true
			// They are hashed, a millisecond per MiB.
			whole := seg
			v.at(modelLook+v.takes(v.segLen(seg), 1<<30), func() { v.announce(i, whole) })
			seg, piece = seg+1, 0
		}
		if seg < len(n.parts) {
			v.fetched(i, seg, piece)
		}
	})
}

func (v *model) announce(i, seg int) {
	p := &v.nodes[i].parts[seg]
	if p.announced || v.nodes[i].dead {
		return
	}
	p.announced = true
	hashes := make([]byte, sha1Size*v.layout.Pieces(seg))
	v.say(i, &api.MemberMessage{Message: &api.MemberMessage_Announce{Announce: &api.Announce{Segment: uint32(seg), Pieces: hashes}}})
	v.haveLater(i, seg)
}

// progress sends the status that is due, and notes who is done.
func (v *model) progress(i int) {
	n := &v.nodes[i]
	n.moved = v.now
	if n.present == v.size {
		if n.done == 0 {
			n.done = v.now
			v.last = max(v.last, v.now)
			v.living--
			v.say(i, &api.MemberMessage{Message: &api.MemberMessage_Status{Status: v.state(n)}})
			v.at(modelStatus, func() { // it registers what it holds
				v.event(func() []Command { return v.m.SeederAdded(v.wall(), n.name, v.zone(n)) })
			})
		}
		return
	}
	if n.status {
		return
	}
	n.status = true
	v.at(modelStatus, func() {
		n.status = false
		if !n.dead && n.done == 0 {
			v.say(i, &api.MemberMessage{Message: &api.MemberMessage_Status{Status: v.state(n)}})
		}
	})
}

// dial connects two members for a segment, again and again until the other
// side knows it, unless they are connected.
func (v *model) dial(from, to, seg int) {
	v.at(6*v.latency(from, to)+modelDial, func() {
		a, b := &v.nodes[from].parts[seg], &v.nodes[to].parts[seg]
		if v.nodes[from].dead || v.nodes[to].dead || a.have == v.all(seg) || (v.blocked != nil && v.blocked(v, from, to)) {
			return
		}
		for _, l := range a.links {
			if l.ends[0] == to || l.ends[1] == to {
				return
			}
		}
		if !b.told {
			v.at(modelRetry, func() { v.dial(from, to, seg) })
			return
		}
		l := &modelLink{ends: [2]int{from, to}, seg: seg}
		a.links, b.links = append(a.links, l), append(b.links, l)
		v.try(l, 0)
		v.try(l, 1)
	})
}

// kill ends a member and its connections.
func (v *model) kill(i int) {
	n := &v.nodes[i]
	if n.dead || n.done > 0 {
		return
	}
	n.dead = true
	v.living--
	for seg := range n.parts {
		for _, l := range n.parts[seg].links {
			l.dead = true
			side := 0
			if l.ends[0] == i {
				side = 1
			}
			p := &v.nodes[l.ends[side]].parts[seg]
			p.asked &^= l.flight[side]
			for _, o := range p.links {
				if !o.dead {
					v.try(o, o.side(l.ends[side]))
				}
			}
		}
	}
	v.event(func() []Command { return v.m.Leave(v.wall(), n.name) })
}

func (l *modelLink) side(i int) int {
	if l.ends[0] == i {
		return 0
	}
	return 1
}

// try asks for pieces over a connection, the rarest first.
func (v *model) try(l *modelLink, side int) {
	x, y := l.ends[side], l.ends[1-side]
	mine, theirs := &v.nodes[x].parts[l.seg], &v.nodes[y].parts[l.seg]
	window := modelWindow
	if v.nodes[x].zone != v.nodes[y].zone {
		window = 8 // the client asks for more ahead where answers take long
	}
	for !l.dead && bits.OnesCount32(l.flight[side]) < window {
		want := theirs.have &^ (mine.have | mine.asked)
		if want == 0 {
			return
		}
		best, few, ties := -1, 0, 0
		for w := want; w != 0; w &= w - 1 {
			k := bits.TrailingZeros32(w)
			n := 0
			for _, o := range mine.links {
				n += int(v.nodes[o.ends[1-o.side(x)]].parts[l.seg].have >> k & 1)
			}
			switch {
			case best < 0 || n < few:
				best, few, ties = k, n, 1
			case n == few:
				if ties++; v.r.IntN(ties) == 0 {
					best = k
				}
			}
		}
		mine.asked |= 1 << best
		l.flight[side] |= 1 << best
		up := &v.nodes[y].up
		up.queue = append(up.queue, modelRequest{l: l, to: side, piece: best, left: modelBlocks})
		if !up.busy {
			v.serve(y)
		}
	}
}

// serve begins to send the next block.
func (v *model) serve(i int) {
	up := &v.nodes[i].up
	for len(up.queue) > 0 && up.queue[0].l.dead {
		up.queue = up.queue[1:]
	}
	if up.busy = len(up.queue) > 0; up.busy {
		q := up.queue[0]
		v.queue.push(event{at: v.now + v.takes(v.blockLen(q.l.seg, q.piece), v.rate), kind: eventSent, node: int32(i)})
	}
}

// sentBlock is the end of a block on an uplink.
func (v *model) sentBlock(i int) {
	n := &v.nodes[i]
	q := n.up.queue[0]
	n.up.queue = n.up.queue[1:]
	if q.left--; q.left > 0 {
		n.up.queue = append(n.up.queue, q)
	}
	v.serve(i)
	if q.l.dead || n.dead {
		return
	}
	size := v.blockLen(q.l.seg, q.piece)
	n.sent += size
	to := q.l.ends[q.to]
	e := event{at: v.now + v.near, kind: eventArrived, link: q.l, side: int8(q.to), piece: int8(q.piece), last: q.left == 0}
	if far := &v.nodes[to]; far.zone != n.zone {
		v.crossed += size
		out, in := &v.lines[n.zone], &v.lines[far.zone]
		takes := v.takes(size, v.line)
		out.out = max(v.now, out.out) + takes
		in.in = max(out.out, in.in+takes)
		e.at = in.in + v.far
	}
	v.queue.push(e)
}

// got is a piece that has arrived.
func (v *model) got(l *modelLink, side, piece int) {
	if l.dead {
		return
	}
	i := l.ends[side]
	n, p := &v.nodes[i], &v.nodes[i].parts[l.seg]
	l.flight[side] &^= 1 << piece
	p.asked &^= 1 << piece
	p.have |= 1 << piece
	n.present += v.pieceLen(l.seg, piece)
	v.try(l, side)
	if p.have == v.all(l.seg) {
		n.held++
		v.at(modelLook, func() { v.announce(i, l.seg) })
	}
	v.haveLater(i, l.seg)
	v.progress(i)
}

// haveLater tells the others, who answer with requests: a round trip.
func (v *model) haveLater(i, seg int) {
	v.queue.push(event{at: v.now + 2*v.near, kind: eventHave, node: int32(i), link: &modelLink{seg: seg}})
}

func (v *model) have(i, seg int) {
	for _, l := range v.nodes[i].parts[seg].links {
		side := 1 - l.side(i)
		if v.nodes[l.ends[side]].zone == v.nodes[i].zone {
			v.try(l, side)
		} else {
			v.queue.push(event{at: v.now + 2*v.far, kind: eventTry, link: l, side: int8(side)})
		}
	}
}

func (v *model) all(seg int) uint32 { return 1<<v.layout.Pieces(seg) - 1 }

func (v *model) segLen(seg int) int64 {
	return min(v.layout.SegmentSize, v.size-int64(seg)*v.layout.SegmentSize)
}

func (v *model) pieceLen(seg, piece int) int64 {
	return min(v.piece, v.segLen(seg)-int64(piece)*v.piece)
}

func (v *model) blockLen(seg, piece int) int64 { return v.pieceLen(seg, piece) / modelBlocks }

func (v *model) takes(n int64, rate float64) time.Duration {
	return time.Duration(float64(n) / rate * float64(time.Second))
}
