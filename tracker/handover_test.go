package tracker

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/test/bufconn"

	api "github.com/imagewolf/imagewolf/api/v1"
)

// TestHandOver: what a tracker does that takes over, or is left.
func TestHandOver(t *testing.T) {
	for _, c := range []struct {
		name      string
		takesOver bool
		elsewhere bool
		members   int // of the cluster, 0 unknown
		lines     string
	}{
		{"who takes over waits for those that may come", true, false, 3, `
			0s     join a can            > a wait
			300ms  join b fetching prefix=1 has=0 resumed > b wait, a seg0*(b)
			1s     tick`},
		{"not for long", true, false, 3, `
			0s     join a can            > a wait
			499ms  tick
			500ms  tick                  > a fetch`},
		{"longer once somebody has come", true, false, 9, `
			0s     join a can            > a wait
			400ms  join b can resumed    > b wait
			1.3s   tick
			1.4s   tick                  > b fetch`},
		{"not if all are here", true, false, 2, `
			0s     join a can            > a wait
			100ms  join b can            > b fetch`},
		{"later comers do not wait again", true, false, 3, `
			0s     join a can whole -can > a wait
			1s     join b                > b wait
			1s     status b can
			3s     tick                  > b fetch`},
		{"a fetcher that moves is followed, not replaced", false, false, 0, `
			0s     join a can            > a fetch
			1ms    join b can            > b wait
			10ms   status a fetching -can
			1s     move a
			2.9s   tick
			2.9s   leave b`},
		{"replaced if nobody follows", false, false, 0, `
			0s     join a can            > a fetch
			1ms    join b can            > b wait
			10ms   status a fetching -can
			1s     move a
			2.9s   tick
			3s     tick                  > b fetch`},
		{"it may come back", false, false, 0, `
			0s     join a can            > a fetch
			1ms    join b can            > b wait
			10ms   status a fetching -can
			1s     move a
			1.5s   join a fetching prefix=1 resumed > a wait
			3s     tick`},
		{"a leecher that moves changes nothing", false, false, 0, `
			0s     join a can            > a fetch
			1ms    join b can            > b wait
			1ms    join c can            > c wait
			10ms   status a fetching -can
			1s     move b
			1.1s   leave a               > c fetch`},
		{"who moves again and again is not believed", false, false, 0, `
			0s     join a fetching       > a wait
			1ms    join b can            > b wait
			1s     move a
			1.5s   join a fetching       > a wait
			2s     move a
			3s     tick                  > b fetch`},
		{"a slow fetcher gets nobody beside it before those that may come have come", true, false, 9, `
			0s     join r registry=8 lately=8 > r wait
			0s     join a fetching prefix=1 inflow=0.1 busy resumed > a wait
			100ms  join b can            > b wait
			900ms  join c fetching prefix=1 resumed > c wait
			2s     tick`},
		{"and one beside it then", true, false, 9, `
			0s     join r registry=8 lately=8 > r wait
			0s     join a fetching prefix=1 inflow=0.1 busy resumed > a wait
			100ms  join b can            > b wait
			999ms  tick
			1s     tick                  > b fetch`},
		{"who is still here when the blob has another tracker is not sent", false, false, 0, `
			0s     join a can            > a fetch
			1ms    join b can            > b wait
			10ms   status a fetching -can
			1s     elsewhere
			1.5s   leave a
			2s     elsewhere
			2.9s   tick
			3s     tick                  > b fetch`},
		{"but if that is over", false, false, 0, `
			0s     join a can            > a fetch
			1ms    join b can            > b wait
			10ms   status a fetching -can
			1s     elsewhere
			1.5s   leave a
			1.6s   here                  > b fetch`},
		{"nor is one that stands in for another held up", true, true, 0, `
			0s     join a can            > a wait
			100ms  elsewhere
			499ms  tick
			500ms  tick                  > a fetch`},
		{"but one that is new in office", true, false, 0, `
			0s     join a can            > a wait
			100ms  elsewhere
			2s     tick
			2.1s   tick                  > a fetch`},
		{"what else is waited for is waited for meanwhile", false, false, 0, `
			0s     join a can            > a fetch
			1ms    join b can            > b wait
			10ms   status a fetching -can
			20ms   announce a 0          > b seg0*(a)
			20ms   announce a 1          > b seg1*(a)
			20ms   announce a 2          > b seg2*(a)
			20ms   announce a 3          > b seg3*(a)
			30ms   join c has=0+1+2+3 whole > c wait, b seg0(c), b seg1(c), b seg2(c), b seg3(c)
			1s     elsewhere
			1.5s   leave a
			5.4s   tick
			5.5s   tick                  > b fetch`},
		{"or was the tracker meanwhile", true, true, 0, `
			0s     join a can            > a wait
			50ms   here
			100ms  elsewhere
			2s     tick
			2.1s   tick                  > a fetch`},
		{"a stranger moves nothing", false, false, 0, `
			0s     join a can            > a fetch
			1s     move b`},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := MachineOptions{StallTimeout: testStall, Layout: testLayout, TakesOver: c.takesOver, Elsewhere: c.elsewhere}
			if c.members > 0 {
				o.Members = func() int { return c.members }
			}
			play(t, testDigest, testSize, o, c.lines)
		})
	}
}

