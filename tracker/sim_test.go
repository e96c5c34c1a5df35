package tracker

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	api "github.com/imagewolf/imagewolf/api/v1"
)

const (
	simStep     = 50 * time.Millisecond
	simSegments = 12
	simQuiet    = 20 * time.Second // no more deaths after this
	simEnd      = 5 * time.Minute
)

// simNode is one simulated member: it leeches from the peers it was told,
// fetches when told, and may misbehave.
type simNode struct {
	name, zone    string
	alive, joined bool
	joinAt        time.Time
	resumed       bool
	can, fetching bool
	whole         bool
	fetchAt       time.Time // when the client that was released begins
	canAt         time.Time // when a client comes (again)
	hung          bool      // its registry connection never delivers
	stray         bool      // told by a tracker that is no more
	has           [simSegments]bool
	part          float64 // of the segment that it is fetching
	pieces        [simSegments]bool
	peers         [simSegments]map[string]bool
	moved         time.Time

	// What the tracker can know, for the invariant.
	told      time.Time
	lastMoved time.Time
	present   int64
}

type sim struct {
	t       *testing.T
	r       *rand.Rand
	m       *Machine
	now     time.Time
	nodes   []*simNode
	byName  map[string]*simNode
	hangs   int
	fetches int
	log     []string
}

func TestSimulation(t *testing.T) {
	extra := 0
	const runs = 400
	for seed := range uint64(runs) {
		s := &sim{t: t, r: rand.New(rand.NewPCG(seed, 1)), now: epoch, byName: map[string]*simNode{}}
		s.m = s.machine(false)
		for i := range 4 + s.r.IntN(17) {
			n := &simNode{
				name:   fmt.Sprintf("n%02d", i),
				zone:   []string{"", "", "x", "y"}[s.r.IntN(4)],
				alive:  true,
				joinAt: epoch.Add(time.Duration(s.r.IntN(2000)) * time.Millisecond),
				can:    true,
			}
			s.nodes = append(s.nodes, n)
			s.byName[n.name] = n
		}
		if !s.run() {
			for _, l := range s.log[max(0, len(s.log)-200):] {
				t.Log(l)
			}
			t.Fatalf("seed %d", seed)
		}
		extra += s.fetches
	}
	t.Logf("%.2f fetches per run", float64(extra)/runs)
}

func (s *sim) machine(takesOver bool) *Machine {
	return NewMachine(testDigest, simSegments*mib, MachineOptions{StallTimeout: testStall, Layout: testLayout, TakesOver: takesOver})
}

func (s *sim) run() bool {
	for s.now.Before(epoch.Add(simEnd)) {
		s.now = s.now.Add(simStep)
		for range 1000 {
			next := s.m.Next()
			if next.IsZero() || next.After(s.now) {
				break
			}
			if !s.deliver(s.m.Tick(next), next) {
				return false
			}
		}
		if s.now.Before(epoch.Add(simQuiet)) && !s.disturb() {
			return false
		}
		done := true
		for _, i := range s.r.Perm(len(s.nodes)) {
			n := s.nodes[i]
			if n.alive && !s.step(n) {
				return false
			}
			done = done && (n.whole || !n.alive)
		}
		if done && s.now.After(epoch.Add(2*time.Second)) {
			return true
		}
	}
	s.t.Errorf("members are waiting for ever")
	return false
}

// disturb kills members and clients, and replaces the tracker.
func (s *sim) disturb() bool {
	n := s.nodes[s.r.IntN(len(s.nodes))]
	switch s.r.IntN(400) {
	case 0, 1:
		living := 0
		for _, o := range s.nodes {
			if o.alive {
				living++
			}
		}
		if n.alive && n.joined && living > 2 {
			s.note("%s dies", n.name)
			n.alive = false
			return s.deliver(s.m.Leave(s.now, n.name), s.now)
		}
	case 2, 3, 4:
		if n.alive && (n.fetching || n.can) {
			s.note("client of %s dies", n.name)
			n.fetching, n.can, n.fetchAt = false, false, time.Time{}
			n.canAt = s.now.Add(time.Duration(s.r.IntN(1000)) * time.Millisecond)
			return s.status(n)
		}
	case 5:
		s.note("tracker dies")
		s.m = s.machine(true)
		for _, o := range s.nodes {
			if o.joined {
				o.resumed = true
				o.stray = o.fetching || !o.told.IsZero()
				o.told = time.Time{}
			}
			o.joined = false
			o.joinAt = s.now.Add(time.Duration(s.r.IntN(300)) * time.Millisecond)
		}
	}
	return true
}

