package notifier

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/imagewolf/imagewolf/internal/systemd/systemdtest"
	"github.com/imagewolf/imagewolf/notifier/queue"
)

// TestSystemdIsTold: that the notifier is ready, that it lives, and that it stops.
func TestSystemdIsTold(t *testing.T) {
	s := systemdtest.Listen(t, 400*time.Millisecond)
	c := settings(t, newNodes(t))
	c.API.Token = secret
	r := start(t, c)
	s.Until(t, "READY=1")
	s.Until(t, "WATCHDOG=1")
	s.Until(t, "WATCHDOG=1")
	r.stop()
	s.Until(t, "STOPPING=1")
}

// stuck is a queue that does not answer until it is let go.
type stuck struct{ letGo chan struct{} }

func (s stuck) Stats() queue.Stats { return queue.Stats{} }

func (s stuck) Position(string) ([]byte, error) {
	<-s.letGo
	return nil, nil
}

// TestWatchdogMissesTheQueue: a queue that hangs is no life.
func TestWatchdogMissesTheQueue(t *testing.T) {
	q := stuck{make(chan struct{})}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := alive(ctx, q); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	close(q.letGo)
	if err := alive(t.Context(), q); err != nil {
		t.Errorf("a queue that answers: %v", err)
	}
}
