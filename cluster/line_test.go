package cluster

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/memberlist"
)

// wire is a socket as a test wants it.
type wire struct {
	sent, confirmed uint64
	closed          bool
}

func (w *wire) count() (sent, confirmed uint64, ok bool) { return w.sent, w.confirmed, !w.closed }

// Whoever has not confirmed for a second what was sent to him is late.
func TestLate(t *testing.T) {
	at := time.Now()
	w := map[string]*wire{"quiet": {}, "prompt": {}, "slow": {}, "gone": {}, "other": {}}
	var l line
	for _, peer := range []string{"quiet", "prompt", "slow", "gone", "other", "slow"} {
		l.conns = append(l.conns, &lineConn{peer: peer, socket: w[peer]})
	}
	for i, step := range []struct {
		after           time.Duration
		send, confirmed string // by whom or of whom
		want            []string
	}{
		{lineEvery, "prompt slow", "", nil},
		{lineEvery, "other", "", nil},
		{lineEvery, "prompt slow", "prompt", []string{"slow"}},
		{lineEvery, "prompt", "prompt", []string{"slow", "other"}},
		{lineEvery, "prompt slow", "prompt slow", []string{"other"}},
		{lineEvery, "prompt gone", "prompt other", nil},
		{lineEvery, "prompt", "prompt", []string{"slow"}},
		{lineEvery, "prompt", "prompt slow", nil}, // gone is closed
		{lineEvery, "slow", "prompt", nil},
		{10 * time.Second, "", "", nil}, // the process stood still
		{lineEvery, "", "", nil},
		{lineEvery, "", "", []string{"slow"}},
	} {
		at = at.Add(step.after)
		for peer, x := range w {
			// What was sent before is confirmed, and what is sent now is not.
			if has(step.confirmed, peer) {
				x.confirmed = x.sent
			}
			if has(step.send, peer) {
				x.sent += 1000
			}
		}
		w["gone"].closed = i >= 7
		if got := l.late(at); !slices.Equal(got, step.want) {
			t.Errorf("step %d: late are %q, want %q", i, got, step.want)
		}
	}
	if len(l.conns) != 5 {
		t.Errorf("%d connections are looked at, 5 are open", len(l.conns))
	}
}

func has(list, word string) bool { return slices.Contains(strings.Fields(list), word) }

// What the kernel counts of a connection.
func TestKernelCounts(t *testing.T) {
	l := listen(t)
	near, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	far, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	var sockets []socket
	for _, conn := range []net.Conn{near, far} {
		s, ok := socketOf(conn)
		if !ok {
			t.Fatal("a TCP connection has no socket")
		}
		for n := range uint64(3) {
			eventually(t, "all is confirmed", func() bool {
				sent, confirmed, ok := s.count()
				return ok && sent >= 1000*n && confirmed >= sent && confirmed < 1000*n+10
			})
			if _, err := conn.Write(make([]byte, 1000)); err != nil {
				t.Fatal(err)
			}
		}
		sockets = append(sockets, s)
	}
	_, _ = near.Close(), far.Close() // each has bytes that nobody has read
	for _, s := range sockets {
		if _, _, ok := s.count(); ok {
			t.Error("a closed connection is counted")
		}
	}
}

// deaf is a transport that sends nothing while it is told not to.
type deaf struct {
	memberlist.Transport
	*atomic.Bool
}

// WriteTo implements memberlist.Transport.
func (d deaf) WriteTo(b []byte, addr string) (time.Time, error) {
	if d.Load() {
		return time.Now(), nil
	}
	return d.Transport.WriteTo(b, addr)
}

