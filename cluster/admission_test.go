package cluster

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
)

func (a *admission) has(key string) bool {
	ok, _ := a.look(key)
	return ok
}

func TestAdmission(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var a admission
		a.set("n", []string{"k1"})
		if !a.has("k1") || a.has("k2") || a.has("") {
			t.Error("not just the member's key is let in")
		}
		a.set("n", []string{"k2", "k1"}) // its certificate is exchanged
		if !a.has("k1") || !a.has("k2") {
			t.Error("not both keys are let in while one replaces the other")
		}
		a.set("n", []string{"k3"}) // it was started again
		if !a.has("k3") || a.has("k1") || a.has("k2") {
			t.Error("a restarted node is not known by its new key alone")
		}
		a.set("other", []string{"k3"}) // a lie; it must not shut n out in the end
		a.lose("other")
		a.lose("nobody")
		time.Sleep(goneMemory + time.Second)
		if !a.has("k3") {
			t.Error("a member was forgotten with another that named its key")
		}

		a.lose("n")
		time.Sleep(goneMemory - time.Second)
		a.lose("n") // does not begin anew
		if !a.has("k3") {
			t.Error("a member that is gone for less than an hour is not let in")
		}
		a.set("n", []string{"k3"})
		time.Sleep(time.Minute)
		if !a.has("k3") {
			t.Error("a member that has come back was forgotten")
		}
		a.lose("n")
		time.Sleep(goneMemory + time.Second)
		if a.has("k3") || len(a.members) != 0 || len(a.holders) != 0 || len(a.gone) != 0 {
			t.Errorf("not forgotten after an hour: %+v", &a)
		}
	})
}

func TestIntroductionsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var a admission
		a.introduce([]string{"k1", "k2"})
		if !a.has("k1") || !a.has("k2") {
			t.Error("who has introduced itself is not let in")
		}
		a.set("n", []string{"k1"})
		time.Sleep(introducedMemory + time.Second)
		if !a.has("k1") || a.has("k2") {
			t.Error("an introduction counts for longer than it should, or a member has lost by it")
		}
	})
}

// However many come and go, what is remembered of them is bounded.
func TestAdmissionIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var a admission
		for i := range 3 * maxGone {
			name := fmt.Sprint("n", i)
			a.set(name, []string{name})
			a.lose(name)
			a.set("restless", []string{fmt.Sprint("r", i)})
			a.lose("restless")
			a.introduce([]string{fmt.Sprint("i", i)})
		}
		if len(a.members) > maxGone || len(a.holders) > maxGone || len(a.gone) > maxGone || len(a.introduced) > maxIntroduced {
			t.Errorf("%d members, %d keys, %d gone, %d introduced", len(a.members), len(a.holders), len(a.gone), len(a.introduced))
		}
		if last := fmt.Sprint("n", 3*maxGone-1); !a.has(last) || a.has("n0") {
			t.Error("not the oldest are forgotten")
		}
		time.Sleep(introducedMemory + time.Second)
		if a.introduce([]string{"new"}); !a.has("new") || len(a.introduced) != 1 {
			t.Errorf("there is no room again for introductions: %d", len(a.introduced))
		}
	})
}

// guarded runs a data port that asks c who is a member.
func guarded(t *testing.T, c *Cluster, change func(*DataPort)) *DataPort {
	t.Helper()
	p := NewDataPort(listen(t), c.o.Identity, c, silent)
	if change != nil {
		change(p)
	}
	start(t, p.Run)
	greet(t, p)
	return p
}

// dataNode makes a node that says in gossip where p listens.
func dataNode(t *testing.T, key, name, data, join string) *Cluster {
	t.Helper()
	return nodeOn(t, key, name, "127.0.0.1:0", func(o *Options) {
		o.DataAddress = data
		if join != "" {
			o.Join = []string{join}
		}
	})
}

// hello is what the port says to a node.
func hello(ctx context.Context, dial func(context.Context, string, string) (net.Conn, error), p *DataPort) (string, error) {
	conn, err := dial(ctx, p.listener.Addr().String(), ProtoBitTorrent)
	if err != nil {
		return "", err
	}
	defer conn.Close() //nolint:errcheck // only read from
	return hear(conn)
}

