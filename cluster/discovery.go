package cluster

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"
	"golang.org/x/sync/errgroup"
)

const (
	defaultGossipPort = 7946
	// One join brings in a whole cluster, so few are under way at once, and a
	// name with a thousand records is not asked through in one round.
	maxJoinsAtOnce   = 4
	maxJoinsPerRound = 32
	maxRecords       = 4096 // of one name
)

// waits are the pauses between two rounds of discovery. They double from
// first while nothing happens, up to most; less while this node is alone. keys
// is the pause between two looks at this node's own keys.
type waits struct{ first, alone, most, keys time.Duration }

var defaultWaits = waits{first: time.Second, alone: 5 * time.Second, most: 30 * time.Second, keys: 5 * time.Second}

// target is one entry of the list of nodes to join.
type target struct {
	entry string     // as the operator wrote it
	host  string     // a name, if ip is not valid
	ip    netip.Addr // an address
	port  uint16
}

// parseTargets reads the list of nodes to join.
func parseTargets(entries []string) ([]target, error) {
	var out []target
	for _, entry := range entries {
		t, err := parseTarget(entry)
		if err != nil {
			return nil, fmt.Errorf("join %q: %w", entry, err)
		}
		out = append(out, t)
	}
	return out, nil
}

func parseTarget(entry string) (target, error) {
	t := target{entry: entry, host: strings.TrimSpace(entry), port: defaultGossipPort}
	bare := strings.TrimSuffix(strings.TrimPrefix(t.host, "["), "]")
	if _, err := netip.ParseAddr(bare); err == nil {
		t.host = bare // an IPv6 address has colons of its own
	} else if strings.Contains(t.host, ":") {
		host, port, err := net.SplitHostPort(t.host)
		if err != nil {
			return t, fmt.Errorf("want host or host:port: %w", err)
		}
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil || n == 0 {
			return t, fmt.Errorf("port %q is not a number from 1 to 65535", port)
		}
		t.host, t.port = host, uint16(n)
	}
	if _, err := netip.ParseAddr(t.host); err == nil {
		t.ip, err = usableIP(t.host)
		return t, err
	}
	if t.host == "" || strings.ContainsFunc(t.host, func(r rune) bool { return !nameRune(r) }) {
		return t, errors.New("neither an address nor a name")
	}
	return t, nil
}

// discover looks for nodes until ctx ends: the list is resolved again and
// again and every address in it that is no member's is joined. So a node that
// started first finds the later ones, and halves of a split cluster that have
// given each other up find each other again.
func (c *Cluster) discover(ctx context.Context, ml *memberlist.Memberlist) {
	d := discovery{c: c, ml: ml, failing: map[string]bool{}}
	for wait := c.wait.first; ; wait = min(2*wait, c.wait.most) {
		if len(c.targets) > 0 {
			d.round(ctx)
		}
		if wait < c.wait.most {
			d.exchange()
		}
		if c.alone() {
			wait = min(wait, c.wait.alone)
		}
		lost := c.pause(ctx, wait)
		if ctx.Err() != nil {
			return
		}
		if lost {
			wait = c.wait.first
		}
	}
}

// pause waits, less long once a member is lost: if that was a split of the
// network and no death, it is well to be back soon. It ends with ctx.
func (c *Cluster) pause(ctx context.Context, wait time.Duration) (lost bool) {
	timer := time.NewTimer(jitter(wait))
	defer timer.Stop()
	before := c.count()
	for {
		changed := c.Changed()
		now := c.count()
		if now < before && !lost {
			lost = true
			timer.Reset(jitter(min(wait, c.wait.first)))
		}
		before = now
		select {
		case <-ctx.Done():
			return lost
		case <-timer.C:
			return lost
		case <-changed:
		}
	}
}

// jitter spreads a pause by a quarter either way, so that nodes that were
// started together do not ask together.
func jitter(d time.Duration) time.Duration { return d*3/4 + rand.N(d/2+1) }

// discovery is the state of one discover.
type discovery struct {
	c  *Cluster
	ml *memberlist.Memberlist

	mu      sync.Mutex
	failing map[string]bool // guarded by mu: entries and addresses that failed last time
}

