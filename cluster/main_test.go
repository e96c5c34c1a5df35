package cluster

import (
	"context"
	"log/slog"
	"net"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is how long a test waits for what is to happen in milliseconds, on a machine
// that has nothing else to do.
const patience = time.Minute

var silent = slog.New(slog.DiscardHandler)

// everyone is a membership of all who have a certificate of the cluster.
type everyone struct{}

func (everyone) Admits(string) bool                 { return true }
func (everyone) Await(context.Context, string) bool { return true }
func (everyone) Connected(net.Conn)                 {}

func keyed(t *testing.T, key, name string) *Identity {
	t.Helper()
	id, err := LoadIdentity(IdentityOptions{ClusterKey: key, NodeName: name, Log: silent})
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// start runs f until the test ends, and the test does not end before f does.
func start(t *testing.T, f func(context.Context) error) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f(ctx) }()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Run: %v", err)
			}
		case <-time.After(patience):
			t.Error("Run does not end")
		}
	}
	t.Cleanup(stop)
	return stop
}

// eventually polls for what nothing announces.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	limit := time.NewTimer(patience)
	defer limit.Stop()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-limit.C:
			t.Fatalf("not after %v: %s", patience, what)
		}
	}
}
