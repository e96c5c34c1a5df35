// Package systemd tells systemd how the program is, if that started it.
package systemd

import (
	"context"
	"log/slog"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

// What systemd is told.
const (
	Ready    = daemon.SdNotifyReady
	Stopping = daemon.SdNotifyStopping
)

// Tell says something to systemd. That it could not be said is logged: the
// program goes on without.
func Tell(log *slog.Logger, state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		log.Warn("systemd was not told", "state", state, "err", err)
	}
}

// Watch keeps systemd's watchdog quiet for as long as alive returns nil; without
// a watchdog it returns at once. It blocks until ctx ends. alive is called four
// times within the time after which systemd starts the program again, and its
// context ends after half of that.
func Watch(ctx context.Context, log *slog.Logger, alive func(ctx context.Context) error) {
	limit, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		log.Warn("systemd's watchdog is not served", "err", err)
	}
	if limit == 0 {
		return
	}
	tick := time.NewTicker(limit / 4)
	defer tick.Stop()
	for {
		asked, cancel := context.WithTimeout(ctx, limit/2)
		err := alive(asked)
		cancel()
		switch {
		case err == nil:
			Tell(log, daemon.SdNotifyWatchdog)
		case ctx.Err() == nil:
			log.Error("systemd's watchdog is not told that the program lives, and will start it again", "err", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}
