package prefetch

import (
	"context"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// lookEvery is how often the ingests under way are looked at.
const lookEvery = 500 * time.Millisecond

// meter knows the blobs of an image and which of them are here.
type meter struct {
	mu     sync.Mutex
	sizes  map[digest.Digest]int64  // guarded by mu; of every blob known so far
	here   map[digest.Digest]bool   // guarded by mu
	active map[digest.Digest]string // guarded by mu; refs of the ingests under way
}

func newMeter() *meter {
	return &meter{sizes: map[digest.Digest]int64{}, here: map[digest.Digest]bool{}, active: map[digest.Digest]string{}}
}

// watch has the meter see every blob that the handler finds.
func (m *meter) watch(h images.Handler) images.Handler {
	return images.HandlerFunc(func(ctx context.Context, desc ocispec.Descriptor) ([]ocispec.Descriptor, error) {
		m.add(desc)
		children, err := h.Handle(ctx, desc)
		for _, c := range children {
			m.add(c)
		}
		return children, err
	})
}

func (m *meter) add(desc ocispec.Descriptor) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, known := m.sizes[desc.Digest]; !known {
		m.sizes[desc.Digest] = max(desc.Size, 0)
	}
}

func (m *meter) begin(d digest.Digest, ref string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.active[d] = ref
}

func (m *meter) end(d digest.Digest) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.active, d)
}

func (m *meter) done(desc ocispec.Descriptor) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.here[desc.Digest] = true
}

// total returns the bytes of all blobs.
func (m *meter) total() (n int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, size := range m.sizes {
		n += size
	}
	return n
}

// snapshot returns the bytes that are here for certain, and the ingests that may
// have more.
func (m *meter) snapshot() (Progress, map[digest.Digest]string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var p Progress
	active := map[digest.Digest]string{}
	for d, size := range m.sizes {
		p.Total += size
		switch ref, ok := m.active[d]; {
		case m.here[d]:
			p.Bytes += size
		case ok:
			active[d] = ref
		}
	}
	return p, active
}

// run calls progress as the bytes come, until ctx ends.
func (m *meter) run(ctx context.Context, store content.IngestManager, progress func(Progress)) {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	var last Progress
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now, active := m.snapshot()
		for _, ref := range active {
			// One that has just ended has no status: it counts at the next look.
			if s, err := store.Status(ctx, ref); err == nil {
				now.Bytes += s.Offset
			}
		}
		if now != last && ctx.Err() == nil {
			progress(now)
			last = now
		}
	}
}
