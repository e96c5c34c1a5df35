package cluster

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/memberlist"
	"github.com/opencontainers/go-digest"
)

// directory is a resolver whose records the test changes.
type directory struct {
	mu      sync.Mutex
	records map[string][]string // guarded by mu
	asked   chan struct{}       // one for every look-up, as far as there is room
}

func newDirectory() *directory {
	return &directory{records: map[string][]string{}, asked: make(chan struct{}, 100)}
}

func (d *directory) set(name string, records ...string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.records[name] = records
}

// LookupHost implements Resolver.
func (d *directory) LookupHost(_ context.Context, host string) ([]string, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	select {
	case d.asked <- struct{}{}:
	default:
	}
	if len(d.records[host]) == 0 {
		return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
	}
	return slices.Clone(d.records[host]), nil
}

// hasty is for tests: the same protocol, ten times as fast as on a network.
func hasty(cfg *memberlist.Config) {
	cfg.ProbeInterval = 100 * time.Millisecond
	cfg.ProbeTimeout = 80 * time.Millisecond
	cfg.GossipInterval = 20 * time.Millisecond
	cfg.PushPullInterval = time.Second
	cfg.DeadNodeReclaimTime = time.Millisecond
}

// nodeOn makes a node on a loopback address that does not wait long.
func nodeOn(t *testing.T, key, name, bind string, change func(*Options)) *Cluster {
	t.Helper()
	o := Options{
		Identity: keyed(t, key, name), Name: name, BindAddr: bind, DataAddress: "127.0.0.1:7947", Log: silent,
	}
	if change != nil {
		change(&o)
	}
	c, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	c.tune = hasty
	c.wait = waits{first: 20 * time.Millisecond, alone: 50 * time.Millisecond, most: 200 * time.Millisecond, keys: 50 * time.Millisecond}
	return c
}

// await waits until what c knows is as it should be.
func await(t *testing.T, c *Cluster, what string, ok func() bool) {
	t.Helper()
	timeout := time.After(patience)
	for {
		changed := c.Changed()
		if ok() {
			return
		}
		select {
		case <-changed:
		case <-timeout:
			t.Fatalf("%s: never %s; members %v", c.Self().Name, what, names(c.Members()))
		}
	}
}

func awaitMembers(t *testing.T, c *Cluster, want ...string) {
	t.Helper()
	slices.Sort(want)
	await(t, c, "members "+strings.Join(want, " "), func() bool { return slices.Equal(names(c.Members()), want) })
}

// gossipAddr waits until c gossips and says where.
func gossipAddr(t *testing.T, c *Cluster) netip.AddrPort {
	t.Helper()
	var at netip.AddrPort
	await(t, c, "gossiping", func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		at = c.gossip[c.self.Name]
		return at.IsValid()
	})
	return at
}

