package node

import (
	"context"
	"sync"

	"github.com/imagewolf/imagewolf/swarm"
)

// offers makes segments ready to be asked, one after the other, beside the
// session: hashing a segment takes tens of milliseconds, in which the tracker
// must still be heard.
type offers struct {
	blob    *swarm.Blob
	guard   func(func() error) error // contains a panic
	cancel  context.CancelFunc
	wg      sync.WaitGroup
	work    chan offerResult
	out     chan offerResult
	pending map[int]bool // belongs to the session
}

// offerResult is a segment to be offered, with its piece hashes where they
// are known, and the same segment when that is done.
type offerResult struct {
	segment int
	pieces  []byte
	err     error
}

func newOffers(ctx context.Context, b *swarm.Blob, guard func(func() error) error) *offers {
	ctx, cancel := context.WithCancel(ctx)
	o := &offers{
		blob: b, guard: guard, cancel: cancel, pending: map[int]bool{},
		work: make(chan offerResult, 1), out: make(chan offerResult),
	}
	o.wg.Go(func() { o.run(ctx) })
	return o
}

func (o *offers) run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case w := <-o.work:
			w.err = o.guard(func() (err error) {
				w.pieces, err = o.blob.Offer(ctx, w.segment, w.pieces)
				return err
			})
			select {
			case <-ctx.Done():
				return
			case o.out <- w:
			}
		}
	}
}

// add asks for a segment, unless the worker is busy: the session comes back
// with the next look. It must not be called for a pending segment.
func (o *offers) add(segment int, pieces []byte) {
	select {
	case o.work <- offerResult{segment: segment, pieces: pieces}:
		o.pending[segment] = true
	default:
	}
}

// results is where offered segments come out; nil for a blob without torrents.
func (o *offers) results() <-chan offerResult {
	if o == nil {
		return nil
	}
	return o.out
}

// stop ends the worker and waits for it.
func (o *offers) stop() {
	o.cancel()
	o.wg.Wait()
}
