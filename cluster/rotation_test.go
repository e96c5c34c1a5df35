package cluster

import (
	"context"
	"fmt"
	"log/slog"
	"testing"
	"time"
)

// accepting makes an identity of one key that accepts others.
func accepting(t *testing.T, name, key string, others ...string) *Identity {
	t.Helper()
	id, err := LoadIdentity(IdentityOptions{ClusterKey: key, AcceptedKeys: others, NodeName: name, Log: silent})
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// rotating is a node with its data port.
type rotating struct {
	*Cluster
	port *DataPort
	stop func()
}

// startRotating starts a node that says its peers' names, and lets nobody wait:
// who is not known at once is refused.
func startRotating(t *testing.T, id *Identity, name, gossip, join string) *rotating {
	t.Helper()
	l := listen(t)
	c := nodeOn(t, GenerateKey(), name, gossip, func(o *Options) {
		o.Identity, o.DataAddress = id, l.Addr().String()
		if join != "" {
			o.Join = []string{join}
		}
	})
	port := NewDataPort(l, id, c, silent)
	stopPort, stopGossip := start(t, port.Run), start(t, c.Run)
	greet(t, port)
	gossipAddr(t, c)
	return &rotating{c, port, func() {
		stopGossip()
		stopPort()
	}}
}

// The cluster's key is exchanged in three steps, a node at a time, and at every
// moment all nodes are members of one cluster and talk with all others.
func TestClusterKeyIsExchanged(t *testing.T) {
	old, next := GenerateKey(), GenerateKey()
	const n = 3
	var nodes [n]*rotating
	join := func(i int) string {
		for k := range n {
			if k != i && nodes[k] != nil {
				return gossipAddr(t, nodes[k].Cluster).String()
			}
		}
		return ""
	}
	var all []string
	for i := range n {
		name := fmt.Sprint("n", i)
		nodes[i] = startRotating(t, accepting(t, name, old), name, "127.0.0.1:0", join(i))
		all = append(all, name)
	}
	check := func(when string) {
		t.Helper()
		for _, c := range nodes {
			awaitMembers(t, c.Cluster, all...)
		}
		for _, from := range nodes {
			for _, to := range nodes {
				want := "hello " + from.Self().Name
				if got, err := hello(t.Context(), from.Dial, to.port); got != want {
					t.Errorf("%s: from %s to %s: %q, %v", when, from.Self().Name, to.Self().Name, got, err)
				}
			}
		}
	}
	check("before")
	for step, keys := range [][]string{{old, next}, {next, old}, {next}} {
		for i := range nodes {
			nodes[i].stop()
			name := all[i]
			nodes[i] = startRotating(t, accepting(t, name, keys[0], keys[1:]...), name, "127.0.0.1:0", join(i))
			check(fmt.Sprintf("step %d, node %d", step+1, i))
		}
	}
	for _, c := range nodes {
		silence(t, keyed(t, old, "n0"), c.port)
	}
	warns := newRecorder(slog.LevelWarn)
	behind := nodeOn(t, old, "behind", "127.0.0.1:0", func(o *Options) {
		o.Join, o.Log = []string{join(-1)}, slog.New(warns)
	})
	start(t, behind.Run)
	warns.await(t, "cannot join")
	awaitMembers(t, nodes[0].Cluster, all...)
}

// A key that is accepted beside a node's own lets in nobody by a third one, and
// shows nobody else's certificate.
func TestAcceptedKeyIsNoMasterKey(t *testing.T) {
	own, beside, third := GenerateKey(), GenerateKey(), GenerateKey()
	server := accepting(t, "server", own, beside)
	p := openPort(t, server, nil)
	greet(t, p)
	for name, id := range map[string]*Identity{
		"own": accepting(t, "own", own), "beside": accepting(t, "beside", beside), "both": accepting(t, "both", beside, own),
	} {
		if got := greeting(t, id, p); got != "hello "+name {
			t.Errorf("%s hears %q", name, got)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	for name, id := range map[string]*Identity{
		"third key":          accepting(t, "x", third),
		"third key, accepts": accepting(t, "x", third, own, beside),
	} {
		if _, err := id.Dial(ctx, p.listener.Addr().String(), ProtoBitTorrent); err == nil {
			t.Errorf("%s: not refused", name)
		}
	}
	// It knows how the cluster is called, and has a certificate of another key.
	spy := accepting(t, "spy", third)
	spy.secrets[0].knock = server.secrets[1].knock
	if _, err := spy.Dial(ctx, p.listener.Addr().String(), ProtoBitTorrent); err == nil {
		t.Error("the server has shown a certificate that the client's key is good for")
	}
}

// Gossip keys of those with certificates of their own are exchanged in the same
// way.
func TestGossipKeyIsExchanged(t *testing.T) {
	ca := newAuthority(t)
	load := func(name, own string, accepted ...string) *Identity {
		dir := t.TempDir()
		ca.issue(t, dir, name, nil)
		write(t, dir, "gossip", own)
		o := filesIn(dir, name, silent)
		for i, key := range accepted {
			file := fmt.Sprint("accepted", i)
			write(t, dir, file, key)
			o.AcceptedGossipKeyFiles = append(o.AcceptedGossipKeyFiles, dir+"/"+file)
		}
		id, err := LoadIdentity(o)
		if err != nil {
			t.Fatal(err)
		}
		return id
	}
	old, next := hexKey('1'), hexKey('2')
	first := startRotating(t, load("a", old, next), "a", "127.0.0.1:0", "")
	second := startRotating(t, load("b", next, old), "b", "127.0.0.1:0", gossipAddr(t, first.Cluster).String())
	third := startRotating(t, load("c", next), "c", "127.0.0.1:0", gossipAddr(t, second.Cluster).String())
	awaitMembers(t, second.Cluster, "a", "b", "c")
	for _, pair := range [][2]*rotating{{first, second}, {second, first}, {second, third}, {third, second}, {third, first}} {
		want := "hello " + pair[0].Self().Name
		if got, err := hello(t.Context(), pair[0].Dial, pair[1].port); got != want {
			t.Errorf("from %s to %s: %q, %v", pair[0].Self().Name, pair[1].Self().Name, got, err)
		}
	}
}

func hexKey(digit byte) string {
	b := make([]byte, 64)
	for i := range b {
		b[i] = digit
	}
	return string(b)
}
