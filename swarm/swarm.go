// Package swarm moves blobs between the nodes of a cluster over BitTorrent: it
// cuts a blob into segments, each a torrent of its own, offers those that are
// here and downloads the others from the peers it is told about, straight from
// and into the blob's own file.
//
// It does not decide who downloads what from whom, does not look for peers,
// does not know whether a blob's bytes have the right digest (piece hashes
// only sort good pieces from bad), and stores nothing. It is the only importer
// of the torrent library.
package swarm

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/anacrolix/torrent"
	"github.com/anacrolix/torrent/metainfo"
	"github.com/anacrolix/torrent/mse"
	pp "github.com/anacrolix/torrent/peer_protocol"
	"github.com/anacrolix/torrent/storage"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/time/rate"
)

const (
	// maxRequests is how many chunks of one connection are on their way at most.
	// Whatever is asked of a second peer, because it is faster, comes twice if
	// the first has sent it already: at slow links a tenth of all bytes, without
	// this bound. Several segments are under way at once, so that it costs no
	// speed.
	maxRequests = 4
	// keepAlive is how often an idle connection's writer looks for work. The
	// client loses a wake-up now and then, and until this fires the transfer
	// stands still.
	keepAlive = 250 * time.Millisecond
	// connsPerTorrent bounds the established connections of one segment.
	connsPerTorrent = 16
	// uploadBuffer bounds the bytes read ahead for one connection.
	uploadBuffer = 64 << 10
	// handshakeTimeout and dialTimeout bound one attempt to connect.
	handshakeTimeout = 5 * time.Second
	dialTimeout      = 3 * time.Second
	// startWait is how long Open waits for Run to be up.
	startWait = 5 * time.Second
	// pace is how often peers are handed in again and bans are collected.
	pace = 250 * time.Millisecond
)

// Options configure a Swarm.
type Options struct {
	// Listener is where peers connect, already authenticated. Run closes it.
	Listener net.Listener
	// Dial connects to a peer, given as host:port, and authenticates it. The
	// connection it returns, and those of Listener, may have a method
	// PeerName() string, or be a *tls.Conn whose handshake is done: then peers
	// that connect are recognized as those that were dialed.
	Dial func(ctx context.Context, addr string) (net.Conn, error)
	// UploadLimit and DownloadLimit are in bytes per second over all blobs, as
	// they go over the wire; 0 or less is no limit.
	UploadLimit, DownloadLimit int64
	// Log takes what an operator should know. Required.
	Log *slog.Logger
	// Counter hears what is to be counted; nil: nobody does.
	Counter Counter
	// Contain runs what a goroutine of the swarm, not of the torrent library, does, and keeps its panic from ending the
	// process; nil: nothing does.
	Contain func(f func())
}

// Counter hears what an operator counts. Its methods are called with locks held,
// from any goroutine, and must return at once.
type Counter interface {
	// Received counts bytes of a blob that came from a peer and were wanted.
	Received(n int)
	// Sent counts bytes of a blob that were read for a peer.
	Sent(n int)
	// ShutOut counts a peer that sent a bad piece and was banned from its blob.
	ShutOut()
}

// noCounter is a Counter for those who have none.
type noCounter struct{}

func (noCounter) Received(int) {}
func (noCounter) Sent(int)     {}
func (noCounter) ShutOut()     {}

// Swarm is this node's part in the swarms of all blobs. Its methods may be
// called at any time from any goroutine.
type Swarm struct {
	opts             Options
	upload, download *rate.Limiter
	ctx              context.Context // ends when Run is told to
	cancel           context.CancelFunc
	up               chan struct{} // closed when client is set
	running          atomic.Bool
	client           *torrent.Client // set before up is closed

	segments sync.Map       // metainfo.Hash -> *segment, of all torrents
	incoming chan *conn     // peer connections for the client to accept
	work     sync.WaitGroup // what spawn runs; Add under mu
	lastFace atomic.Uint64

	// mu is taken last: with it held neither the client nor a blob is called.
	mu          sync.Mutex
	stopping    bool                    // guarded by mu
	ended       bool                    // guarded by mu; work is waited for
	blobs       map[digest.Digest]*Blob // guarded by mu
	faces       map[string]*face        // guarded by mu; by IP address as text
	names       map[string]string       // guarded by mu; address by peer name
	conns       map[*conn]struct{}      // guarded by mu
	unreachable map[string]unreachable  // guarded by mu
	trunks      map[string]*trunk       // guarded by mu; those that this node has dialed, by address
	accepted    map[*trunk]struct{}     // guarded by mu; those that others have
}