func TestNodesFindAndMissEachOther(t *testing.T) {
	key := GenerateKey()
	first := nodeOn(t, key, "n0", "127.0.0.1:0", nil)
	if got := first.Members(); len(got) != 1 || got[0].Address != "127.0.0.1:7947" {
		t.Errorf("members before Run: %+v", got)
	}
	start(t, first.Run)
	seed := gossipAddr(t, first).String()

	all, nodes := []string{"n0"}, []*Cluster{first}
	var transports []*memberlist.NetTransport
	var stops []func()
	for i := 1; i < 6; i++ {
		name := fmt.Sprintf("n%d", i)
		c := nodeOn(t, key, name, "127.0.0.1:0", func(o *Options) {
			o.Join = []string{seed}
			o.DataAddress = fmt.Sprintf("127.0.0.%d:%d", i, 8000+i)
			o.Labels = map[string]string{"zone": "z" + name, "disk": "ssd"}
		})
		var transport *memberlist.NetTransport
		c.tune = func(cfg *memberlist.Config) {
			hasty(cfg)
			var err error
			transport, err = memberlist.NewNetTransport(&memberlist.NetTransportConfig{
				BindAddrs: []string{"127.0.0.1"}, BindPort: 0, Logger: log.New(discard{}, "", 0),
			})
			if err != nil {
				t.Error(err)
				return
			}
			cfg.Transport, cfg.BindPort = transport, transport.GetAutoBindPort()
			cfg.AdvertisePort = cfg.BindPort
		}
		stops = append(stops, start(t, c.Run))
		gossipAddr(t, c)
		transports = append(transports, transport)
		all, nodes = append(all, name), append(nodes, c)
	}
	for _, c := range nodes {
		awaitMembers(t, c, all...)
	}
	// On a busy machine one is missed now and then, for a moment: what is known is looked
	// at when all are there.
	await(t, first, "data of all", func() bool {
		members := first.Members()
		if !slices.Equal(names(members), all) {
			return false
		}
		for i, m := range members[1:] {
			want := fmt.Sprintf("127.0.0.%d:%d", i+1, 8001+i)
			labels := map[string]string{"zone": "z" + m.Name, "disk": "ssd"}
			if m.Address != want || m.Zone() != "z"+m.Name || !maps.Equal(m.Labels, labels) {
				t.Fatalf("%s is known as %+v, want %s", m.Name, m, want)
			}
			if self := nodes[i+1].Self(); self.Address != m.Address {
				t.Fatalf("%s calls itself %s", m.Name, self.Address)
			}
		}
		return true
	})
	d := digest.FromString("blob")
	var order, trackers []string
	await(t, first, "trackers of all", func() bool {
		order, trackers = names(first.Trackers(d)), names(first.TrackerNodes())
		return len(order) == 6 && len(trackers) == 6
	})
	for _, c := range nodes {
		await(t, c, fmt.Sprintf("to ask %v, as n0, of %v", order, trackers), func() bool {
			return slices.Equal(names(c.Trackers(d)), order) && slices.Equal(names(c.TrackerNodes()), trackers)
		})
	}

	// n5 loses power, n4 says goodbye.
	if err := transports[4].Shutdown(); err != nil {
		t.Fatal(err)
	}
	for _, c := range nodes[:5] {
		awaitMembers(t, c, all[:5]...)
	}
	stops[3]()
	for _, c := range nodes[:4] {
		awaitMembers(t, c, all[:4]...)
	}
	awaitMembers(t, nodes[4], "n4")
	// It comes back, at another address.
	again := nodeOn(t, key, "n4", "127.0.0.2:0", func(o *Options) { o.Join = []string{seed} })
	start(t, again.Run)
	awaitMembers(t, again, all[:5]...)
	awaitMembers(t, first, all[:5]...)
}

type discard struct{}

func (discard) Write(p []byte) (int, error) { return len(p), nil }

// A name with many records, some of them nobody's and some no addresses,
// brings in whoever is there, and those who come later.
func TestNameWithManyRecords(t *testing.T) {
	key, dns := GenerateKey(), newDirectory()
	first := nodeOn(t, key, "n1", "127.0.1.1:0", func(o *Options) { o.Resolver = dns })
	start(t, first.Run)
	port := gossipAddr(t, first).Port()
	dns.set("tasks.imagewolf", "127.0.1.200", "not an address", "::", "127.0.1.3", "127.0.1.2", "127.0.1.1")

	all, nodes := []string{"n1"}, []*Cluster{first}
	for i := 2; i <= 4; i++ {
		name := fmt.Sprintf("n%d", i)
		c := nodeOn(t, key, name, fmt.Sprintf("127.0.1.%d:%d", i, port), func(o *Options) {
			o.Resolver = dns
			o.Join = []string{"nowhere", fmt.Sprintf("tasks.imagewolf:%d", port)}
		})
		start(t, c.Run)
		all, nodes = append(all, name), append(nodes, c)
	}
	for _, c := range nodes {
		awaitMembers(t, c, all...)
	}
}

