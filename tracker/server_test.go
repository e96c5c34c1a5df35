package tracker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	api "github.com/imagewolf/imagewolf/api/v1"
)

func TestHedgeAfterTheStallTime(t *testing.T) {
	bubble(t, func(t *testing.T, n *testNet) {
		ts := n.serve("t0", nil)
		a := n.join(n.client("a", ""), &api.Status{CanFetch: true})
		defer a.Close()
		expect(t, a, "fetch")
		b := n.join(n.client("b", ""), &api.Status{CanFetch: true})
		defer b.Close()
		expect(t, b, "wait")
		start := time.Now()
		expect(t, b, "fetch")
		if took := time.Since(start); took != DefaultStallTimeout {
			t.Errorf("hedged after %v", took)
		}
		a.Close()
		b.Close()
		synctest.Wait()
		if len(ts.s.blobs) != 0 {
			t.Errorf("%d blobs are kept without members", len(ts.s.blobs))
		}
	})
}

func TestGraceIsKept(t *testing.T) {
	bubble(t, func(t *testing.T, n *testNet) {
		n.serve("t0", nil)
		a := n.join(n.client("a", ""), &api.Status{CanFetch: true, Rank: 1})
		defer a.Close()
		start := time.Now()
		expect(t, a, "wait")
		expect(t, a, "fetch")
		if took := time.Since(start); took != decideGrace {
			t.Errorf("decided after %v", took)
		}
	})
}

// rawJoin opens a Join stream and sends it messages.
func rawJoin(t *testing.T, n *testNet, msgs ...*api.MemberMessage) api.Tracker_JoinClient {
	t.Helper()
	cc, err := n.dial(t.Context(), n.trackers("")[0].Address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cc.Close() })
	stream, err := api.NewTrackerClient(cc).Join(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range msgs {
		if err := stream.Send(m); errors.Is(err, io.EOF) {
			break // the stream has ended: Recv says why
		} else if err != nil {
			t.Fatal(err)
		}
	}
	return stream
}

func helloOf(name string, change func(h *api.Hello)) *api.MemberMessage {
	h := &api.Hello{Digest: testDigest.String(), Size: testSize, Self: &api.Peer{Name: name, Address: "x:1"}}
	if change != nil {
		change(h)
	}
	return &api.MemberMessage{Message: &api.MemberMessage_Hello{Hello: h}}
}

func TestServerRefuses(t *testing.T) {
	bubble(t, func(t *testing.T, n *testNet) {
		n.serve("t0", func(o *ServerOptions) {
			o.PeerName = func(context.Context) (string, bool) { return "a", true }
		})
		first := rawJoin(t, n, helloOf("a", nil))
		if _, err := first.Recv(); err != nil {
			t.Fatal(err)
		}
		for _, c := range []struct {
			name string
			msg  *api.MemberMessage
			want codes.Code
		}{
			{"another's name", helloOf("b", nil), codes.PermissionDenied},
			{"another size", helloOf("a", func(h *api.Hello) { h.Size++ }), codes.FailedPrecondition},
			{"no size", helloOf("a", func(h *api.Hello) { h.Size = 0 }), codes.InvalidArgument},
			{"huge size", helloOf("a", func(h *api.Hello) { h.Size = 1 << 60 }), codes.InvalidArgument},
			{"no digest", helloOf("a", func(h *api.Hello) { h.Digest = "latest" }), codes.InvalidArgument},
			{"no address", helloOf("a", func(h *api.Hello) { h.Self.Address = "" }), codes.InvalidArgument},
			{"a long zone", helloOf("a", func(h *api.Hello) { h.Zone = string(make([]byte, 600)) }), codes.InvalidArgument},
			{"no hello", &api.MemberMessage{Message: &api.MemberMessage_Ask{Ask: &api.Ask{}}}, codes.InvalidArgument},
			{"nothing at all", nil, codes.DeadlineExceeded},
		} {
			var msgs []*api.MemberMessage
			if c.msg != nil {
				msgs = append(msgs, c.msg)
			}
			_, err := rawJoin(t, n, msgs...).Recv()
			if status.Code(err) != c.want {
				t.Errorf("%s: %v, want %v", c.name, err, c.want)
			}
		}
		// None of them has cost the first its place.
		if err := first.Send(&api.MemberMessage{Message: &api.MemberMessage_Ask{Ask: &api.Ask{}}}); err != nil {
			t.Fatal(err)
		}
		if _, err := first.Recv(); err != nil {
			t.Fatal(err)
		}
		// A member that joins again takes it.
		second := rawJoin(t, n, helloOf("a", nil))
		if _, err := second.Recv(); err != nil {
			t.Fatal(err)
		}
		if _, err := first.Recv(); status.Code(err) != codes.Aborted {
			t.Errorf("the old stream ends with %v", err)
		}
		synctest.Wait()
		if err := second.Send(&api.MemberMessage{Message: &api.MemberMessage_Ask{Ask: &api.Ask{}}}); err != nil {
			t.Fatal(err)
		}
		if _, err := second.Recv(); err != nil {
			t.Errorf("the old stream's end takes the new one along: %v", err)
		}
	})
}

