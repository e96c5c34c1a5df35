package lru

import "testing"

func TestWhatWasUsedLeastRecentlyIsForgotten(t *testing.T) {
	c := New[string, int](10)
	c.Put("a", 1, 4)
	c.Put("b", 2, 4)
	if v, ok := c.Get("a"); !ok || v != 1 {
		t.Errorf("a is %d, %v", v, ok)
	}
	c.Put("c", 3, 4)
	if _, ok := c.Get("b"); ok {
		t.Error("b is still there, and a was used after it")
	}
	c.Put("d", 4, 11)
	if _, ok := c.Get("d"); ok || c.cost != 8 {
		t.Errorf("what costs more than all may is kept; all cost %d", c.cost)
	}
	c.Put("a", 5, 10)
	if v, _ := c.Get("a"); v != 5 || c.cost != 10 || len(c.items) != 1 || c.order.Len() != 1 {
		t.Errorf("a is %d; %d cost %d", v, len(c.items), c.cost)
	}
	c.Put("a", 6, 11)
	c.Delete("none")
	if _, ok := c.Get("a"); ok || c.cost != 0 || c.order.Len() != 0 {
		t.Errorf("an old value is kept in place of one that cost too much (%d)", c.cost)
	}
	c.Put("e", 7, 1)
	c.Delete("e")
	if _, ok := c.Get("e"); ok || c.cost != 0 {
		t.Error("e is still there")
	}
}
