// Package notifier is the program beside a registry: it hears of pushed images
// through webhooks and feeds, keeps what it heard in a queue, and works that off
// by asking nodes to prefetch. It connects the packages below it; they do not
// know each other, but for the events.
package notifier

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/imagewolf/imagewolf/config"
	"github.com/imagewolf/imagewolf/internal/serve"
	"github.com/imagewolf/imagewolf/internal/systemd"
	"github.com/imagewolf/imagewolf/notifier/api"
	"github.com/imagewolf/imagewolf/notifier/event"
	"github.com/imagewolf/imagewolf/notifier/feed"
	"github.com/imagewolf/imagewolf/notifier/metrics"
	"github.com/imagewolf/imagewolf/notifier/queue"
	"github.com/imagewolf/imagewolf/notifier/receive"
	"github.com/imagewolf/imagewolf/notifier/work"
)

// Options are what a notifier is made of beside its settings.
type Options struct {
	Log      *slog.Logger // nil logs nothing
	Rules    work.Rules
	Nodes    api.Nodes
	Listener net.Listener // nil: one at the address of the settings
	Metrics  net.Listener // nil: one at the address of the settings, if there is one
}

// Notifier is one notifier. Run is called once.
type Notifier struct {
	settings config.Notifier
	options  Options
	log      *slog.Logger
}

// New returns a notifier. It opens and starts nothing; its error is a setting
// that cannot work, though Validate found nothing.
func New(c config.Notifier, o Options) (*Notifier, error) {
	n := &Notifier{settings: c, options: o, log: cmp.Or(o.Log, slog.New(slog.DiscardHandler))}
	_, err := receive.New(c, nil, receive.Options{})
	_, pollers := n.pollers(nil, nil)
	return n, errors.Join(err, pollers)
}

// Run serves and works until the context ends, or until something fails that
// cannot be done without: the queue's file, an address to listen on. It lets
// requests under way come to their end, and the event that is worked on is
// worked on again after the next start.
func (n *Notifier) Run(ctx context.Context) (err error) {
	history := 0
	if n.settings.Feed.On() {
		history = n.settings.Feed.History
	}
	q, err := queue.Open(n.settings.Queue, queue.Options{
		Log: n.log, History: history, Record: func(e event.Event) bool { return !feed.Polled(e) },
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, q.Close()) }()

	count := counts{Metrics: metrics.New(q.Stats, slices.Sorted(maps.Keys(n.settings.Poll))...), queue: q}
	group, ctx := errgroup.WithContext(ctx)
	parts := n.parts(ctx, q, count)
	hooks, err := receive.New(n.settings, q, receive.Options{Log: n.log, Wrap: parts.wrap})
	if err != nil {
		return err
	}
	pollers, err := n.pollers(q, count)
	if err != nil {
		return err
	}
	l, err := listen(ctx, n.options.Listener, n.settings.Listen)
	if err != nil {
		return err
	}
	if address := n.settings.Metrics.Address; address != "" || n.options.Metrics != nil {
		ml, err := listen(ctx, n.options.Metrics, address)
		if err != nil {
			return errors.Join(fmt.Errorf("metrics.address: %w", err), l.Close())
		}
		group.Go(func() error { return serveMetrics(ctx, ml, count.Metrics) })
	}
	worker := work.New(n.options.Rules, n.options.Nodes, count, n.log)
	group.Go(func() error { return hooks.Run(ctx, l) })
	group.Go(func() error { return q.Run(ctx, worker.Work) })
	for _, p := range pollers {
		group.Go(func() error { return p.Run(ctx) })
	}
	n.log.Info("serving", "address", l.Addr().String(), "receivers", len(n.settings.Receiver), "polls", len(pollers),
		"feed", n.settings.Feed.On(), "api", n.settings.API.On(), "events_waiting", q.Stats().Waiting)
	group.Go(func() error {
		systemd.Watch(ctx, n.log, func(ctx context.Context) error { return alive(ctx, q) })
		return nil
	})
	systemd.Tell(n.log, systemd.Ready)
	defer context.AfterFunc(ctx, func() { systemd.Tell(n.log, systemd.Stopping) })()
	return group.Wait()
}

func listen(ctx context.Context, l net.Listener, address string) (net.Listener, error) {
	if l != nil {
		return l, nil
	}
	return (&net.ListenConfig{}).Listen(ctx, "tcp", address)
}

