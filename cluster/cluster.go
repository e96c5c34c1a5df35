// Package cluster says which nodes there are, and lets no one else in.
//
// It keeps the membership by gossip (memberlist), finds the first nodes to
// gossip with, gives every node an identity, and turns one TCP port into
// connections that are mutually authenticated and split by protocol. It also
// says which nodes track a blob, because that follows from the membership
// alone. It does not know what is said over the connections, and nothing in
// it is needed for a node to serve its own containerd.
package cluster

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"
	"github.com/opencontainers/go-digest"
)

// leaveTimeout is how long Run tries to say goodbye, so that the others need
// not find out.
const leaveTimeout = time.Second

// Member is one live node. Its labels are shared: they must not be changed.
type Member struct {
	Name    string            // unique in the cluster
	Address string            // host:port of the data port
	Labels  map[string]string // the operator's, and "zone"
	// Slow says that its line has been found slow a while ago: it is the last to track a
	// blob, as long as such nodes are few.
	Slow bool
}

// Zone is the label "zone": nodes of one zone are near each other. Empty if
// the operator gave none.
func (m Member) Zone() string { return m.Labels["zone"] }

// Resolver looks up names; *net.Resolver is one.
type Resolver interface {
	LookupHost(ctx context.Context, host string) (addrs []string, err error)
}

// Options configure a Cluster.
type Options struct {
	Identity *Identity
	Name     string // this node's: unique, at most 253 letters, digits, '.', '_', '-'

	// BindAddr is the host:port that gossip listens on, TCP and UDP. The host
	// is an IP address or empty (all); port 0 lets the system choose.
	BindAddr string
	// AdvertiseAddr is the IP address or name under which the others reach
	// this node, for gossip and for data. Empty: the address that is bound, or
	// that of the default route.
	AdvertiseAddr string
	// DataAddress is where the data port listens: host:port, port not 0.
	DataAddress string

	// Labels of this node, known to all; at most about 420 bytes in all.
	Labels map[string]string
	// Join has the nodes to begin with: addresses, or names with any number
	// of address records, each with or without a port (default 7946). They
	// are asked again for as long as Run runs.
	Join []string

	Resolver Resolver // nil: net.DefaultResolver
	Log      *slog.Logger
	// Contain runs what a goroutine does that looks for nodes or at them, and keeps its panic
	// from ending the process; nil: nothing does.
	Contain func(f func())
}

// Cluster is this node's view of the cluster. Safe for concurrent use.
type Cluster struct {
	o       Options
	bind    netip.AddrPort
	host    netip.Addr // advertised
	self    Member
	said    meta // without what may change: keys, Slow
	targets []target
	tune    func(*memberlist.Config) // nil but in tests that cannot wait
	wait    waits

	admission admission // has a lock of its own
	line      line      // as admission

	mu       sync.Mutex
	meta     []byte                    // guarded by mu: what is said of this node
	ml       *memberlist.Memberlist    // guarded by mu: nil while Run does not run
	members  map[string]Member         // guarded by mu: live, by name, self included
	gossip   map[string]netip.AddrPort // guarded by mu: where the members gossip, self included while Run runs
	sorted   []Member                  // guarded by mu; nil until asked for; replaced, never changed
	trackers []Member                  // guarded by mu; as sorted
	changed  chan struct{}             // guarded by mu: closed at the next change
	slow     time.Time                 // guarded by mu: until when this node is Slow
}

// New checks the options and finds the address under which others reach this
// node, which may take a look-up of at most 5 seconds. It starts nothing.
func New(o Options) (*Cluster, error) {
	if o.Identity == nil {
		return nil, errors.New("cluster: no identity")
	}
	if err := checkName(o.Name); err != nil {
		return nil, err
	}
	if o.Log == nil {
		o.Log = slog.Default()
	}
	if o.Contain == nil {
		o.Contain = func(f func()) { f() }
	}
	if o.Resolver == nil {
		o.Resolver = net.DefaultResolver
	}
	bind, err := parseBind(o.BindAddr)
	if err != nil {
		return nil, fmt.Errorf("gossip address %q: %w", o.BindAddr, err)
	}
	data, err := parseBind(o.DataAddress)
	if err == nil && data.Port() == 0 {
		err = errors.New("port is 0")
	}
	if err != nil {
		return nil, fmt.Errorf("data address %q: %w", o.DataAddress, err)
	}
	targets, err := parseTargets(o.Join)
	if err != nil {
		return nil, err
	}
	host, err := advertised(o, bind.Addr())
	if err != nil {
		return nil, err
	}
	c := &Cluster{
		o: o, bind: bind, host: host, targets: targets, wait: defaultWaits,
		changed: make(chan struct{}),
	}
	said := meta{Port: data.Port(), Labels: maps.Clone(o.Labels)}
	// A data port bound to one address is reached there, unless the operator
	// says that the others see something else.
	if ip := data.Addr(); o.AdvertiseAddr == "" && !ip.IsUnspecified() && ip != host {
		said.Host = ip.String()
	}
	c.said = said
	// There must be room for as many keys as there may ever be.
	said.Keys = slices.Repeat([]string{strings.Repeat("A", base64.RawURLEncoding.EncodedLen(fingerprintSize))}, maxKeys)
	if _, err := said.encode(); err != nil {
		return nil, err
	}
	if c.meta, _, err = c.describe(); err != nil {
		return nil, err
	}
	c.self = member(o.Name, host, said)
	c.reset()
	return c, nil
}

