package node

import (
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
)

const (
	// handedOn is how much of a blob containerd and its clients read from a registry
	// before they hand it on (content.Copy's buffer). On a slow line nothing is seen
	// of a fetch for as long as that takes.
	handedOn = 1 << 20
	// inflowSlack is how much more may have come in: headers, TLS, what lies in buffers.
	inflowSlack = 256 << 10
	// quietFor is how long a fetch brings nothing before its connections are looked at.
	quietFor = 500 * time.Millisecond
	// sampleEvery is the least time between two looks at them.
	sampleEvery = 500 * time.Millisecond
	// aWhile is how long a fetch may be slower than any that is worth waiting for: other
	// blobs may have the line for themselves at first.
	aWhile = 5 * time.Second
	// lookAgain is after which time a look that failed is tried again.
	lookAgain = 10 * sampleEvery
	// inflowLately is within which time bytes must have come in, and inflowLeast how
	// many: more than what keeps a connection alive.
	inflowLately = 2 * time.Second
	inflowLeast  = 4 << 10
	// flowSpan is over how much time it is measured how much comes in now.
	flowSpan = 2 * time.Second
	// mostApart is how far apart looks may be for that: after each lump that is handed on
	// there is none for quietFor.
	mostApart = 1500 * time.Millisecond
	// inflowSpan is how long looks are kept.
	inflowSpan = time.Minute
	// maxConnections is with how many connections of other processes the node does
	// without the look: it would take too long.
	maxConnections = 4096
)

// inflow tells a fetch whose registry is slow from one whose registry is silent,
// while neither has handed on a byte: by what the kernel says that the TCP
// connections of other processes here have received. Which of them is containerd's
// is not known, and need not be: one that has had more than the fetches together can
// be waiting for is somebody else's. It is safe for concurrent use.
type inflow struct {
	log         *slog.Logger
	connections func() (map[uint32]uint64, error) // bytes received, by socket

	mu      sync.Mutex
	samples []sample  // guarded by mu; oldest first
	failed  time.Time // guarded by mu; when it could not be known; zero: it could
}

type sample struct {
	at       time.Time
	received map[uint32]uint64
	come     uint64 // bytes on all connections since the sample before; 0 of the first
}

func newInflow(log *slog.Logger) *inflow { return &inflow{log: log, connections: connectionsOfOthers} }

// receiving says whether a fetch that has brought nothing since a moment is taken to
// be receiving bytes, and enough of them: what is handed on at a time must come within
// the wait that others are ready for. fetches is how many blobs are being fetched
// here, this one among them. It is false where that cannot be known.
func (f *inflow) receiving(now, since time.Time, fetches int, wait time.Duration) bool {
	if now.Sub(since) < quietFor {
		return false
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.look(now)
	if len(f.samples) == 0 {
		return false
	}
	last, before, base := f.samples[len(f.samples)-1], sample{}, f.samples[0]
	for _, s := range f.samples {
		if before.received == nil && now.Sub(s.at) <= inflowLately {
			before = s
		}
		if !s.at.After(since) {
			base = s
		}
	}
	least, limit := uint64(0), uint64(fetches)*handedOn+inflowSlack
	if quiet := min(now.Sub(since), inflowSpan); quiet >= aWhile && wait > 0 {
		least = uint64(handedOn * quiet.Seconds() / wait.Seconds())
	}
	for socket, n := range last.received {
		had, known := before.received[socket]
		come := n - min(base.received[socket], n)
		if known && n >= had+inflowLeast && come >= least && come < limit {
			return true
		}
	}
	return false
}

// rate returns the bytes per second that the TCP connections of other processes have
// received within the flowSpan up to the last look; 0 where that is not known, since
// there were no looks or they are not of now, or too far apart.
func (f *inflow) rate(now time.Time) float64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	last := len(f.samples) - 1
	if last < 0 || now.Sub(f.samples[last].at) > mostApart {
		return 0
	}
	var come uint64
	k := last
	for ; k > 0 && f.samples[last].at.Sub(f.samples[k].at) < flowSpan; k-- {
		if f.samples[k].at.Sub(f.samples[k-1].at) > mostApart {
			return 0
		}
		come += f.samples[k].come
	}
	if span := f.samples[last].at.Sub(f.samples[k].at); span >= flowSpan {
		return float64(come) / span.Seconds()
	}
	return 0
}

// look takes a sample if one is due. mu must be held.
func (f *inflow) look(now time.Time) {
	if n := len(f.samples); n > 0 && now.Sub(f.samples[n-1].at) < sampleEvery {
		return
	}
	if !f.failed.IsZero() && now.Sub(f.failed) < lookAgain { // it may be many connections, and a look at them costs
		return
	}
	received, err := f.connections()
	if err != nil {
		if f.failed.IsZero() {
			f.log.Info("whether a slow registry sends anything is not known: a second node is sent to it sooner", "err", err)
		}
		f.samples, f.failed = nil, now
		return
	}
	f.failed = time.Time{}
	s := sample{at: now, received: received}
	if len(f.samples) > 0 {
		before := f.samples[len(f.samples)-1].received
		for socket, n := range received {
			s.come += n - min(before[socket], n)
		}
	}
	f.samples = append(f.samples, s)
	for now.Sub(f.samples[0].at) > inflowSpan {
		f.samples = f.samples[1:]
	}
}

// connectionsOfOthers returns what the TCP connections of other processes in this
// network namespace have received, in bytes, by the socket's inode (sock_diag(7)).
func connectionsOfOthers() (map[uint32]uint64, error) {
	own, err := ownSockets()
	if err != nil {
		return nil, err
	}
	out := map[uint32]uint64{}
	for _, family := range []uint8{syscall.AF_INET, syscall.AF_INET6} {
		list, err := netlink.SocketDiagTCPInfo(family)
		if err != nil {
			return nil, fmt.Errorf("TCP connections: %w", err)
		}
		for _, c := range list {
			if c.TCPInfo == nil || c.TCPInfo.State != netlink.TCP_ESTABLISHED || own[c.InetDiagMsg.INode] {
				continue
			}
			if len(out) == maxConnections {
				return nil, fmt.Errorf("more than %d TCP connections", maxConnections)
			}
			out[c.InetDiagMsg.INode] = c.TCPInfo.Bytes_received
		}
	}
	return out, nil
}

// ownSockets returns the inodes of this process' sockets.
func ownSockets() (map[uint32]bool, error) {
	const fds = "/proc/self/fd"
	entries, err := os.ReadDir(fds)
	if err != nil {
		return nil, err
	}
	out := map[uint32]bool{}
	for _, e := range entries {
		to, err := os.Readlink(fds + "/" + e.Name())
		if err != nil {
			continue // closed meanwhile
		}
		inode, ok := strings.CutPrefix(to, "socket:[")
		if !ok {
			continue
		}
		if n, err := strconv.ParseUint(strings.TrimSuffix(inode, "]"), 10, 32); err == nil {
			out[uint32(n)] = true
		}
	}
	return out, nil
}
