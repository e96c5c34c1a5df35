package tracker

import (
	"context"
	"sync"
)

// outbox is a bounded queue between those who may not block and the one
// goroutine that sends.
type outbox[T any] struct {
	limit int
	ready chan struct{} // has room for one: something was put

	mu    sync.Mutex
	queue []T // guarded by mu
}

func newOutbox[T any](limit int) *outbox[T] {
	return &outbox[T]{limit: limit, ready: make(chan struct{}, 1)}
}

// put queues v; false means that the queue is full and v is lost.
func (o *outbox[T]) put(v T) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.queue) >= o.limit {
		return false
	}
	o.queue = append(o.queue, v)
	select {
	case o.ready <- struct{}{}:
	default: // the sender has yet to take the last hint
	}
	return true
}

// drain sends what is put, in order, until ctx ends or send fails. One
// goroutine at a time may be in it.
func (o *outbox[T]) drain(ctx context.Context, send func(T) error) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-o.ready:
		}
		o.mu.Lock()
		batch := o.queue
		o.queue = nil
		o.mu.Unlock()
		for _, v := range batch {
			if err := send(v); err != nil {
				return err
			}
		}
	}
}
