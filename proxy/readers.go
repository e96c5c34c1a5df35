package proxy

import (
	"context"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// maxIdleReaders bounds the open files kept for blobs nobody reads just now.
	maxIdleReaders = 32
	// readerIdle is how long such a file stays open. It holds the disk space of
	// a blob that was removed meanwhile, so it is short.
	readerIdle = 10 * time.Second
)

// readerCache keeps readers of blobs open between calls: containerd opens a
// Read stream for each 32 KiB, 32768 of them for a layer of 1 GiB, and looking
// the blob up for each would cost more than reading it.
type readerCache struct {
	store content.Provider

	mu      sync.Mutex
	readers map[digest.Digest]*cachedReader // guarded by mu
	drops   uint64                          // calls of drop so far; guarded by mu
}

type cachedReader struct {
	content.ReaderAt
	digest digest.Digest
	refs   int       // calls that read from it; guarded by readerCache.mu
	used   time.Time // when refs last became 0; guarded by readerCache.mu
	cached bool      // it is in the map; guarded by readerCache.mu
}

func newReaderCache(store content.Provider) *readerCache {
	return &readerCache{store: store, readers: map[digest.Digest]*cachedReader{}}
}

// run closes readers that are idle, and all of them when ctx ends.
func (c *readerCache) run(ctx context.Context) {
	t := time.NewTicker(readerIdle / 2)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			c.closeIdle(func(*cachedReader) bool { return true })
			return
		case <-t.C:
			c.closeIdle(func(r *cachedReader) bool { return time.Since(r.used) >= readerIdle })
		}
	}
}

// acquire returns the reader of d; the caller hands it back with release.
func (c *readerCache) acquire(ctx context.Context, d digest.Digest) (*cachedReader, error) {
	c.mu.Lock()
	if r := c.readers[d]; r != nil {
		r.refs++
		c.mu.Unlock()
		return r, nil
	}
	drops := c.drops
	c.mu.Unlock()

	// The reader outlives the call that opens it.
	ra, err := c.store.ReaderAt(context.WithoutCancel(ctx), ocispec.Descriptor{Digest: d})
	if err != nil {
		return nil, err
	}
	r := &cachedReader{ReaderAt: ra, digest: d, refs: 1}

	c.mu.Lock()
	if other := c.readers[d]; other != nil { // someone was faster
		other.refs++
		c.mu.Unlock()
		_ = ra.Close()
		return other, nil
	}
	var evicted *cachedReader
	if c.drops == drops { // else it may have been opened before its blob was deleted
		c.readers[d], r.cached = r, true
		if len(c.readers) > maxIdleReaders {
			evicted = c.evictLocked()
		}
	}
	c.mu.Unlock()
	if evicted != nil {
		_ = evicted.Close()
	}
	return r, nil
}

// release gives a reader back; the caller must not use it any more.
func (c *readerCache) release(r *cachedReader) {
	c.mu.Lock()
	r.refs--
	r.used = time.Now()
	closing := r.refs == 0 && !r.cached
	c.mu.Unlock()
	if closing {
		_ = r.Close()
	}
}

// drop forgets the reader of d: later calls ask the store again.
func (c *readerCache) drop(d digest.Digest) {
	c.mu.Lock()
	c.drops++
	r := c.readers[d]
	closing := false
	if r != nil {
		c.removeLocked(r)
		closing = r.refs == 0
	}
	c.mu.Unlock()
	if closing {
		_ = r.Close()
	}
}

// evictLocked removes the reader idle for longest and returns it; nil if all
// are in use. c.mu must be held.
func (c *readerCache) evictLocked() *cachedReader {
	var oldest *cachedReader
	for _, r := range c.readers {
		if r.refs == 0 && (oldest == nil || r.used.Before(oldest.used)) {
			oldest = r
		}
	}
	if oldest != nil {
		c.removeLocked(oldest)
	}
	return oldest
}

// removeLocked takes r out of the map. c.mu must be held.
func (c *readerCache) removeLocked(r *cachedReader) {
	delete(c.readers, r.digest)
	r.cached = false
}

func (c *readerCache) closeIdle(old func(*cachedReader) bool) {
	var closing []*cachedReader
	c.mu.Lock()
	for _, r := range c.readers {
		if r.refs == 0 && old(r) {
			c.removeLocked(r)
			closing = append(closing, r)
		}
	}
	c.mu.Unlock()
	for _, r := range closing {
		_ = r.Close()
	}
}
