// Package receive is where registries' webhooks come in: an HTTP handler with
// one receiver for each, which finds out whether the sender is who it should
// be, has the body decoded, and hands the events to a queue before it answers.
//
// What is answered decides whether a sender tries again:
//
//	200  taken, or nothing to take (a ping, a delete): do not send it again
//	400  a body that cannot be read, 413 one that is too large; 200 to those
//	     senders that would otherwise repeat it without end and send nothing else
//	401  who sends did not prove who it is; 404 where the path is the proof
//	503  the queue takes no more, or SNS or an OIDC issuer could not be asked for its
//	     certificate or keys, or SNS to confirm a subscription: later
//
// Secrets, signatures, tokens and bodies are not logged, nor are URLs, which
// may hold a secret.
package receive

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"golang.org/x/time/rate"

	"github.com/imagewolf/imagewolf/config"
	"github.com/imagewolf/imagewolf/notifier/event"
)

const (
	maxAtOnce  = 32               // requests of one receiver whose bodies are in memory
	slotWait   = 5 * time.Second  // how long a further one waits
	readTime   = 15 * time.Second // for a whole request
	stopTime   = 10 * time.Second // for requests under way when the server ends
	outTime    = 10 * time.Second // for a request of our own
	retryAfter = "10"             // seconds
)

// Queue takes what deliveries said.
type Queue interface {
	// Put keeps the result's events, all or none of them, and counts what leads
	// to nothing. It returns nil once the events cannot get lost any more. It is
	// called concurrently.
	Put(ctx context.Context, r event.Result) error
}

// Options are what a handler may be given beside its settings.
type Options struct {
	Log *slog.Logger // nil logs nothing
	// Transport carries requests of our own: for the keys of OIDC issuers, and
	// to confirm subscriptions at SNS. Nil is http.DefaultTransport.
	Transport http.RoundTripper
	// Wrap returns what Run serves: the receivers, which it is given, and what
	// else there is. Nil: the receivers.
	Wrap func(receivers http.Handler) http.Handler
}

// Handler serves the receivers. It is safe for concurrent use.
type Handler struct {
	settings config.Notifier
	queue    Queue
	log      *slog.Logger
	client   *http.Client
	served   http.Handler         // by Run
	exact    map[string]*receiver // by path
	secret   map[string]*receiver // by path, of those where a secret follows
	refused  rate.Sometimes       // warnings about senders that are not let in
}

type receiver struct {
	name   string
	config config.Receiver
	atPath func(sent string) bool // what follows the path, or nil
	before check                  // of the head, or nil
	signed check                  // of head and body, or nil
	slots  chan struct{}
}

// sendAgain are the types whose senders repeat a request that was answered with
// an error until it is taken, and meanwhile send nothing else or pay for it: a
// body that can never be read must not stand in the way of those that can.
var sendAgain = map[string]bool{"distribution": true, "google": true}

// New returns a handler for the receivers of c. It fails on a receiver without
// authentication that does not say so, and on what else cannot work, naming the
// key. Other than that it does not judge the settings: see Validate.
func New(c config.Notifier, q Queue, o Options) (*Handler, error) {
	h := &Handler{
		settings: c, queue: q, log: o.Log, exact: map[string]*receiver{}, secret: map[string]*receiver{},
		client: &http.Client{
			Transport: o.Transport, Timeout: outTime,
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
		refused: rate.Sometimes{First: 5, Interval: time.Second},
	}
	if h.log == nil {
		h.log = slog.New(slog.DiscardHandler)
	}
	h.served = h
	if o.Wrap != nil {
		h.served = o.Wrap(h)
	}
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(c.Receiver)) {
		r := &receiver{name: name, config: c.Receiver[name], slots: make(chan struct{}, maxAtOnce)}
		if !slices.Contains(event.Types(), r.config.Type) {
			errs = append(errs, fmt.Errorf("receiver.%s.type: %q is none of %s", name, r.config.Type, strings.Join(event.Types(), ", ")))
			continue
		}
		if err := r.authenticate(h.client); err != nil {
			errs = append(errs, fmt.Errorf("receiver.%s%w", name, err))
			continue
		}
		paths := h.exact
		if r.atPath != nil {
			paths = h.secret
		}
		if paths[r.config.Path] != nil {
			errs = append(errs, fmt.Errorf("receiver.%s.path: %s is taken", name, r.config.Path))
		}
		paths[r.config.Path] = r
	}
	return h, errors.Join(errs...)
}

