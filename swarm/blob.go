package swarm

import (
	"bytes"
	"context"
	"crypto/sha1"
	"fmt"
	"maps"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/anacrolix/torrent"
	"github.com/anacrolix/torrent/metainfo"
	pp "github.com/anacrolix/torrent/peer_protocol"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

const (
	// maxPeers is how many peers of one segment are remembered; more are
	// ignored.
	maxPeers = 64
	// maxAddress is the longest peer address that is taken, in bytes.
	maxAddress = 300
	// maxUnderWay is how many segments of a blob are downloaded at a time. With
	// more of them, each comes more slowly: no piece is whole for long, which
	// looks like standing still, and none can be passed on. Each also has
	// connections of its own, at about 200 KB, and a node that comes late to a
	// blob is told of all its segments at once.
	maxUnderWay = 8
	// stalled is after how long without a byte a segment does not count as under
	// way any more. It goes on all the same.
	stalled = 2 * time.Second
)

// Blob is this node's part in the swarm of one blob. Its methods may be called
// at any time from any goroutine; after Close they fail or do nothing.
type Blob struct {
	swarm  *Swarm
	digest digest.Digest
	layout Layout
	data   Data
	gate   gate

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	wg     sync.WaitGroup // keep
	wake   chan struct{}  // has room for one: keep is to look again

	uploaded, downloaded     atomic.Int64
	lastActive, lastReceived atomic.Int64 // as sinceStart has it; 0: never
	offered                  atomic.Int64 // when a segment was last made ready to be asked, as sinceStart has it; 0: never

	// Lock order: mu, the torrent client's own lock, acct. The client calls
	// back with its lock held, so mu must not be taken in callbacks.
	mu       sync.Mutex
	closed   bool             // guarded by mu
	limit    int              // of segments under way; guarded by mu
	segs     map[int]*segment // guarded by mu
	faces    map[string]*face // guarded by mu; by peer address
	fetching bool             // guarded by mu; see Fetching
	refuted  map[int]*segment // guarded by mu; dropped, as bytes of the registry did not have their hashes
	acct     sync.Mutex
	err      error               // guarded by acct
	bad      []BadSender         // guarded by acct
	accounts map[string]*account // guarded by acct; by peer
	kicked   map[string]struct{} // guarded by acct; peers to be disconnected
	gap      time.Duration       // guarded by acct; the longest that a peer took lately
	gapAt    time.Time           // guarded by acct; when it had taken that long
}

// segment is one segment whose torrent is added, which it is the storage of.
type segment struct {
	blob   *Blob
	index  int
	off, n int64 // in the blob
	pieces []byte
	hash   metainfo.Hash

	sent   atomic.Int64     // when a byte of it was last read for a peer, as sinceStart has it; 0: never
	t      *torrent.Torrent // guarded by blob.mu; nil once dropped
	peers  []string         // guarded by blob.mu; where to download from
	begun  time.Time        // guarded by blob.mu; when peers were first handed in
	parted bool             // guarded by blob.mu; whole, and no connection is left that is of no use
	roused time.Time        // guarded by blob.mu; when connections were roused last
	read   []atomic.Int64   // bytes that were read of each piece for peers
	joined atomic.Int64     // when somebody last connected, as sinceStart has it; 0: never

	// guarded by blob.acct: when a chunk last came, who sent chunks of each piece
	// that is not checked yet, which pieces were checked and good, which of these
	// came from peers, and which could not be read.
	moved   time.Time
	senders map[int]map[string]struct{}
	good    map[int]struct{}
	came    map[int]struct{}
	broken  map[int]struct{}
}

func newBlob(s *Swarm, d digest.Digest, size int64, data Data) *Blob {
	b := &Blob{
		swarm: s, digest: d, layout: LayoutOf(size), data: data, limit: maxUnderWay,
		wake:     make(chan struct{}, 1),
		segs:     map[int]*segment{},
		faces:    map[string]*face{},
		refuted:  map[int]*segment{},
		accounts: map[string]*account{},
		kicked:   map[string]struct{}{},
	}
	b.ctx, b.cancel = context.WithCancel(context.Background())
	return b
}

// Offer makes a segment that is whole here ready to be asked, and returns its
// piece hashes. With pieces given, these are taken for its hashes, unseen;
// otherwise they are computed, which takes about a millisecond per MiB and ends
// early with ctx. The segment may be one that Leech was called for: if its
// hashes turn out to be others than Leech was given, it is offered under the
// right ones.
//
// Errors: ErrOutOfRange and ErrInvalidArgument for a segment or hashes that
// cannot be, ErrFailedPrecondition if the segment is not whole, ErrUnavailable
// after Close, and whatever Data returned.
func (b *Blob) Offer(ctx context.Context, seg int, pieces []byte) ([]byte, error) {
	if err := b.checkOffer(seg, pieces); err != nil {
		return nil, err
	}
	if len(pieces) == 0 {
		pieces = b.verified(seg)
	}
	if len(pieces) == 0 {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		defer context.AfterFunc(b.ctx, cancel)()
		var err error
		if pieces, err = hashPieces(ctx, gatedReader{b}, b.layout, seg); err != nil {
			return nil, fmt.Errorf("offer %s: %w", b.digest, err)
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if s := b.segs[seg]; s != nil && !bytes.Equal(s.pieces, pieces) {
		b.swarm.opts.Log.Warn("piece hashes that came from a peer were wrong", "digest", b.digest, "segment", seg)
		b.drop(s)
	}
	s, err := b.add(seg, pieces)
	if err != nil {
		return nil, err
	}
	if !s.t.Complete().Bool() {
		for i := range s.t.NumPieces() {
			s.t.Piece(i).UpdateCompletion()
		}
	}
	b.offered.Store(sinceStart(time.Now()))
	return bytes.Clone(pieces), nil
}

func (b *Blob) checkOffer(seg int, pieces []byte) error {
	err := checkSegment(b.layout, seg)
	if err == nil && len(pieces) > 0 {
		err = checkPieces(b.layout, seg, pieces)
	}
	if err == nil && b.ctx.Err() != nil {
		err = fmt.Errorf("%w: %w", errClosed, errdefs.ErrUnavailable)
	}
	if err == nil {
		if err = b.Err(); err == nil && !b.present(b.layout.Segment(seg)) {
			err = fmt.Errorf("segment %d is not whole: %w", seg, errdefs.ErrFailedPrecondition)
		}
	}
	if err != nil {
		return fmt.Errorf("offer %s: %w", b.digest, err)
	}
	return nil
}

// present asks Data, unless it is closed.
func (b *Blob) present(off, n int64) bool {
	if !b.gate.enter() {
		return false
	}
	defer b.gate.leave()
	return b.data.Present(off, n)
}

// verified returns the hashes of a segment all of whose pieces were checked as
// they arrived; nil of any other.
func (b *Blob) verified(seg int) []byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	s := b.segs[seg]
	if s == nil {
		return nil
	}
	b.acct.Lock()
	defer b.acct.Unlock()
	if len(s.good) != b.layout.Pieces(seg) {
		return nil
	}
	return s.pieces
}

// Leech downloads a segment from peers (each host:port), which are tried again
// every 250 ms until it is whole; it is offered to others meanwhile, and
// afterwards until Close. Called again for the same segment it adds peers; with
// other hashes it begins anew, with these peers alone, and keeps the bytes that
// are present: they are taken to be right by the new hashes, so those that came
// by others must not be. Of a segment that is whole already nothing is
// downloaded, nor, while this node is Fetching, by hashes that bytes which came from
// elsewhere did not have. Peers whose address cannot be one are left out.
//
// Errors: ErrOutOfRange and ErrInvalidArgument for a segment or hashes that
// cannot be, ErrUnavailable after Close, and whatever Data returned.
func (b *Blob) Leech(seg int, pieces []byte, peers []string) error {
	if err := checkPieces(b.layout, seg, pieces); err != nil {
		return fmt.Errorf("leech %s: %w", b.digest, err)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if s := b.refuted[seg]; s != nil && bytes.Equal(s.pieces, pieces) {
		s.addPeers(peers) // for when it goes on
		return nil
	}
	return b.leech(seg, pieces, peers)
}

// Fetching says whether the registry's bytes are on their way here, or all are here: then
// none goes by hashes that the registry's do not have. Otherwise who is told such hashes
// has nothing else to go on by than they are, and finds out by the digest in the end
// which bytes were wrong. It may be called very often.
func (b *Blob) Fetching(is bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.fetching = is
	if is {
		return
	}
	for i, s := range b.refuted {
		delete(b.refuted, i)
		if b.segs[i] != nil {
			continue
		}
		if err := b.leech(i, s.pieces, s.peers); err != nil {
			b.swarm.opts.Log.Debug("segment not gone on with", "digest", b.digest, "segment", i, "err", err)
		}
	}
}

// leech is Leech of hashes that can be. b.mu must be held.
func (b *Blob) leech(seg int, pieces []byte, peers []string) error {
	if s := b.segs[seg]; s != nil && !bytes.Equal(s.pieces, pieces) {
		b.drop(s)
	}
	s, err := b.add(seg, bytes.Clone(pieces))
	if err != nil {
		return err
	}
	s.addPeers(peers)
	now := time.Now()
	if b.begin(s, now, b.limit-b.underWay(now)) {
		b.handIn(s, now)
	}
	b.poke()
	return nil
}

// addPeers takes those that can be. b.mu must be held.
func (s *segment) addPeers(peers []string) {
	have := make(map[string]struct{}, len(s.peers))
	for _, p := range s.peers {
		have[p] = struct{}{}
	}
	for _, p := range peers {
		if _, ok := have[p]; ok {
			continue
		}
		if len(s.peers) >= maxPeers {
			return
		}
		if !validAddress(p) {
			s.blob.swarm.opts.Log.Debug("peer left out: not host:port", "address", p[:min(len(p), maxAddress)])
			continue
		}
		have[p] = struct{}{}
		s.peers = append(s.peers, p)
	}
}

// validAddress reports whether a is host:port with a port that can be dialed.
func validAddress(a string) bool {
	if len(a) > maxAddress {
		return false
	}
	host, port, err := net.SplitHostPort(a)
	if err != nil || host == "" {
		return false
	}
	n, err := strconv.ParseUint(port, 10, 16)
	return err == nil && n > 0
}

// add returns the segment with its torrent added. b.mu must be held.
func (b *Blob) add(seg int, pieces []byte) (*segment, error) {
	if b.closed {
		return nil, fmt.Errorf("%s: %w: %w", b.digest, errClosed, errdefs.ErrUnavailable)
	}
	if err := b.Err(); err != nil {
		return nil, fmt.Errorf("%s: %w", b.digest, err)
	}
	if s := b.segs[seg]; s != nil {
		return s, nil
	}
	info, err := infoBytes(b.digest, b.layout, seg, pieces)
	if err != nil {
		return nil, err
	}
	s := &segment{
		blob: b, index: seg, pieces: pieces, hash: metainfo.HashBytes(info),
		senders: map[int]map[string]struct{}{},
		good:    map[int]struct{}{},
		came:    map[int]struct{}{},
		broken:  map[int]struct{}{},
		read:    make([]atomic.Int64, b.layout.Pieces(seg)),
	}
	s.off, s.n = b.layout.Segment(seg)
	// Known before it is added: from then on peers may speak of it.
	b.swarm.segments.Store(s.hash, s)
	t, isNew := b.swarm.client.AddTorrentOpt(torrent.AddTorrentOpts{
		InfoHash: s.hash, InfoBytes: info, Storage: s,
		ChunkSize: pp.Integer(b.layout.ChunkSize()), DisableInitialPieceCheck: true,
	})
	if !isNew || t.Info() == nil {
		b.swarm.segments.Delete(s.hash)
		return nil, fmt.Errorf("torrent of segment %d of %s not added: %w", seg, b.digest, errdefs.ErrInternal)
	}
	s.t = t
	b.segs[seg] = s
	t.DownloadAll()
	return s, nil
}

// drop removes the segment's torrent. b.mu must be held.
func (b *Blob) drop(s *segment) {
	if s.t != nil {
		s.t.Drop()
		s.t = nil
	}
	b.swarm.segments.Delete(s.hash)
	delete(b.segs, s.index)
}

// Ready reports whether the segment is whole and its torrent added, so that a
// peer that asks for it gets it.
func (b *Blob) Ready(seg int) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	s := b.segs[seg]
	return s != nil && s.t.Complete().Bool()
}

// Clash reports whether a piece of the segment that is present here, wherever it came
// from, has another hash by one list of piece hashes than by another; false outside
// [0, Segments()), true if a list is not as long as it must be.
func (b *Blob) Clash(seg int, one, other []byte) bool {
	off, n := b.layout.Segment(seg)
	if want := b.layout.Pieces(seg) * sha1.Size; len(one) != want || len(other) != want {
		return n > 0
	}
	for i := range b.layout.Pieces(seg) {
		at, hash := int64(i)*b.layout.PieceSize, i*sha1.Size
		if !bytes.Equal(one[hash:hash+sha1.Size], other[hash:hash+sha1.Size]) &&
			b.present(off+at, min(b.layout.PieceSize, n-at)) {
			return true
		}
	}
	return false
}

// Stats is what has been exchanged of one blob since Open.
type Stats struct {
	// Uploaded counts bytes read for peers, Downloaded the bytes that peers
	// sent and that were wanted, good or bad.
	Uploaded, Downloaded int64
	// LastActive is when a byte last went either way; the zero time if never.
	LastActive time.Time
	// Sources is Downloaded by peer. A peer is named by the address that Leech
	// was given. One that connected to us, and was never dialed since Run, is
	// named by what its connection says its name is, or else by the address
	// that it came from.
	Sources map[string]int64
}

// LastReceived is when a peer last sent bytes, checked or not; the zero time if
// none has since Open. It may be called very often.
func (b *Blob) LastReceived() time.Time {
	return atStart(b.lastReceived.Load())
}

// Stats takes no lock of the torrent client and may be called often.
func (b *Blob) Stats() Stats {
	st := Stats{Uploaded: b.uploaded.Load(), Downloaded: b.downloaded.Load(), LastActive: atStart(b.lastActive.Load())}
	b.acct.Lock()
	defer b.acct.Unlock()
	st.Sources = make(map[string]int64, len(b.accounts))
	for p, a := range b.accounts {
		if a.bytes > 0 {
			st.Sources[p] = a.bytes
		}
	}
	return st
}

// Ban cuts the peer, named as in Stats or in Leech, off from this blob: it is
// neither asked nor answered any more.
func (b *Blob) Ban(addr string) { b.ban(addr, "asked to") }

// Err returns the first error that Data returned to the exchange, nil if there
// was none. After an error the blob's torrents are dropped: a file that cannot
// be written must not be downloaded over and over.
func (b *Blob) Err() error {
	b.acct.Lock()
	defer b.acct.Unlock()
	return b.err
}

// Close drops the blob's torrents and returns when nothing reads or writes its
// Data any more. It may be called more than once; every call waits.
func (b *Blob) Close() error {
	b.cancel()
	b.wg.Wait()
	b.mu.Lock()
	b.closed = true
	for _, s := range maps.Clone(b.segs) {
		b.drop(s)
	}
	b.mu.Unlock()
	b.gate.close()
	b.swarm.forget(b)
	return nil
}

// touch notes that a byte went over a connection.
func (b *Blob) touch() { b.lastActive.Store(sinceStart(time.Now())) }

// started is what moments are kept relative to: the difference is of the clock
// that nobody sets.
var started = time.Now()

// sinceStart returns a moment in nanoseconds, never 0.
func sinceStart(t time.Time) int64 { return max(1, int64(t.Sub(started))) }

// atStart is the reverse of sinceStart; the zero time of 0.
func atStart(n int64) time.Time {
	if n == 0 {
		return time.Time{}
	}
	return started.Add(time.Duration(n))
}

// fail ends the exchange because Data cannot be used.
func (b *Blob) fail(err error) {
	if b.ctx.Err() != nil {
		return // it is being closed
	}
	b.acct.Lock()
	first := b.err == nil
	if first {
		b.err = err
	}
	b.acct.Unlock()
	if first {
		b.swarm.opts.Log.Error("blob is not exchanged any more", "digest", b.digest, "err", err)
		b.poke()
	}
}

// poke has keep look again. It never blocks.
func (b *Blob) poke() {
	select {
	case b.wake <- struct{}{}:
	default:
	}
}
