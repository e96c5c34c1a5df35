package feed

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"runtime/debug"
	"strconv"
	"time"

	"github.com/imagewolf/imagewolf/config"
	"github.com/imagewolf/imagewolf/notifier/event"
)

// errPanic is why a feed is read again later whose reading panicked; the panic is
// logged where it is contained.
var errPanic = errors.New("reading it panicked")

const (
	maxBody    = 4 << 20 // of a document; a page of ours has at most half
	askTime    = 30 * time.Second
	maxBackoff = 15 * time.Minute
	maxRefusal = time.Hour // longest Retry-After that is heeded
)

// Queue takes what was read, and keeps how far.
type Queue interface {
	// Put keeps the result's events, all or none of them, and counts what leads
	// to nothing. It returns nil once the events cannot get lost any more.
	Put(ctx context.Context, r event.Result) error
	// Position returns what SetPosition kept under the name, or nil.
	Position(name string) ([]byte, error)
	// SetPosition keeps how far the feed of that name was read.
	SetPosition(name string, position []byte) error
}

// Counts are told what became of requests. The methods do not block.
type Counts interface {
	// Polled counts a request, and whether it was answered.
	Polled(name string, ok bool)
	// Missed counts events that the feed no longer had.
	Missed(name string, n uint64)
	// Panicked counts a panic that was contained.
	Panicked()
}

// PollerOptions are what a poller may be given beside its settings.
type PollerOptions struct {
	Log       *slog.Logger      // nil logs nothing
	Counts    Counts            // nil counts nothing
	Transport http.RoundTripper // nil: one that trusts the feed's ca_file
}

// Poller reads one feed into the queue. Each event is put there before it counts
// as read, so that none is lost whichever side is started anew; one that comes
// twice for it is known by its entry's id.
type Poller struct {
	name     string
	settings config.Poll
	url      url.URL
	queue    Queue
	log      *slog.Logger
	counts   Counts
	client   *http.Client
	at       *position // nil: nothing was read yet; Run's
}

// position is how far a feed was read.
type position struct {
	Feed     string `json:"feed"`     // the history's id
	Sequence uint64 `json:"sequence"` // of the last event that was put
	// Of the answer to a request for what comes after Sequence.
	ETag     string `json:"etag,omitempty"`
	Modified string `json:"modified,omitempty"`
}

// NewPoller returns a poller of the feed called name. It asks nothing before
// Run; its error is a setting that cannot work, beginning with the setting's key.
func NewPoller(name string, c config.Poll, q Queue, o PollerOptions) (*Poller, error) {
	u, err := url.Parse(c.URL)
	if err != nil {
		return nil, fmt.Errorf(".url: %w", err)
	}
	if o.Transport == nil {
		t, err := transport(c.CAFile)
		if err != nil {
			return nil, fmt.Errorf(".ca_file: %w", err)
		}
		o.Transport = t
	}
	p := &Poller{name: name, settings: c, url: *u, queue: q, counts: o.Counts, log: cmp.Or(o.Log, slog.New(slog.DiscardHandler)).With("poll", name)}
	p.client = &http.Client{
		Transport: o.Transport, Timeout: askTime,
		// The token is for the one host that was named.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return p, nil
}

func transport(caFile string) (*http.Transport, error) {
	t := &http.Transport{
		Proxy: http.ProxyFromEnvironment, ForceAttemptHTTP2: true, MaxResponseHeaderBytes: 64 << 10, IdleConnTimeout: time.Minute,
		TLSHandshakeTimeout: 10 * time.Second, TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12},
	}
	if caFile == "" {
		return t, nil
	}
	pem, err := os.ReadFile(caFile)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("no certificate in PEM in %s", caFile)
	}
	t.TLSClientConfig.RootCAs = pool
	return t, nil
}