// Run serves on l, which it closes, until the context ends or the listener
// fails. It lets requests under way come to their end.
func (h *Handler) Run(ctx context.Context, l net.Listener) error {
	if h.settings.TLSCertFile != "" {
		l = tls.NewListener(l, &tls.Config{
			MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"},
			GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
				c, err := tls.LoadX509KeyPair(h.settings.TLSCertFile, h.settings.TLSKeyFile)
				return &c, err
			},
		})
	}
	s := &http.Server{
		Handler: h.served, ReadHeaderTimeout: readTime, ReadTimeout: readTime, WriteTimeout: 2 * readTime, IdleTimeout: 2 * time.Minute,
		MaxHeaderBytes: 16 << 10, ErrorLog: slog.NewLogLogger(h.log.Handler(), slog.LevelDebug),
	}
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(l) }()
	select {
	case err := <-ended:
		return fmt.Errorf("serve webhooks: %w", err)
	case <-ctx.Done():
	}
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTime)
	defer cancel()
	err := s.Shutdown(stop)
	if err != nil {
		err = errors.Join(fmt.Errorf("requests did not end in %s: %w", stopTime, err), s.Close())
	}
	if served := <-ended; !errors.Is(served, http.ErrServerClosed) {
		err = errors.Join(err, served)
	}
	return err
}

// ServeHTTP takes a webhook.
func (h *Handler) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	r, ok := h.find(req)
	if r == nil {
		http.Error(w, "no such receiver", http.StatusNotFound)
		return
	}
	if !ok {
		h.refuse(w, req, r, errors.New("the path's secret is wrong"))
		return
	}
	if shakeHands(w, req, r) {
		return
	}
	if req.Method != http.MethodPost {
		w.Header().Set("Allow", http.MethodPost)
		http.Error(w, "webhooks are sent with POST", http.StatusMethodNotAllowed)
		return
	}
	if r.before != nil && !h.passes(w, req, r, r.before(req, nil)) {
		return
	}
	if !r.enter(req.Context()) {
		later(w, "too many requests at once")
		return
	}
	defer func() { <-r.slots }()
	h.take(w, req, r)
}

// find returns the receiver that a request is for, and whether the request has
// the path's secret, where that is what proves who sends.
func (h *Handler) find(req *http.Request) (r *receiver, ok bool) {
	at := req.URL.Path
	if r := h.exact[at]; r != nil {
		return r, true
	}
	i := strings.LastIndexByte(at, '/')
	if i < 0 {
		return nil, false
	}
	if r := h.secret[at[:i]]; r != nil {
		return r, r.atPath(at[i+1:])
	}
	return nil, false
}

// enter waits for a slot, for a while.
func (r *receiver) enter(ctx context.Context) bool {
	t := time.NewTimer(slotWait)
	defer t.Stop()
	select {
	case r.slots <- struct{}{}:
		return true
	case <-t.C:
	case <-ctx.Done():
	}
	return false
}

// take reads, checks, decodes and hands on one delivery.
func (h *Handler) take(w http.ResponseWriter, req *http.Request, r *receiver) {
	ctx := req.Context()
	body, err := io.ReadAll(http.MaxBytesReader(w, req.Body, h.settings.MaxBody.Bytes()))
	var large *http.MaxBytesError
	switch {
	case errors.As(err, &large):
		h.unreadable(ctx, w, r, http.StatusRequestEntityTooLarge, fmt.Errorf("a body of more than %d bytes (max_body)", large.Limit))
		return
	case err != nil:
		h.log.DebugContext(ctx, "a webhook broke off", "receiver", r.name, "error", err)
		http.Error(w, "the body broke off", http.StatusBadRequest)
		return
	}
	if r.signed != nil && !h.passes(w, req, r, r.signed(req, body)) {
		return
	}
	result, err := event.Decode(r.config.Type, event.Delivery{
		Header: req.Header, Body: body, Registry: r.config.Registry, Topic: r.config.TopicARN,
		MaxEvents: h.settings.Queue.MaxPerBody(),
	})
	if err != nil {
		h.unreadable(ctx, w, r, http.StatusBadRequest, err)
		return
	}
	if result.Confirm != nil {
		if err := h.confirm(ctx, *result.Confirm); err != nil {
			h.log.WarnContext(ctx, "a subscription could not be confirmed", "receiver", r.name, "topic", result.Confirm.TopicARN, "error", err)
			later(w, "the subscription could not be confirmed")
			return
		}
		result.Ignored = append(result.Ignored, event.Ignored{Kind: event.Handshake, Reason: "SNS's handshake, confirmed"})
	}
	for i := range result.Events {
		e := &result.Events[i]
		// What tells no id of its own gets one, so that whatever is made of the event
		// has one that is its own, and the same at each try.
		e.Source, e.DeliveryID = r.name, cmp.Or(e.DeliveryID, rand.Text())
	}
	if err := h.queue.Put(ctx, result); err != nil {
		h.log.WarnContext(ctx, "events are refused", "receiver", r.name, "events", len(result.Events), "error", err)
		later(w, "the events cannot be kept now")
		return
	}
	h.tell(ctx, r, result)
	if result.Reply != nil {
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(result.Reply)
	}
}

