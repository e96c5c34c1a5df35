package tracker

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	api "github.com/imagewolf/imagewolf/api/v1"
)

func TestJoinTriesTheNextAndRemembers(t *testing.T) {
	bubble(t, func(t *testing.T, n *testNet) {
		ts := n.serve("t1", nil)
		hole := Peer{"t0", "t0"}
		n.setOrder(hole, ts.peer)
		c := n.client("a", "")
		timed := func(hello *api.Hello) time.Duration {
			start := time.Now()
			ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
			defer cancel()
			s, err := c.Join(ctx, testDigest, says(hello), nil)
			if err != nil {
				t.Fatal(err)
			}
			if s.Tracker() != ts.peer {
				t.Errorf("joined at %v", s.Tracker())
			}
			s.Close()
			return time.Since(start)
		}
		hello := &api.Hello{Size: testSize}
		if took := timed(hello); took != 150*time.Millisecond {
			t.Errorf("the first join took %v", took)
		}
		if took := timed(hello); took != 0 {
			t.Errorf("the second join took %v", took)
		}
		time.Sleep(failureMemory) // virtual
		if took := timed(hello); took != 150*time.Millisecond {
			t.Errorf("the failure is remembered for ever: %v", took)
		}
	})
}

// TestRestartedTracker: a tracker whose process ended is missed while it is
// away and not a moment longer, or members would be at different trackers and
// two of them be sent to the registry.
func TestRestartedTracker(t *testing.T) {
	bubble(t, func(t *testing.T, n *testNet) {
		t0, t1 := n.serve("t0", nil), n.serve("t1", nil)
		c := n.client("a", "")
		at := func(want Peer) *Session {
			t.Helper()
			s := n.join(c, nil)
			if s.Tracker() != want {
				t.Fatalf("joined at %v, want %v", s.Tracker(), want)
			}
			return s
		}
		first := at(t0.peer)
		defer first.Close()
		t0.kill()
		for range first.Recv() {
		}
		at(t1.peer).Close()
		at(t1.peer).Close()
		n.serve("t0", nil)
		n.setOrder(t0.peer, t1.peer)
		synctest.Wait() // gRPC says that it has failed a moment before it knows it itself
		at(t0.peer).Close()
	})
}

func TestJoinWithoutTracker(t *testing.T) {
	bubble(t, func(t *testing.T, n *testNet) {
		c := n.client("a", "")
		hello := &api.Hello{Size: testSize}
		if _, err := c.Join(t.Context(), testDigest, says(hello), nil); !errors.Is(err, ErrNoTracker) {
			t.Errorf("no trackers: %v", err)
		}
		n.setOrder(Peer{"t0", "t0"}, Peer{"t1", "t1"})
		start := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		if _, err := c.Join(ctx, testDigest, says(hello), nil); !errors.Is(err, ErrNoTracker) {
			t.Errorf("dead trackers: %v", err)
		}
		if took := time.Since(start); took > 300*time.Millisecond {
			t.Errorf("that took %v", took)
		}
	})
}

// TestSlowTracker: a tracker that there is a connection to may take longer to answer
// than one may take to be reached, and not for ever.
func TestSlowTracker(t *testing.T) {
	bubble(t, func(t *testing.T, n *testNet) {
		var takes time.Duration
		slowly := func(o *ServerOptions) {
			o.PeerName = func(context.Context) (string, bool) {
				time.Sleep(takes) // virtual
				return "", false
			}
		}
		slow, slow2, well := n.serve("t0", slowly), n.serve("t1", slowly), n.serve("t2", nil)
		hole := Peer{"t3", "t3"}
		c := n.client("a", "")
		c.o.Reach, c.o.Answer = 300*time.Millisecond, 3*time.Second
		for _, tc := range []struct {
			name   string
			order  []Peer
			takes  time.Duration
			joined bool
			after  time.Duration
		}{
			{"slow", []Peer{slow.peer, hole}, 900 * time.Millisecond, true, 900 * time.Millisecond},
			{"very slow", []Peer{slow.peer, well.peer}, 2900 * time.Millisecond, true, 2900 * time.Millisecond},
			{"slow, and stands in for one that cannot be reached", []Peer{hole, slow.peer}, 700 * time.Millisecond, true, 850 * time.Millisecond},
			{"hangs, and the next does not", []Peer{hole, slow.peer, well.peer}, 5 * time.Second, true, 3 * time.Second},
			{"hangs", []Peer{slow.peer}, 5 * time.Second, false, 3 * time.Second},
			{"hangs, and one that cannot be reached", []Peer{slow.peer, hole}, 5 * time.Second, false, 3300 * time.Millisecond},
			{"hangs, as does the next", []Peer{slow.peer, slow2.peer, hole, well.peer}, 5 * time.Second, true, 3225 * time.Millisecond},
			{"cannot be reached", []Peer{hole}, 0, false, 300 * time.Millisecond},
		} {
			time.Sleep(failureMemory)
			takes = 0
			for _, ts := range []*testServer{slow, slow2} {
				n.setOrder(ts.peer)
				n.join(c, nil).Close() // connects
			}
			n.setOrder(tc.order...)
			takes = tc.takes
			start := time.Now()
			s, err := c.Join(t.Context(), testDigest, says(&api.Hello{Size: testSize}), nil)
			if (err == nil) != tc.joined || err != nil && !errors.Is(err, ErrNoTracker) {
				t.Errorf("%s: %v", tc.name, err)
			}
			if took := time.Since(start); took != tc.after {
				t.Errorf("%s: took %v, want %v", tc.name, took, tc.after)
			}
			if err == nil {
				s.Close()
			}
			synctest.Wait()
		}
	})
}