func (s *sim) step(n *simNode) bool {
	if !n.joined {
		if s.now.Before(n.joinAt) {
			return true
		}
		return s.join(n)
	}
	changed := false
	if !n.canAt.IsZero() && !s.now.Before(n.canAt) && !n.whole {
		n.can, n.canAt, changed = true, time.Time{}, true
	}
	if !n.fetchAt.IsZero() && !s.now.Before(n.fetchAt) {
		n.fetchAt, n.fetching, changed = time.Time{}, true, true
		if s.hangs < maxFetchers-1 && s.r.IntN(6) == 0 {
			s.hangs++
			n.hung = true
			s.note("%s hangs", n.name)
		}
	}
	if n.fetching && !n.hung && !s.fetch(n, &changed) {
		return false
	}
	for i := range n.has {
		if !n.has[i] && n.pieces[i] && s.leech(n, i) {
			changed = true
			if !s.announce(n, i) {
				return false
			}
		}
	}
	if !slices.Contains(n.has[:], false) && !n.whole {
		n.whole, n.fetching, n.can, changed = true, false, false, true
	}
	if changed {
		n.moved = s.now
		return s.status(n)
	}
	if !n.whole && s.now.Sub(n.moved) > testStall {
		n.moved = s.now
		return s.deliver(s.m.Message(s.now, n.name, &api.MemberMessage{Message: &api.MemberMessage_Ask{}}), s.now)
	}
	return true
}

// fetch moves a fetcher on by a quarter of a segment.
func (s *sim) fetch(n *simNode, changed *bool) bool {
	i := slices.Index(n.has[:], false)
	if i < 0 {
		return true
	}
	*changed = true
	if n.part += 0.25; n.part < 1 {
		return true
	}
	n.part = 0
	return s.announce(n, i)
}

// leech says whether n got segment i in this step.
func (s *sim) leech(n *simNode, i int) bool {
	for p := range n.peers[i] {
		if o := s.byName[p]; o.alive && o.has[i] && s.r.IntN(2) == 0 {
			return true
		}
	}
	// Connections go both ways.
	for _, o := range s.nodes {
		if o.alive && o.has[i] && o.peers[i][n.name] && s.r.IntN(2) == 0 {
			return true
		}
	}
	return false
}

func (s *sim) announce(n *simNode, i int) bool {
	n.has[i] = true
	return s.deliver(s.m.Message(s.now, n.name, &api.MemberMessage{Message: &api.MemberMessage_Announce{Announce: segmentOf(i, 1)}}), s.now)
}

func (s *sim) state(n *simNode) *api.Status {
	st := &api.Status{CanFetch: n.can, Fetching: n.fetching, Whole: n.whole}
	for i, h := range n.has {
		if h {
			st.Present += mib
			if st.Prefix == int64(i)*mib {
				st.Prefix += mib
			}
		}
	}
	part := int64(n.part * mib)
	st.Present = min(st.Present+part, simSegments*mib)
	if slices.Contains(n.has[:], false) {
		st.Prefix += part
	}
	if st.Present != n.present {
		n.present, n.lastMoved = st.Present, s.now
	}
	return st
}

func (s *sim) status(n *simNode) bool {
	if !n.joined {
		return true
	}
	st := s.state(n)
	if st.Fetching || !st.CanFetch {
		n.told = time.Time{}
	}
	return s.deliver(s.m.Message(s.now, n.name, &api.MemberMessage{Message: &api.MemberMessage_Status{Status: st}}), s.now)
}

func (s *sim) join(n *simNode) bool {
	h := &api.Hello{Size: simSegments * mib, Self: &api.Peer{Name: n.name, Address: n.name}, Zone: n.zone, Resumed: n.resumed}
	h.Status = s.state(n)
	h.Status.Rank = uint32(s.r.IntN(2))
	for i, has := range n.has {
		if has {
			h.Announced = append(h.Announced, segmentOf(i, 1))
		}
		n.peers[i] = map[string]bool{}
	}
	n.joined, n.moved = true, s.now
	out, err := s.m.Join(s.now, h)
	if err != nil {
		s.t.Error(err)
		return false
	}
	s.note("%s joins, fetching %v", n.name, n.fetching)
	return s.deliver(out, s.now)
}

func (s *sim) deliver(out []Command, now time.Time) bool {
	for _, c := range out {
		n := s.byName[c.To]
		if n == nil || !n.alive {
			s.t.Errorf("command to %s, which is not there", c.To)
			return false
		}
		switch t := c.Msg.GetMessage().(type) {
		case *api.TrackerMessage_Segment:
			i := t.Segment.GetSegment()
			n.pieces[i] = n.pieces[i] || t.Segment.GetPieces() != nil
			for _, p := range t.Segment.GetPeers() {
				n.peers[i][p.GetName()] = true
			}
			if !n.pieces[i] {
				s.t.Errorf("%s is given peers of segment %d before its hashes", n.name, i)
				return false
			}
		case *api.TrackerMessage_Fetch:
			if !s.mayFetch(n, now) {
				return false
			}
		}
	}
	return true
}

