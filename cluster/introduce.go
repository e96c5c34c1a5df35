package cluster

import (
	"bytes"
	"context"
	"net"
	"time"

	"github.com/hashicorp/memberlist"
	"google.golang.org/grpc"
)

// updateTimeout is how long news of this node's keys may take to be on its way.
const updateTimeout = 2 * time.Second

// Dial is Identity.Dial to a member at the address of its data port, which is
// told before who comes.
func (c *Cluster) Dial(ctx context.Context, address, proto string) (net.Conn, error) {
	c.introduce(address)
	return c.o.Identity.Dial(ctx, address, proto)
}

// GRPCDialOptions are Identity.GRPCDialOptions, for connections that are
// announced as those of Dial are.
func (c *Cluster) GRPCDialOptions() []grpc.DialOption {
	return append(c.o.Identity.GRPCDialOptions(), grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
		c.introduce(address)
		return dialTCP(ctx, address)
	}))
}

// introduce tells a member, by one packet of gossip, this node's keys. A node
// that has just started knows of others sooner than they of it, and connects to
// them at once: without this they would have to let it wait. A packet may be
// lost; then it does wait, until gossip comes.
func (c *Cluster) introduce(address string) {
	c.mu.Lock()
	ml, to := c.ml, ""
	for name, m := range c.members {
		if at := c.gossip[name]; m.Address == address && at.IsValid() {
			to = at.String()
			break
		}
	}
	c.mu.Unlock()
	if ml == nil || to == "" {
		return
	}
	msg, err := introduction{Keys: c.o.Identity.creds.keys()}.encode()
	if err == nil {
		err = ml.SendToAddress(memberlist.Address{Addr: to}, msg)
	}
	if err != nil {
		c.o.Log.Debug("gossip: not introduced", "to", to, "err", err)
	}
}

// describe is what gossip says of this node.
func (c *Cluster) describe() ([]byte, error) {
	m := c.said
	m.Keys = c.o.Identity.creds.keys()
	return m.encode()
}

// followKeys tells the others when this node's keys have changed, until ctx ends.
func (c *Cluster) followKeys(ctx context.Context, ml *memberlist.Memberlist) {
	tick := time.NewTicker(c.wait.keys)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now, err := c.describe()
		if err != nil {
			c.o.Log.Error("this node's key cannot be told to the others", "err", err)
			continue
		}
		c.mu.Lock()
		changed := !bytes.Equal(now, c.meta)
		c.meta = now
		c.mu.Unlock()
		if !changed {
			continue
		}
		c.o.Log.Info("this node has a new key: telling the others")
		if err := ml.UpdateNode(updateTimeout); err != nil {
			c.o.Log.Warn("gossip: news of this node's key are slow", "err", err)
		}
	}
}