func TestSlowMemberIsLetGo(t *testing.T) {
	bubble(t, func(t *testing.T, n *testNet) {
		n.serve("t0", nil)
		data := make([]byte, MaxInline)
		d := digest.FromBytes(data)
		small := func(h *api.Hello) { h.Digest, h.Size = d.String(), MaxInline }
		slow := rawJoin(t, n, helloOf("slow", small))
		quick := rawJoin(t, n, helloOf("quick", small),
			&api.MemberMessage{Message: &api.MemberMessage_Inline{Inline: &api.Inline{Data: data}}})
		if _, err := quick.Recv(); err != nil {
			t.Fatal(err)
		}
		// Every ask is answered with the blob, none of which is read.
		for range queueSlack + 100 {
			if err := slow.Send(&api.MemberMessage{Message: &api.MemberMessage_Ask{Ask: &api.Ask{}}}); err != nil {
				break
			}
			time.Sleep(askAgain) // virtual
		}
		if err := quick.Send(&api.MemberMessage{Message: &api.MemberMessage_Ask{Ask: &api.Ask{}}}); err != nil {
			t.Fatal(err)
		}
		if msg, err := quick.Recv(); err != nil || msg.GetInline() == nil {
			t.Errorf("the others are kept waiting: %v, %v", msg, err)
		}
		var err error
		for err == nil {
			_, err = slow.Recv()
		}
		if status.Code(err) != codes.ResourceExhausted {
			t.Errorf("the slow member's stream ends with %v", err)
		}
	})
}

func TestPanicCostsOneBlobOnly(t *testing.T) {
	bubble(t, func(t *testing.T, n *testNet) {
		var counted tally
		ts := n.serve("t0", func(o *ServerOptions) {
			o.Counter = &counted
			o.Layout = func(size int64) Layout {
				l := testLayout(size)
				l.Pieces = func(i int) int {
					if i == 3 {
						panic("no such luck")
					}
					return 1
				}
				return l
			}
		})
		bystander := rawJoin(t, n, helloOf("z", func(h *api.Hello) { h.Digest = digest.FromString("other").String() }))
		if _, err := bystander.Recv(); err != nil {
			t.Fatal(err)
		}
		a := rawJoin(t, n, helloOf("a", nil))
		b := rawJoin(t, n, helloOf("b", nil))
		for _, s := range []api.Tracker_JoinClient{a, b} {
			if _, err := s.Recv(); err != nil {
				t.Fatal(err)
			}
		}
		if err := a.Send(&api.MemberMessage{Message: &api.MemberMessage_Announce{Announce: segmentOf(3, 1)}}); err != nil {
			t.Fatal(err)
		}
		for _, s := range []api.Tracker_JoinClient{a, b} {
			if _, err := s.Recv(); status.Code(err) != codes.Internal {
				t.Errorf("a member's stream ends with %v", err)
			}
		}
		synctest.Wait()
		if len(ts.s.blobs) != 1 {
			t.Errorf("%d blobs, want the bystander's", len(ts.s.blobs))
		}
		again := rawJoin(t, n, helloOf("a", nil))
		if _, err := again.Recv(); err != nil {
			t.Errorf("joining again: %v", err)
		}
		// In the hello, and in making the machine, it is the same.
		bad := rawJoin(t, n, helloOf("c", func(h *api.Hello) { h.Announced = []*api.Announce{segmentOf(3, 1)} }))
		if _, err := bad.Recv(); status.Code(err) != codes.Internal {
			t.Errorf("a hello's panic ends with %v", err)
		}
		synctest.Wait()
		if got := counted.panicked.Load(); got != 2 {
			t.Errorf("%d panics counted, want 2", got)
		}
	})
}

// tally is a Counter.
type tally struct{ shutOut, broke, full, mismatched, panicked atomic.Int32 }

func (c *tally) ShutOut()    { c.shutOut.Add(1) }
func (c *tally) Broke()      { c.broke.Add(1) }
func (c *tally) Full()       { c.full.Add(1) }
func (c *tally) Mismatched() { c.mismatched.Add(1) }
func (c *tally) Panicked()   { c.panicked.Add(1) }

