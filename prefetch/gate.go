package prefetch

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/semaphore"
	"golang.org/x/time/rate"
)

const (
	// refPrefix starts the ref of every ingest of a prefetch. The digest is still
	// at its end, where the store looks for it.
	refPrefix = "prefetch-"
	// blobsAtOnce is how many blobs of an image are on their way at the same time,
	// as in containerd's default. Blobs have different fetchers in the cluster, so
	// that one at a time would be slower for all.
	blobsAtOnce = 3
	// minBurst is the least that a bandwidth limit lets pass at once, in bytes.
	minBurst = 64 << 10
	// busyLook is how often is looked whether foreground pulls have ended.
	busyLook = 200 * time.Millisecond
	// busyLooks is how many times in a row none must be seen: between two blobs of
	// a pull there is a moment without any.
	busyLooks = 3
)

// IsRef reports whether an ingest's ref, as containerd names it to its content
// store ("<namespace>/<sequence>/<ref>"), is that of a prefetch.
func IsRef(ref string) bool {
	parts := strings.SplitN(ref, "/", 3)
	return len(parts) == 3 && strings.HasPrefix(parts[2], refPrefix)
}

type slots struct{ *semaphore.Weighted }

func newSlots() slots { return slots{semaphore.NewWeighted(blobsAtOnce)} }

// gate is containerd's content store, but that writers wait for their turn, and
// are named and counted as those of a prefetch.
type gate struct {
	content.Store
	job *job
}

// Writer opens a writer once the blob may be begun.
func (g *gate) Writer(ctx context.Context, opts ...content.WriterOpt) (content.Writer, error) {
	var wo content.WriterOpts
	for _, o := range opts {
		if err := o(&wo); err != nil {
			return nil, err
		}
	}
	ref, leave := refPrefix+wo.Ref, func() {}
	if _, err := g.Info(ctx, wo.Desc.Digest); err != nil {
		if err := g.job.enter(ctx, wo.Desc.Digest); err != nil {
			return nil, err
		}
		leave = func() { g.job.slots.Release(1) }
	}
	// Also for a blob that is here: the lease is to hold it.
	w, err := g.Store.Writer(ctx, append(opts, content.WithRef(ref))...)
	if err != nil {
		leave()
		if errdefs.IsAlreadyExists(err) {
			g.job.meter.done(wo.Desc)
		}
		return nil, err
	}
	g.job.meter.begin(wo.Desc.Digest, ref)
	return &writer{Writer: w, ctx: ctx, job: g.job, desc: wo.Desc, leave: leave}, nil
}

// enter waits until a blob may be begun and takes a slot.
func (j *job) enter(ctx context.Context, d digest.Digest) error {
	if err := j.slots.Acquire(ctx, 1); err != nil {
		return err
	}
	err := giveWay(ctx, j.o.Foreground, d)
	if err == nil && j.limiter != nil {
		err = waitFor(ctx, j.limiter, 1)
	}
	if err != nil {
		j.slots.Release(1)
	}
	return err
}

// giveWay waits while pulls are under way that somebody asked for, unless one of
// them is after the same blob.
func giveWay(ctx context.Context, f Foreground, d digest.Digest) error {
	if f == nil || !f.Busy() {
		return nil
	}
	tick := time.NewTicker(busyLook)
	defer tick.Stop()
	for quiet := 0; quiet < busyLooks && !f.Wants(d); {
		select {
		case <-ctx.Done():
			return fmt.Errorf("it gave way to pulls on this node that somebody asked for: %w", context.Cause(ctx))
		case <-tick.C:
		}
		if quiet++; f.Busy() {
			quiet = 0
		}
	}
	return nil
}

// waitFor waits until the limit lets n bytes pass, at most its burst.
func waitFor(ctx context.Context, l *rate.Limiter, n int) error {
	if err := l.WaitN(ctx, n); err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		// It says so at once if the time will not suffice.
		return fmt.Errorf("prefetch.bandwidth_limit leaves too little for the time that is left: %w", context.DeadlineExceeded)
	}
	return nil
}

// charge counts bytes that have come already: what comes next waits for them.
func charge(l *rate.Limiter, n int64) {
	for now := time.Now(); n > 0; {
		part := min(n, int64(l.Burst()))
		l.ReserveN(now, int(part))
		n -= part
	}
}

// writer is a content.Writer of a blob that is being prefetched. It is used by
// one goroutine at a time, as all are.
type writer struct {
	content.Writer
	ctx   context.Context // of the call that opened it, which is that of the pull
	job   *job
	desc  ocispec.Descriptor
	leave func()
	once  sync.Once

	written   int64 // bytes that came through here
	committed bool
}

// Write passes bytes on as the limit lets them.
func (w *writer) Write(p []byte) (int, error) {
	n := 0
	for n < len(p) {
		part := p[n:]
		if l := w.job.limiter; l != nil && !w.wanted() {
			part = part[:min(len(part), l.Burst())]
			if err := waitFor(w.ctx, l, len(part)); err != nil {
				return n, err
			}
		}
		m, err := w.Writer.Write(part)
		n += m
		w.written += int64(m)
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

// wanted reports whether somebody else here waits for the blob.
func (w *writer) wanted() bool {
	return w.job.o.Foreground != nil && w.job.o.Foreground.Wants(w.desc.Digest)
}

// Commit notes that the blob is here.
func (w *writer) Commit(ctx context.Context, size int64, expected digest.Digest, opts ...content.Opt) error {
	err := w.Writer.Commit(ctx, size, expected, opts...)
	if err == nil || errdefs.IsAlreadyExists(err) {
		w.committed = err == nil
		w.job.meter.done(w.desc)
	}
	return err
}

// Close gives the slot back and has the next blob wait for what of this one
// came from other nodes.
func (w *writer) Close() error {
	err := w.Writer.Close()
	w.once.Do(func() {
		w.job.meter.end(w.desc.Digest)
		if l := w.job.limiter; l != nil && w.committed && !w.wanted() {
			charge(l, w.desc.Size-w.written)
		}
		w.leave()
	})
	return err
}
