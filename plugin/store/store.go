package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"
)

const (
	defaultMaxWait = 30 * time.Second
	// flushEvery is how often state.db is brought up to date.
	flushEvery = 2 * time.Second
	// sweepEvery is how often abandoned staging is looked for.
	sweepEvery = 10 * time.Minute
	// abandonedAfter is the age from which staging that no stream uses is
	// removed. containerd's leases on unfinished pulls live as long.
	abandonedAfter = 24 * time.Hour
	// unclaimedAfter is the same for staging without a ref: containerd has
	// given the pull up, but its user has often not.
	unclaimedAfter = time.Hour
)

// Options says how a Store is to be. Root is required.
type Options struct {
	Root      string        // containerd's content directory; made if missing
	SeedQuota int64         // bytes of hidden blobs that are kept; 0: none
	Filler    Filler        // nil: a plain local store
	Log       *slog.Logger  // nil: discards
	Counter   Counter       // nil: nobody counts
	Panicked  func()        // called when a panic of the Filler was contained; may be nil
	MaxWait   time.Duration // how long a stream that writes may make no progress before another that waits is released; 0: 30 s

	bootID string // tests: instead of the kernel's
}

// Counter hears what an operator counts. Its methods are called with locks held,
// from any goroutine, and must return at once. Blobs whose digest or size is not
// known before they are committed are not counted.
type Counter interface {
	// Fetched counts bytes that a stream has written.
	Fetched(n int)
	// Completed counts a blob that has become whole.
	Completed()
	// Failed counts an unfinished blob whose bytes could not be kept, or for whose
	// wrong bytes a stream was failed.
	Failed()
	// Mismatched counts a blob of which every byte was there, and not right.
	Mismatched()
}

// noCounter is a Counter for those who have none.
type noCounter struct{}

func (noCounter) Fetched(int) {}
func (noCounter) Completed()  {}
func (noCounter) Failed()     {}
func (noCounter) Mismatched() {}

// Filler fills ingests from elsewhere and hears which blobs there are. Its
// methods must not block for long on the store: Added and Removed are called
// one after the other, in the order in which things happened.
type Filler interface {
	// Fill runs in a goroutine of the store, at most one per ingest, from the
	// first Wait on. When it returns before the ingest is whole, the streams
	// that wait are released to the registry, one at a time; a later Wait
	// starts it again. It may go on after the ingest is whole, to seed it.
	// ctx ends when another size is wanted of the digest or the store closes. After Fill has
	// returned the ingest must not be used.
	Fill(ctx context.Context, in *Ingest)
	// Added says that the blob is whole and can be seeded. It is called for
	// every blob when Run starts, and may be called again for the same blob.
	Added(d digest.Digest, size int64)
	// Removed says that the blob is gone.
	Removed(d digest.Digest)
}

// Waiter is an ability of the writers that share an ingest. Wait blocks until
// the blob is whole (Status then says Offset == Total) or this stream is to go
// on with the registry's bytes from its Offset; it returns an error if ctx or
// the stream ends first. It must be called at most once per stream.
type Waiter interface {
	Wait(ctx context.Context) error
}

// OwnedWriter is an ability of the writers that share an ingest. WriteOwned is
// Write, but the store keeps p until it calls free: the caller must not touch it
// before. Free may be nil, and is called from any goroutine, with locks held, at
// most once; after an error perhaps not at all.
type OwnedWriter interface {
	WriteOwned(p []byte, free func()) (int, error)
}

