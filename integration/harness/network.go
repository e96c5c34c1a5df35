package harness

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Network is machines and the switches between them, each a network namespace
// of its own. The namespaces have no names and nothing of them is in the
// namespace of this machine: they, their bridges and their links live as long as
// this process and the processes started in them, so that nothing can be left
// behind, whatever ends the run. To look into one: nsenter --net=/proc/PID/ns/net
// with the id of a process in it.
type Network struct {
	mu       sync.Mutex // guards what follows
	spaces   []*space
	machines int
	links    int
	hosts    []host
}

// NewNetwork returns a network without anything in it.
func NewNetwork() *Network { return &Network{} }

// Close takes the network down and ends the daemons that still run on its
// machines.
func (n *Network) Close() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, s := range n.spaces {
		s.close()
	}
	n.spaces = nil
}

// space is one network namespace, held by an OS thread that lives in it.
type space struct {
	handle *netlink.Handle
	ns     netns.NsHandle
	do     chan func()   // run on the thread
	quit   chan struct{} // closed to end the thread
	ended  chan struct{} // closed when it has ended
}

func (n *Network) newSpace() (*space, error) {
	s := &space{do: make(chan func()), quit: make(chan struct{}), ended: make(chan struct{})}
	ready := make(chan error)
	go onOwnThread(func() {
		defer close(s.ended)
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			s.ns, err = netns.Get()
		}
		ready <- err
		if err != nil {
			return
		}
		for {
			select {
			case f := <-s.do:
				f()
			case <-s.quit:
				return
			}
		}
	})
	if err := <-ready; err != nil {
		return nil, fmt.Errorf("network namespace: %w", err)
	}
	n.mu.Lock()
	n.spaces = append(n.spaces, s)
	n.mu.Unlock()
	var err error
	if s.handle, err = netlink.NewHandleAt(s.ns, unix.NETLINK_ROUTE); err != nil {
		return nil, fmt.Errorf("network namespace: %w", err)
	}
	if err := s.in(settle); err != nil {
		return nil, err
	}
	return s, s.up("lo")
}

// onOwnThread runs f on an OS thread that ends with it, so that what f does to
// the thread gets into no other hands. The main thread does not end, so it is
// not taken.
func onOwnThread(f func()) {
	runtime.LockOSThread() // and never unlocked, but below
	if unix.Gettid() != unix.Getpid() {
		f()
		return
	}
	taken := make(chan struct{})
	go func() {
		runtime.LockOSThread()
		close(taken)
		f()
	}()
	<-taken
	runtime.UnlockOSThread()
}

// settle sets what else would differ from one machine to the next, or from one
// pull to the next.
func settle() error {
	// Most machines have cubic. Where a namespace may not have it, reno, which
	// every kernel allows, comes closest: what some machines have in its place,
	// bbr, does not yield to a full queue and sends several percent twice.
	const file = "/proc/sys/net/ipv4/tcp_congestion_control"
	if os.WriteFile(file, []byte("cubic"), 0o644) != nil {
		if err := os.WriteFile(file, []byte("reno"), 0o644); err != nil {
			return fmt.Errorf("network namespace: %w", err)
		}
	}
	for path, value := range map[string]string{
		"net/ipv4/tcp_no_metrics_save":       "1", // or one pull's losses slow the next one down
		"net/ipv6/conf/all/disable_ipv6":     "1", // its chatter would be counted
		"net/ipv6/conf/default/disable_ipv6": "1",
	} {
		if err := os.WriteFile("/proc/sys/"+path, []byte(value), 0o644); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("network namespace: %w", err)
		}
	}
	return nil
}

// in runs f on the namespace's thread. Sockets that it makes, and processes that
// it starts, are of the namespace.
func (s *space) in(f func() error) error {
	done := make(chan error)
	select {
	case s.do <- func() { done <- f() }:
		return <-done
	case <-s.ended:
		return errors.New("the network has been taken down")
	}
}

func (s *space) up(name string) error {
	l, err := s.handle.LinkByName(name)
	if err == nil {
		err = s.handle.LinkSetUp(l)
	}
	if err != nil {
		return fmt.Errorf("interface %s: %w", name, err)
	}
	return nil
}

func (s *space) close() {
	close(s.quit)
	<-s.ended
	if s.handle != nil {
		s.handle.Close()
	}
	_ = s.ns.Close()
}

// Switch is a bridge.
type Switch struct {
	net   *Network
	space *space
}

const bridge = "switch"

// Switch adds a switch to the network.
func (n *Network) Switch() (*Switch, error) {
	s, err := n.newSpace()
	if err != nil {
		return nil, err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = bridge
	if err := s.handle.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
		return nil, fmt.Errorf("switch: %w", err)
	}
	return &Switch{net: n, space: s}, s.up(bridge)
}