func member(name string, host netip.Addr, m meta) Member {
	h := host.String()
	if m.Host != "" {
		h = m.Host
	}
	return Member{Name: name, Address: net.JoinHostPort(h, strconv.Itoa(int(m.Port))), Labels: m.Labels, Slow: m.Slow}
}

// Self is this node as the others see it, but for Slow.
func (c *Cluster) Self() Member { return c.self }

// Members are the live nodes by name, this one included; only this one while
// Run does not run. The slice is the caller's.
func (c *Cluster) Members() []Member {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.view()
	return slices.Clone(c.sorted)
}

// Member returns the live node of that name, and whether there is one.
func (c *Cluster) Member(name string) (Member, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	m, ok := c.members[name]
	return m, ok
}

// Changed returns a channel that is closed when Members changes next. To miss
// nothing, call it before looking.
func (c *Cluster) Changed() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.changed
}

// TrackerNodes are the at most 32 nodes that track blobs, the same on every
// node that knows the same members. The slice is the caller's.
func (c *Cluster) TrackerNodes() []Member {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.view()
	return slices.Clone(c.trackers)
}

// Trackers are the tracker nodes in the order in which they are to be asked
// about a blob: each stands in for the one before it. The slice is the
// caller's.
func (c *Cluster) Trackers(d digest.Digest) []Member {
	c.mu.Lock()
	c.view()
	trackers := c.trackers
	c.mu.Unlock()
	return rank(d.String(), trackers)
}

// Run takes part in the cluster until ctx ends, which is no error; it then
// says goodbye. It fails only if the gossip port cannot be had: that no other
// node is found is no failure. Not to be called twice at once.
func (c *Cluster) Run(ctx context.Context) error {
	g := &gossip{c: c}
	cfg, err := g.config()
	if err != nil {
		return err
	}
	ml, err := memberlist.Create(cfg)
	if err != nil {
		g.stop()
		return fmt.Errorf("cluster.gossip_address: %w", err)
	}
	c.setGossip(ml)
	var following sync.WaitGroup
	following.Go(func() { c.o.Contain(func() { c.follow(ctx, ml) }) })
	c.discover(ctx, ml)
	following.Wait()
	c.setGossip(nil)

	if err := ml.Leave(leaveTimeout); err != nil {
		c.o.Log.Debug("gossip: no goodbye", "err", err)
	}
	err = ml.Shutdown()
	g.stop()
	if err != nil {
		return fmt.Errorf("gossip: %w", err)
	}
	return nil
}

// reset forgets everyone but this node.
func (c *Cluster) reset() {
	c.mu.Lock()
	defer c.mu.Unlock()
	self := c.self
	self.Slow = time.Now().Before(c.slow)
	c.members = map[string]Member{c.self.Name: self}
	c.gossip = map[string]netip.AddrPort{}
	c.admission.reset()
	c.publish()
}

// setGossip says with what introductions are sent; nil for nothing.
func (c *Cluster) setGossip(ml *memberlist.Memberlist) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ml = ml
}

// publish tells who waits that the members have changed. c.mu must be held.
func (c *Cluster) publish() {
	c.sorted, c.trackers = nil, nil
	close(c.changed)
	c.changed = make(chan struct{})
}

// view makes what is read often. Not at every change: while a big cluster
// starts there are more of them than looks. c.mu must be held.
func (c *Cluster) view() {
	if c.sorted != nil {
		return
	}
	c.sorted = slices.SortedFunc(maps.Values(c.members), func(a, b Member) int { return strings.Compare(a.Name, b.Name) })
	c.trackers = trackersOf(c.sorted)
}

// parseBind parses what a listener could be given: no host means all.
func parseBind(s string) (netip.AddrPort, error) {
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("want host:port: %w", err)
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("port %q is not a number from 0 to 65535", port)
	}
	ip := netip.IPv6Unspecified() // takes IPv4 as well
	if host != "" {
		if ip, err = netip.ParseAddr(host); err != nil {
			return netip.AddrPort{}, fmt.Errorf("host is not an IP address: %w", err)
		}
	}
	return netip.AddrPortFrom(ip.Unmap(), uint16(n)), nil
}