// New returns a Swarm that does nothing until Run is called.
func New(o Options) *Swarm {
	if o.Counter == nil {
		o.Counter = noCounter{}
	}
	if o.Contain == nil {
		o.Contain = func(f func()) { f() }
	}
	s := &Swarm{
		opts: o, upload: newLimiter(o.UploadLimit), download: newLimiter(o.DownloadLimit),
		up:          make(chan struct{}),
		incoming:    make(chan *conn),
		blobs:       map[digest.Digest]*Blob{},
		faces:       map[string]*face{},
		names:       map[string]string{},
		conns:       map[*conn]struct{}{},
		unreachable: map[string]unreachable{},
		trunks:      map[string]*trunk{},
		accepted:    map[*trunk]struct{}{},
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s
}

// Run takes part in swarms until ctx ends, which is no error. It then closes
// the blobs that are still open, all connections and the listener. A Swarm
// runs once.
func (s *Swarm) Run(ctx context.Context) error {
	if !s.running.CompareAndSwap(false, true) {
		return fmt.Errorf("swarm runs, or ran, already: %w", errdefs.ErrFailedPrecondition)
	}
	defer s.cancel()
	client, err := torrent.NewClient(s.clientConfig())
	if err != nil {
		return errors.Join(fmt.Errorf("start torrent client: %w", err), s.opts.Listener.Close())
	}
	client.AddDialer(dialer{s})
	client.AddListener(listener{s.opts.Listener, s})
	s.client = client
	s.spawn(s.acceptTrunks)
	close(s.up)

	tick := time.NewTicker(pace)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return s.stop()
		case now := <-tick.C:
			s.sweepFaces(client.BadPeerIPs())
			s.sweepTrunks(now)
		}
	}
}

// stop undoes Run.
func (s *Swarm) stop() error {
	s.mu.Lock()
	s.stopping = true
	var blobs []*Blob
	for _, b := range s.blobs {
		blobs = append(blobs, b)
	}
	s.mu.Unlock()
	var errs []error
	for _, b := range blobs {
		errs = append(errs, b.Close())
	}
	s.cancel()
	errs = append(errs, s.client.Close()...)
	if err := s.opts.Listener.Close(); !errors.Is(err, net.ErrClosed) {
		errs = append(errs, err)
	}
	s.mu.Lock()
	var conns []*conn
	for c := range s.conns {
		conns = append(conns, c)
	}
	s.mu.Unlock()
	for _, c := range conns {
		_ = c.Close() // the client closes most of them as well
	}
	s.stopTrunks()
	return errors.Join(errs...)
}

// clientConfig leaves nothing of the library on that finds peers by itself,
// and nothing that opens a socket or a file.
func (s *Swarm) clientConfig() *torrent.ClientConfig {
	c := torrent.NewDefaultClientConfig()
	c.NoDHT, c.DisableTrackers, c.DisablePEX = true, true, true
	c.DisableTCP, c.DisableUTP, c.NoDefaultPortForwarding = true, true, true
	c.DisableWebtorrent, c.DisableWebseeds = true, true
	c.Seed = true
	// Two nodes that were told of each other dial each other at the same time.
	c.DropDuplicatePeerIds = true
	// part does it. The library does it in the middle of noting that a piece is here,
	// and then finds its own notes in disorder and panics (v1.61.0, updatePieceCompletion).
	c.DropMutuallyCompletePeers = false
	c.AlwaysWantConns = true // asked once per accepted connection, over all torrents
	c.KeepAliveTimeout = keepAlive
	c.MaxUnverifiedBytes = 0
	c.MaxAllocPeerRequestDataPerConn = uploadBuffer
	c.EstablishedConnsPerTorrent = connsPerTorrent
	c.HalfOpenConnsPerTorrent = connsPerTorrent
	c.TotalHalfOpenConns = 1000
	c.DialRateLimiter = rate.NewLimiter(rate.Inf, 1)
	c.NominalDialTimeout, c.MinDialTimeout = dialTimeout, dialTimeout
	c.HandshakesTimeout = handshakeTimeout
	c.HeaderObfuscationPolicy = torrent.HeaderObfuscationPolicy{Preferred: false, RequirePreferred: true}
	c.CryptoProvides = mse.CryptoMethodPlaintext
	// No extension protocol: what goes over it (peer exchange, hole punching,
	// metadata) is of no use here.
	c.Extensions = pp.NewPeerExtensionBytes(pp.ExtensionBitFast)
	c.MinPeerExtensions = c.Extensions
	// Never used, but the default opens a database in the working directory.
	c.DefaultStorage = noStorage{}
	c.Logger, c.Slogger = libraryLoggers(s.opts.Log)
	c.Callbacks.CompletedHandshake = s.completedHandshake
	c.Callbacks.ReadMessage = s.check
	c.Callbacks.SentRequest = []func(torrent.PeerRequestEvent){s.asked}
	c.Callbacks.DeletedRequest = []func(torrent.PeerRequestEvent){s.settled}
	c.Callbacks.ReceivedUsefulData = []func(torrent.ReceivedUsefulDataEvent){s.received}
	return c
}