// alive returns nil if the queue answers before ctx ends. Everything that the
// program does goes through the queue: a program that hangs there takes no event
// and works none off. An error of the file is an answer: senders are told, and
// starting again would not help. The way in is not tried: who keeps it busy from
// outside must not be able to have the program started again and again.
func alive(ctx context.Context, q interface {
	Stats() queue.Stats
	Position(name string) ([]byte, error)
}) error {
	answered := make(chan struct{})
	go func() { // who hangs in there cannot be waited for: it is what systemd ends the program for
		defer close(answered)
		q.Stats()
		_, _ = q.Position("")
	}()
	select {
	case <-answered:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("the queue does not answer: %w", ctx.Err())
	}
}

// pollers returns one for each feed that is polled.
func (n *Notifier) pollers(q feed.Queue, c feed.Counts) ([]*feed.Poller, error) {
	var out []*feed.Poller
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(n.settings.Poll)) {
		p, err := feed.NewPoller(name, n.settings.Poll[name], q, feed.PollerOptions{Log: n.log, Counts: c})
		if err != nil {
			errs = append(errs, fmt.Errorf("poll.%s%w", name, err))
			continue
		}
		out = append(out, p)
	}
	return out, errors.Join(errs...)
}

// counts is where all parts count.
type counts struct {
	*metrics.Metrics
	queue *queue.Queue
}

// Nothing counts what leads to nothing beside what the queue counts itself.
func (c counts) Nothing(why event.Kind) { c.queue.Count(why) }

// Panicked counts a panic beside those that the queue counts itself.
func (c counts) Panicked() { c.queue.Panicked() }

// parts are what answers beside the receivers.
type parts struct {
	ctx       context.Context // of Run: what waits for long waits no longer when it ends
	count     counts
	feed      *feed.Handler // nil: not served
	feedPath  string
	api       *api.Handler // nil: not served
	receivers http.Handler
}

func (n *Notifier) parts(ctx context.Context, q *queue.Queue, count counts) *parts {
	p := &parts{ctx: ctx, count: count, feedPath: n.settings.Feed.Path}
	if n.settings.Feed.On() {
		p.feed = feed.NewHandler(n.settings.Feed, q, n.log)
	}
	if n.settings.API.On() {
		p.api = api.New(n.settings.API, n.options.Rules, n.options.Nodes, count, n.log)
	}
	return p
}

func (p *parts) wrap(receivers http.Handler) http.Handler {
	p.receivers = receivers
	return p
}

// ServeHTTP has the part answer that the path is one of, and counts it.
func (p *parts) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	start, told := time.Now(), &answer{ResponseWriter: w, status: http.StatusOK}
	part := "webhook"
	switch at := req.URL.Path; {
	case at == "/healthz":
		part = "other"
		healthy(told, req)
	case p.api != nil && (at == "/v1/prefetch" || strings.HasPrefix(at, "/v1/prefetch/")):
		part = "api"
		ctx, cancel := context.WithCancel(req.Context())
		stop := context.AfterFunc(p.ctx, cancel)
		p.api.ServeHTTP(told, req.WithContext(ctx))
		stop()
		cancel()
	case p.feed != nil && (at == p.feedPath+"/atom" || at == p.feedPath+"/rss"):
		part = "feed"
		p.feed.ServeHTTP(told, req)
	default:
		p.receivers.ServeHTTP(told, req)
	}
	p.count.Answered(part, told.status, time.Since(start))
}

// answer remembers the status.
type answer struct {
	http.ResponseWriter
	status int
}

// WriteHeader implements http.ResponseWriter.
func (a *answer) WriteHeader(status int) {
	a.status = status
	a.ResponseWriter.WriteHeader(status)
}

// Unwrap is for http.ResponseController.
func (a *answer) Unwrap() http.ResponseWriter { return a.ResponseWriter }

// healthy answers that the program runs. It ends when it cannot go on, so there
// is no other answer.
func healthy(w http.ResponseWriter, req *http.Request) {
	if req.Method != http.MethodGet && req.Method != http.MethodHead {
		w.Header().Set("Allow", "GET, HEAD")
		http.Error(w, "asked with GET", http.StatusMethodNotAllowed)
		return
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	_, _ = w.Write([]byte("ok\n"))
}

// serveMetrics answers on l until ctx ends, and closes it.
func serveMetrics(ctx context.Context, l net.Listener, m *metrics.Metrics) error {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", m.Handler())
	mux.HandleFunc("GET /healthz", healthy)
	if err := serve.HTTP(ctx, l, mux); err != nil {
		return fmt.Errorf("metrics.address: %w", err)
	}
	return nil
}