// Run reads the feed again and again until the context ends. Its error is the
// queue's, that cannot say how far the feed was read.
func (p *Poller) Run(ctx context.Context) error {
	defer p.client.CloseIdleConnections()
	kept, err := p.queue.Position(p.name)
	if err != nil {
		return fmt.Errorf("poll.%s: %w", p.name, err)
	}
	if len(kept) > 0 {
		var at position
		if err := json.Unmarshal(kept, &at); err != nil {
			return fmt.Errorf("poll.%s: how far it was read cannot be read: %w", p.name, err)
		}
		p.at = &at
	}
	failures := 0
	for {
		err := p.round(ctx)
		if ctx.Err() != nil {
			return nil //nolint:nilerr // the context's end is how Run is ended
		}
		if p.counts != nil {
			p.counts.Polled(p.name, err == nil)
		}
		wait := p.settings.Interval.Duration()
		if err == nil {
			failures = 0
		} else {
			wait = backoff(wait, failures, err)
			failures++
			p.log.Warn("a feed cannot be read", "error", err, "failures", failures, "again_in", wait.Round(time.Second))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(jittered(wait)):
		}
	}
}

// backoff doubles the interval with every failure, and heeds what the feed asks
// for.
func backoff(interval time.Duration, failures int, err error) time.Duration {
	wait := max(interval, min(interval<<min(failures+1, 20), maxBackoff))
	var refused *refusal
	if errors.As(err, &refused) {
		wait = max(wait, min(refused.after, maxRefusal))
	}
	return wait
}

// jittered returns about d: pollers that began together do not stay so.
func jittered(d time.Duration) time.Duration {
	return d - d/10 + rand.N(d/5+1)
}

// refusal is an answer without a feed in it.
type refusal struct {
	status int
	after  time.Duration
}

// Error implements error.
func (r *refusal) Error() string {
	hint := ""
	switch {
	case r.status == http.StatusUnauthorized || r.status == http.StatusForbidden:
		hint = ": is the token one of the feed's?"
	case r.status == http.StatusNotFound:
		hint = ": is the feed served there, and does it have a token?"
	case r.status >= 300 && r.status < 400:
		hint = ": it is elsewhere; set url to where it is"
	}
	return fmt.Sprintf("the feed answers %d %s%s", r.status, http.StatusText(r.status), hint)
}

// round reads all that there is, and makes a panic an error: what a feed holds is
// foreign, and one that ended the process would do so again after every start.
func (p *Poller) round(ctx context.Context) (err error) {
	defer func() {
		if v := recover(); v != nil {
			p.log.Error("panic over a feed", "err", fmt.Sprintf("%v\n%s", v, debug.Stack()))
			if p.counts != nil {
				p.counts.Panicked()
			}
			err = errPanic
		}
	}()
	for ctx.Err() == nil {
		more, err := p.step(ctx)
		if err != nil || !more {
			return err
		}
	}
	return ctx.Err()
}

// step reads one document, and tells whether there is more.
func (p *Poller) step(ctx context.Context) (more bool, err error) {
	var after *uint64
	if p.at != nil {
		after = &p.at.Sequence
	}
	doc, head, err := p.ask(ctx, after)
	if err != nil || doc == nil {
		return false, err
	}
	got, err := read(doc)
	if err != nil {
		return false, err
	}
	switch {
	case p.at == nil && !p.settings.FromStart:
		p.log.Info("a feed is read from now on", "events_before", got.last)
		return false, p.move(position{Feed: got.id, Sequence: got.last})
	case p.at == nil:
		return true, p.move(position{Feed: got.id}) // and ask anew, so that the page is for it
	case got.id != p.at.Feed || got.last < p.at.Sequence:
		p.log.Warn("the feed's history is another one, and is read from its start; what came before it and was not read is missed",
			"was", p.at.Feed, "is", got.id, "read", p.at.Sequence, "last", got.last)
		return true, p.move(position{Feed: got.id})
	}
	return p.take(ctx, got, head)
}

