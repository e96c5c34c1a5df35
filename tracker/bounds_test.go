package tracker

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	api "github.com/imagewolf/imagewolf/api/v1"
)

// bounded is a tracker with small bounds, and what it logs and counts.
type bounded struct {
	*testServer
	counted tally

	mu   sync.Mutex
	logs bytes.Buffer // guarded by mu
}

func (b *bounded) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.logs.Write(p)
}

// named is how many lines of the log name somebody for something.
func (b *bounded) named(name, reason string) (n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for line := range strings.Lines(b.logs.String()) {
		if strings.Contains(line, "peer="+name) && strings.Contains(line, reason) {
			n++
		}
	}
	return n
}

// held is how many registrations the tracker counts, in all and of one node, and how
// many there are.
func (b *bounded) held(name string) (registered, of, inFact int) {
	synctest.Wait()
	b.s.mu.Lock()
	defer b.s.mu.Unlock()
	if r := b.s.registrants[name]; r != nil {
		of = r.held
	}
	for _, x := range b.s.blobs {
		inFact += x.seeders.len()
	}
	return b.s.registered, of, inFact
}

func serveBounded(n *testNet, change func(l *limits)) *bounded {
	b := &bounded{}
	b.testServer = n.serve("t0", func(o *ServerOptions) {
		o.Counter, o.Log = &b.counted, slog.New(slog.NewTextHandler(b, nil))
	})
	if change != nil {
		change(&b.s.limits)
	}
	return b
}

// rawRegister opens a Register stream of a node that holds blobs number from to to.
func rawRegister(t *testing.T, n *testNet, name string, from, to int) api.Tracker_RegisterClient {
	t.Helper()
	cc, err := n.dial(t.Context(), n.trackers("")[0].Address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cc.Close() })
	stream, err := api.NewTrackerClient(cc).Register(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	msg := &api.RegisterMessage{Self: &api.Peer{Name: name, Address: "x:1"}}
	msg.Added = numbered(from, to)
	if err := stream.Send(msg); err != nil {
		t.Fatal(err)
	}
	synctest.Wait()
	return stream
}

func numbered(from, to int) (out []*api.Held) {
	for i := from; i < to; i++ {
		out = append(out, &api.Held{Digest: digest.FromString(fmt.Sprint(i)).String(), Size: 5})
	}
	return out
}

// runRegistrar runs one that holds such blobs until the test ends.
func runRegistrar(t *testing.T, n *testNet, name string, from, to int) *Registrar {
	t.Helper()
	r := NewRegistrar(n.client(name, ""), func(digest.Digest) {})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	for _, h := range numbered(from, to) {
		r.Add(digest.Digest(h.GetDigest()), h.GetSize())
	}
	synctest.Wait()
	return r
}

// A node that registers more than it may is refused and named, whatever number of
// streams it does that with, and holds nothing afterwards; others are not harmed.
func TestFloodOfRegistrationsIsRefused(t *testing.T) {
	bubble(t, func(t *testing.T, n *testNet) {
		b := serveBounded(n, func(l *limits) { l.held = 100 })
		honest := rawRegister(t, n, "honest", 0, 100)
		for k := range 3 {
			liar := rawRegister(t, n, "liar", 1000*k, 1000*k+101)
			if _, err := liar.Recv(); status.Code(err) != codes.ResourceExhausted {
				t.Fatalf("a flood ends with %v", err)
			}
		}
		if all, of, inFact := b.held("liar"); all != 100 || of != 0 || inFact != 100 {
			t.Errorf("%d registrations are counted, %d of the liar; there are %d", all, of, inFact)
		}
		if n, c := b.named("liar", manyBlobs), b.counted.broke.Load(); n != 1 || c != 3 {
			t.Errorf("named %d times, counted %d times; want 1 and 3", n, c)
		}
		time.Sleep(nameAgain) // virtual
		_, _ = rawRegister(t, n, "liar", 0, 101).Recv()
		if n := b.named("liar", manyBlobs); n != 2 {
			t.Errorf("named %d times an hour later", n)
		}
		// What is given back makes room, also in the same message.
		if err := honest.Send(&api.RegisterMessage{Added: numbered(100, 150), Removed: []string{
			digest.FromString("1").String(), digest.FromString("2").String(),
		}}); err != nil {
			t.Fatal(err)
		}
		if _, err := honest.Recv(); status.Code(err) != codes.ResourceExhausted {
			t.Errorf("50 for 2: %v", err)
		}
		if all, _, inFact := b.held("honest"); all != 0 || inFact != 0 || len(b.s.registrants) != 0 {
			t.Errorf("%d registrations are counted, there are %d, of %d nodes", all, inFact, len(b.s.registrants))
		}
	})
}