// TestNoSecondFetcherWhileTrackersChange: members of one blob learn at different
// times that it has another tracker, from the fetcher to those that pull it for the
// first time; whoever comes first, one is sent to the registry. Sometimes nobody can
// be reached any more at the old one, and sometimes it comes back.
func TestNoSecondFetcherWhileTrackersChange(t *testing.T) {
	for seed := range uint64(300) {
		r := rand.New(rand.NewPCG(seed, 2))
		dies := r.IntN(2) == 0 // the old one, instead of being left
		const nodes = 6
		count := func() int { return nodes + 1 } // one is dead, or never pulls
		o := MachineOptions{StallTimeout: testStall, Layout: testLayout, Members: count}
		older := NewMachine(testDigest, testSize, o)
		o.TakesOver = true
		newer := NewMachine(testDigest, testSize, o)
		fetches, fetcher := 0, ""
		take := func(out []Command, err error) {
			if err != nil {
				t.Fatal(err)
			}
			for _, c := range out {
				if c.Msg.GetFetch() != nil {
					fetches++
					fetcher = c.To
				}
			}
		}
		hello := func(name string, resumed bool) *api.Hello {
			return &api.Hello{
				Digest: testDigest.String(), Size: testSize, Self: &api.Peer{Name: name, Address: name}, Resumed: resumed,
				Status: &api.Status{Fetching: name == fetcher, CanFetch: name != fetcher, Busy: true},
			}
		}
		old := nodes - r.IntN(3) // the others pull it for the first time, at the newer one
		at := map[time.Duration][]string{}
		for i := range nodes {
			name := fmt.Sprint("n", i)
			when := time.Second + time.Duration(r.IntN(450))*time.Millisecond
			if i < old {
				take(older.Join(epoch, hello(name, false)))
			}
			at[when] = append(at[when], name)
		}
		take(older.Message(epoch, fetcher, &api.MemberMessage{Message: &api.MemberMessage_Status{Status: &api.Status{Fetching: true}}}), nil)
		for after := time.Duration(0); after < 2500*time.Millisecond; after += time.Millisecond {
			now := epoch.Add(after)
			for _, m := range []*Machine{older, newer} {
				if m == older && dies && after >= time.Second {
					continue
				}
				if next := m.Next(); !next.IsZero() && !next.After(now) {
					take(m.Tick(now), nil)
				}
			}
			for _, name := range at[after] {
				resumed := older.members[name] != nil
				if !dies {
					take(older.Move(now, name), nil)
				}
				take(newer.Join(now, hello(name, resumed)))
			}
			for _, m := range []*Machine{older, newer} { // it gets on
				if m.members[fetcher] != nil && after%100 == 0 {
					take(m.Message(now, fetcher, &api.MemberMessage{Message: &api.MemberMessage_Status{Status: &api.Status{
						Fetching: true, Prefix: int64(after), Present: int64(after),
					}}}), nil)
				}
			}
		}
		if fetches != 1 {
			t.Errorf("seed %d: %d are sent to the registry; the old tracker dies: %v, of %d nodes %d were there", seed, fetches, dies, nodes, old)
		}
	}
}

