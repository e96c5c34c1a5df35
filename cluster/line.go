package cluster

import (
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"
)

const (
	// lineEvery is how often the connections to other members are looked at.
	lineEvery = 500 * time.Millisecond
	// lateAfter is how long what is sent goes unconfirmed where the line is slow: no line
	// is so long, and a queue that is holds all news up. It is two looks, of which neither
	// comes at its very moment.
	lateAfter = 2*lineEvery - lineEvery/5
	// latePeers is with how many others it must be so for the line to be this node's, and
	// not theirs.
	latePeers = 2
	// linePings is how many others are asked, if there are so many, whether it is: some may
	// be gone, and nobody knows yet.
	linePings = 5
	// slowFor is how long a node whose line was slow leaves tracking to others: who has
	// joined a blob is not to wait for what waits in front of that line.
	slowFor = 5 * time.Minute
)

// line finds out whether this node's line is so slow that what is said over it comes
// seconds late. It is safe for concurrent use.
type line struct {
	mu     sync.Mutex
	conns  []*lineConn // guarded by mu
	looked time.Time   // guarded by mu; when they were last looked at
}

// lineConn is a connection to another member.
type lineConn struct {
	peer   string // its host: what is there is on one line
	socket socket
	until  uint64    // how many bytes had been sent at since, if not all of them are known to have come there; else zero
	since  time.Time // when the connection was looked at
}

// socket is what the kernel knows of a TCP connection.
type socket interface {
	// count returns the bytes that were sent, and how many of them are confirmed; false
	// once it is closed.
	count() (sent, confirmed uint64, ok bool)
}

// watch has a connection looked at for as long as it is open.
func (l *line) watch(conn net.Conn) {
	s, ok := socketOf(conn)
	if !ok {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.conns = append(l.conns, &lineConn{peer: hostOf(conn), socket: s})
}

// late looks at all connections and returns the hosts of those that have not confirmed
// for long what was sent to them. It is to be called every lineEvery.
func (l *line) late(now time.Time) []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	// Where this process stood still, what was confirmed meanwhile may have been in time.
	awake := now.Sub(l.looked) < 3*lineEvery
	l.looked = now
	open, late := l.conns[:0], []string(nil)
	for _, c := range l.conns {
		sent, confirmed, ok := c.socket.count()
		if !ok {
			continue
		}
		open = append(open, c)
		if !awake || c.until <= confirmed {
			c.until = 0
		}
		switch {
		case c.until == 0 && sent > confirmed:
			c.until, c.since = sent, now
		case c.until > 0 && now.Sub(c.since) >= lateAfter && !slices.Contains(late, c.peer):
			late = append(late, c.peer)
		}
	}
	clear(l.conns[len(open):])
	l.conns = open
	return late
}

// slowLine looks at the connections to other members, and says whether this node's line is
// slow, or has been cut: several do not confirm what was sent to them, nor do others
// answer a ping. It is to be called every lineEvery, and waits for the pings.
func (c *Cluster) slowLine(now time.Time, ml *memberlist.Memberlist) bool {
	asked := c.toAsk(c.line.late(now))
	answers := make(chan bool, len(asked))
	for _, m := range asked {
		go func() {
			answered := false
			defer func() { answers <- answered }()
			c.o.Contain(func() {
				_, err := ml.Ping(m.name, net.UDPAddrFromAddrPort(m.gossip))
				answered = err == nil
			})
		}()
	}
	slow := len(asked) > 0
	for range asked {
		if <-answers {
			slow = false
		}
	}
	return slow
}

// witness is a member that is asked whether this node's line is slow.
type witness struct {
	name   string
	gossip netip.AddrPort
	late   bool
}

// toAsk returns which members are to be asked whether the line is slow, at random and if
// possible none that is late; none if those at the hosts that are late are too few.
func (c *Cluster) toAsk(late []string) []witness {
	if len(late) < latePeers {
		return nil
	}
	var all []witness
	hosts := map[netip.Addr]bool{}
	c.mu.Lock()
	for name, at := range c.gossip {
		if name == c.self.Name {
			continue
		}
		data, _, _ := net.SplitHostPort(c.members[name].Address) // New and decodeMeta have checked it
		is := slices.Contains(late, at.Addr().String()) || slices.Contains(late, data)
		if is {
			hosts[at.Addr()] = true
		}
		all = append(all, witness{name, at, is})
	}
	c.mu.Unlock()
	if len(hosts) < latePeers {
		return nil
	}
	rand.Shuffle(len(all), func(i, k int) { all[i], all[k] = all[k], all[i] })
	slices.SortStableFunc(all, func(a, b witness) int { return compareTrue(a.late, b.late) })
	return all[:min(len(all), linePings)]
}
