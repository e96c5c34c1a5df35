package cluster

import (
	"maps"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"testing"
)

func TestMeta(t *testing.T) {
	long := map[string]string{"k": strings.Repeat("x", 500)}
	for name, c := range map[string]struct {
		m    meta
		want string // "" if it is good
	}{
		"plain":         {meta{Port: 7947}, ""},
		"labels":        {meta{Port: 1, Host: "fd00::1", Labels: map[string]string{"zone": "a", "topology.kubernetes.io/zone": "<Köln> & co"}}, ""},
		"too long":      {meta{Port: 1, Labels: long}, "too long"},
		"no port":       {meta{}, "data port"},
		"host no IP":    {meta{Port: 1, Host: "node.example"}, "not an IP"},
		"host anything": {meta{Port: 1, Host: "0.0.0.0"}, "every address"},
		"empty label":   {meta{Port: 1, Labels: map[string]string{"": "x"}}, "label"},
		"spaced label":  {meta{Port: 1, Labels: map[string]string{"a b": "x"}}, "label"},
		"newline":       {meta{Port: 1, Labels: map[string]string{"a": "x\ny"}}, "not printable"},
		"no UTF-8":      {meta{Port: 1, Labels: map[string]string{"a": "\xff"}}, "not printable"},
	} {
		t.Run(name, func(t *testing.T) {
			b, err := c.m.encode()
			if c.want != "" {
				if err == nil || !strings.Contains(err.Error(), c.want) {
					t.Fatalf("err = %v, want one with %q", err, c.want)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			got, err := decodeMeta(b)
			if err != nil || got.Port != c.m.Port || got.Host != c.m.Host || !maps.Equal(got.Labels, c.m.Labels) {
				t.Fatalf("decoded %+v, %v", got, err)
			}
		})
	}
}

func FuzzDecodeMeta(f *testing.F) {
	f.Add([]byte(`{"p":7947,"l":{"zone":"a"}}`))
	f.Add([]byte(`{"p":7947,"h":"10.0.0.1","from":"a later version"}`))
	f.Add([]byte("{\"p\":1,\"l\":{\"a\":\"\xff\"}}"))
	f.Add([]byte(`{"p":65536}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := decodeMeta(b)
		if err != nil {
			return
		}
		again, err := m.encode()
		if err != nil {
			if strings.Contains(err.Error(), "too long") {
				return // broken UTF-8 grows when it is repaired
			}
			t.Fatalf("what was accepted cannot be said: %v", err)
		}
		got, err := decodeMeta(again)
		if err != nil || got.Port != m.Port || got.Host != m.Host || !maps.Equal(got.Labels, m.Labels) {
			t.Fatalf("%q decodes as %+v, then as %+v, %v", b, m, got, err)
		}
	})
}

func FuzzParseTarget(f *testing.F) {
	for _, s := range []string{"a", "a:1", "10.0.0.1:2", "[fd00::1]:3", "fd00::1", "[fd00::1]", "fe80::1%eth0", ":1", "a:b:c"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		got, err := parseTarget(s)
		if err != nil {
			return
		}
		if got.port == 0 || got.host == "" || got.ip.IsValid() && got.ip.String() != got.host && got.ip != netip.MustParseAddr(got.host) {
			t.Fatalf("%q gives %+v", s, got)
		}
		again, err := parseTarget(net.JoinHostPort(got.host, strconv.Itoa(int(got.port))))
		if err != nil || again.host != got.host || again.port != got.port || again.ip != got.ip {
			t.Fatalf("%q gives %+v, then %+v, %v", s, got, again, err)
		}
	})
}
