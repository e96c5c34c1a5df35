package cluster

import (
	"bytes"
	"context"
	"fmt"
	"log"
	"log/slog"
	"net/netip"
	"time"

	"github.com/hashicorp/memberlist"
	"golang.org/x/time/rate"
)

// gossip is what memberlist tells one Run. Its methods are called with
// memberlist's locks held: they must not call back, and take c.mu only.
type gossip struct {
	c         *Cluster
	over      bool // guarded by c.mu: what comes late is ignored
	conflicts rate.Sometimes
}

var (
	_ memberlist.Delegate         = (*gossip)(nil)
	_ memberlist.EventDelegate    = (*gossip)(nil)
	_ memberlist.AliveDelegate    = (*gossip)(nil)
	_ memberlist.ConflictDelegate = (*gossip)(nil)
)

// config is memberlist's for a LAN, changed where a cluster of nodes that
// come, go and crash wants to know sooner.
func (g *gossip) config() (*memberlist.Config, error) {
	g.conflicts = rate.Sometimes{First: 1, Interval: 30 * time.Second}
	cfg := memberlist.DefaultLANConfig()
	cfg.Name = g.c.o.Name
	cfg.BindAddr = g.c.bind.Addr().String()
	cfg.BindPort = int(g.c.bind.Port())
	cfg.AdvertiseAddr = g.c.host.String()
	cfg.AdvertisePort = cfg.BindPort // memberlist replaces it where it is 0
	keys := g.c.o.Identity.GossipKeys()
	var err error
	if cfg.Keyring, err = memberlist.NewKeyring(keys[1:], keys[0]); err != nil {
		return nil, fmt.Errorf("gossip keys: %w", err)
	}
	// Seeds that are not there cost this much at each attempt, also when the
	// node wants to stop.
	cfg.TCPTimeout = 2 * time.Second
	cfg.PushPullInterval = 15 * time.Second
	// A node that comes back with another address, as pods do, takes its name
	// over as soon as it is known that the old one is dead.
	cfg.DeadNodeReclaimTime = time.Second
	cfg.Delegate, cfg.Events, cfg.Alive, cfg.Conflict = g, g, g, g
	cfg.Logger = log.New(&logWriter{log: g.c.o.Log, limit: rate.NewLimiter(2, 30)}, "", 0)
	if g.c.tune != nil {
		g.c.tune(cfg)
	}
	return cfg, nil
}

// stop ends the view that this gossip kept.
func (g *gossip) stop() {
	g.c.mu.Lock()
	g.over = true
	g.c.mu.Unlock()
	g.c.reset()
}

// NodeMeta implements memberlist.Delegate.
func (g *gossip) NodeMeta(int) []byte {
	g.c.mu.Lock()
	defer g.c.mu.Unlock()
	return g.c.meta
}

// NotifyMsg implements memberlist.Delegate: a node introduces itself.
func (g *gossip) NotifyMsg(b []byte) {
	i, err := decodeIntroduction(b)
	if err != nil {
		g.c.o.Log.Debug("gossip: message dropped", "err", err)
		return
	}
	g.c.admission.introduce(i.Keys)
}

// GetBroadcasts implements memberlist.Delegate.
func (g *gossip) GetBroadcasts(int, int) [][]byte { return nil }

// LocalState implements memberlist.Delegate.
func (g *gossip) LocalState(bool) []byte { return nil }

// MergeRemoteState implements memberlist.Delegate.
func (g *gossip) MergeRemoteState([]byte, bool) {}

// NotifyAlive implements memberlist.AliveDelegate: who does not make sense is
// not let into the membership.
func (g *gossip) NotifyAlive(n *memberlist.Node) error {
	if err := checkName(n.Name); err != nil {
		return err
	}
	_, err := decodeMeta(n.Meta)
	return err
}

// NotifyConflict implements memberlist.ConflictDelegate.
func (g *gossip) NotifyConflict(existing, other *memberlist.Node) {
	g.conflicts.Do(func() {
		g.c.o.Log.Error("two nodes have one name: the second is left out until it is given another, or the first is found dead",
			"name", existing.Name, "first", existing.Address(), "second", other.Address())
	})
}

// NotifyJoin implements memberlist.EventDelegate.
func (g *gossip) NotifyJoin(n *memberlist.Node) { g.set(n, "node joined") }

// NotifyUpdate implements memberlist.EventDelegate.
func (g *gossip) NotifyUpdate(n *memberlist.Node) { g.set(n, "node changed") }

// NotifyLeave implements memberlist.EventDelegate: it left or is dead.
func (g *gossip) NotifyLeave(n *memberlist.Node) {
	c := g.c
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, known := c.members[n.Name]; g.over || !known || n.Name == c.self.Name {
		return
	}
	delete(c.members, n.Name)
	delete(c.gossip, n.Name)
	c.admission.lose(n.Name)
	c.publish()
	c.o.Log.Info("node gone", "name", n.Name, "members", len(c.members))
}

func (g *gossip) set(n *memberlist.Node, event string) {
	c := g.c
	ip, ok := netip.AddrFromSlice(n.Addr)
	m, err := decodeMeta(n.Meta)
	if !ok || err != nil {
		return // NotifyAlive has refused it
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if g.over {
		return
	}
	ip = ip.Unmap()
	c.gossip[n.Name] = netip.AddrPortFrom(ip, n.Port)
	if n.Name != c.self.Name {
		c.members[n.Name] = member(n.Name, ip, m)
		c.admission.set(n.Name, m.Keys)
		c.o.Log.Info(event, "name", n.Name, "address", c.members[n.Name].Address, "members", len(c.members))
	}
	c.publish()
}

// knows says whether a live member gossips at that address.
func (c *Cluster) knows(addr netip.AddrPort) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, a := range c.gossip {
		if a == addr {
			return true
		}
	}
	return false
}

// count is how many members there are, which is known without making a view
// of them.
func (c *Cluster) count() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.members)
}

// alone says that no other member is known.
func (c *Cluster) alone() bool { return c.count() < 2 }

// logWriter turns memberlist's lines into records. Its errors are warnings to
// us: none of them stops the node. Strangers can cause lines at will, so only
// so many a second get through.
type logWriter struct {
	log   *slog.Logger
	limit *rate.Limiter
}

// Write implements io.Writer; log.Logger calls it once per line.
func (w *logWriter) Write(p []byte) (int, error) {
	level, line := slog.LevelWarn, bytes.TrimSpace(p)
	for _, l := range []struct {
		mark  string
		level slog.Level
	}{{"[DEBUG] ", slog.LevelDebug}, {"[INFO] ", slog.LevelDebug}, {"[WARN] ", slog.LevelInfo}, {"[ERR] ", slog.LevelWarn}} {
		if rest, ok := bytes.CutPrefix(line, []byte(l.mark)); ok {
			level, line = l.level, rest
		}
	}
	line = bytes.TrimPrefix(line, []byte("memberlist: "))
	if bytes.HasPrefix(line, []byte("Conflicting address for ")) {
		level = slog.LevelDebug // it comes with every message of the other node; NotifyConflict says it in our words
	}
	if w.log.Enabled(context.Background(), level) && w.limit.Allow() {
		w.log.Log(context.Background(), level, "gossip: "+string(line))
	}
	return len(p), nil
}