// A member whose hashes made wrong bytes is shut out, and that is counted; so is
// what the tracker has to do.
func TestServerCounts(t *testing.T) {
	bubble(t, func(t *testing.T, n *testNet) {
		var counted tally
		ts := n.serve("t0", func(o *ServerOptions) { o.Counter = &counted })
		liar := rawJoin(t, n, helloOf("liar", nil))
		if _, err := liar.Recv(); err != nil {
			t.Fatal(err)
		}
		announce := &api.MemberMessage{Message: &api.MemberMessage_Announce{Announce: segmentOf(0, 1)}}
		if err := liar.Send(announce); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		for _, name := range []string{"a", "b"} {
			victim := rawJoin(t, n, helloOf(name, nil))
			if _, err := victim.Recv(); err != nil {
				t.Fatal(err)
			}
			synctest.Wait() // it has been told of the segment
			if err := victim.Send(&api.MemberMessage{Message: &api.MemberMessage_Bad{Bad: &api.Bad{}}}); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		if out, bad := counted.shutOut.Load(), counted.mismatched.Load(); out != 1 || bad != 2 {
			t.Errorf("%d shut out, %d mismatches, want 1 and 2", out, bad)
		}
		if blobs, members := ts.s.Load(); blobs != 1 || members < 2 {
			t.Errorf("%d blobs, %d members", blobs, members)
		}
	})
}

func TestSeederIsAskedAndServes(t *testing.T) {
	bubble(t, func(t *testing.T, n *testNet) {
		ts := n.serve("t0", nil)
		cs := n.client("s", "")
		asked := make(chan digest.Digest, 10)
		r := NewRegistrar(cs, func(d digest.Digest) { asked <- d })
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- r.Run(ctx) }()
		r.Add(testDigest, testSize)
		r.Add(digest.FromString("of another size"), 1)
		synctest.Wait()
		if len(ts.s.blobs) != 2 {
			t.Fatalf("%d blobs registered", len(ts.s.blobs))
		}

		a := n.join(n.client("a", ""), &api.Status{CanFetch: true})
		defer a.Close()
		expect(t, a, "wait")
		if d := <-asked; d != testDigest {
			t.Fatalf("asked for %s", d)
		}
		s := n.join(cs, &api.Status{Whole: true, Prefix: testSize, Present: testSize})
		defer s.Close()
		expect(t, s, "wait")
		if err := sendSegment(s, 0); err != nil {
			t.Fatal(err)
		}
		expect(t, a, "seg0*(s)")

		// The size that a member gives counts, not the seeder's.
		b, err := n.client("b", "").Join(t.Context(), digest.FromString("of another size"), says(&api.Hello{
			Size: testSize, Status: &api.Status{CanFetch: true},
		}), nil)
		if err != nil {
			t.Fatal(err)
		}
		defer b.Close()
		expect(t, b, "fetch")

		cancel()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		for _, s := range []*Session{a, b, s} {
			s.Close()
		}
		synctest.Wait()
		if len(ts.s.blobs) != 0 {
			t.Errorf("%d blobs left", len(ts.s.blobs))
		}
	})
}

