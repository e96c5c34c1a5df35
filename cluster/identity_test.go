package cluster

import (
	"bytes"
	"crypto/x509"
	"encoding/hex"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// All nodes must derive the same from one key, in every version to come.
func TestIdentityIsStable(t *testing.T) {
	key := formatKey(bytes.Repeat([]byte{7}, 32))
	a, b := keyed(t, key, "a"), keyed(t, key, "b")
	if a.ClusterID() != b.ClusterID() || !bytes.Equal(a.GossipKey(), b.GossipKey()) || a.knock != b.knock {
		t.Fatal("two nodes with one key differ")
	}
	if !bytes.Equal(a.creds.(*issuer).ca.Raw, b.creds.(*issuer).ca.Raw) {
		t.Fatal("two nodes with one key have two CAs")
	}
	const wantID, wantGossip = "0f1ba1a2c5f933cf0d4f71b3671ee049", "0a061628b472f16262244599a27d460b491eb98c7df3ed2b5c065e6480ad433e"
	if got := a.ClusterID(); got != wantID {
		t.Errorf("cluster id %s, want %s", got, wantID)
	}
	if got := hex.EncodeToString(a.GossipKey()); got != wantGossip {
		t.Errorf("gossip key %s, want %s", got, wantGossip)
	}
	other := keyed(t, GenerateKey(), "a")
	if other.ClusterID() == a.ClusterID() || bytes.Equal(other.GossipKey(), a.GossipKey()) || other.knock == a.knock {
		t.Error("two keys give one cluster")
	}
}

func TestIdentityOptions(t *testing.T) {
	key := GenerateKey()
	for name, c := range map[string]struct {
		o    IdentityOptions
		want string
	}{
		"nothing":             {IdentityOptions{NodeName: "n"}, "imagewolf cluster-key generate"},
		"key and files":       {IdentityOptions{NodeName: "n", ClusterKey: key, CertFile: "x"}, "not both"},
		"key and gossip key":  {IdentityOptions{NodeName: "n", ClusterKey: key, GossipKeyFile: "x"}, "not both"},
		"key and insecure":    {IdentityOptions{NodeName: "n", ClusterKey: key, Insecure: true}, "remove one"},
		"files and insecure":  {IdentityOptions{NodeName: "n", CAFile: "x", Insecure: true}, "remove one"},
		"mistyped key":        {IdentityOptions{NodeName: "n", ClusterKey: key[:20]}, "characters"},
		"files, one missing":  {IdentityOptions{NodeName: "n", CertFile: "c", KeyFile: "k", GossipKeyFile: "g"}, "ca_file is missing"},
		"files, no gossip":    {IdentityOptions{NodeName: "n", CertFile: "c", KeyFile: "k", CAFile: "a"}, "gossip_key_file is missing"},
		"files not there":     {IdentityOptions{NodeName: "n", CertFile: "c", KeyFile: "k", CAFile: "a", GossipKeyFile: "/nowhere/g"}, "gossip_key_file: open"},
		"no name":             {IdentityOptions{ClusterKey: key}, "node name"},
		"name with a newline": {IdentityOptions{ClusterKey: key, NodeName: "a\nb"}, "node name"},
		"name too long":       {IdentityOptions{ClusterKey: key, NodeName: strings.Repeat("a", 254)}, "254"},
	} {
		t.Run(name, func(t *testing.T) {
			c.o.Log = silent
			if _, err := LoadIdentity(c.o); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("err = %v, want one with %q", err, c.want)
			}
		})
	}
}

func TestInsecureIsOneCluster(t *testing.T) {
	load := func(name string) *Identity {
		id, err := LoadIdentity(IdentityOptions{Insecure: true, NodeName: name, Log: silent})
		if err != nil {
			t.Fatal(err)
		}
		return id
	}
	if a, b := load("a"), load("b"); a.ClusterID() != b.ClusterID() {
		t.Fatal("insecure nodes are not of one cluster")
	}
}

// Nodes with the cluster's key know each other whatever their clocks say: time in
// the bubble is a quarter of a century behind.
func TestClocksDoNotMatter(t *testing.T) {
	key := GenerateKey()
	now := keyed(t, key, "now")
	accept := func(other *Identity) {
		t.Helper()
		leaf, _ := other.creds.current()
		_, pool := now.creds.current()
		for _, use := range []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth} {
			if err := verifyChain([]*x509.Certificate{leaf.Leaf}, pool, use); err != nil {
				t.Errorf("at %v: %v", time.Now().Year(), err)
			}
		}
	}
	var then *Identity
	synctest.Test(t, func(t *testing.T) {
		if began := time.Now().Year(); began > 2001 {
			t.Fatalf("time in the bubble is %d", began)
		}
		then = keyed(t, key, "then")
		accept(now)
		// A clock that was behind is set, and later far ahead.
		for range 3 {
			time.Sleep(40 * 365 * 24 * time.Hour)
			accept(now)
			accept(then)
		}
	})
	accept(then)
}
