package queue

import (
	"errors"
	"testing"
	"testing/synctest"

	"go.etcd.io/bbolt"
)

// What comes while a transaction is written shares the next one, and who comes
// alone waits for nobody. An error is that of all who shared.
func TestChangesShareATransaction(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gate := make(chan struct{})
		var shared []int // changes in each transaction
		changes := 0
		c := newCommits(func(f func(*bbolt.Tx) error) error {
			changes = 0
			err := f(nil)
			shared = append(shared, changes)
			<-gate
			return err
		})
		results := make(chan error, 5)
		commit := func(err error) {
			go func() {
				results <- c.commit(func(*bbolt.Tx) error {
					changes++
					return err
				})
			}()
			synctest.Wait()
		}
		commit(nil)
		if len(shared) != 1 {
			t.Fatal("one that came alone waits")
		}
		broken := errors.New("broken")
		commit(nil)
		commit(nil)
		commit(broken)
		gate <- struct{}{}
		synctest.Wait()
		if err := <-results; err != nil || len(results) != 0 {
			t.Errorf("the first: %v, and %d more have ended", err, len(results))
		}
		commit(nil) // too late for the one that is written now
		gate <- struct{}{}
		synctest.Wait()
		for range 3 {
			if err := <-results; !errors.Is(err, broken) {
				t.Errorf("one of those that shared: %v", err)
			}
		}
		gate <- struct{}{}
		if err := <-results; err != nil {
			t.Errorf("the last: %v", err)
		}
		if len(shared) != 3 || shared[0] != 1 || shared[1] != 3 || shared[2] != 1 {
			t.Errorf("%v changes in each transaction", shared)
		}
	})
}

// A transaction that breaks down must leave nobody waiting.
func TestATransactionThatPanicsIsAnErrorForTheOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gate := make(chan struct{})
		c := newCommits(func(f func(*bbolt.Tx) error) error {
			<-gate
			return f(nil)
		})
		go func() { _ = c.commit(func(*bbolt.Tx) error { return nil }) }()
		synctest.Wait()
		panicked := make(chan any, 1)
		go func() {
			defer func() { panicked <- recover() }()
			_ = c.commit(func(*bbolt.Tx) error { panic("broken") })
		}()
		synctest.Wait()
		other := make(chan error, 1)
		go func() { other <- c.commit(func(*bbolt.Tx) error { return nil }) }()
		synctest.Wait()
		close(gate)
		if p := <-panicked; p != "broken" {
			t.Errorf("recovered %v", p)
		}
		if err := <-other; err == nil {
			t.Error("taken, though the transaction was not written")
		}
	})
}