// A node that gossip has passed by hears of the others all the same, soon.
func TestMissedNewsIsFetched(t *testing.T) {
	key := GenerateKey()
	silence := func(cfg *memberlist.Config) {
		hasty(cfg)
		cfg.GossipInterval, cfg.PushPullInterval, cfg.ProbeInterval = 0, 0, time.Hour
	}
	a := nodeOn(t, key, "a", "127.0.0.1:0", nil)
	a.tune = silence
	start(t, a.Run)
	join := func(o *Options) { o.Join = []string{gossipAddr(t, a).String()} }
	b, c := nodeOn(t, key, "b", "127.0.0.1:0", join), nodeOn(t, key, "c", "127.0.0.1:0", join)
	b.tune, c.tune = silence, silence
	start(t, b.Run)
	awaitMembers(t, b, "a", "b")
	start(t, c.Run)
	awaitMembers(t, b, "a", "b", "c")
}

// Two clusters that know nothing of each other become one when the name that
// they all ask has records of both.
func TestSplitHeals(t *testing.T) {
	key, left, right := GenerateKey(), newDirectory(), newDirectory()
	var port uint16
	node := func(name, ip string, dns *directory) *Cluster {
		c := nodeOn(t, key, name, fmt.Sprintf("%s:%d", ip, port), func(o *Options) {
			o.Resolver = dns
			o.Join = []string{"wolves"}
		})
		for i := range c.targets {
			c.targets[i].port = port
		}
		start(t, c.Run)
		return c
	}
	port = gossipAddr(t, node("a", "127.0.2.1", left)).Port()
	left.set("wolves", "127.0.2.1", "127.0.2.2")
	right.set("wolves", "127.0.2.3", "127.0.2.4")
	b := node("b", "127.0.2.2", left)
	c, d := node("c", "127.0.2.3", right), node("d", "127.0.2.4", right)
	awaitMembers(t, b, "a", "b")
	awaitMembers(t, c, "c", "d")
	awaitMembers(t, d, "c", "d")
	right.set("wolves", "127.0.2.3", "127.0.2.4", "127.0.2.1")
	for _, n := range []*Cluster{b, c, d} {
		awaitMembers(t, n, "a", "b", "c", "d")
	}
}

// Nodes with another key, or with one name, do not become members.
func TestWhoStaysOut(t *testing.T) {
	key := GenerateKey()
	errs := newRecorder(slog.LevelInfo)
	first := nodeOn(t, key, "n0", "127.0.0.1:0", func(o *Options) { o.Log = slog.New(errs) })
	start(t, first.Run)
	seed := gossipAddr(t, first).String()

	warns := newRecorder(slog.LevelWarn)
	stranger := nodeOn(t, GenerateKey(), "stranger", "127.0.0.1:0", func(o *Options) {
		o.Join, o.Log = []string{seed}, slog.New(warns)
	})
	start(t, stranger.Run)
	warns.await(t, "cannot join")

	double := nodeOn(t, key, "n0", "127.0.0.1:0", func(o *Options) { o.Join = []string{seed} })
	start(t, double.Run)
	errs.await(t, "two nodes have one name")

	member := nodeOn(t, key, "n1", "127.0.0.1:0", func(o *Options) { o.Join = []string{seed} })
	start(t, member.Run)
	awaitMembers(t, first, "n0", "n1")
	awaitMembers(t, stranger, "stranger")
	if n := errs.count("two nodes have one name"); n != 1 {
		t.Errorf("the conflict was logged %d times", n)
	}
	if n := errs.count("Conflicting address"); n != 0 {
		t.Errorf("and %d times in the library's words", n)
	}
}

