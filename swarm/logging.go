package swarm

import (
	"context"
	"log/slog"
	"time"

	"github.com/anacrolix/log"
)

// demoted passes what the torrent client logs on at debug level, whatever the
// client thinks of it: what matters to an operator is logged by this package.
type demoted struct{ slog.Handler }

// Enabled is true of warnings and worse: the client's own debug output is
// hundreds of lines a second.
func (d demoted) Enabled(ctx context.Context, l slog.Level) bool {
	return l >= slog.LevelWarn && d.Handler.Enabled(ctx, slog.LevelDebug)
}

func (d demoted) Handle(ctx context.Context, r slog.Record) error {
	r.Level = slog.LevelDebug
	return d.Handler.Handle(ctx, r)
}

func (d demoted) WithAttrs(attrs []slog.Attr) slog.Handler {
	return demoted{d.Handler.WithAttrs(attrs)}
}

func (d demoted) WithGroup(name string) slog.Handler {
	return demoted{d.Handler.WithGroup(name)}
}

// Handle takes what the client logs through its older logger. The adapter that
// comes with it panics when the handler returns an error.
func (d demotedAnalog) Handle(r log.Record) {
	if d.Enabled(context.Background(), slog.LevelWarn) {
		_ = d.Handler.Handle(context.Background(), slog.NewRecord(time.Now(), slog.LevelDebug, r.Text(), 0))
	}
}

type demotedAnalog struct{ demoted }

// libraryLoggers returns the loggers to give to the torrent client.
func libraryLoggers(l *slog.Logger) (log.Logger, *slog.Logger) {
	d := demoted{l.With("part", "torrent").Handler()}
	old := log.NewLogger().WithDefaultLevel(log.Debug).WithFilterLevel(log.Warning)
	old.SetHandlers(demotedAnalog{d})
	if !d.Enabled(context.Background(), slog.LevelWarn) {
		old = old.WithFilterLevel(log.Disabled)
	}
	return old, slog.New(d)
}