// Store implements content.Store. All methods may be called from any number of
// goroutines. Info, Status, Writer and the writers' Status and Commit do no
// more than a few system calls on metadata.
type Store struct {
	root     string
	quota    int64
	maxWait  time.Duration
	filler   Filler
	panicked func()
	log      *slog.Logger
	counter  Counter
	bootID   string
	local    content.Store
	db       *bolt.DB

	ctx    context.Context // parent of every Fill; ended by Close
	cancel context.CancelFunc

	// commits is held shared while the local store commits, which may find
	// the blob already there, and exclusively while blobs are evicted.
	commits sync.RWMutex

	// Locks are taken in this order: commits, mu, Ingest.wmu, Ingest.mu,
	// spawnMu. No lock but commits and Ingest.wmu is held while data is
	// read, written or synced.
	mu      sync.Mutex
	closed  bool                       // guarded by mu
	blobs   map[digest.Digest]*blob    // guarded by mu
	dirty   map[digest.Digest]struct{} // guarded by mu; blobs that state.db does not know as they are
	ingests map[digest.Digest]*Ingest  // guarded by mu
	refs    map[string]*ref            // guarded by mu
	events  []event                    // guarded by mu; for the Filler
	latest  time.Time                  // guarded by mu: the latest use of a blob; see nowLocked
	staged  map[digest.Digest]staged   // guarded by mu: what sweep has seen
	swept   bool                       // guarded by mu: sweep has run

	told  chan struct{} // events may not be empty
	evict chan struct{} // hidden blobs may be beyond the quota
	full  chan struct{} // a write found the disk full

	spawnMu  sync.Mutex
	stopping bool           // guarded by spawnMu
	work     sync.WaitGroup // goroutines of the store and its ingests; Add under spawnMu
}

var _ content.Store = (*Store)(nil)

// event is something for the Filler to hear.
type event struct {
	digest digest.Digest
	size   int64
	gone   bool
}

// Open opens the store at o.Root and makes it if need be. It starts nothing:
// the store works at once, but the Filler hears of blobs, quota and state.db
// are kept only while Run runs. The caller must Close it. A second store on
// the same root is an error.
func Open(o Options) (*Store, error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.MaxWait <= 0 {
		o.MaxWait = defaultMaxWait
	}
	if o.Counter == nil {
		o.Counter = noCounter{}
	}
	if o.Panicked == nil {
		o.Panicked = func() {}
	}
	s := &Store{
		counter: o.Counter, panicked: o.Panicked,
		root: o.Root, quota: o.SeedQuota, maxWait: o.MaxWait, filler: o.Filler, log: o.Log, bootID: o.bootID,
		blobs:   map[digest.Digest]*blob{},
		dirty:   map[digest.Digest]struct{}{},
		ingests: map[digest.Digest]*Ingest{},
		refs:    map[string]*ref{},
		staged:  map[digest.Digest]staged{},
		told:    make(chan struct{}, 1),
		evict:   make(chan struct{}, 1),
		full:    make(chan struct{}, 1),
	}
	if s.bootID == "" {
		s.bootID = readBootID()
	}
	if err := os.MkdirAll(s.stagingDir(), 0o700); err != nil {
		return nil, fmt.Errorf("make staging directory: %w", err)
	}
	var err error
	if s.local, err = local.NewLabeledStore(o.Root, labels{s}); err != nil {
		return nil, fmt.Errorf("open local store: %w", err)
	}
	var states map[digest.Digest]blobState
	path := filepath.Join(o.Root, "imagewolf", "state.db")
	s.db, states, err = openDB(path, o.Log)
	if isFull(err) {
		s.log.Warn("the disk is full: unfinished blobs are removed", "root", s.root)
		if err = s.emptyStaging(); err == nil {
			s.db, states, err = openDB(path, o.Log)
		}
	}
	if err != nil {
		return nil, err
	}
	if err := errors.Join(s.scanBlobs(states), s.scanStaging()); err != nil {
		return nil, errors.Join(err, s.db.Close())
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s, nil
}

// Run tells the Filler about blobs, evicts hidden ones beyond the quota,
// removes abandoned staging and keeps state.db, until ctx ends. It returns nil
// then. It is to be called once at most.
func (s *Store) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	wg.Go(func() { s.tell(ctx) })
	defer wg.Wait()
	flush, sweep := time.NewTicker(flushEvery), time.NewTicker(sweepEvery)
	defer flush.Stop()
	defer sweep.Stop()
	s.sweep(time.Now())
	retry := time.NewTimer(0)
	defer retry.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-flush.C:
			if err := s.flush(); err != nil {
				s.log.Warn("state not kept", "err", err)
			}
		case <-sweep.C:
			s.sweep(time.Now())
		case <-s.evict:
			retry.Reset(0)
		case <-s.full:
			s.makeRoom()
			retry.Reset(0)
		case <-retry.C:
			if !s.evictHidden(s.quota) {
				retry.Reset(time.Second)
			}
		}
	}
}