// What fails is logged when it begins and when it ends, not at every attempt.
func TestFailuresAreLoggedOnce(t *testing.T) {
	key, dns, said := GenerateKey(), newDirectory(), newRecorder(slog.LevelInfo)
	first := nodeOn(t, key, "n0", "127.0.3.1:0", nil)
	start(t, first.Run)
	port := gossipAddr(t, first).Port()
	c := nodeOn(t, key, "n1", "127.0.3.2:0", func(o *Options) {
		o.Resolver, o.Log = dns, slog.New(said)
		o.Join = []string{fmt.Sprintf("wolves:%d", port)}
	})
	start(t, c.Run)
	for range 5 {
		select {
		case <-dns.asked:
		case <-time.After(patience):
			t.Fatal("the name is not asked again")
		}
	}
	dns.set("wolves", "127.0.3.9")
	said.await(t, "cannot join: trying again and again join=127.0.3.9:")
	if n := said.count("\n"); n != 0 {
		t.Errorf("%d messages are of several lines", n)
	}
	dns.set("wolves", "127.0.3.1")
	awaitMembers(t, c, "n0", "n1")
	if n := said.count("cannot join: trying again and again join=wolves"); n != 1 {
		t.Errorf("the failure was logged %d times", n)
	}
	if n := said.count("can be joined again"); n != 1 {
		t.Errorf("its end was logged %d times", n)
	}
}

func TestRunFailsOnTakenPort(t *testing.T) {
	key := GenerateKey()
	first := nodeOn(t, key, "n0", "127.0.0.1:0", nil)
	stop := start(t, first.Run)
	at := gossipAddr(t, first).String()
	second := nodeOn(t, key, "n1", at, nil)
	if err := second.Run(t.Context()); err == nil || !strings.Contains(err.Error(), at) || !strings.HasPrefix(err.Error(), "cluster.gossip_address: ") {
		t.Fatalf("Run on a taken port: %v", err)
	}
	stop()
	stop = start(t, second.Run) // again, now that the port is free
	gossipAddr(t, second)
	stop()
	awaitMembers(t, second, "n1")
}

func TestOptions(t *testing.T) {
	id, dns := keyed(t, GenerateKey(), "n"), newDirectory()
	dns.set("me.example", "10.9.8.7")
	for name, c := range map[string]struct {
		change  func(*Options)
		address string // of Self, if there is no error
		err     string
	}{
		"plain":                  {func(*Options) {}, "127.0.0.1:7947", ""},
		"data port elsewhere":    {func(o *Options) { o.DataAddress = "10.0.0.1:9" }, "10.0.0.1:9", ""},
		"advertised":             {func(o *Options) { o.AdvertiseAddr = "192.168.1.1"; o.DataAddress = "10.0.0.1:9" }, "192.168.1.1:9", ""},
		"advertised by name":     {func(o *Options) { o.AdvertiseAddr = "me.example" }, "10.9.8.7:7947", ""},
		"advertised IPv6":        {func(o *Options) { o.AdvertiseAddr = "fd00::7" }, "[fd00::7]:7947", ""},
		"advertised unknown":     {func(o *Options) { o.AdvertiseAddr = "nobody.example" }, "", "advertise address"},
		"advertised all":         {func(o *Options) { o.AdvertiseAddr = "0.0.0.0" }, "", "every address"},
		"no identity":            {func(o *Options) { o.Identity = nil }, "", "identity"},
		"no name":                {func(o *Options) { o.Name = "" }, "", "node name"},
		"gossip without port":    {func(o *Options) { o.BindAddr = "127.0.0.1" }, "", "gossip address"},
		"gossip on a name":       {func(o *Options) { o.BindAddr = "localhost:1" }, "", "not an IP"},
		"gossip port too high":   {func(o *Options) { o.BindAddr = "127.0.0.1:65536" }, "", "port"},
		"data port unknown":      {func(o *Options) { o.DataAddress = "127.0.0.1:0" }, "", "port is 0"},
		"labels too long":        {func(o *Options) { o.Labels = map[string]string{"a": strings.Repeat("b", 512)} }, "", "too long"},
		"join nonsense":          {func(o *Options) { o.Join = []string{"a b"} }, "", `join "a b"`},
		"join without a name":    {func(o *Options) { o.Join = []string{":7946"} }, "", "neither"},
		"join port 0":            {func(o *Options) { o.Join = []string{"a:0"} }, "", "port"},
		"join link-local":        {func(o *Options) { o.Join = []string{"fe80::1%eth0"} }, "", "zone"},
		"join everything usable": {func(o *Options) { o.Join = []string{"a", "a:1", "10.0.0.1", "fd00::1", "[fd00::1]:5"} }, "127.0.0.1:7947", ""},
	} {
		t.Run(name, func(t *testing.T) {
			o := Options{
				Identity: id, Name: "n", BindAddr: "127.0.0.1:0", DataAddress: "0.0.0.0:7947", Resolver: dns, Log: silent,
			}
			c.change(&o)
			got, err := New(o)
			switch {
			case c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)):
				t.Fatalf("err = %v, want one with %q", err, c.err)
			case c.err == "" && err != nil:
				t.Fatal(err)
			case c.err == "" && got.Self().Address != c.address:
				t.Errorf("the others would connect to %s, want %s", got.Self().Address, c.address)
			}
		})
	}
}