// Blobs that go make room for as many that come.
func TestRegistrationsTakeTurns(t *testing.T) {
	bubble(t, func(t *testing.T, n *testNet) {
		b := serveBounded(n, func(l *limits) { l.held = 10 })
		stream := rawRegister(t, n, "a", 0, 10)
		for i := range 100 {
			msg := &api.RegisterMessage{Added: numbered(i+10, i+11), Removed: []string{digest.FromString(fmt.Sprint(i)).String()}}
			if err := stream.Send(msg); err != nil {
				t.Fatal(err)
			}
		}
		if all, of, inFact := b.held("a"); all != 10 || of != 10 || inFact != 10 {
			t.Errorf("%d registrations, %d of the node, %d real", all, of, inFact)
		}
	})
}

// So many nodes register and no more, and those that do are not refused for it.
func TestRegistrantsAreBounded(t *testing.T) {
	bubble(t, func(t *testing.T, n *testNet) {
		b := serveBounded(n, func(l *limits) { l.registrants = 2 })
		rawRegister(t, n, "a", 0, 1)
		rawRegister(t, n, "b", 0, 1)
		if _, err := rawRegister(t, n, "c", 0, 1).Recv(); status.Code(err) != codes.ResourceExhausted {
			t.Errorf("one more ends with %v", err)
		}
		rawRegister(t, n, "b", 0, 2)
		if _, of, _ := b.held("b"); of != 2 {
			t.Errorf("one that is there registers %d of 2 blobs", of)
		}
		if b.counted.full.Load() != 1 || b.counted.broke.Load() != 0 {
			t.Errorf("counted full %d times, the node's fault %d times", b.counted.full.Load(), b.counted.broke.Load())
		}
	})
}

// A node has one stream: a newer one replaces the older, which ends with a status
// that says so, registers no more, and takes nothing of the newer one along.
func TestNewerRegistrationReplacesTheOlder(t *testing.T) {
	bubble(t, func(t *testing.T, n *testNet) {
		b := serveBounded(n, func(l *limits) { l.held, l.registered = 10, 10 })
		older := rawRegister(t, n, "a", 0, 10)
		// It has all that it may, and is not refused for what it had before.
		newer := rawRegister(t, n, "a", 0, 10)
		if _, err := older.Recv(); status.Code(err) != codes.Aborted {
			t.Errorf("the older stream ends with %v", err)
		}
		if all, of, inFact := b.held("a"); all != 10 || of != 10 || inFact != 10 {
			t.Errorf("%d registrations, %d of the node, %d real", all, of, inFact)
		}
		// What the newer one does not have goes with the older.
		if third := rawRegister(t, n, "a", 5, 8); third == nil {
			t.Fatal("no stream")
		}
		if _, err := newer.Recv(); status.Code(err) != codes.Aborted {
			t.Errorf("the second stream ends with %v", err)
		}
		if all, of, inFact := b.held("a"); all != 3 || of != 3 || inFact != 3 {
			t.Errorf("%d registrations, %d of the node, %d real; want 3", all, of, inFact)
		}
		if c := b.counted.broke.Load() + b.counted.full.Load(); c != 0 {
			t.Errorf("a node that registers again is counted %d times", c)
		}
		// One that was replaced while it registers has no say.
		late := &registerStream{name: "a", held: map[digest.Digest]*blob{}}
		if err := b.s.hold(late, digest.FromString("6"), 5); status.Code(err) != codes.Aborted {
			t.Errorf("a stream that was replaced registers: %v", err)
		}
	})
}

