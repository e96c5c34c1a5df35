package queue

import (
	"errors"
	"sync"

	"go.etcd.io/bbolt"
)

// commits has changes that come while another is being written share the next
// transaction, and so its fsync, which is what takes time. One that comes alone
// waits for nobody: bbolt's own Batch has each wait for others that may come.
type commits struct {
	update  func(func(*bbolt.Tx) error) error // bbolt's Update
	writing chan struct{}                     // of size 1: full while one writes

	mu   sync.Mutex // guards next
	next *group     // of changes that wait for the transaction that is being written; nil: none does
}

func newCommits(update func(func(*bbolt.Tx) error) error) *commits {
	return &commits{update: update, writing: make(chan struct{}, 1)}
}

// group is the changes of one transaction.
type group struct {
	changes []func(*bbolt.Tx) error
	written chan struct{} // closed when err is
	err     error
}

// commit returns when the change is on disk. When it or another one in its
// transaction fails, none of them is written, and all return the error. It is
// safe for concurrent use.
func (c *commits) commit(change func(*bbolt.Tx) error) error {
	c.mu.Lock()
	g := c.next
	first := g == nil
	if first {
		g = &group{written: make(chan struct{}), err: errors.New("not written")}
		c.next = g
	}
	g.changes = append(g.changes, change)
	c.mu.Unlock()
	if first {
		c.write(g)
	}
	<-g.written
	return g.err
}

// write writes a group, once what is being written is.
func (c *commits) write(g *group) {
	c.writing <- struct{}{}
	defer func() { <-c.writing }()
	defer close(g.written) // also when a change panics
	c.mu.Lock()
	c.next = nil // none joins any more
	c.mu.Unlock()
	g.err = c.update(func(tx *bbolt.Tx) error {
		for _, change := range g.changes {
			if err := change(tx); err != nil {
				return err
			}
		}
		return nil
	})
}