// Machine is a host on a switch, with one NIC.
type Machine struct {
	*Link
	// IP is its address in the network.
	IP string
	// Zone is the label that its node gets; "" for none.
	Zone string

	space *space
}

// Machine adds a machine to the switch whose NIC sends and receives at most rate
// bits per second; 0 for no bound.
func (s *Switch) Machine(rate int64) (*Machine, error) {
	sp, err := s.net.newSpace()
	if err != nil {
		return nil, err
	}
	s.net.mu.Lock()
	s.net.machines++
	i := s.net.machines
	s.net.mu.Unlock()
	m := &Machine{space: sp, IP: fmt.Sprintf("10.66.%d.%d", i/250, 1+i%250)}
	if m.Link, err = s.net.link(sp, s.space, rate); err != nil {
		return nil, err
	}
	addr, err := netlink.ParseAddr(m.IP + "/16")
	if err != nil {
		return nil, fmt.Errorf("address of a machine: %w", err)
	}
	l, err := sp.handle.LinkByName(m.name)
	if err == nil {
		err = sp.handle.AddrAdd(l, addr)
	}
	if err != nil {
		return nil, fmt.Errorf("address of a machine: %w", err)
	}
	return m, s.net.introduce(host{sp, l.Attrs().Index, addr.IP, l.Attrs().HardwareAddr})
}

// host is a machine as its neighbours know it.
type host struct {
	space *space
	nic   int // index
	ip    net.IP
	mac   net.HardwareAddr
}

// introduce tells a machine and all others of each other. What they find out by
// themselves goes into the kernel's one table for all namespaces, which is full
// (net.ipv4.neigh.default.gc_thresh3, 1,024) with 33 machines; permanent entries
// are not counted.
func (n *Network) introduce(h host) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, o := range n.hosts {
		for _, pair := range [][2]host{{h, o}, {o, h}} {
			at, of := pair[0], pair[1]
			if err := at.space.handle.NeighSet(&netlink.Neigh{
				LinkIndex: at.nic, State: netlink.NUD_PERMANENT, IP: of.ip, HardwareAddr: of.mac,
			}); err != nil {
				return fmt.Errorf("neighbour of a machine: %w", err)
			}
		}
	}
	n.hosts = append(n.hosts, h)
	return nil
}

// Uplink connects the switch to another; sent and received are then as the
// first of them sees it.
func (s *Switch) Uplink(to *Switch, rate int64) (*Link, error) {
	return s.net.link(s.space, to.space, rate)
}