// A node whose stream was replaced, or that comes back while its old one is still
// there, has everything registered soon, at the very bound as well.
func TestNodeThatReconnectsLosesNothing(t *testing.T) {
	const blobs = 2*registerBatch + 5
	bubble(t, func(t *testing.T, n *testNet) {
		b := serveBounded(n, func(l *limits) { l.held, l.registered = blobs, blobs })
		old := rawRegister(t, n, "a", 0, blobs)
		runRegistrar(t, n, "a", 0, blobs)
		if _, err := old.Recv(); status.Code(err) != codes.Aborted {
			t.Errorf("the old stream ends with %v", err)
		}
		if all, of, inFact := b.held("a"); all != blobs || of != blobs || inFact != blobs {
			t.Fatalf("%d registrations, %d of the node, %d real", all, of, inFact)
		}
		rawRegister(t, n, "a", 0, 1)
		if _, of, inFact := b.held("a"); of != 1 || inFact != 1 {
			t.Fatalf("%d registrations of the node, %d inFact, want what the newest has", of, inFact)
		}
		time.Sleep(registerRetry) // virtual
		if all, of, inFact := b.held("a"); all != blobs || of != blobs || inFact != blobs {
			t.Errorf("%d registrations, %d of the node, %d real", all, of, inFact)
		}
		if c := b.counted.broke.Load() + b.counted.full.Load(); c != 0 {
			t.Errorf("counted %d times", c)
		}
	})
}

// Where all together have registered as much as the tracker holds, what fits stays,
// the node is told of the rest and has it registered when there is room.
func TestFullTrackerTakesWhatFits(t *testing.T) {
	bubble(t, func(t *testing.T, n *testNet) {
		b := serveBounded(n, func(l *limits) { l.held, l.registered = 100, 100 })
		first := rawRegister(t, n, "first", 0, 60)
		second := rawRegister(t, n, "second", 30, 90)
		if msg, err := second.Recv(); err != nil || msg.GetRefused() != 20 {
			t.Errorf("%v, %v; want 20 refused", msg, err)
		}
		if err := second.CloseSend(); err != nil {
			t.Fatal(err)
		}
		runRegistrar(t, n, "second", 30, 90)
		if all, of, inFact := b.held("second"); all != 100 || of != 40 || inFact != 100 {
			t.Errorf("%d registrations, %d of the second, %d real", all, of, inFact)
		}
		if err := first.CloseSend(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(registerAgain) // virtual
		if all, of, inFact := b.held("second"); all != 60 || of != 60 || inFact != 60 {
			t.Errorf("with room: %d registrations, %d of the second, %d real", all, of, inFact)
		}
		if n, c := b.named("second", "registrations"), b.counted.full.Load(); n != 1 || c < 2 {
			t.Errorf("named %d times, counted %d times; want 1, and 2 or more: what it has may come in several messages", n, c)
		}
		if c := b.counted.broke.Load(); c != 0 {
			t.Errorf("the node is blamed %d times for what all have", c)
		}
	})
}

// A node asks for no more than a tracker gives.
func TestRegistrarKeepsToTheBound(t *testing.T) {
	if maxOffered >= maxHeld {
		t.Fatalf("a node registers %d blobs of %d that it may", maxOffered, maxHeld)
	}
	l := newLink(t.Context(), NewRegistrar(&Client{}, nil), Peer{})
	defer l.cancel()
	l.most = 2
	for _, d := range []digest.Digest{"a", "b", "c"} {
		l.set(d, 1)
	}
	l.set("a", 2) // one that is there may change
	if len(l.want) != 2 || l.want["a"] != 2 || l.todo["c"] {
		t.Errorf("wants %v, says %v", l.want, l.todo)
	}
	l.set("b", 0)
	l.set("c", 1)
	if len(l.want) != 2 || l.want["c"] != 1 {
		t.Errorf("wants %v after one has gone", l.want)
	}
	if l.again(); !l.todo["b"] {
		t.Error("what is told again leaves out that one has gone")
	}
}

// A node that joins blob after blob, or blobs of too many segments, is refused in the
// end, and let in again when it has left some. So is every node where all together
// have too much, and is not blamed for it.
func TestMembershipsAreBounded(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(l *limits)
		others bool // are refused as well
		reason string
	}{
		{"blobs of one", func(l *limits) { l.memberships = 3 }, false, manyJoins},
		{"segments of one", func(l *limits) { l.segments = 3*8 + 7 }, false, manySegments},
		{"blobs of all", func(l *limits) { l.allMemberships = 3 }, true, "members"},
		{"segments of all", func(l *limits) { l.units = 3*8*(1+unitsOfBlob) + 8 }, true, "segments"},
		{"members' segments of all", func(l *limits) { l.units = 3*8*(1+unitsOfBlob) + 7 }, true, "segments"},
	} {
		t.Run(c.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, n *testNet) {
				b := serveBounded(n, c.change)
				join := func(name string, i int) (api.Tracker_JoinClient, error) {
					s := rawJoin(t, n, helloOf(name, func(h *api.Hello) {
						h.Digest, h.Size = digest.FromString(fmt.Sprint(i)).String(), 8*mib
					}))
					_, err := s.Recv()
					synctest.Wait()
					return s, err
				}
				var streams []api.Tracker_JoinClient
				for i := range 3 {
					s, err := join("a", i)
					if err != nil {
						t.Fatal(err)
					}
					streams = append(streams, s)
				}
				for range 2 {
					if _, err := join("a", 3); status.Code(err) != codes.ResourceExhausted {
						t.Errorf("one more: %v", err)
					}
				}
				if _, err := join("b", 4); (status.Code(err) == codes.ResourceExhausted) != c.others {
					t.Errorf("another node: %v", err)
				}
				if n := b.named("a", c.reason); n != 1 {
					t.Errorf("named %d times", n)
				}
				if broke, full := b.counted.broke.Load(), b.counted.full.Load(); broke+full < 2 || (broke > 0) == c.others {
					t.Errorf("%d are blamed, and %d refused by a full tracker", broke, full)
				}
				if err := streams[0].CloseSend(); err != nil {
					t.Fatal(err)
				}
				synctest.Wait()
				if _, err := join("a", 3); err != nil {
					t.Errorf("refused although one has left: %v", err)
				}
			})
		})
	}
}

