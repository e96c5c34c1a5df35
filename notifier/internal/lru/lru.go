// Package lru is a map of bounded cost that forgets what was used least
// recently.
package lru

import (
	"container/list"
	"sync"
)

// Cache is safe for concurrent use.
type Cache[K comparable, V any] struct {
	max int

	mu    sync.Mutex // guards what follows
	cost  int
	items map[K]*list.Element
	order *list.List // the most recently used first
}

type item[K comparable, V any] struct {
	key   K
	value V
	cost  int
}

// New returns an empty cache for values that cost at most max together.
func New[K comparable, V any](maximum int) *Cache[K, V] {
	return &Cache[K, V]{max: maximum, items: map[K]*list.Element{}, order: list.New()}
}

// Get returns the value of a key.
func (c *Cache[K, V]) Get(key K) (V, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e, ok := c.items[key]
	if !ok {
		var zero V
		return zero, false
	}
	c.order.MoveToFront(e)
	return e.Value.(*item[K, V]).value, true //nolint:errcheck // nothing else is put in
}

// Put keeps a value, unless it alone costs too much.
func (c *Cache[K, V]) Put(key K, value V, cost int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.remove(c.items[key])
	if cost > c.max {
		return
	}
	c.items[key] = c.order.PushFront(&item[K, V]{key, value, cost})
	for c.cost += cost; c.cost > c.max; {
		c.remove(c.order.Back())
	}
}

// Delete forgets a key.
func (c *Cache[K, V]) Delete(key K) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.remove(c.items[key])
}

// remove is called with mu held.
func (c *Cache[K, V]) remove(e *list.Element) {
	if e == nil {
		return
	}
	i := c.order.Remove(e).(*item[K, V]) //nolint:errcheck // nothing else is put in
	delete(c.items, i.key)
	c.cost -= i.cost
}