// Listen opens a port on the machine, for this process.
func (m *Machine) Listen(port string) (l net.Listener, err error) {
	err = m.space.in(func() (err error) {
		l, err = (&net.ListenConfig{}).Listen(context.Background(), "tcp", net.JoinHostPort(m.IP, port))
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("port of a machine: %w", err)
	}
	return l, nil
}

// dial connects from the machine; m may be nil for this process's own place.
func (m *Machine) dial(ctx context.Context, network, addr string) (conn net.Conn, err error) {
	err = m.in(func() (err error) {
		conn, err = (&net.Dialer{}).DialContext(ctx, network, addr)
		return err
	})
	return conn, err
}

// in runs f on the machine; m may be nil for this process's own place.
func (m *Machine) in(f func() error) error {
	if m == nil {
		return f()
	}
	return m.space.in(f)
}

// Link is a cable between a machine and its switch, or between two switches.
type Link struct {
	name string // of both ends
	ends [2]*space
}

// Traffic is what has passed a link, in bytes of TCP's payload: what the
// kernel counts for the interface, less the headers of the packets.
type Traffic struct{ Sent, Received int64 }

// Sub returns the traffic since an earlier one.
func (t Traffic) Sub(earlier Traffic) Traffic {
	return Traffic{Sent: t.Sent - earlier.Sent, Received: t.Received - earlier.Received}
}

// Cut takes the link down until Mend: neither end hears of the other, and no
// connection is told so.
func (l *Link) Cut() error { return l.set((*netlink.Handle).LinkSetDown) }

// Mend takes the link up again.
func (l *Link) Mend() error { return l.set((*netlink.Handle).LinkSetUp) }

// set changes the link's far end, the switch's: a machine whose own end goes down
// would forget its routes.
func (l *Link) set(change func(*netlink.Handle, netlink.Link) error) error {
	h := l.ends[1].handle
	nic, err := h.LinkByName(l.name)
	if err == nil {
		err = change(h, nic)
	}
	if err != nil {
		return fmt.Errorf("link: %w", err)
	}
	return nil
}

// Drop has the machine lose so many percent of the packets that come from the
// given addresses, from anywhere if there are none; 0 percent ends it. It needs
// nft (.ci/need nft).
func (m *Machine) Drop(ctx context.Context, percent int, from ...string) error {
	rules := "table ip faults\ndelete table ip faults\n"
	if percent > 0 {
		match := ""
		if len(from) > 0 {
			match = "ip saddr { " + strings.Join(from, ", ") + " } "
		}
		if percent < 100 {
			match += fmt.Sprintf("numgen random mod 100 < %d ", percent)
		}
		rules += "table ip faults {\n chain input {\n type filter hook input priority 0\n " + match + "drop\n }\n}\n"
	}
	if _, err := runOn(ctx, m, strings.NewReader(rules), nil, "nft", "-f", "-"); err != nil {
		return fmt.Errorf("losing packets: %w", err)
	}
	return nil
}

// headers are the bytes of a packet that are Ethernet's (14), IPv4's (20) and
// TCP's with its timestamp (32). The kernel counts a large packet, which a real
// NIC would cut, once.
const headers = 66

// link connects two namespaces by a pair of interfaces; those of switches become
// ports of the bridge.
func (n *Network) link(a, b *space, rate int64) (*Link, error) {
	n.mu.Lock()
	n.links++
	l := &Link{name: fmt.Sprintf("nic%d", n.links), ends: [2]*space{a, b}}
	n.mu.Unlock()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = l.name
	veth := netlink.NewVeth(attrs)
	veth.PeerName, veth.PeerNamespace = l.name, netlink.NsFd(int(b.ns))
	if err := a.handle.LinkAdd(veth); err != nil {
		return nil, fmt.Errorf("link: %w", err)
	}
	for _, s := range l.ends {
		if err := s.plug(l.name); err != nil {
			return nil, err
		}
	}
	return l, l.SetRate(rate)
}

// plug makes an interface a port of the namespace's bridge, if there is one,
// and sets it up.
func (s *space) plug(name string) error {
	if br, err := s.handle.LinkByName(bridge); err == nil {
		port, err := s.handle.LinkByName(name)
		if err == nil {
			err = s.handle.LinkSetMaster(port, br)
		}
		if err != nil {
			return fmt.Errorf("port of a switch: %w", err)
		}
	}
	return s.up(name)
}

// SetRate bounds the link in either direction, each for itself, to rate bits
// per second; 0 for no bound.
func (l *Link) SetRate(rate int64) error {
	for _, s := range l.ends {
		nic, err := s.handle.LinkByName(l.name)
		if err == nil {
			err = s.shape(nic, uint64(rate)/8)
		}
		if errors.Is(err, unix.ENOENT) {
			err = fmt.Errorf("%w: the kernel may lack sch_tbf", err)
		}
		if err != nil {
			return fmt.Errorf("rate of a link: %w", err)
		}
	}
	return nil
}

const (
	// burst is the depth of the bucket. Less than the kernel's largest packet
	// (64 KiB before a NIC would cut it), and it cuts all of them in software.
	burst = 128 << 10
	// queue is how long a packet may wait in front of the link, as a fraction of
	// a second, and leastQueue the bytes that may wait in any case.
	queue      = 20
	leastQueue = 512 << 10
)

// shape bounds what leaves by an interface to rate bytes per second.
func (s *space) shape(nic netlink.Link, rate uint64) error {
	attrs := netlink.QdiscAttrs{LinkIndex: nic.Attrs().Index, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT}
	if rate == 0 {
		err := s.handle.QdiscDel(&netlink.Tbf{QdiscAttrs: attrs})
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL) {
			return nil // there was none
		}
		return err
	}
	return s.handle.QdiscReplace(&netlink.Tbf{
		QdiscAttrs: attrs, Rate: rate,
		Limit:  uint32(max(rate/queue, leastQueue)),
		Buffer: netlink.Xmittime(rate, burst),
	})
}

// Traffic returns what the link's first end, a machine's, has sent and received
// since it exists.
func (l *Link) Traffic() (Traffic, error) {
	nic, err := l.ends[0].handle.LinkByName(l.name)
	if err != nil {
		return Traffic{}, fmt.Errorf("counters of a link: %w", err)
	}
	c := nic.Attrs().Statistics
	if c == nil {
		return Traffic{}, fmt.Errorf("counters of a link: %w", errors.ErrUnsupported)
	}
	return Traffic{
		Sent:     int64(c.TxBytes) - headers*int64(c.TxPackets),
		Received: int64(c.RxBytes) - headers*int64(c.RxPackets),
	}, nil
}