// All that is counted is given back.
func TestNothingIsCountedForEver(t *testing.T) {
	bubble(t, func(t *testing.T, n *testNet) {
		b := serveBounded(n, nil)
		var ends []func() error
		for i := range 20 {
			s := rawJoin(t, n, helloOf(fmt.Sprint("n", i%4), nil))
			if _, err := s.Recv(); err != nil {
				t.Fatal(err)
			}
			ends = append(ends, s.CloseSend, rawRegister(t, n, fmt.Sprint("n", i%4), i, i+5).CloseSend)
		}
		for _, end := range ends {
			if err := end(); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		s := b.s
		if len(s.blobs)+len(s.joined)+s.members+s.units+len(s.registrants)+s.registered+s.returns.n+len(s.returns.of) != 0 {
			t.Errorf("%d blobs, %v joined, %d members, %d units, %d registrants, %d registered, %d that may return to %d blobs are left",
				len(s.blobs), s.joined, s.members, s.units, len(s.registrants), s.registered, s.returns.n, len(s.returns.of))
		}
	})
}

// One that sends without end is cut off and named; one that keeps to the pace of a
// node is not, for hours.
func TestFloodOfMessagesIsCut(t *testing.T) {
	bubble(t, func(t *testing.T, n *testNet) {
		b := serveBounded(n, nil)
		say := func(s api.Tracker_JoinClient, i int) error {
			return s.Send(&api.MemberMessage{Message: &api.MemberMessage_Status{Status: &api.Status{Line: int64(i)}}})
		}
		honest := rawJoin(t, n, helloOf("honest", nil))
		if _, err := honest.Recv(); err != nil {
			t.Fatal(err)
		}
		for i := range messagesAtOnce { // what was held up for a while comes at once
			if err := say(honest, i); err != nil {
				t.Fatal(err)
			}
		}
		liar := rawJoin(t, n, helloOf("liar", nil))
		if _, err := liar.Recv(); err != nil {
			t.Fatal(err)
		}
		sent := 0
		for ; say(liar, sent) == nil; sent++ {
			if sent > 10*messagesAtOnce {
				t.Fatal("nobody stops it")
			}
			synctest.Wait()
		}
		var err error
		for err == nil {
			_, err = liar.Recv()
		}
		if status.Code(err) != codes.ResourceExhausted || b.named("liar", manyMessages) != 1 || b.counted.broke.Load() != 1 {
			t.Errorf("after %d messages: %v; named %d times, counted %d", sent, err, b.named("liar", manyMessages), b.counted.broke.Load())
		}
		for i := range 20_000 {
			time.Sleep(time.Second / messagesPerSecond) // virtual
			if err := say(honest, i); err != nil {
				t.Fatalf("the honest one is cut off: %v", err)
			}
		}
		synctest.Wait()
		if b.named("honest", "") != 0 {
			t.Error("the honest one is named")
		}
	})
}

// One that leaves a blob and joins it again without end is refused and named, and may
// come back at the pace of a node.
func TestFloodOfReturnsIsRefused(t *testing.T) {
	bubble(t, func(t *testing.T, n *testNet) {
		b := serveBounded(n, nil)
		honest := rawJoin(t, n, helloOf("honest", nil))
		if _, err := honest.Recv(); err != nil {
			t.Fatal(err)
		}
		join := func() error {
			s := rawJoin(t, n, helloOf("liar", nil))
			_, err := s.Recv()
			if err == nil {
				err = s.CloseSend()
			}
			synctest.Wait()
			return err
		}
		for i := range joinsAtOnce {
			if err := join(); err != nil {
				t.Fatalf("refused after %d times: %v", i, err)
			}
		}
		for range 3 {
			if err := join(); status.Code(err) != codes.ResourceExhausted {
				t.Errorf("once more: %v", err)
			}
		}
		if n, c := b.named("liar", manyReturns), b.counted.broke.Load(); n != 1 || c != 3 {
			t.Errorf("named %d times, counted %d times; want 1 and 3", n, c)
		}
		for range 5 {
			time.Sleep(time.Second / joinsPerSecond) // virtual
			if err := join(); err != nil {
				t.Errorf("refused at a node's pace: %v", err)
			}
		}
	})
}

// What is remembered of who has joined is bounded, of any number of names and blobs, and
// goes when it is of no more use; who joins again and again is not forgotten before.
func TestReturnsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const most = 1000
		var r returns
		check := func(limit int) {
			t.Helper()
			inFact := 0
			for _, byName := range r.of {
				inFact += len(byName)
			}
			if r.n != inFact || r.n > limit {
				t.Fatalf("%d are counted, there are %d, and %d may be", r.n, inFact, limit)
			}
		}
		blobs := []*blob{{}, {}, {}}
		for i := range 10 * most { // at once, by names that were made up
			if !r.allow(blobs[i%3], fmt.Sprint(i), most) {
				t.Fatal("refused at the first time")
			}
			check(most)
		}
		for range joinsAtOnce {
			r.allow(blobs[0], "liar", most)
		}
		for i := range 2000 { // as many as a big cluster's nodes, over some time
			if i%100 == 0 { // every 5 s
				granted := 0
				for range joinsAtOnce {
					if r.allow(blobs[0], "liar", most) {
						granted++
					}
				}
				if granted > 6 {
					t.Fatalf("one that returns again and again may %d times at once after %d", granted, i)
				}
			}
			time.Sleep(50 * time.Millisecond) // virtual
			if !r.allow(blobs[1], fmt.Sprint("honest", i), most) {
				t.Fatal("refused at the first time")
			}
			check(most)
		}
		if check(2 * tidyFrom); len(r.of[blobs[2]]) > 0 {
			t.Error("a blob that nobody joins is remembered")
		}
		for _, b := range blobs {
			r.forget(b)
		}
		check(0)
	})
}