// silence fails the test unless a stranger with this identity is told nothing,
// whatever it speaks.
func silence(t *testing.T, id *Identity, p *DataPort) {
	t.Helper()
	for _, proto := range []string{ProtoBitTorrent, ProtoGRPC} {
		conn, err := id.Dial(t.Context(), p.listener.Addr().String(), proto)
		if err != nil {
			continue // refused at once
		}
		if said, err := hear(conn); said != "" || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: a stranger was told %q, %v", proto, said, err)
		}
		_ = conn.Close() // by the other side before
	}
	conn, err := grpc.NewClient("passthrough:///"+p.listener.Addr().String(), id.GRPCDialOptions()...)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close() //nolint:errcheck // the call is over
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	if _, err := healthv1.NewHealthClient(conn).Check(ctx, &healthv1.HealthCheckRequest{}); err == nil {
		t.Error("a stranger's call was answered")
	}
	if n := len(p.torrent.queue) + len(p.grpc.queue); n > 0 {
		t.Errorf("%d strangers were let in", n)
	}
}

// A certificate of the cluster is not enough: one must be a member.
func TestOnlyMembersAreLetIn(t *testing.T) {
	key := GenerateKey()
	l := listen(t)
	server := dataNode(t, key, "server", l.Addr().String(), "")
	port := NewDataPort(l, server.o.Identity, server, silent)
	port.grace = 100 * time.Millisecond
	start(t, port.Run)
	greet(t, port)
	start(t, server.Run)
	seed := gossipAddr(t, server).String()

	silence(t, keyed(t, key, "stranger"), port)
	// Not by a member's name either.
	member := dataNode(t, key, "member", "127.0.0.1:1", seed)
	stop := start(t, member.Run)
	awaitMembers(t, server, "member", "server")
	silence(t, keyed(t, key, "member"), port)
	silence(t, keyed(t, key, "server"), port)

	talks := func(c *Cluster, dial func(context.Context, string, string) (net.Conn, error)) {
		t.Helper()
		if got, err := hello(t.Context(), dial, port); got != "hello "+c.Self().Name {
			t.Errorf("%s hears %q, %v", c.Self().Name, got, err)
		}
	}
	talks(member, member.o.Identity.Dial) // gossip alone suffices
	talks(server, server.o.Identity.Dial) // a node reaches itself

	// Gone, by its goodbye, and still on the network: a split looks like this.
	stop()
	awaitMembers(t, server, "server")
	talks(member, member.o.Identity.Dial)

	// Started again, it has another key, and its old one is no good any more.
	again := dataNode(t, key, "member", "127.0.0.1:1", seed)
	start(t, again.Run)
	awaitMembers(t, server, "member", "server")
	talks(again, again.o.Identity.Dial)
	silence(t, member.o.Identity, port)
}

// acquainted are two nodes that know each other, and the listener of the first one's data port.
func acquainted(t *testing.T, key string) (member, c *Cluster, l net.Listener) {
	l = listen(t)
	member = dataNode(t, key, "member", l.Addr().String(), "")
	start(t, member.Run)
	c = dataNode(t, key, "node", "127.0.0.1:1", gossipAddr(t, member).String())
	start(t, c.Run)
	awaitMembers(t, c, "member", "node")
	return member, c, l
}

// serveCalls takes calls and peers at a member's data port.
func serveCalls(t *testing.T, member *Cluster, p *DataPort) {
	start(t, p.Run)
	greet(t, p)
	srv := grpc.NewServer(grpc.Creds(member.o.Identity.ServerCredentials()))
	healthv1.RegisterHealthServer(srv, health.NewServer())
	start(t, func(context.Context) error { return srv.Serve(p.GRPC()) })
	t.Cleanup(srv.Stop)
}

