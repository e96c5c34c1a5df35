package cluster

import (
	"context"
	"fmt"
	"log"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/memberlist"
)

// BenchmarkCrowd is several hundred members in this process that start within
// a few seconds and know one of them. It reports how long after the last start
// all know all, and what gossip costs each at rest. It takes minutes.
//
// All of them share these processors, and where those do not keep up members
// are taken for dead. So all clocks go slower than a node's, by slow, and what
// is reported is in the nodes' time.
func BenchmarkCrowd(b *testing.B) {
	for _, n := range []int{100, 200, 500} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			for b.Loop() {
				measureCrowd(b, n)
			}
		})
	}
}

// slow is how much slower than a node's the members' clocks go.
const slow = 5

// What is counted beside the bytes of a packet: its UDP and IP head.
const packetHead = 28

func measureCrowd(b *testing.B, n int) {
	key := GenerateKey()
	ctx, cancel := context.WithCancel(b.Context())
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()
	var sent atomic.Int64
	crowd := make([]*Cluster, n)
	join := ""
	cpu := processorTime(b)
	for i := range crowd {
		name := fmt.Sprintf("node-%05d.cluster.local", i)
		id, err := LoadIdentity(IdentityOptions{ClusterKey: key, NodeName: name, Log: silent})
		if err != nil {
			b.Fatal(err)
		}
		o := Options{
			Identity: id, Name: name, BindAddr: "127.0.0.1:0", DataAddress: "127.0.0.1:7947",
			Labels: map[string]string{"zone": "eu-central-1a"}, Log: silent,
		}
		if join != "" {
			o.Join = []string{join}
		}
		c, err := New(o)
		if err != nil {
			b.Fatal(err)
		}
		c.tune = func(cfg *memberlist.Config) {
			for _, d := range []*time.Duration{
				&cfg.GossipInterval, &cfg.ProbeInterval, &cfg.ProbeTimeout, &cfg.PushPullInterval, &cfg.TCPTimeout,
			} {
				*d *= slow
			}
			count(b, cfg, &sent)
		}
		c.wait = waits{first: slow * c.wait.first, alone: slow * c.wait.alone, most: slow * c.wait.most, keys: slow * c.wait.keys}
		crowd[i] = c
		running.Go(func() {
			if err := c.Run(ctx); err != nil {
				b.Error(err)
			}
		})
		if i == 0 {
			join = awaitGossip(c).String()
		}
		time.Sleep(10 * slow * time.Millisecond)
	}
	began := time.Now()
	for _, c := range crowd {
		awaitCount(b, c, n)
	}
	b.ReportMetric(time.Since(began).Seconds()/slow, "s-to-all")
	b.ReportMetric((processorTime(b)-cpu).Seconds()/float64(n), "cpu-s-to-all/member")
	b.ReportMetric(float64(sent.Load())/float64(n)/1e3, "kB-to-all/member")

	time.Sleep(6 * slow * time.Second) // news dies down
	const rest = 30 * time.Second
	before, cpu := sent.Load(), processorTime(b)
	time.Sleep(slow * rest)
	perSecond := 1 / rest.Seconds() / float64(n)
	b.ReportMetric(float64(sent.Load()-before)*perSecond, "B/s/member")
	b.ReportMetric((processorTime(b)-cpu).Seconds()*100*perSecond, "%core/member")
	b.ReportMetric(0, "ns/op")
	for _, c := range crowd {
		if got := c.count(); got != n {
			b.Errorf("%s knows %d of %d", c.Self().Name, got, n)
		}
	}
}

func awaitGossip(c *Cluster) net.Addr {
	for {
		changed := c.Changed()
		c.mu.Lock()
		at := c.gossip[c.self.Name]
		c.mu.Unlock()
		if at.IsValid() {
			return net.UDPAddrFromAddrPort(at)
		}
		<-changed
	}
}

func awaitCount(b *testing.B, c *Cluster, n int) {
	limit := time.After(5 * time.Minute)
	for {
		changed := c.Changed()
		if c.count() == n {
			return
		}
		select {
		case <-changed:
		case <-limit:
			b.Fatalf("%s knows %d of %d", c.Self().Name, len(c.Members()), n)
		}
	}
}

func processorTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// counted is a transport that counts what is sent: packets, and both
// directions of the connections that it made.
type counted struct {
	*memberlist.NetTransport
	sent *atomic.Int64
}

func count(b *testing.B, cfg *memberlist.Config, sent *atomic.Int64) {
	t, err := memberlist.NewNetTransport(&memberlist.NetTransportConfig{
		BindAddrs: []string{cfg.BindAddr}, BindPort: cfg.BindPort, Logger: log.New(discard{}, "", 0),
	})
	if err != nil {
		b.Error(err)
		return
	}
	cfg.BindPort = t.GetAutoBindPort()
	cfg.AdvertisePort = cfg.BindPort
	cfg.Transport = &counted{t, sent}
}

func (c *counted) WriteTo(p []byte, addr string) (time.Time, error) {
	c.sent.Add(int64(len(p)) + packetHead)
	return c.NetTransport.WriteTo(p, addr)
}

func (c *counted) WriteToAddress(p []byte, addr memberlist.Address) (time.Time, error) {
	return c.WriteTo(p, addr.Addr)
}

func (c *counted) DialTimeout(addr string, timeout time.Duration) (net.Conn, error) {
	conn, err := c.NetTransport.DialTimeout(addr, timeout)
	if err != nil {
		return nil, err
	}
	return countedConn{conn, c.sent}, nil
}

func (c *counted) DialAddressTimeout(addr memberlist.Address, timeout time.Duration) (net.Conn, error) {
	return c.DialTimeout(addr.Addr, timeout)
}

type countedConn struct {
	net.Conn
	sent *atomic.Int64
}

func (c countedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.sent.Add(int64(n))
	return n, err
}

func (c countedConn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.sent.Add(int64(n))
	return n, err
}
