package cluster

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/hashicorp/memberlist"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
)

// updateTimeout is how long news of this node's keys may take to be on its way.
const updateTimeout = 2 * time.Second

// errStranger is returned to those who dial one that is no member.
var errStranger = errors.New("it has a certificate of the cluster and is no member")

// Dial is Identity.Dial to a member at the address of its data port, which is
// told before who comes. One that is no member, whoever gave its address, is not
// spoken to.
func (c *Cluster) Dial(ctx context.Context, address, proto string) (net.Conn, error) {
	c.introduce(address)
	conn, err := c.o.Identity.Dial(ctx, address, proto)
	if err != nil {
		return nil, err
	}
	state := conn.(*tls.Conn).ConnectionState() //nolint:errcheck // its type is Identity.Dial's promise
	if err := c.recognise(ctx, state); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", address, err), conn.Close())
	}
	c.Connected(conn.(*tls.Conn).NetConn()) //nolint:errcheck // as above
	return conn, nil
}

// Connected implements Membership.
func (c *Cluster) Connected(conn net.Conn) { c.line.watch(conn) }

// GRPCDialOptions are Identity.GRPCDialOptions, for connections that are
// announced and checked as those of Dial are.
func (c *Cluster) GRPCDialOptions() []grpc.DialOption {
	return append(c.o.Identity.GRPCDialOptions(),
		grpc.WithTransportCredentials(memberCredentials{credentials.NewTLS(c.o.Identity.ClientTLS(ProtoGRPC)), c}),
		grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
			c.introduce(address)
			return dialGRPC(ctx, address)
		}))
}

// recognise returns an error unless the other side of a connection is a member, or
// gossip says so within 2 seconds: one that has just joined may be heard of from
// a tracker first.
func (c *Cluster) recognise(ctx context.Context, s tls.ConnectionState) error {
	peer := s.PeerCertificates[0]
	ctx, cancel := context.WithTimeout(ctx, admitTimeout)
	defer cancel()
	if c.Await(ctx, fingerprint(peer)) {
		return nil
	}
	return fmt.Errorf("%q: %w", peer.Subject.CommonName, errStranger)
}

// memberCredentials are TLS credentials for clients of members.
type memberCredentials struct {
	credentials.TransportCredentials
	cluster *Cluster
}

// ClientHandshake implements credentials.TransportCredentials.
func (m memberCredentials) ClientHandshake(ctx context.Context, authority string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := m.TransportCredentials.ClientHandshake(ctx, authority, raw)
	if err != nil {
		return nil, nil, err
	}
	state := info.(credentials.TLSInfo).State //nolint:errcheck // its type is that of credentials.NewTLS
	if err := m.cluster.recognise(ctx, state); err != nil {
		return nil, nil, errors.Join(fmt.Errorf("%s: %w", raw.RemoteAddr(), err), conn.Close())
	}
	m.cluster.Connected(raw)
	return conn, info, nil
}

// Clone implements credentials.TransportCredentials.
func (m memberCredentials) Clone() credentials.TransportCredentials {
	return memberCredentials{m.TransportCredentials.Clone(), m.cluster}
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

// beSlow has this node be Member.Slow for a while from now on, or for that long again.
func (c *Cluster) beSlow(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.slow = time.Now().Add(d)
}

// describe is what gossip says of this node, and whether that it is Slow is part of it.
func (c *Cluster) describe() (said []byte, slow bool, err error) {
	m := c.said
	m.Keys = c.o.Identity.creds.keys()
	c.mu.Lock()
	m.Slow = time.Now().Before(c.slow)
	c.mu.Unlock()
	said, err = m.encode()
	if err != nil && m.Slow {
		m.Slow = false // labels may leave room for two keys and no more
		said, err = m.encode()
	}
	return said, m.Slow, err
}

// follow tells the others, until ctx ends, when this node has other keys, and when it has
// become slow or is so no more.
func (c *Cluster) follow(ctx context.Context, ml *memberlist.Memberlist) {
	tick, look := time.NewTicker(c.wait.keys), time.NewTicker(lineEvery)
	defer tick.Stop()
	defer look.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-look.C:
			if !c.slowLine(time.Now(), ml) { // a tick may be old
				continue
			}
			c.beSlow(slowFor)
		case <-tick.C:
		}
		said, slow, err := c.describe()
		if err != nil {
			c.o.Log.Error("this node's key cannot be told to the others", "err", err)
			continue
		}
		if !c.restate(said, slow) {
			continue
		}
		if err := ml.UpdateNode(updateTimeout); err != nil {
			c.o.Log.Warn("gossip: news of this node are slow", "err", err)
		}
	}
}

// restate takes what is to be said of this node, and says whether that is anything new.
func (c *Cluster) restate(said []byte, slow bool) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if bytes.Equal(said, c.meta) {
		return false
	}
	c.meta = said
	self := c.members[c.self.Name]
	switch {
	case slow == self.Slow:
		c.o.Log.Info("this node has a new key: telling the others")
		return true
	case slow:
		c.o.Log.Info("this node's line is slow: others are to track blobs", "until", c.slow)
	default:
		c.o.Log.Info("this node's line has not been slow for a while: it tracks blobs again")
	}
	self.Slow = slow
	c.members[c.self.Name] = self
	c.publish()
	return true
}