// take puts a page's events into the queue, and then remembers that it did.
func (p *Poller) take(ctx context.Context, got page, head http.Header) (more bool, err error) {
	next := *p.at
	var r event.Result
	for _, e := range got.entries {
		if e.sequence <= next.Sequence {
			continue // a feed that does not heed after=
		}
		if n := e.sequence - next.Sequence - 1; n > 0 {
			p.log.Warn("the feed no longer has events that were not read: it was not reached for too long; nodes pull those images when they are needed",
				"missed", n, "from", next.Sequence+1, "to", e.sequence-1)
			if p.counts != nil {
				p.counts.Missed(p.name, n)
			}
		}
		next.Sequence = e.sequence
		e.event.Source = sourceOf + p.name
		checked := event.Check(e.event)
		r.Events, r.Ignored = append(r.Events, checked.Events...), append(r.Ignored, checked.Ignored...)
	}
	for _, i := range r.Ignored {
		p.log.Warn("an event leads to nothing", "kind", string(i.Kind), "reason", i.Reason)
	}
	if next.Sequence == p.at.Sequence {
		if got.last > next.Sequence {
			return false, fmt.Errorf("the feed says that it has events up to %d, and shows none after %d", got.last, next.Sequence)
		}
		next.ETag, next.Modified = bounded(head.Get("ETag")), bounded(head.Get("Last-Modified"))
		return false, p.move(next)
	}
	if err := p.queue.Put(ctx, r); err != nil {
		return false, fmt.Errorf("the events cannot be kept now: %w", err)
	}
	next.ETag, next.Modified = "", "" // of another request
	return true, p.move(next)
}

// bounded returns s, or nothing where it is longer than any that is meant well.
func bounded(s string) string {
	if len(s) > 256 {
		return ""
	}
	return s
}

// move remembers how far the feed was read.
func (p *Poller) move(to position) error {
	if p.at != nil && *p.at == to {
		return nil
	}
	b, err := json.Marshal(to)
	if err != nil {
		return err
	}
	if err := p.queue.SetPosition(p.name, b); err != nil {
		return err
	}
	p.at = &to
	return nil
}

// ask returns a document, or nil if it is the one that was read last.
func (p *Poller) ask(ctx context.Context, after *uint64) ([]byte, http.Header, error) {
	u := p.url
	if after != nil {
		query := u.Query()
		query.Set("after", strconv.FormatUint(*after, 10))
		u.RawQuery = query.Encode()
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, nil, err
	}
	token, err := p.settings.ReadToken()
	if err != nil {
		return nil, nil, fmt.Errorf("the token: %w", err)
	}
	req.Header.Set("Authorization", "Bearer "+token)
	req.Header.Set("User-Agent", "imagewolf-notifier")
	req.Header.Set("Accept", "application/atom+xml, application/rss+xml")
	if p.at != nil && p.at.ETag != "" {
		req.Header.Set("If-None-Match", p.at.ETag)
	}
	if p.at != nil && p.at.Modified != "" {
		req.Header.Set("If-Modified-Since", p.at.Modified)
	}
	res, err := p.client.Do(req)
	if err != nil {
		return nil, nil, err
	}
	defer res.Body.Close() //nolint:errcheck // only read
	switch res.StatusCode {
	case http.StatusOK:
	case http.StatusNotModified:
		return nil, nil, nil
	default:
		seconds, _ := strconv.ParseUint(res.Header.Get("Retry-After"), 10, 16)
		return nil, nil, &refusal{status: res.StatusCode, after: time.Duration(seconds) * time.Second}
	}
	doc, err := io.ReadAll(io.LimitReader(res.Body, maxBody+1))
	if err != nil {
		return nil, nil, err
	}
	if len(doc) > maxBody {
		return nil, nil, fmt.Errorf("the feed's document is larger than %d bytes", maxBody)
	}
	return doc, res.Header, nil
}