// makeRoom gives up all that is kept for others and for later: the disk is full,
// and a pull of this node matters more.
func (s *Store) makeRoom() {
	s.log.Warn("the disk is full: blobs kept for other nodes and unfinished ones are removed", "root", s.root)
	s.evictHidden(0)
	s.sweep(time.Now().Add(abandonedAfter))
}

// Close ends every Fill and every stream, waits for them, and keeps on disk
// what is needed to resume. Fill must return when its context ends.
func (s *Store) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	live := make([]*Ingest, 0, len(s.ingests))
	for _, in := range s.ingests {
		live = append(live, in)
	}
	s.mu.Unlock()

	s.cancel()
	for _, in := range live {
		in.failStreams(errClosed)
	}
	s.spawnMu.Lock()
	s.stopping = true
	s.spawnMu.Unlock()
	s.work.Wait()

	var errs []error
	for _, in := range live {
		errs = append(errs, in.park())
	}
	return errors.Join(append(errs, s.flush(), s.db.Close())...)
}

// spawn runs f in a goroutine that Close waits for, unless Close has come so
// far that it waits already.
func (s *Store) spawn(f func()) bool {
	s.spawnMu.Lock()
	defer s.spawnMu.Unlock()
	if s.stopping {
		return false
	}
	s.work.Go(f)
	return true
}

// tell hands events to the Filler until ctx ends.
func (s *Store) tell(ctx context.Context) {
	if s.filler == nil {
		return
	}
	for {
		s.mu.Lock()
		events := s.events
		s.events = nil
		s.mu.Unlock()
		for _, e := range events {
			if ctx.Err() != nil {
				return
			}
			if e.gone {
				s.filler.Removed(e.digest)
			} else {
				s.filler.Added(e.digest, e.size)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-s.told:
		}
	}
}

// announceLocked queues an event for the Filler. mu must be held.
func (s *Store) announceLocked(d digest.Digest, size int64, gone bool) {
	if s.filler == nil || d.Algorithm() != digest.SHA256 {
		return
	}
	s.events = append(s.events, event{d, size, gone})
	wake(s.told)
}

// wake makes the receiver of c look again.
func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

func (s *Store) stagingDir() string { return filepath.Join(s.root, "imagewolf", "staging") }

func (s *Store) stagingPath(d digest.Digest) string {
	return filepath.Join(s.stagingDir(), d.Encoded())
}

func (s *Store) blobPath(d digest.Digest) string {
	return filepath.Join(s.root, "blobs", d.Algorithm().String(), d.Encoded())
}

// trash takes a file out of the way by renaming it, which is quick, and leaves
// the unlinking, which is not when the file is big, to a goroutine. Where no name can
// be made for that, as on a disk that is out of inodes, it unlinks at once.
func (s *Store) trash(path string) error {
	f, err := os.CreateTemp(s.stagingDir(), "*.trash")
	if err != nil {
		return os.Remove(path)
	}
	name := f.Name()
	if err := errors.Join(f.Close(), os.Rename(path, name)); err != nil {
		return errors.Join(fmt.Errorf("remove %s: %w", path, err), os.Remove(name))
	}
	unlink := func() {
		if err := os.Remove(name); err != nil {
			s.log.Warn("removed file stays until the next start", "path", name, "err", err)
		}
	}
	if !s.spawn(unlink) {
		unlink()
	}
	return nil
}

// readBootID tells one life of the kernel from the next: what was written but
// not synced is still there in the same life. Without one nothing is trusted.
func readBootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// syncDir makes renames in a directory durable.
func syncDir(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// Blob is a blob that is open for reading. It stays readable after the store
// has removed it.
type Blob interface {
	io.ReaderAt
	io.Closer
	Size() int64
}