// A session stays where it is while a better tracker does not answer.
func TestSessionMovesOnlyWhereItIsAnswered(t *testing.T) {
	bubble(t, func(t *testing.T, n *testNet) {
		old := n.serve("t1", nil)
		c := n.client("a", "")
		s := n.join(c, nil)
		defer s.Close()
		expect(t, s, "wait")
		n.setOrder(Peer{"t0", "t0"}, old.peer)
		c.TrackersChanged()
		time.Sleep(time.Minute) // virtual
		if err := s.Err(); err != nil {
			t.Fatalf("it has left for a tracker that is not there: %v", err)
		}
		back := n.serve("t0", nil)
		n.setOrder(back.peer, old.peer)
		c.TrackersChanged()
		c.TrackersChanged() // once is enough
		began := time.Now()
		for range s.Recv() {
		}
		if !errors.Is(s.Err(), ErrMoved) || time.Since(began) > 0 {
			t.Errorf("over after %v: %v", time.Since(began), s.Err())
		}
	})
}

// Nor does one stay that was about to join when the trackers changed.
func TestTrackersChangeWhileJoining(t *testing.T) {
	bubble(t, func(t *testing.T, n *testNet) {
		old, better := n.odd("t1", &late{after: 2, heard: make(chan *api.MemberMessage, 100)}), n.serve("t0", nil)
		n.setOrder(old.peer, better.peer)
		c := n.client("a", "")
		s, err := c.Join(t.Context(), testDigest, says(&api.Hello{Size: testSize}), func(s *Session) {
			n.setOrder(better.peer, old.peer)
			c.TrackersChanged()
			if err := s.Send(&api.MemberMessage{Message: &api.MemberMessage_Status{Status: &api.Status{}}}); err != nil {
				t.Error(err)
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		began := time.Now()
		for range s.Recv() {
		}
		if !errors.Is(s.Err(), ErrMoved) || time.Since(began) > goodbyeTime {
			t.Errorf("over after %v: %v", time.Since(began), s.Err())
		}
	})
}

// The tracker that a fetcher leaves for another knows that it lives on.
func TestFetcherThatMovesIsNotTakenForDead(t *testing.T) {
	bubble(t, func(t *testing.T, n *testNet) {
		old, better := n.serve("t0", nil), n.serve("t1", nil)
		c := n.client("a", "")
		fetcher, leecher := n.join(c, &api.Status{Fetching: true}), n.join(n.client("b", ""), &api.Status{CanFetch: true})
		defer leecher.Close()
		expect(t, leecher, "wait")
		n.setOrder(better.peer, old.peer)
		c.TrackersChanged()
		for range fetcher.Recv() {
		}
		fetcher.Close()
		select {
		case msg := <-leecher.Recv():
			t.Errorf("the leecher is told %v as if the fetcher had died", msg)
		case <-time.After(testStall - time.Millisecond):
		}
		expect(t, leecher, "fetch") // nobody followed
	})
}

// A tracker that has just become none of a blob's sends none of its members to the registry
// while they are leaving; those of other blobs it does.
func TestFormerTrackerSendsNobody(t *testing.T) {
	for _, c := range []struct{ before, after, held bool }{
		{true, true, false}, {true, false, true},
		{false, false, false}, // it stands in for another all the time
	} {
		bubble(t, func(t *testing.T, n *testNet) {
			tracks := c.before
			old := n.serve("t0", func(o *ServerOptions) {
				o.Tracks = func(d digest.Digest) bool { return d != testDigest || tracks }
			})
			fetcher := n.join(n.client("a", ""), &api.Status{Fetching: true})
			leecher := n.join(n.client("b", ""), &api.Status{CanFetch: true})
			defer leecher.Close()
			expect(t, leecher, "wait")
			tracks = c.after
			old.s.TrackersChanged()
			fetcher.Close()
			began := time.Now()
			expect(t, leecher, "fetch")
			if held := time.Since(began) >= testStall; held != c.held {
				t.Errorf("it was the tracker: %v, and is: %v; one is sent after %v", c.before, c.after, time.Since(began))
			}
		})
	}
}

// A session whose tracker is none any more does not stay there.
func TestSessionLeavesAFormerTracker(t *testing.T) {
	bubble(t, func(t *testing.T, n *testNet) {
		n.serve("t1", nil)
		c := n.client("a", "")
		s := n.join(c, nil)
		defer s.Close()
		expect(t, s, "wait")
		n.leaves(c, s, reachTime)
	})
}

// leaves has another tracker that cannot be reached be the blob's only one, and the
// session end at its former one after so long.
func (n *testNet) leaves(c *Client, s *Session, after time.Duration) {
	n.t.Helper()
	n.setOrder(Peer{"t0", "t0"})
	c.TrackersChanged()
	began := time.Now()
	for range s.Recv() {
	}
	if took := time.Since(began); !errors.Is(s.Err(), ErrMoved) || took != after {
		n.t.Errorf("over after %v: %v", took, s.Err())
	}
}

// mute answers a member once and hears no more of it.
type mute struct{ api.UnimplementedTrackerServer }

func (mute) Join(stream grpc.BidiStreamingServer[api.MemberMessage, api.TrackerMessage]) error {
	if _, err := stream.Recv(); err != nil {
		return err
	}
	if err := stream.Send(waitFor("").Msg); err != nil {
		return err
	}
	<-stream.Context().Done()
	return nil
}

// odd serves what is no tracker of ours, over a pipe.
func (n *testNet) odd(name string, tracker api.TrackerServer) *testServer {
	odd := &testServer{peer: Peer{name, name}, g: grpc.NewServer(), pipe: bufconn.Listen(1 << 16), cancel: func() {}}
	api.RegisterTrackerServer(odd.g, tracker)
	odd.wg.Go(func() { _ = odd.g.Serve(odd.pipe) }) // ends with Stop
	n.t.Cleanup(odd.kill)
	n.servers[name] = odd
	return odd
}

// A former tracker that hears no goodbye is not waited for.
func TestSessionLeavesADeafTracker(t *testing.T) {
	bubble(t, func(t *testing.T, n *testNet) {
		n.setOrder(n.odd("t1", mute{}).peer)
		c := n.client("a", "")
		s := n.join(c, nil)
		defer s.Close()
		expect(t, s, "wait")
		n.leaves(c, s, reachTime+goodbyeTime)
	})
}

// Under however many names fetchers say that they move, the others wait for a few.
func TestOnlySoManyMoversAreBelieved(t *testing.T) {
	m := NewMachine(testDigest, testSize, MachineOptions{StallTimeout: testStall, Layout: testLayout})
	now := epoch
	for i := range 2 * maxMovers {
		now = now.Add(testStall)
		name := fmt.Sprint("x", i)
		hello := &api.Hello{Digest: testDigest.String(), Size: testSize, Self: &api.Peer{Name: name, Address: "a:1"}, Status: &api.Status{Fetching: true}}
		if _, err := m.Join(now, hello); err != nil {
			t.Fatal(err)
		}
		m.Move(now, name)
		if believed := m.resumeUntil.Equal(now.Add(testStall)); believed != (i < maxMovers) {
			t.Errorf("the %dth that moves: believed is %v", i+1, believed)
		}
	}
	if len(m.movers) > maxMovers {
		t.Errorf("%d names are kept", len(m.movers))
	}
}

// Who went to the next tracker because the best could not be connected to in time
// goes back as soon as it can be.
func TestSessionReturnsToALateTracker(t *testing.T) {
	bubble(t, func(t *testing.T, n *testNet) {
		next := n.serve("t1", nil)
		n.hold = make(chan struct{})
		n.serve("t0", nil)
		n.setOrder(Peer{"t0", "t0"}, next.peer)
		c := n.client("a", "")
		s := n.join(c, nil)
		defer s.Close()
		if s.Tracker() != next.peer {
			t.Fatalf("joined at %v", s.Tracker())
		}
		close(n.hold)
		for range s.Recv() {
		}
		if !errors.Is(s.Err(), ErrMoved) {
			t.Errorf("over: %v", s.Err())
		}
		again := n.join(c, nil)
		defer again.Close()
		if again.Tracker().Name != "t0" {
			t.Errorf("joined again at %v", again.Tracker())
		}
	})
}