// Those are asked that are not late, if there are enough of them, and nobody if it is not
// several hosts of members that are late.
func TestToAsk(t *testing.T) {
	for _, c := range []struct {
		name    string
		members []string // host of gossip, or hosts of gossip/data
		late    []string
		want    []string // who may be asked, by number
		n       int
	}{
		{"nobody is late", []string{"10.0.0.1", "10.0.0.2"}, nil, nil, 0},
		{"one is", []string{"10.0.0.1", "10.0.0.2", "10.0.0.3"}, []string{"10.0.0.1"}, nil, 0},
		{"two are", []string{"10.0.0.1", "10.0.0.2", "10.0.0.3"}, []string{"10.0.0.1", "10.0.0.2"}, []string{"0", "1", "2"}, 3},
		{"others are enough", strings.Fields("10.0.0.1 10.0.0.2 10.0.0.3 10.0.0.4 10.0.0.5 10.0.0.6 10.0.0.7 10.0.0.8"),
			[]string{"10.0.0.1", "10.0.0.2"}, strings.Fields("2 3 4 5 6 7"), 5},
		{"one of them is no member any more", []string{"10.0.0.1", "10.0.0.3"}, []string{"10.0.0.1", "10.0.0.2"}, nil, 0},
		{"two at one host", []string{"10.0.0.1", "10.0.0.1", "10.0.0.3"}, []string{"10.0.0.1", "10.0.0.2"}, nil, 0},
		{"one with two addresses", []string{"10.0.0.1/10.1.0.1", "10.0.0.3"}, []string{"10.0.0.1", "10.1.0.1"}, nil, 0},
		{"data has its own", strings.Fields("10.0.0.1/10.1.0.1 10.0.0.2/10.1.0.2 10.0.0.3 10.0.0.4 10.0.0.5 10.0.0.6 10.0.0.7"),
			[]string{"10.1.0.1", "10.1.0.2"}, strings.Fields("2 3 4 5 6"), 5},
		{"and IPv6", strings.Fields("fd00::1 fd00::2"), strings.Fields("fd00::1 fd00::2"), strings.Fields("0 1"), 2},
	} {
		for range 20 { // it is at random
			x := &Cluster{self: Member{Name: "self"}, members: map[string]Member{"self": {}}, gossip: map[string]netip.AddrPort{}}
			x.gossip["self"] = netip.MustParseAddrPort("10.0.0.1:1")
			for i, host := range c.members {
				gossip, data, own := strings.Cut(host, "/")
				if !own {
					data = gossip
				}
				name := fmt.Sprint(i)
				x.members[name] = Member{Name: name, Address: net.JoinHostPort(data, "7947")}
				x.gossip[name] = netip.AddrPortFrom(netip.MustParseAddr(gossip), 7946)
			}
			got := map[string]bool{}
			for _, a := range x.toAsk(c.late) {
				got[a.name] = true
				if a.gossip != x.gossip[a.name] || !slices.Contains(c.want, a.name) {
					t.Errorf("%s: %s is asked, at %s", c.name, a.name, a.gossip)
				}
			}
			if len(got) != c.n {
				t.Errorf("%s: %d are asked, want %d", c.name, len(got), c.n)
			}
		}
	}
}

// A node says that its line is slow where several others are late and nobody answers it;
// while one does, it is they that are slow, or gone.
func TestSlowLine(t *testing.T) {
	key := GenerateKey()
	var nodes []*Cluster
	var mute []*atomic.Bool
	for i := range 4 {
		c := nodeOn(t, key, fmt.Sprintf("n%d", i), fmt.Sprintf("127.0.0.%d:0", i+1), func(o *Options) {
			if i > 0 {
				o.Join = []string{gossipAddr(t, nodes[0]).String()}
			}
		})
		is := &atomic.Bool{}
		c.tune = func(cfg *memberlist.Config) {
			hasty(cfg)
			cfg.ProbeInterval, cfg.ProbeTimeout = time.Hour, 300*time.Millisecond // nobody is found dead
			udp, err := memberlist.NewNetTransport(&memberlist.NetTransportConfig{
				BindAddrs: []string{cfg.BindAddr}, BindPort: cfg.BindPort, Logger: cfg.Logger,
			})
			if err != nil {
				t.Error(err)
				return
			}
			cfg.BindPort = udp.GetAutoBindPort()
			cfg.AdvertisePort = cfg.BindPort
			cfg.Transport = deaf{udp, is}
		}
		start(t, c.Run)
		nodes, mute = append(nodes, c), append(mute, is)
	}
	for _, c := range nodes {
		awaitMembers(t, c, "n0", "n1", "n2", "n3")
	}
	self := nodes[0]
	self.mu.Lock()
	ml := self.ml
	self.mu.Unlock()
	late := func(n int) {
		self.line.mu.Lock()
		defer self.line.mu.Unlock()
		self.line.conns, self.line.looked = nil, time.Now()
		for i := range n {
			self.line.conns = append(self.line.conns, &lineConn{
				peer: fmt.Sprintf("127.0.0.%d", i+2), socket: &wire{sent: 1}, until: 1, since: time.Now().Add(-time.Second),
			})
		}
	}
	mute[1].Store(true)
	mute[2].Store(true)
	if late(2); self.slowLine(time.Now(), ml) {
		t.Error("others are late, and one that is not answers: it takes itself for slow")
	}
	mute[3].Store(true)
	if late(1); self.slowLine(time.Now(), ml) {
		t.Error("one is late: the node takes itself for slow")
	}
	if late(2); !self.slowLine(time.Now(), ml) {
		t.Error("two are late and nobody answers: the node does not know that it is slow")
	}
	for _, c := range nodes {
		await(t, c, "knows that n0 is slow", func() bool { m, _ := c.Member("n0"); return m.Slow })
	}
}