// Seeders are the same set whichever of them needs no map.
func TestSeeders(t *testing.T) {
	var s seeders
	want := map[string]int64{}
	for i := int64(1); i < 2000; i++ {
		name := string(rune('a' + i*i%7))
		if i*i%11 < 5 {
			s.set(name, registration{stream: &registerStream{}, size: i})
			want[name] = i
		} else {
			s.remove(name)
			delete(want, name)
		}
		got := map[string]int64{}
		for name, r := range s.all {
			got[name] = r.size
		}
		if !maps.Equal(got, want) || s.len() != len(want) {
			t.Fatalf("step %d: %v (%d), want %v", i, got, s.len(), want)
		}
		if r, there := s.get(name), want[name] > 0; r.size != want[name] || (r.stream != nil) != there {
			t.Fatalf("step %d: %s is %v", i, name, r)
		}
	}
}

// One that opens streams and says nothing is refused and named; others are not, and
// nor is it once it has said something.
func TestSilentStreamsAreBounded(t *testing.T) {
	bubble(t, func(t *testing.T, n *testNet) {
		b := serveBounded(n, func(l *limits) { l.silent, l.allSilent = 3, 5 })
		var caller atomic.Value
		caller.Store("liar")
		b.s.o.PeerName = func(context.Context) (string, bool) { return caller.Load().(string), true } //nolint:errcheck // it is one
		for range 4 {
			rawJoin(t, n)
			synctest.Wait()
		}
		if n, c := b.named("liar", manySilent), b.counted.broke.Load(); n != 1 || c != 1 {
			t.Errorf("named %d times, counted %d times", n, c)
		}
		caller.Store("honest")
		for range 5 {
			if _, err := rawJoin(t, n, helloOf("honest", nil)).Recv(); err != nil {
				t.Errorf("others are refused: %v", err)
			}
		}
		rawJoin(t, n)
		rawJoin(t, n)
		synctest.Wait()
		if _, err := rawJoin(t, n).Recv(); status.Code(err) != codes.ResourceExhausted || b.counted.full.Load() != 1 {
			t.Errorf("all together: %v; counted %d", err, b.counted.full.Load())
		}
		time.Sleep(helloTimeout) // virtual
		synctest.Wait()
		if b.s.allSilent != 0 || len(b.s.silent) != 0 {
			t.Errorf("%d are counted for ever, %v", b.s.allSilent, b.s.silent)
		}
	})
}