func TestRegistrarFollowsTheTrackers(t *testing.T) {
	const blobs = 2*registerBatch + 500
	bubble(t, func(t *testing.T, n *testNet) {
		t0, t1 := n.serve("t0", nil), n.serve("t1", nil)
		count := func(ts *testServer) int {
			synctest.Wait()
			ts.s.mu.Lock()
			defer ts.s.mu.Unlock()
			return len(ts.s.blobs)
		}
		r := NewRegistrar(n.client("s", ""), func(digest.Digest) {})
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		done := make(chan error, 1)
		go func() { done <- r.Run(ctx) }()
		for i := range blobs {
			r.Add(digest.FromString(fmt.Sprint(i)), 5)
		}
		if a, b := count(t0), count(t1); a != blobs || b != 0 {
			t.Fatalf("%d and %d blobs", a, b)
		}
		r.Remove(digest.FromString("7"))
		if a := count(t0); a != blobs-1 {
			t.Errorf("%d blobs after one was removed", a)
		}
		n.setOrder(t1.peer, t0.peer)
		r.TrackersChanged()
		if a, b := count(t0), count(t1); a != 0 || b != blobs-1 {
			t.Errorf("%d and %d blobs after the move", a, b)
		}
		// A tracker that has begun anew hears it all again.
		t1.kill()
		delete(n.servers, "t1")
		fresh := n.serve("t1", nil)
		time.Sleep(2 * registerRetryMax) // virtual
		if b := count(fresh); b != blobs-1 {
			t.Errorf("%d blobs at the new tracker", b)
		}
		n.setOrder()
		r.TrackersChanged()
		if b := count(fresh); b != 0 {
			t.Errorf("%d blobs when there is no tracker", b)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestNewerRegistrationOutlivesTheOlder(t *testing.T) {
	bubble(t, func(t *testing.T, n *testNet) {
		ts := n.serve("t0", nil)
		var ends []context.CancelFunc
		for range 2 {
			r := NewRegistrar(n.client("s", ""), func(digest.Digest) {})
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() { done <- r.Run(ctx) }()
			ends = append(ends, func() {
				cancel()
				if err := <-done; err != nil {
					t.Error(err)
				}
				synctest.Wait()
			})
			r.Add(testDigest, testSize)
			synctest.Wait()
		}
		for i, end := range ends {
			end()
			if want := 1 - i; len(ts.s.blobs) != want {
				t.Errorf("%d blobs after %d streams have ended, want %d", len(ts.s.blobs), i+1, want)
			}
		}
	})
}

func TestServerEndsItsStreams(t *testing.T) {
	bubble(t, func(t *testing.T, n *testNet) {
		ts := n.serve("t0", nil)
		c := n.client("a", "")
		s := n.join(c, &api.Status{})
		defer s.Close()
		expect(t, s, "wait")
		ts.cancel()
		for range s.Recv() {
		}
		if status.Code(s.Err()) != codes.Unavailable {
			t.Errorf("session over: %v", s.Err())
		}
		if _, err := c.Join(t.Context(), testDigest, says(&api.Hello{Size: 1}), nil); err == nil {
			t.Error("a closed tracker takes members")
		}
	})
}

// The panic of a goroutine that serves one stream costs that stream.
func TestPanicCostsOneStreamOnly(t *testing.T) {
	bubble(t, func(t *testing.T, n *testNet) {
		var caught atomic.Int32
		n.serve("t0", func(o *ServerOptions) {
			o.PeerName = func(context.Context) (string, bool) {
				if caught.Load() == 0 {
					panic("no such luck")
				}
				return "", false
			}
			o.Contain = func(f func()) {
				defer func() {
					if recover() != nil {
						caught.Add(1)
					}
				}()
				f()
			}
		})
		if _, err := rawJoin(t, n, helloOf("a", nil)).Recv(); status.Code(err) != codes.Internal {
			t.Errorf("the stream ends with %v", err)
		}
		if _, err := rawJoin(t, n, helloOf("a", nil)).Recv(); err != nil || caught.Load() != 1 {
			t.Errorf("joining again: %v; %d panics", err, caught.Load())
		}
	})
}

// One that was given up, and whose goroutine comes to it only when its node has a newer
// stream already, does not replace that: it would cost the node its membership.
func TestStreamThatWasGivenUpReplacesNone(t *testing.T) {
	hello := helloOf("a", nil).GetHello()
	alive := func() ender { return ender{done: make(chan struct{})} }
	for _, c := range []struct {
		name   string
		giveUp func(e *ender, cancel func())
		want   codes.Code
	}{
		{"by its node", func(_ *ender, cancel func()) { cancel() }, codes.Canceled},
		{"here, as it was silent", func(e *ender, _ func()) { e.end(status.Error(codes.DeadlineExceeded, "no hello")) }, codes.DeadlineExceeded},
	} {
		t.Run(c.name, func(t *testing.T) {
			older := &joinStream{ender: alive(), out: newOutbox[*api.TrackerMessage](queueSlack)}
			newer := &joinStream{ender: alive(), out: newOutbox[*api.TrackerMessage](queueSlack)}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			var s *Server
			overtaken := false
			s = NewServer(ServerOptions{Log: slog.New(slog.DiscardHandler), Layout: func(size int64) Layout {
				if !overtaken { // the older one is on its way to the blob
					overtaken = true
					c.giveUp(&older.ender, cancel)
					if err := s.join(t.Context(), caller{}, newer, hello); err != nil {
						t.Error(err)
					}
				}
				return testLayout(size)
			}})
			if err := s.join(ctx, caller{}, older, hello); status.Code(err) != c.want {
				t.Errorf("the older stream joins: %v", err)
			}
			if err := newer.over(t.Context()); err != nil {
				t.Errorf("the newer stream ends: %v", err)
			}
			if s.blobs[testDigest].members["a"] != newer {
				t.Error("the newer stream is no member's any more")
			}
			// So it is with what a node registers.
			first, late := &registerStream{ender: alive()}, &registerStream{ender: alive()}
			c.giveUp(&late.ender, cancel)
			msg := &api.RegisterMessage{Self: hello.GetSelf()}
			if err := s.introduce(t.Context(), caller{}, first, msg); err != nil {
				t.Fatal(err)
			}
			if err := s.introduce(ctx, caller{}, late, msg); status.Code(err) != c.want || s.registrants["a"].live != first {
				t.Errorf("the older stream registers: %v", err)
			}
		})
	}
}
