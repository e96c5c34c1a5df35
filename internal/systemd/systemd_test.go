package systemd_test

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/imagewolf/imagewolf/internal/systemd"
	"github.com/imagewolf/imagewolf/internal/systemd/systemdtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// What fails, and what does not answer, is no life.
func TestWatchdogIsToldOfLifeOnly(t *testing.T) {
	s := systemdtest.Listen(t, 40*time.Millisecond)
	ctx, cancel := context.WithCancel(t.Context())
	log := slog.New(slog.DiscardHandler)
	asked := 0
	systemd.Watch(ctx, log, func(ctx context.Context) error {
		switch asked++; asked {
		case 1:
			return nil
		case 2:
			return errors.New("not well")
		case 3:
			<-ctx.Done() // hangs
		default:
			cancel()
		}
		return ctx.Err()
	})
	systemd.Tell(log, "the end")
	for i, want := range []string{"WATCHDOG=1", "the end"} {
		if got := s.Next(t); got != want {
			t.Errorf("told %q as number %d, want %q", got, i+1, want)
		}
	}
}

func TestWithoutWatchdogNobodyIsAsked(t *testing.T) {
	t.Setenv("WATCHDOG_USEC", "")
	systemd.Watch(t.Context(), slog.New(slog.DiscardHandler), func(context.Context) error {
		t.Error("asked")
		return nil
	})
}