func (d *discovery) round(ctx context.Context) {
	addrs, seen := d.resolve(ctx)
	rand.Shuffle(len(addrs), func(i, j int) { addrs[i], addrs[j] = addrs[j], addrs[i] })
	var g errgroup.Group
	g.SetLimit(maxJoinsAtOnce)
	joins := 0
	for _, a := range addrs {
		if ctx.Err() != nil || joins == maxJoinsPerRound {
			break
		}
		if d.c.knows(a) {
			d.report(a.String(), nil)
			continue
		}
		joins++
		g.Go(func() error {
			d.c.o.Contain(func() {
				if d.c.knows(a) { // a join beside this one has brought it in
					return
				}
				_, err := d.ml.Join([]string{a.String()})
				d.report(a.String(), single(err))
			})
			return nil
		})
	}
	_ = g.Wait() // never fails: failures are reported where they happen
	d.forget(seen)
}

// single takes the error of one address out of memberlist's list of them, which is
// several lines long.
func single(err error) error {
	var list interface{ WrappedErrors() []error }
	if errors.As(err, &list) && len(list.WrappedErrors()) == 1 {
		return list.WrappedErrors()[0]
	}
	return err
}

// exchange asks a random member for all it knows. Where hundreds of nodes
// start at once, gossip drops some of the news, and memberlist itself makes
// good for that only after minutes.
func (d *discovery) exchange() {
	var addrs []netip.AddrPort
	d.c.mu.Lock()
	for name, a := range d.c.gossip {
		if name != d.c.self.Name {
			addrs = append(addrs, a)
		}
	}
	d.c.mu.Unlock()
	if len(addrs) == 0 {
		return
	}
	addr := addrs[rand.IntN(len(addrs))].String()
	if _, err := d.ml.Join([]string{addr}); err != nil {
		d.c.o.Log.Debug("gossip: no exchange", "with", addr, "err", single(err))
	}
}

// resolve returns the addresses behind the list, each once, and everything
// that failures are remembered by.
func (d *discovery) resolve(ctx context.Context) ([]netip.AddrPort, map[string]bool) {
	found := make([][]netip.AddrPort, len(d.c.targets))
	var g errgroup.Group
	g.SetLimit(maxJoinsAtOnce)
	for i, t := range d.c.targets {
		if t.ip.IsValid() {
			found[i] = []netip.AddrPort{netip.AddrPortFrom(t.ip, t.port)}
			continue
		}
		g.Go(func() error {
			d.c.o.Contain(func() {
				var err error
				found[i], err = d.lookup(ctx, t)
				if ctx.Err() == nil {
					d.report(t.entry, err)
				}
			})
			return nil
		})
	}
	_ = g.Wait() // never fails: failures are reported where they happen
	var addrs []netip.AddrPort
	seen := map[string]bool{}
	for i, t := range d.c.targets {
		seen[t.entry] = true
		addrs = append(addrs, found[i]...)
	}
	slices.SortFunc(addrs, netip.AddrPort.Compare)
	addrs = slices.Compact(addrs)
	for _, a := range addrs {
		seen[a.String()] = true
	}
	return addrs, seen
}

func (d *discovery) lookup(ctx context.Context, t target) ([]netip.AddrPort, error) {
	ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
	defer cancel()
	hosts, err := d.c.o.Resolver.LookupHost(ctx, t.host)
	if err != nil {
		return nil, fmt.Errorf("look up: %w", err)
	}
	var addrs []netip.AddrPort
	for _, h := range hosts[:min(len(hosts), maxRecords)] {
		if ip, err := usableIP(h); err == nil {
			addrs = append(addrs, netip.AddrPortFrom(ip, t.port))
		}
	}
	if len(addrs) == 0 {
		return nil, errors.New("look up: no usable address")
	}
	return addrs, nil
}

// report logs what fails when it begins to fail and when it works again.
func (d *discovery) report(what string, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case err != nil && !d.failing[what]:
		d.failing[what] = true
		d.c.o.Log.Warn("cannot join: trying again and again", "join", what, "err", err)
	case err == nil && d.failing[what]:
		delete(d.failing, what)
		d.c.o.Log.Info("can be joined again", "join", what)
	}
}

// forget drops what is no longer in the list's records.
func (d *discovery) forget(seen map[string]bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for what := range d.failing {
		if !seen[what] {
			delete(d.failing, what)
		}
	}
}