// What is remembered of those that were named is bounded.
func TestMentionsAreBounded(t *testing.T) {
	var m mentions
	for i := range 3 * maxNamed {
		if !m.first(fmt.Sprint(i), "r") {
			t.Fatalf("%d is not named", i)
		}
	}
	if len(m.at) > maxNamed {
		t.Errorf("%d are remembered", len(m.at))
	}
	if last := fmt.Sprint(3*maxNamed - 1); m.first(last, "r") || !m.first(last, "other") {
		t.Error("named twice for the same, or not for another thing")
	}
}

// The bounds are numbers, and what they stand for is bytes: the worst that members can
// do has to fit into a node.
func TestBoundsInBytes(t *testing.T) {
	const some = 1 << 15
	heap := func() int64 {
		for range 3 { // what earlier tests left in pools as well
			runtime.GC()
		}
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	s := NewServer(ServerOptions{Layout: testLayout, Log: slog.New(slog.DiscardHandler)})
	before := heap()
	st := &registerStream{name: "a", held: map[digest.Digest]*blob{}}
	defer runtime.KeepAlive(s)
	s.registrants["a"] = &registrant{live: st}
	for _, h := range numbered(0, some) {
		if err := s.hold(st, digest.Digest(h.GetDigest()), 5); err != nil {
			t.Fatal(err)
		}
	}
	each := (heap() - before) / some
	t.Logf("a registration is %d bytes: one node's %d MiB, all %d MiB", each, each*maxHeld>>20, each*maxRegistered>>20)
	if each*maxHeld > 56<<20 || each*maxRegistered > 224<<20 {
		t.Error("that is too much")
	}

	before = heap()
	var r returns
	for i := range some {
		r.allow(&blob{}, fmt.Sprintf("%0*d", MaxText, i), maxReturns)
	}
	each = (heap() - before) / some
	t.Logf("a member that may return is %d bytes: all %d MiB", each, each*maxReturns>>20)
	if each*maxReturns > 96<<20 {
		t.Error("that is too much")
	}
	runtime.KeepAlive(&r)

	const segments = 1 << 14
	before = heap()
	var keep []any
	for range 8 {
		m := NewMachine(testDigest, segments*mib, MachineOptions{Layout: testLayout})
		_, err := m.Join(time.Now(), &api.Hello{
			Digest: testDigest.String(), Size: segments * mib, Self: &api.Peer{Name: "a", Address: "x:1"},
		})
		if err != nil {
			t.Fatal(err)
		}
		keep = append(keep, m)
	}
	each = (heap() - before) / (8 * segments)
	t.Logf("a segment with one member is %d bytes: one node's %d MiB, all %d MiB", each, each*maxSegments>>20, each*maxUnits/(1+unitsOfBlob)>>20)
	if each*maxSegments > 48<<20 || each*maxUnits/(1+unitsOfBlob) > 600<<20 {
		t.Error("that is too much")
	}
	runtime.KeepAlive(keep)
}