func TestRefusalIsFinal(t *testing.T) {
	bubble(t, func(t *testing.T, n *testNet) {
		n.serve("t0", func(o *ServerOptions) {
			o.PeerName = func(context.Context) (string, bool) { return "b", true }
		})
		n.serve("t1", nil)
		_, err := n.client("a", "").Join(t.Context(), testDigest, says(&api.Hello{Size: testSize}), nil)
		if status.Code(err) != codes.PermissionDenied {
			t.Errorf("got %v", err)
		}
	})
}

func TestSessionMovesWithTheTracker(t *testing.T) {
	bubble(t, func(t *testing.T, n *testNet) {
		t0, t1 := n.serve("t0", nil), n.serve("t1", nil)
		c := n.client("a", "")
		s := n.join(c, nil)
		defer s.Close()
		expect(t, s, "wait")
		c.TrackersChanged() // to the same
		if err := s.Err(); err != nil {
			t.Fatal(err)
		}
		n.setOrder(t1.peer, t0.peer)
		c.TrackersChanged()
		for range s.Recv() {
		}
		if !errors.Is(s.Err(), ErrMoved) {
			t.Errorf("over: %v", s.Err())
		}
		if err := s.Send(&api.MemberMessage{}); !errors.Is(err, ErrMoved) {
			t.Errorf("send: %v", err)
		}
		again := n.join(c, nil)
		if again.Tracker() != t1.peer {
			t.Errorf("at %v", again.Tracker())
		}
		again.Close()
		if !errors.Is(again.Err(), ErrClosed) {
			t.Errorf("closed: %v", again.Err())
		}
	})
}

func TestIdleConnectionsAreClosed(t *testing.T) {
	bubble(t, func(t *testing.T, n *testNet) {
		n.serve("t0", nil)
		c := n.client("a", "")
		one, two := n.join(c, nil), n.join(c, nil)
		one.Close()
		two.Close()
		count := func() int {
			c.conns.mu.Lock()
			defer c.conns.mu.Unlock()
			return len(c.conns.byAddr)
		}
		time.Sleep(connIdle / 2) // virtual
		three := n.join(c, nil)
		time.Sleep(2 * connIdle)
		if got := count(); got != 1 {
			t.Errorf("%d connections while one is used", got)
		}
		three.Close()
		time.Sleep(2 * connIdle)
		if got := count(); got != 0 {
			t.Errorf("%d connections when none is used", got)
		}
	})
}

func TestClosedClient(t *testing.T) {
	bubble(t, func(t *testing.T, n *testNet) {
		n.serve("t0", nil)
		c := n.client("a", "")
		s := n.join(c, nil)
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		for range s.Recv() {
		}
		if !errors.Is(s.Err(), ErrClosed) {
			t.Errorf("session: %v", s.Err())
		}
		if _, err := c.Join(t.Context(), testDigest, says(&api.Hello{}), nil); !errors.Is(err, ErrClosed) {
			t.Errorf("join: %v", err)
		}
	})
}

// late answers a member after so many messages, and notes all of them.
type late struct {
	api.UnimplementedTrackerServer
	after int
	heard chan *api.MemberMessage
}

func (l *late) Join(stream grpc.BidiStreamingServer[api.MemberMessage, api.TrackerMessage]) error {
	for n := 1; ; n++ {
		m, err := stream.Recv()
		if err != nil {
			return err
		}
		l.heard <- m
		if n == l.after {
			if err := stream.Send(waitFor("").Msg); err != nil {
				return err
			}
		}
	}
}

// While a tracker has yet to answer, it is told what is new; and the next that is tried is
// told all at once.
func TestTellsWhileUnanswered(t *testing.T) {
	bubble(t, func(t *testing.T, n *testNet) {
		never, slow := &late{heard: make(chan *api.MemberMessage, 100)}, &late{after: 3, heard: make(chan *api.MemberMessage, 100)}
		n.setOrder(n.odd("t0", never).peer, n.odd("t1", slow).peer)
		c := n.client("a", "")
		present := int64(0)
		hello := func() *api.Hello { return &api.Hello{Size: testSize, Status: &api.Status{Present: present}} }
		ctx, cancel := context.WithTimeout(t.Context(), 1900*time.Millisecond) // no tick at the moment when t0 is given up
		defer cancel()
		s, err := c.Join(ctx, testDigest, hello, func(s *Session) {
			present++
			if err := s.Send(&api.MemberMessage{Message: &api.MemberMessage_Status{Status: &api.Status{Present: present}}}); err != nil {
				t.Error(err)
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		expect(t, s, "wait")
		want := int64(0) // each goes on where the one before ended
		for _, l := range []*late{never, slow} {
			first := <-l.heard
			if got := first.GetHello().GetStatus().GetPresent(); got != want || first.GetHello().GetDigest() != testDigest.String() {
				t.Errorf("hello of %v", first)
			}
			n := len(l.heard)
			if n < 2 {
				t.Errorf("%d are told before the answer, want two at least", n)
			}
			for range n {
				want++
				if got := (<-l.heard).GetStatus().GetPresent(); got != want {
					t.Errorf("told %d, want %d", got, want)
				}
			}
		}
	})
}
