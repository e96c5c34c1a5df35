package cluster

import (
	"bytes"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// All nodes must derive the same from one key, in every version to come.
func TestIdentityIsStable(t *testing.T) {
	key := formatKey(bytes.Repeat([]byte{7}, 32))
	a, b := keyed(t, key, "a"), keyed(t, key, "b")
	if !bytes.Equal(a.GossipKeys()[0], b.GossipKeys()[0]) || a.secrets[0].knock != b.secrets[0].knock {
		t.Fatal("two nodes with one key differ")
	}
	if !bytes.Equal(a.creds.(*derived).issuers[0].ca.Raw, b.creds.(*derived).issuers[0].ca.Raw) {
		t.Fatal("two nodes with one key have two CAs")
	}
	text, err := AuthorityPEM(key)
	if b, _ := pem.Decode(text); err != nil || b == nil || !bytes.Equal(b.Bytes, a.creds.(*derived).issuers[0].ca.Raw) {
		t.Errorf("the CA is printed as %s, %v", text, err)
	}
	const wantKnock, wantGossip = "8f5846aa4e0dcac47a3a4804a5fe0871", "0a061628b472f16262244599a27d460b491eb98c7df3ed2b5c065e6480ad433e"
	if got := a.secrets[0].knock; got != wantKnock {
		t.Errorf("the cluster's name in hellos is %s, want %s", got, wantKnock)
	}
	if got := hex.EncodeToString(a.GossipKeys()[0]); got != wantGossip {
		t.Errorf("gossip key %s, want %s", got, wantGossip)
	}
	other := keyed(t, GenerateKey(), "a")
	if bytes.Equal(other.GossipKeys()[0], a.GossipKeys()[0]) || other.secrets[0].knock == a.secrets[0].knock {
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
		"accepted, no key":    {IdentityOptions{NodeName: "n", AcceptedKeys: []string{key}}, "accepted_cluster_keys without"},
		"accepted, insecure":  {IdentityOptions{NodeName: "n", Insecure: true, AcceptedKeys: []string{key}}, "accepted_cluster_keys without"},
		"accepted, mistyped":  {IdentityOptions{NodeName: "n", ClusterKey: key, AcceptedKeys: []string{key, "x"}}, "number 2"},
		"too many accepted":   {IdentityOptions{NodeName: "n", ClusterKey: key, AcceptedKeys: make([]string, 5)}, "at most 4"},
		"gossip, with a key":  {IdentityOptions{NodeName: "n", ClusterKey: key, AcceptedGossipKeyFiles: []string{"g"}}, "accepted_gossip_key_files without"},
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
	if a, b := load("a"), load("b"); a.secrets[0].knock != b.secrets[0].knock {
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
		leaf, _ := other.creds.current(0)
		_, pool := now.creds.current(0)
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
	leaf, _ := now.creds.current(0)
	if got := fingerprint(leaf.Leaf); !slices.Equal(now.creds.keys(), []string{got}) {
		t.Error("the certificate has another key than the others know")
	}
}
