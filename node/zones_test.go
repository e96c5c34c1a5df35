package node

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	apiv1 "github.com/imagewolf/imagewolf/api/v1"
	"github.com/imagewolf/imagewolf/cluster"
	"github.com/imagewolf/imagewolf/swarm"
	"github.com/imagewolf/imagewolf/tracker"
)

// unit is a piece of the smallest blobs.
const unit = 256 << 10

// memoryBlob is a blob in memory, present by units.
type memoryBlob struct {
	mu    sync.Mutex
	bytes []byte // guarded by mu
	there []bool // guarded by mu: by unit
	full  bool   // nothing can be written; set before it is used
}

func (m *memoryBlob) ReadAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return bytes.NewReader(m.bytes).ReadAt(p, off)
}

func (m *memoryBlob) WriteAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.full {
		return 0, syscall.ENOSPC
	}
	return copy(m.bytes[off:], p), nil
}

func (m *memoryBlob) MarkPresent(off, n int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for at := off; at < off+n; at += unit {
		m.there[at/unit] = true
	}
	return nil
}

func (m *memoryBlob) Present(off, n int64) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	for at := off; at < off+n; at += unit {
		if !m.there[at/unit] {
			return false
		}
	}
	return true
}

// zoned is the members of one blob: real swarms of this process, and the
// tracker's decisions.
type zoned struct {
	t       *testing.T
	layout  swarm.Layout
	machine *tracker.Machine
	peers   []*zonedPeer
	byName  map[string]*zonedPeer
	byAddr  map[string]*zonedPeer
	started time.Time
}

// now is the machine's time, which goes by thirty times slower: on a busy machine
// nobody is to be given more peers because it seems to stand still.
func (z *zoned) now() time.Time { return z.started.Add(time.Since(z.started) / 30) }

type zonedPeer struct {
	name, zone, addr string
	blob             *swarm.Blob
	data             *memoryBlob
	pieces           map[int][]byte
	told             map[int]bool
}

// everyone is a membership of all who have a certificate of the cluster.
type everyone struct{}

func (everyone) Admits(string) bool                 { return true }
func (everyone) Await(context.Context, string) bool { return true }
func (everyone) Connected(net.Conn)                 {}

func newZoned(t *testing.T, content []byte, members, zones int) *zoned {
	z := &zoned{t: t, layout: swarm.LayoutOf(int64(len(content))), byName: map[string]*zonedPeer{}, byAddr: map[string]*zonedPeer{}, started: time.Now()}
	d := digest.FromBytes(content)
	z.machine = tracker.NewMachine(d, int64(len(content)), tracker.MachineOptions{Layout: func(int64) tracker.Layout {
		return tracker.Layout{Segments: z.layout.Segments(), SegmentSize: z.layout.SegmentSize, Pieces: z.layout.Pieces}
	}})
	key, log := cluster.GenerateKey(), slog.New(slog.DiscardHandler)
	for i := range members {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		name := fmt.Sprint("n", i)
		id, err := cluster.LoadIdentity(cluster.IdentityOptions{ClusterKey: key, NodeName: name})
		if err != nil {
			t.Fatal(err)
		}
		port := cluster.NewDataPort(l, id, everyone{}, log)
		s := swarm.New(swarm.Options{
			Listener: port.BitTorrent(), Log: log, UploadLimit: 20e6,
			Dial: func(ctx context.Context, addr string) (net.Conn, error) {
				return id.Dial(ctx, addr, cluster.ProtoBitTorrent)
			},
		})
		running, cancel := context.WithCancel(context.Background())
		g, ctx := errgroup.WithContext(running)
		g.Go(func() error { return port.Run(ctx) })
		g.Go(func() error { return s.Run(ctx) })
		t.Cleanup(func() {
			cancel()
			if err := g.Wait(); err != nil {
				t.Error(err)
			}
		})
		p := &zonedPeer{
			name: name, zone: fmt.Sprint("z", i%zones), addr: l.Addr().String(),
			data:   &memoryBlob{bytes: make([]byte, len(content)), there: make([]bool, len(content)/unit)},
			pieces: map[int][]byte{}, told: map[int]bool{},
		}
		if p.blob, err = s.Open(d, int64(len(content)), p.data); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := p.blob.Close(); err != nil {
				t.Error(err)
			}
		})
		z.peers, z.byName[p.name], z.byAddr[p.addr] = append(z.peers, p), p, p
	}
	return z
}