// Nor does a node speak to one that is no member, whoever named its address.
func TestOnlyMembersAreSpokenTo(t *testing.T) {
	key := GenerateKey()
	member, c, l := acquainted(t, key)
	other := NewDataPort(listen(t), keyed(t, key, "stranger"), c, silent)
	for _, p := range []*DataPort{NewDataPort(l, member.o.Identity, member, silent), other} {
		serveCalls(t, member, p)
		said, err := hello(t.Context(), c.Dial, p)
		conn, dialErr := grpc.NewClient("passthrough:///"+p.listener.Addr().String(), c.GRPCDialOptions()...)
		if dialErr != nil {
			t.Fatal(dialErr)
		}
		defer conn.Close() //nolint:errcheck // the call is over
		_, callErr := healthv1.NewHealthClient(conn).Check(t.Context(), &healthv1.HealthCheckRequest{})
		if p == other {
			if !errors.Is(err, errStranger) || said != "" {
				t.Errorf("a stranger's port says %q, %v", said, err)
			}
			if callErr == nil || !strings.Contains(callErr.Error(), errStranger.Error()) {
				t.Errorf("a call to a stranger ends with %v", callErr)
			}
			continue
		}
		if said != "hello node" || callErr != nil {
			t.Errorf("a member's port says %q, %v; a call ends with %v", said, err, callErr)
		}
	}
}

// Whoever connects, members know of their connections to each other, and of no others.
func TestConnectionsAreLookedAt(t *testing.T) {
	key := GenerateKey()
	member, c, l := acquainted(t, key)
	let := &connections{Membership: member}
	port := NewDataPort(l, member.o.Identity, let, silent)
	port.grace = 0
	serveCalls(t, member, port)
	silence(t, keyed(t, key, "stranger"), port)
	peers, err := c.Dial(t.Context(), l.Addr().String(), ProtoBitTorrent)
	if err != nil {
		t.Fatal(err)
	}
	defer peers.Close() //nolint:errcheck // nothing was sent
	calls, err := grpc.NewClient("passthrough:///"+l.Addr().String(), c.GRPCDialOptions()...)
	if err != nil {
		t.Fatal(err)
	}
	defer calls.Close() //nolint:errcheck // the call is over
	if _, err := healthv1.NewHealthClient(calls).Check(t.Context(), &healthv1.HealthCheckRequest{}); err != nil {
		t.Fatal(err)
	}
	for _, x := range []*Cluster{c, member} {
		eventually(t, x.Self().Name+" looks at two connections", func() bool {
			x.line.mu.Lock()
			defer x.line.mu.Unlock()
			return len(x.line.conns) == 2
		})
	}
	if n := let.connected.Load(); n != 2 {
		t.Errorf("%d connections were of members, want 2", n)
	}
}

// connections counts the connections of members.
type connections struct {
	Membership
	connected atomic.Int64
}

// Connected implements Membership.
func (c *connections) Connected(conn net.Conn) {
	c.connected.Add(1)
	c.Membership.Connected(conn)
}

// A node connects to one that has not heard of it, and is let in at once.
func TestFreshNodeIsIntroduced(t *testing.T) {
	key := GenerateKey()
	l := listen(t)
	server := dataNode(t, key, "server", l.Addr().String(), "")
	port := NewDataPort(l, server.o.Identity, server, silent)
	port.grace = 0 // nobody may wait
	start(t, port.Run)
	greet(t, port)
	start(t, server.Run)
	seed := gossipAddr(t, server).String()
	// What gossip says of it has no key, so that it cannot be known by that.
	fresh := dataNode(t, key, "fresh", "127.0.0.1:1", seed)
	fresh.wait.keys = time.Hour
	var err error
	if fresh.meta, err = fresh.said.encode(); err != nil {
		t.Fatal(err)
	}
	start(t, fresh.Run)
	awaitMembers(t, fresh, "fresh", "server")
	awaitMembers(t, server, "fresh", "server")
	if got, err := hello(t.Context(), fresh.o.Identity.Dial, port); got != "" {
		t.Fatalf("not introduced, it hears %q, %v: the test shows nothing", got, err)
	}
	if got, err := hello(t.Context(), fresh.Dial, port); got != "hello fresh" {
		t.Errorf("introduced, it hears %q, %v", got, err)
	}
}