func TestParseTarget(t *testing.T) {
	for entry, want := range map[string]target{
		"a.example":      {host: "a.example", port: 7946},
		"a.example:1":    {host: "a.example", port: 1},
		" 10.0.0.1 ":     {host: "10.0.0.1", port: 7946, ip: netip.MustParseAddr("10.0.0.1")},
		"10.0.0.1:2":     {host: "10.0.0.1", port: 2, ip: netip.MustParseAddr("10.0.0.1")},
		"fd00::1":        {host: "fd00::1", port: 7946, ip: netip.MustParseAddr("fd00::1")},
		"[fd00::1]":      {host: "fd00::1", port: 7946, ip: netip.MustParseAddr("fd00::1")},
		"[fd00::1]:3":    {host: "fd00::1", port: 3, ip: netip.MustParseAddr("fd00::1")},
		"::ffff:1.2.3.4": {host: "::ffff:1.2.3.4", port: 7946, ip: netip.MustParseAddr("1.2.3.4")},
	} {
		want.entry = entry
		if got, err := parseTarget(entry); err != nil || got != want {
			t.Errorf("%q is %+v, %v", entry, got, err)
		}
	}
}

// recorder keeps what is logged from a level up.
type recorder struct {
	level slog.Level
	mu    sync.Mutex
	lines []string      // guarded by mu
	more  chan struct{} // guarded by mu: closed at the next line
}

func newRecorder(level slog.Level) *recorder {
	return &recorder{level: level, more: make(chan struct{})}
}

func (r *recorder) Enabled(_ context.Context, l slog.Level) bool { return l >= r.level }
func (r *recorder) WithAttrs([]slog.Attr) slog.Handler           { return r }
func (r *recorder) WithGroup(string) slog.Handler                { return r }

func (r *recorder) Handle(_ context.Context, rec slog.Record) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	line := rec.Message
	rec.Attrs(func(a slog.Attr) bool { line += " " + a.String(); return true })
	r.lines = append(r.lines, line)
	close(r.more)
	r.more = make(chan struct{})
	return nil
}

func (r *recorder) count(text string) (n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, l := range r.lines {
		if strings.Contains(l, text) {
			n++
		}
	}
	return n
}

func (r *recorder) await(t *testing.T, text string) {
	t.Helper()
	timeout := time.After(patience)
	for {
		r.mu.Lock()
		more := r.more
		r.mu.Unlock()
		if r.count(text) > 0 {
			return
		}
		select {
		case <-more:
		case <-timeout:
			t.Fatalf("%q is never logged", text)
		}
	}
}

func TestAdvertiseIsAnAddress(t *testing.T) {
	for _, bind := range []string{"0.0.0.0", "::"} {
		ip, err := advertised(Options{}, netip.MustParseAddr(bind))
		if err == nil && (ip.IsUnspecified() || ip.IsLoopback() || !ip.IsValid()) {
			t.Errorf("bound to %s, this node would be looked for at %s", bind, ip)
		}
		if err != nil && !strings.Contains(err.Error(), "advertise_address") {
			t.Errorf("the error does not say what to do: %v", err)
		}
	}
	var dnsErr *net.DNSError
	_, err := advertised(Options{AdvertiseAddr: "nobody", Resolver: newDirectory()}, netip.MustParseAddr("0.0.0.0"))
	if !errors.As(err, &dnsErr) {
		t.Errorf("err = %v", err)
	}
}