// do has the members do what the machine says.
func (z *zoned) do(out []tracker.Command) {
	for _, c := range out {
		m := c.Msg.GetSegment()
		if m == nil {
			continue
		}
		p, i := z.byName[c.To], int(m.GetSegment())
		if len(m.GetPieces()) > 0 {
			p.pieces[i] = m.GetPieces()
		}
		var addrs []string
		for _, a := range m.GetPeers() {
			addrs = append(addrs, a.GetAddress())
		}
		if err := p.blob.Leech(i, p.pieces[i], addrs); err != nil {
			z.t.Fatal(err)
		}
	}
}

// look announces what has become whole, and reports whether p has it all.
func (z *zoned) look(p *zonedPeer) bool {
	present := int64(0)
	for i := range z.layout.Segments() {
		off, n := z.layout.Segment(i)
		if !p.told[i] && p.data.Present(off, n) {
			pieces, err := p.blob.Offer(z.t.Context(), i, p.pieces[i])
			if err != nil {
				z.t.Fatal(err)
			}
			p.told[i] = true
			z.do(z.machine.Message(z.now(), p.name, &apiv1.MemberMessage{Message: &apiv1.MemberMessage_Announce{
				Announce: &apiv1.Announce{Segment: uint32(i), Pieces: pieces},
			}}))
		}
		if p.told[i] {
			present += n
		}
	}
	whole := present == z.layout.Size
	z.do(z.machine.Message(z.now(), p.name, &apiv1.MemberMessage{Message: &apiv1.MemberMessage_Status{
		Status: &apiv1.Status{Present: present, Whole: whole, CanFetch: !whole && p != z.peers[0], Fetching: !whole && p == z.peers[0]},
	}}))
	return whole
}

// Real peers in three zones, told what to do by the tracker: each byte goes
// from zone to zone twice and not more often.
func TestBytesCrossIntoAZoneOnce(t *testing.T) {
	content := make([]byte, 20<<20)
	if _, err := rand.Read(content); err != nil {
		t.Fatal(err)
	}
	z := newZoned(t, content, 12, 3)
	for k, p := range z.peers {
		out, err := z.machine.Join(z.now(), &apiv1.Hello{
			Size: int64(len(content)), Self: &apiv1.Peer{Name: p.name, Address: p.addr}, Zone: p.zone,
			Status: &apiv1.Status{CanFetch: k > 0, Fetching: k == 0},
		})
		if err != nil {
			t.Fatal(err)
		}
		z.do(out)
	}
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	limit := time.After(3 * time.Minute) // where there is much other work
	fetched := 0
	for done := false; !done; {
		select {
		case <-tick.C:
		case <-limit:
			t.Fatal("not all members have the blob after three minutes")
		}
		if fetched < z.layout.Segments() { // the registry is fast
			off, n := z.layout.Segment(fetched)
			if _, err := z.peers[0].data.WriteAt(content[off:off+n], off); err != nil {
				t.Fatal(err)
			}
			if err := z.peers[0].data.MarkPresent(off, n); err != nil {
				t.Fatal(err)
			}
			fetched++
		}
		done = true
		for _, p := range z.peers {
			done = z.look(p) && done
		}
		if next := z.machine.Next(); !next.IsZero() && !z.now().Before(next) {
			z.do(z.machine.Tick(z.now()))
		}
	}
	var crossed, near int64
	for _, p := range z.peers {
		for addr, n := range p.blob.Stats().Sources {
			from := cmp.Or(z.byAddr[addr], z.byName[addr])
			if from.zone == p.zone {
				near += n
			} else {
				crossed += n
			}
		}
		if !bytes.Equal(p.data.bytes, content) {
			t.Errorf("%s has other bytes", p.name)
		}
	}
	copies := float64(crossed) / float64(len(content))
	t.Logf("%.2f copies between zones, %.2f within", copies, float64(near)/float64(len(content)))
	if copies < 1.9 || copies > 2*1.05 {
		t.Errorf("%.2f copies between zones", copies)
	}
}