// Whoever is known soon is let in then; and those who wait are bounded.
func TestWaitingForGossip(t *testing.T) {
	key := GenerateKey()
	server := dataNode(t, key, "server", "127.0.0.1:1", "")
	port := guarded(t, server, func(p *DataPort) {
		p.waiting = make(chan struct{}, 1)
		p.grace = patience
	})
	late, id := make(chan string, 1), keyed(t, key, "late")
	go func() {
		said, _ := hello(context.WithoutCancel(t.Context()), id.Dial, port)
		late <- said
	}()
	eventually(t, "the port waits for a stranger", func() bool { return len(port.waiting) > 0 })
	if got, err := hello(t.Context(), keyed(t, key, "stranger").Dial, port); got != "" || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("beyond the bound a stranger hears %q, %v", got, err)
	}
	server.admission.set("late", id.creds.keys())
	if got := <-late; got != "hello late" {
		t.Errorf("known at last, it hears %q", got)
	}
}

// The port does not wait for strangers when it is to end.
func TestPortEndsWhileStrangersWait(t *testing.T) {
	key := GenerateKey()
	server := dataNode(t, key, "server", "127.0.0.1:1", "")
	port := NewDataPort(listen(t), server.o.Identity, server, silent)
	port.grace = time.Hour
	stop := start(t, port.Run)
	conn, err := keyed(t, key, "stranger").Dial(t.Context(), port.listener.Addr().String(), ProtoGRPC)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close() //nolint:errcheck // closed from the other side
	eventually(t, "the port waits for a stranger", func() bool { return len(port.waiting) > 0 })
	stop()
	if said, err := hear(conn); said != "" || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("heard %q, %v", said, err)
	}
}

// A node whose certificate files are exchanged is known by the new key, and by
// the old one as well.
func TestNewKeyIsGossiped(t *testing.T) {
	ca, dir := newAuthority(t), t.TempDir()
	l := listen(t)
	node := func(id *Identity, name, join string) *Cluster {
		c := dataNode(t, GenerateKey(), name, l.Addr().String(), join)
		c.o.Identity = id
		var err error
		if c.meta, _, err = c.describe(); err != nil {
			t.Fatal(err)
		}
		return c
	}
	server := node(ca.filed(t, t.TempDir(), "server"), "server", "")
	port := NewDataPort(l, server.o.Identity, server, silent)
	start(t, port.Run)
	start(t, server.Run)
	member := node(ca.filed(t, dir, "member"), "member", gossipAddr(t, server).String())
	start(t, member.Run)
	awaitMembers(t, server, "member", "server")
	before := member.o.Identity.creds.keys()
	for _, key := range before {
		if !server.Admits(key) {
			t.Fatal("the member's key is not known")
		}
	}
	ca.issue(t, dir, "member", nil)
	after := member.o.Identity.creds.keys()
	if len(after) != 2 || after[0] == before[0] || after[1] != before[0] {
		t.Fatalf("keys %v, then %v", before, after)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for _, key := range after {
		if !server.Await(ctx, key) {
			t.Errorf("%s never becomes known", key)
		}
	}
	ca.issue(t, dir, "member", nil) // the first key is history
	last := member.o.Identity.creds.keys()
	if !server.Await(ctx, last[0]) || slices.Contains(last, before[0]) {
		t.Errorf("keys %v in the end", last)
	}
	await(t, server, "rid of the first key", func() bool { return !server.Admits(before[0]) })
}

func FuzzDecodeIntroduction(f *testing.F) {
	f.Add([]byte(`{"k":["AAAAAAAAAAAAAAAAAAAAAA"]}`))
	f.Add([]byte(`{"k":["AAAAAAAAAAAAAAAAAAAAAA","_____________________w"],"from":"a later version"}`))
	f.Add([]byte(`{"k":["AAAAAAAAAAAAAAAAAAAAA="]}`))
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		i, err := decodeIntroduction(b)
		if err != nil {
			return
		}
		again, err := i.encode()
		if err != nil {
			t.Fatalf("what was accepted cannot be said: %v", err)
		}
		got, err := decodeIntroduction(again)
		if err != nil || !slices.Equal(got.Keys, i.Keys) || len(i.Keys) > maxKeys {
			t.Fatalf("%q decodes as %+v, then as %+v, %v", b, i, got, err)
		}
	})
}