// noStorage is the client's storage for torrents that bring none; ours all do.
type noStorage struct{}

func (noStorage) OpenTorrent(context.Context, *metainfo.Info, metainfo.Hash) (storage.TorrentImpl, error) {
	return storage.TorrentImpl{}, errors.New("torrent without storage")
}

// Open begins the exchange of a blob, of which nothing is offered or
// downloaded yet. It waits a moment for Run to be up. The blob must be closed.
//
// Errors: ErrInvalidArgument for a size below 1 or a digest that is none,
// ErrAlreadyExists if the blob is open, ErrUnavailable if Run is not up.
func (s *Swarm) Open(d digest.Digest, size int64, data Data) (*Blob, error) {
	if err := d.Validate(); err != nil {
		return nil, fmt.Errorf("open %q: %w: %w", d, err, errdefs.ErrInvalidArgument)
	}
	if size <= 0 {
		return nil, fmt.Errorf("open %s of %d bytes: %w", d, size, errdefs.ErrInvalidArgument)
	}
	select {
	case <-s.up:
	case <-s.ctx.Done():
	case <-time.After(startWait):
	}
	b := newBlob(s, d, size, data)
	if err := s.register(b); err != nil {
		b.cancel()
		return nil, fmt.Errorf("open %s: %w", d, err)
	}
	b.wg.Go(func() { s.opts.Contain(b.keep) })
	return b, nil
}

func (s *Swarm) register(b *Blob) error {
	select {
	case <-s.up:
	default:
		return fmt.Errorf("swarm is not up: %w", errdefs.ErrUnavailable)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopping {
		return fmt.Errorf("swarm is ending: %w", errdefs.ErrUnavailable)
	}
	if s.blobs[b.digest] != nil {
		return errdefs.ErrAlreadyExists
	}
	s.blobs[b.digest] = b
	return nil
}

// forget is the end of Close of a blob.
func (s *Swarm) forget(b *Blob) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.blobs[b.digest] == b {
		delete(s.blobs, b.digest)
	}
	for ip, f := range s.faces {
		if f.addr != "" && f.blob.Load() == b {
			delete(s.faces, ip)
		}
	}
}

// completedHandshake is called without the client's lock.
func (s *Swarm) completedHandshake(c *torrent.PeerConn, h metainfo.Hash) {
	f, _ := c.RemoteAddr.(*face)
	v, _ := s.segments.Load(h)
	seg, _ := v.(*segment)
	if f == nil || seg == nil {
		return // the client refuses it
	}
	c.PeerMaxRequests = maxRequests
	now := time.Now()
	if last := seg.joined.Swap(sinceStart(now)); now.Sub(atStart(last)) >= settling/2 {
		seg.blob.poke() // which may have thought that nobody wants the segment
	}
	if f.conn != nil {
		f.blob.Store(seg.blob)
		if seg.blob.refuses(f.peer, time.Now()) {
			_ = f.conn.Close()
		}
	}
}

// received is called with the client locked.
func (s *Swarm) received(e torrent.ReceivedUsefulDataEvent) {
	f, _ := e.Peer.RemoteAddr.(*face)
	v, _ := s.segments.Load(e.Peer.Torrent().InfoHash())
	if seg, ok := v.(*segment); ok && f != nil {
		seg.received(f.peer, int(e.Message.Index), len(e.Message.Piece))
	}
}