// mayFetch is the invariant: never two fetchers, save when all the others
// stand still, and never more than three.
func (s *sim) mayFetch(n *simNode, now time.Time) bool {
	s.note("%s is told", n.name)
	s.fetches++
	others := 0
	for _, o := range s.nodes {
		if o == n || !o.alive || !o.joined || o.whole || o.stray {
			continue
		}
		waitingForIt := !o.told.IsZero() && now.Before(o.told.Add(2*testStall))
		if !o.fetching && !waitingForIt {
			continue
		}
		others++
		last := o.lastMoved
		if o.told.After(last) {
			last = o.told
		}
		if now.Sub(last) < testStall {
			s.t.Errorf("%v: %s is told while %s fetches (%v) and moved %v ago", now.Sub(epoch), n.name, o.name, o.fetching, now.Sub(last))
			return false
		}
	}
	if others >= maxFetchers {
		s.t.Errorf("%d fetchers beside %s", others, n.name)
		return false
	}
	n.told = now
	if n.can && s.r.IntN(10) > 0 {
		n.fetchAt = s.now.Add(time.Duration(s.r.IntN(300)) * time.Millisecond)
		n.can = false
	}
	return true
}

func (s *sim) note(f string, args ...any) {
	s.log = append(s.log, fmt.Sprintf("%v: ", s.now.Sub(epoch))+fmt.Sprintf(f, args...))
}

// FuzzMachine feeds a machine with random events; it must not panic, and time
// must move it on.
func FuzzMachine(f *testing.F) {
	f.Add([]byte{0, 0, 1, 3, 0, 1, 0, 2, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9})
	f.Add([]byte("join and leave and announce and ask and tell who was bad"))
	f.Fuzz(func(t *testing.T, data []byte) {
		size := int64(3*mib + 5)
		if len(data) > 0 && data[0] == 's' {
			size = int64(len(smallBlob))
		}
		m := NewMachine(testDigest, size, MachineOptions{Layout: testLayout})
		now := epoch
		next := func() int {
			if len(data) == 0 {
				return 0
			}
			b := data[0]
			data = data[1:]
			return int(b)
		}
		for len(data) > 0 {
			fuzzEvent(m, now, next)
			now = now.Add(time.Duration(next()) * 10 * time.Millisecond)
			for range 1000 {
				due := m.Next()
				if due.IsZero() || due.After(now) {
					break
				}
				m.Tick(due)
				if n := m.Next(); !n.IsZero() && !n.After(due) {
					t.Fatalf("Next stays at %v", n)
				}
			}
			counts(t, m)
		}
	})
}

func fuzzEvent(m *Machine, now time.Time, next func() int) {
	name := string(rune('a' + next()%6))
	bits := next()
	st := &api.Status{
		CanFetch: bits&1 > 0, Fetching: bits&2 > 0, Whole: bits&12 == 12, Load: uint32(bits >> 6),
		Prefix: int64(next()-8) * mib / 4, Present: int64(next()-8) * mib / 4, Rank: uint32(bits >> 5),
	}
	ann := segmentOf(next()%6, byte(next()%2))
	msg := &api.MemberMessage{}
	switch next() % 13 {
	case 0, 1:
		_, _ = m.Join(now, &api.Hello{
			Size: m.Size(), Self: &api.Peer{Name: name, Address: "x"}, Zone: string(rune('a' + bits>>6)), Status: st,
			Announced: []*api.Announce{ann, nil, segmentOf(1, 1)}, Resumed: bits&16 > 0,
		})
		return
	case 2:
		if bits&1 > 0 {
			m.Move(now, name)
			return
		}
		m.Leave(now, name)
		return
	case 3:
		m.SeederAdded(now, name, "")
		return
	case 4:
		m.SeederRemoved(now, name)
		return
	case 5:
		msg.Message = &api.MemberMessage_Ask{Ask: &api.Ask{Silent: []string{"a", "b", string(rune('a' + next()%6))}}}
	case 6:
		msg.Message = &api.MemberMessage_Bad{Bad: &api.Bad{Own: bits&32 > 0}}
	case 7:
		msg.Message = &api.MemberMessage_Inline{Inline: &api.Inline{Data: smallBlob}}
	case 8:
		msg.Message = &api.MemberMessage_BadPieces{BadPieces: &api.BadPieces{
			Segment: ann.GetSegment(), Pieces: ann.GetPieces(), Peers: []string{string(rune('a' + next()%6))},
		}}
	case 9, 10:
		msg.Message = &api.MemberMessage_Announce{Announce: ann}
	default:
		msg.Message = &api.MemberMessage_Status{Status: st}
	}
	m.Message(now, name, msg)
}