// The panic of a goroutine that looks for nodes comes to Contain, and so does that
// of one that has a connection.
func TestPanicIsContained(t *testing.T) {
	caught := make(chan any, 100)
	contain := func(f func()) {
		defer func() {
			if p := recover(); p != nil {
				caught <- p
			}
		}()
		f()
	}
	c := nodeOn(t, GenerateKey(), "n", "127.0.0.1:0", func(o *Options) {
		o.Join, o.Resolver, o.Contain = []string{"others"}, unlucky{}, contain
	})
	start(t, c.Run)
	if p := <-caught; p != "no such luck" {
		t.Error(p)
	}
	port := openPort(t, keyed(t, GenerateKey(), "n"), func(p *DataPort) {
		p.listener = unluckyListener{p.listener}
		p.Contain(contain)
	})
	conn, err := net.Dial("tcp", port.listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if p := <-caught; p != "no such luck" {
		t.Error(p)
	}
	if _, err := conn.Read(make([]byte, 1)); err == nil {
		t.Error("the connection goes on")
	}
}

type unlucky struct{ net.Conn }

func (unlucky) LookupHost(context.Context, string) ([]string, error) { panic("no such luck") }
func (unlucky) Read([]byte) (int, error)                             { panic("no such luck") }

type unluckyListener struct{ net.Listener }

func (l unluckyListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	return unlucky{conn}, err
}

// Who is slow tracks last everywhere, and no longer than it was said.
func TestSlowNodeIsKnown(t *testing.T) {
	key := GenerateKey()
	first := nodeOn(t, key, "n0", "127.0.0.1:0", nil)
	start(t, first.Run)
	seed := gossipAddr(t, first).String()
	nodes := []*Cluster{first}
	for _, name := range []string{"n1", "n2"} {
		c := nodeOn(t, key, name, "127.0.0.1:0", func(o *Options) { o.Join = []string{seed} })
		start(t, c.Run)
		nodes = append(nodes, c)
	}
	for _, c := range nodes {
		awaitMembers(t, c, "n0", "n1", "n2")
	}
	d := digest.FromString("blob")
	order := names(first.Trackers(d))
	slow := nodes[slices.IndexFunc(nodes, func(c *Cluster) bool { return c.Self().Name == order[0] })]
	slow.beSlow(3 * time.Second)
	for _, c := range nodes {
		await(t, c, "asks the slow one last", func() bool {
			return slices.Equal(names(c.Trackers(d)), []string{order[1], order[2], order[0]})
		})
	}
	for _, c := range nodes {
		await(t, c, "asks all as before", func() bool { return slices.Equal(names(c.Trackers(d)), order) })
	}
}

// Labels that leave no room for it keep a node from saying that it is slow, and so from
// believing it alone; nothing else.
func TestNoRoomToBeSlow(t *testing.T) {
	var c *Cluster
	for n := 0; ; n++ { // the longest label that is taken
		o := Options{
			Identity: keyed(t, GenerateKey(), "n0"), Name: "n0", BindAddr: "127.0.0.1:0", DataAddress: "127.0.0.1:7947",
			Labels: map[string]string{"l": strings.Repeat("x", 330+n)}, Log: silent,
		}
		next, err := New(o)
		if err != nil {
			break
		}
		c = next
	}
	if c == nil {
		t.Fatal("no label is taken")
	}
	// As while its certificate is exchanged.
	c.said.Labels["l"] += strings.Repeat("x", base64.RawURLEncoding.EncodedLen(fingerprintSize)+len(`"",`))
	c.beSlow(time.Minute)
	said, slow, err := c.describe()
	if err != nil || slow {
		t.Fatalf("slow: %v, %v", slow, err)
	}
	if c.restate(said, slow); c.Members()[0].Slow {
		t.Error("it is slow for itself alone")
	}
}
