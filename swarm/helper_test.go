package swarm

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is how long a test waits for what should take a fraction of it.
const patience = 90 * time.Second

// quiet logs what went wrong, when asked to.
func quiet() *slog.Logger {
	if os.Getenv("SWARM_LOG") != "" {
		return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelInfo}))
	}
	return slog.New(slog.DiscardHandler)
}

// memory is a blob in memory, present by blocks of the size of a chunk.
type memory struct {
	mu      sync.Mutex
	bytes   []byte       // guarded by mu
	there   []bool       // guarded by mu; by block
	failing error        // guarded by mu: what writes return
	marking error        // guarded by mu: what MarkPresent returns
	reading func() error // guarded by mu: called by reads, without mu
	closed  bool         // guarded by mu: must not be used any more
	misused bool         // guarded by mu: was used after that
	marked  chan struct{}
}

func newMemory(size int) *memory {
	return &memory{bytes: make([]byte, size), there: make([]bool, (size-1)/minChunk+1), marked: make(chan struct{}, 1)}
}

// wholeMemory is a blob that is all there.
func wholeMemory(content []byte) *memory {
	m := newMemory(len(content))
	m.fill(content, 0, len(content))
	return m
}

// fill writes as the registry would, in whole blocks.
func (m *memory) fill(content []byte, off, n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	copy(m.bytes[off:off+n], content[off:off+n])
	for at := off; at < off+n; at += minChunk {
		m.there[at/minChunk] = true
	}
}

func (m *memory) used() {
	if m.closed {
		m.misused = true
	}
}

func (m *memory) ReadAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	if hook := m.reading; hook != nil {
		m.mu.Unlock()
		if err := hook(); err != nil {
			return 0, err
		}
		m.mu.Lock()
	}
	defer m.mu.Unlock()
	m.used()
	if off >= int64(len(m.bytes)) {
		return 0, io.EOF
	}
	n := copy(p, m.bytes[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (m *memory) WriteAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.used()
	if m.failing != nil {
		return 0, m.failing
	}
	if off+int64(len(p)) > int64(len(m.bytes)) {
		return 0, io.ErrShortWrite
	}
	if !m.there[int(off/minChunk)] {
		copy(m.bytes[off:], p)
	}
	return len(p), nil
}

func (m *memory) MarkPresent(off, n int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.used()
	if m.marking != nil {
		return m.marking
	}
	for at := off; at < off+n; at += minChunk {
		m.there[int(at/minChunk)] = true
	}
	select {
	case m.marked <- struct{}{}:
	default:
	}
	return nil
}

func (m *memory) Present(off, n int64) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.used()
	for at := off; at < off+n; at += minChunk {
		if !m.there[int(at/minChunk)] {
			return false
		}
	}
	return true
}

func (m *memory) equal(content []byte) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return bytes.Equal(m.bytes, content)
}

// await waits until all n bytes at off are present, for as long as more become so: how
// long all take depends on what else the machine does.
func (m *memory) await(t testing.TB, off, n int64) {
	t.Helper()
	limit := time.NewTimer(patience)
	defer limit.Stop()
	for !m.Present(off, n) {
		select {
		case <-m.marked:
			limit.Reset(patience)
		case <-limit.C:
			t.Fatalf("%d bytes at %d not there, and none became so for %v", n, off, patience)
		}
	}
}

// seal says that the memory must not be used from here on; the cleanup of
// newPeer checks it.
func (m *memory) seal() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.closed = true
}

func (m *memory) wasMisused() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.misused
}

// peer is one node's swarm.
type peer struct {
	*Swarm
	addr string
	seen *tally
	stop func()
}

// tally is a Counter.
type tally struct{ received, sent, shutOut atomic.Int64 }

func (c *tally) Received(n int) { c.received.Add(int64(n)) }
func (c *tally) Sent(n int)     { c.sent.Add(int64(n)) }
func (c *tally) ShutOut()       { c.shutOut.Add(1) }

// named is a connection that knows who is at its other end, as one with
// mutual TLS does.
type named struct {
	net.Conn
	name string
}

func (n named) PeerName() string { return n.name }

type namedListener struct {
	net.Listener
	name string
}

func (l namedListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return named{c, l.name}, nil
}

// newPeer starts a swarm that listens on loopback and ends with the test.
func newPeer(t testing.TB, change ...func(*Options)) *peer {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	o := Options{
		Listener: l, Log: quiet(),
		Dial: func(ctx context.Context, addr string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", addr)
		},
	}
	for _, f := range change {
		f(&o)
	}
	seen := &tally{}
	o.Counter = seen
	p := &peer{Swarm: New(o), addr: l.Addr().String(), seen: seen}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- p.Run(ctx) }()
	p.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(p.stop)
	return p
}

// content returns n random bytes that are the same for the same seed.
func content(n int, seed uint64) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	_, _ = r.Read(b) // never fails
	return b
}

// open opens a blob that is closed with the test, and then checks that nobody
// used its bytes after Close.
func (p *peer) open(t testing.TB, d digest.Digest, m *memory) *Blob {
	t.Helper()
	b, err := p.Open(d, int64(len(m.bytes)), m)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
		m.seal()
		p.stop()
		if m.wasMisused() {
			t.Error("bytes were used after Close")
		}
	})
	return b
}

// offerAll offers every segment and returns their piece hashes.
func offerAll(t testing.TB, b *Blob) [][]byte {
	t.Helper()
	var all [][]byte
	for i := range b.layout.Segments() {
		p, err := b.Offer(t.Context(), i, nil)
		if err != nil {
			t.Fatal(err)
		}
		if !b.Ready(i) {
			t.Errorf("segment %d is offered but not ready", i)
		}
		all = append(all, p)
	}
	return all
}

// pair is a seeder with content, and a leecher without.
func pair(t testing.TB, size int, change ...func(*Options)) (data []byte, seeder, leecher *peer, from, to *Blob, sink *memory) {
	t.Helper()
	data = content(size, 1)
	d := digest.FromBytes(data)
	seeder, leecher = newPeer(t, change...), newPeer(t, change...)
	sink = newMemory(size)
	from, to = seeder.open(t, d, wholeMemory(data)), leecher.open(t, d, sink)
	return data, seeder, leecher, from, to, sink
}

// eventually polls for what nothing announces.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	limit := time.NewTimer(patience)
	defer limit.Stop()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-limit.C:
			t.Fatalf("not after %v: %s", patience, what)
		}
	}
}

func addrs(peers ...*peer) (a []string) {
	for _, p := range peers {
		a = append(a, p.addr)
	}
	return a
}

func name(i int) string { return fmt.Sprintf("node%d", i) }