func (h *Handler) tell(ctx context.Context, r *receiver, result event.Result) {
	for _, e := range result.Events {
		h.log.DebugContext(ctx, "an image was pushed", "receiver", r.name, "image", e.Image(), "delivery", e.DeliveryID)
	}
	for _, i := range result.Ignored {
		level := slog.LevelDebug
		switch i.Kind {
		case event.Invalid, event.TooMany:
			level = slog.LevelWarn
		case event.Handshake:
			level = slog.LevelInfo
		}
		h.log.Log(ctx, level, "an event leads to nothing", "receiver", r.name, "kind", string(i.Kind), "reason", i.Reason, "more", i.More)
	}
}

// unreadable answers a body that no repetition makes readable.
func (h *Handler) unreadable(ctx context.Context, w http.ResponseWriter, r *receiver, status int, why error) {
	h.log.WarnContext(ctx, "a webhook cannot be read", "receiver", r.name, "type", r.config.Type, "error", why)
	h.count(ctx, event.Unreadable, why)
	if sendAgain[r.config.Type] {
		return
	}
	http.Error(w, "this is not what receivers of this type take", status)
}

// passes tells whether a check has found nothing wrong, and answers if it has.
func (h *Handler) passes(w http.ResponseWriter, req *http.Request, r *receiver, found error) bool {
	switch {
	case errors.Is(found, errNotNow):
		h.refused.Do(func() {
			h.log.WarnContext(req.Context(), "whether a sender is who it should be cannot be found out now", "receiver", r.name, "error", found)
		})
		later(w, "who sends cannot be checked now")
	case found != nil:
		h.refuse(w, req, r, found)
	}
	return found == nil
}

// refuse answers a sender that did not prove who it is.
func (h *Handler) refuse(w http.ResponseWriter, req *http.Request, r *receiver, why error) {
	h.refused.Do(func() {
		h.log.WarnContext(req.Context(), "a sender is refused", "receiver", r.name, "remote", req.RemoteAddr, "auth", r.config.Auth, "error", why)
	})
	h.count(req.Context(), event.Refused, why)
	switch r.config.Auth {
	case "path":
		http.Error(w, "no such receiver", http.StatusNotFound)
		return
	case "basic": // SNS sends its password only when it is asked
		w.Header().Set("WWW-Authenticate", `Basic realm="imagewolf"`)
	case "bearer", "oidc":
		w.Header().Set("WWW-Authenticate", "Bearer")
	}
	http.Error(w, "not authenticated", http.StatusUnauthorized)
}

// count tells the queue of something that leads to nothing; it has nothing to
// keep, so there is nothing to fail.
func (h *Handler) count(ctx context.Context, k event.Kind, why error) {
	err := h.queue.Put(ctx, event.Result{Ignored: []event.Ignored{{Kind: k, Reason: why.Error()}}})
	if err != nil {
		h.log.WarnContext(ctx, "not counted", "kind", string(k), "error", err)
	}
}

func later(w http.ResponseWriter, why string) {
	w.Header().Set("Retry-After", retryAfter)
	http.Error(w, why, http.StatusServiceUnavailable)
}

// confirm tells SNS that a subscription is wanted. The URL is made here, of
// what the decoder compared with the receiver's topic_arn.
func (h *Handler) confirm(ctx context.Context, s event.Subscription) error {
	ctx, cancel := context.WithTimeout(ctx, outTime)
	defer cancel()
	u := url.URL{Scheme: "https", Host: s.Host, Path: "/", RawQuery: url.Values{
		"Action": {"ConfirmSubscription"}, "TopicArn": {s.TopicARN}, "Token": {s.Token},
	}.Encode()}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return errors.New("the topic's host makes no URL")
	}
	res, err := h.client.Do(req)
	if err != nil {
		var at *url.Error
		if errors.As(err, &at) { // its text has the URL, and so the token
			err = at.Err
		}
		return fmt.Errorf("%s: %w", s.Host, err)
	}
	defer res.Body.Close() //nolint:errcheck // only read
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("%s answered %s", s.Host, cmp.Or(http.StatusText(res.StatusCode), "with no known status"))
	}
	return nil
}
