// Package api lets CI systems ask for a prefetch by name, over HTTP, and wait
// for it:
//
//	POST /v1/prefetch               what is wanted, as JSON; 202 and the prefetch's state
//	GET  /v1/prefetch/ID?wait=60s   its state, when nothing is left to do or the time is up
//
// A caller has a token, and sends it or signs with it. That lets it name images
// and nodes, and no more: the allow-list holds, a rule must match the image, and
// what the rule says of signatures, platforms and nodes holds too. What the
// caller wishes can only be less.
//
// What is answered, with {"error": "..."} where it is not the state:
//
//	202  the nodes took the request; 200 to GET
//	400  the request cannot be understood, or a node does not understand it
//	401  no token, or a wrong one
//	403  the allow-list, the rules or the signature say no
//	404  no such prefetch
//	409  the id is one of another image
//	413  a body that is too large
//	503  a registry, the nodes or the notifier cannot answer now: later
package api

import (
	"cmp"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	imagewolfv1 "github.com/imagewolf/imagewolf/api/v1"
	"github.com/imagewolf/imagewolf/config"
	"github.com/imagewolf/imagewolf/notifier/event"
	"github.com/imagewolf/imagewolf/notifier/work"
)

const (
	maxBody    = 64 << 10
	maxPosts   = 16               // decided at the same time
	maxGets    = 256              // that wait at the same time
	maxUnknown = 256              // whose bodies are read at the same time to see whether their signature is right
	readTime   = 5 * time.Second  // for the body of one of these
	decideTime = time.Minute      // for a POST: rules may ask the registry
	maxWait    = 10 * time.Minute // for a GET
	writeTime  = 10 * time.Second // for an answer
	source     = "api"            // of its events
	retryAfter = "10"             // seconds
)

// Nodes take requests and tell of them.
type Nodes interface {
	work.Nodes
	GetPrefetch(ctx context.Context, in *imagewolfv1.GetPrefetchRequest, opts ...grpc.CallOption) (*imagewolfv1.PrefetchStatus, error)
	WatchPrefetch(ctx context.Context, in *imagewolfv1.GetPrefetchRequest, opts ...grpc.CallOption) (grpc.ServerStreamingClient[imagewolfv1.PrefetchStatus], error)
}

// Counts are told what led to nothing, and what did not. The methods do not
// block.
type Counts interface {
	Nothing(why event.Kind)
	Requested(rule string)
}

// Handler serves the API. It is safe for concurrent use.
type Handler struct {
	settings    config.NotifierAPI
	rules       work.Rules
	nodes       Nodes
	counts      Counts
	log         *slog.Logger
	mux         *http.ServeMux
	posts, gets chan struct{}
	unknown     chan struct{}  // has an entry for each body of a caller that may be a stranger
	refused     rate.Sometimes // lines of the log about strangers
}

// New returns a handler. A nil log logs nothing.
func New(c config.NotifierAPI, r work.Rules, n Nodes, counts Counts, log *slog.Logger) *Handler {
	h := &Handler{
		settings: c, rules: r, nodes: n, counts: counts, log: cmp.Or(log, slog.New(slog.DiscardHandler)),
		mux: http.NewServeMux(), posts: make(chan struct{}, maxPosts), gets: make(chan struct{}, maxGets),
		unknown: make(chan struct{}, maxUnknown), refused: rate.Sometimes{First: 5, Interval: time.Second},
	}
	h.mux.HandleFunc("POST /v1/prefetch", h.limited(h.posts, h.post))
	h.mux.HandleFunc("GET /v1/prefetch/{id}", h.limited(h.gets, h.get))
	return h
}

// ServeHTTP answers requests below /v1/prefetch.
func (h *Handler) ServeHTTP(w http.ResponseWriter, req *http.Request) { h.mux.ServeHTTP(w, req) }

// problem is an answer that is none of those that were hoped for.
type problem struct {
	status int
	text   string
}

// Error implements error.
func (p *problem) Error() string { return p.text }

// errBusy is what callers are told for whom there is no place.
var errBusy = &problem{http.StatusServiceUnavailable, "too many requests at once"}

// take takes a place, if there is one.
func take(places chan struct{}) (leave func(), ok bool) {
	select {
	case places <- struct{}{}:
		return func() { <-places }, true
	default:
		return nil, false
	}
}

// limited answers who has the token, and not too many at once. Strangers take no
// place of theirs.
func (h *Handler) limited(slots chan struct{}, serve func(*http.Request, []byte) (int, any, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, req *http.Request) {
		control := http.NewResponseController(w)
		signed, err := h.known(w, control, req)
		if err != nil {
			h.fail(w, req, err)
			return
		}
		leave, ok := take(slots)
		if !ok {
			h.fail(w, req, errBusy)
			return
		}
		defer leave()
		body := signed
		if body == nil {
			if body, err = read(w, req); err != nil {
				h.fail(w, req, err)
				return
			}
		}
		// The server's own bounds are for webhooks: an answer may take longer here.
		if err := errors.Join(control.SetReadDeadline(time.Time{}), control.SetWriteDeadline(time.Time{})); err != nil && !errors.Is(err, http.ErrNotSupported) {
			h.fail(w, req, err)
			return
		}
		code, answer, err := serve(req, body)
		if deadline := control.SetWriteDeadline(time.Now().Add(writeTime)); deadline != nil && !errors.Is(deadline, http.ErrNotSupported) {
			err = errors.Join(err, deadline)
		}
		if err != nil {
			h.fail(w, req, err)
			return
		}
		h.answer(w, req, code, answer)
	}
}

// known finds out whether a caller is known. The body of one that signs it has to be
// read for that, in places of its own and not for long; it is returned, and else nil.
func (h *Handler) known(w http.ResponseWriter, control *http.ResponseController, req *http.Request) (signed []byte, err error) {
	if !byBody(req) {
		return nil, h.authenticate(req, nil)
	}
	if _, err := signature(req); err != nil {
		return nil, err
	}
	leave, ok := take(h.unknown)
	if !ok {
		return nil, errBusy
	}
	defer leave()
	if err := control.SetReadDeadline(time.Now().Add(readTime)); err != nil && !errors.Is(err, http.ErrNotSupported) {
		return nil, err
	}
	if signed, err = read(w, req); err != nil {
		return nil, err
	}
	return signed, h.authenticate(req, signed)
}

// read returns the whole body, which is never nil.
func read(w http.ResponseWriter, req *http.Request) ([]byte, error) {
	body, err := io.ReadAll(http.MaxBytesReader(w, req.Body, maxBody))
	var large *http.MaxBytesError
	switch {
	case errors.As(err, &large):
		return nil, &problem{http.StatusRequestEntityTooLarge, "the body is too large"}
	case err != nil:
		return nil, &problem{http.StatusBadRequest, "the body broke off"}
	}
	return body, nil
}

func (h *Handler) answer(w http.ResponseWriter, req *http.Request, code int, answer any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(code)
	if err := json.NewEncoder(w).Encode(answer); err != nil {
		h.log.DebugContext(req.Context(), "an answer broke off", "error", err)
	}
}

func (h *Handler) fail(w http.ResponseWriter, req *http.Request, err error) {
	var p *problem
	if !errors.As(err, &p) {
		p = ofNodes(err)
	}
	switch p.status {
	case http.StatusUnauthorized:
		w.Header().Set("WWW-Authenticate", "Bearer")
		h.counts.Nothing(event.Refused)
		h.refused.Do(func() { h.tell(req, p) })
		h.answer(w, req, p.status, map[string]string{"error": p.text})
		return
	case http.StatusServiceUnavailable:
		w.Header().Set("Retry-After", retryAfter)
	}
	h.tell(req, p)
	h.answer(w, req, p.status, map[string]string{"error": p.text})
}

func (h *Handler) tell(req *http.Request, p *problem) {
	h.log.InfoContext(req.Context(), "a request to prefetch is not served", "status", p.status, "reason", p.text, "remote", req.RemoteAddr)
}

// ofNodes makes an answer of an error of the Node API, or of anything else that
// may pass.
func ofNodes(err error) *problem {
	switch s := status.Convert(err); s.Code() {
	case codes.InvalidArgument, codes.OutOfRange:
		return &problem{http.StatusBadRequest, s.Message()}
	case codes.NotFound:
		return &problem{http.StatusNotFound, "no such prefetch; those of the last day are known"}
	default:
		return &problem{http.StatusServiceUnavailable, err.Error()}
	}
}

// authenticate checks the token that was sent, or the signature of the body;
// where there is no body, of the path and the query.
func (h *Handler) authenticate(req *http.Request, body []byte) error {
	tokens, err := h.settings.Tokens()
	if err != nil {
		h.log.ErrorContext(req.Context(), "the API cannot be served: its tokens cannot be read", "error", err)
		return &problem{http.StatusServiceUnavailable, "not now"}
	}
	if sent, ok := bearer(req); ok {
		sum, found := sha256.Sum256([]byte(strings.TrimSpace(sent))), 0
		for _, t := range tokens {
			want := sha256.Sum256([]byte(t))
			found |= subtle.ConstantTimeCompare(sum[:], want[:])
		}
		if found == 1 {
			return nil
		}
		return &problem{http.StatusUnauthorized, "the token is wrong"}
	}
	mac, err := signature(req)
	if err != nil {
		return err
	}
	signed := body
	if req.Method == http.MethodGet {
		signed = []byte(req.URL.RequestURI())
	}
	for _, t := range tokens {
		m := hmac.New(sha256.New, []byte(t))
		m.Write(signed)
		if hmac.Equal(mac, m.Sum(nil)) {
			return nil
		}
	}
	return &problem{http.StatusUnauthorized, "the signature is wrong"}
}

func bearer(req *http.Request) (token string, ok bool) {
	scheme, token, _ := strings.Cut(req.Header.Get("Authorization"), " ")
	return token, strings.EqualFold(scheme, "bearer")
}

// signature returns the one that was sent, which may be anybody's.
func signature(req *http.Request) ([]byte, error) {
	text, ok := strings.CutPrefix(req.Header.Get("X-Signature"), "sha256=")
	mac, err := hex.DecodeString(text)
	if !ok || err != nil || len(mac) != sha256.Size {
		return nil, &problem{http.StatusUnauthorized, "neither a token (Authorization: Bearer) nor a signature (X-Signature: sha256=hex)"}
	}
	return mac, nil
}

// byBody tells whether only the body can show who calls.
func byBody(req *http.Request) bool {
	_, token := bearer(req)
	return !token && req.Method != http.MethodGet && req.Header.Get("X-Signature") != ""
}

func (h *Handler) post(req *http.Request, body []byte) (int, any, error) {
	ctx, cancel := context.WithTimeout(req.Context(), decideTime)
	defer cancel()
	want, e, err := understand(body)
	if err != nil {
		return 0, nil, &problem{http.StatusBadRequest, err.Error()}
	}
	d, err := h.rules.Decide(ctx, e)
	switch {
	case err != nil:
		return 0, nil, &problem{http.StatusServiceUnavailable, err.Error()}
	case d.Request == nil:
		h.counts.Nothing(d.Kind)
		return 0, nil, &problem{http.StatusForbidden, cmp.Or(d.Reason, string(d.Kind))}
	}
	if err := want.narrow(d.Request); err != nil {
		return 0, nil, &problem{http.StatusForbidden, "rule " + d.Rule + ": " + err.Error()}
	}
	d.Request.Id = want.requestID()
	s, err := work.Ask(ctx, h.nodes, d.Request)
	if err != nil {
		return 0, nil, err
	}
	if taken := s.GetRequest(); taken != nil && !same(taken, d.Request) {
		return 0, nil, &problem{http.StatusConflict, "the id " + want.ID + " is one of another prefetch, of " + taken.GetImage()}
	}
	h.counts.Requested(d.Rule)
	h.log.InfoContext(ctx, "an image is prefetched", "image", e.Image(), "from", source, "rule", d.Rule,
		"request", d.Request.Id, "digest", d.Request.Digest, "nodes", len(s.GetNodes()))
	return http.StatusAccepted, describe(s), nil
}

// same tells whether a request that is known is the one that is asked for again.
// A tag may have moved meanwhile.
func same(known, now *imagewolfv1.PrefetchRequest) bool {
	image := func(r *imagewolfv1.PrefetchRequest) string { s, _, _ := strings.Cut(r.GetImage(), "@"); return s }
	tagged := strings.LastIndexByte(image(now), ':') > strings.LastIndexByte(image(now), '/')
	return image(known) == image(now) && (tagged || known.GetDigest() == now.GetDigest())
}

func (h *Handler) get(req *http.Request, _ []byte) (int, any, error) {
	var wait time.Duration
	if text := req.URL.Query().Get("wait"); text != "" {
		var err error
		if wait, err = time.ParseDuration(text); err != nil || wait < 0 || wait > maxWait {
			return 0, nil, &problem{http.StatusBadRequest, "wait: a time such as 60s, at most " + maxWait.String()}
		}
	}
	id := req.PathValue("id")
	if !requestID.MatchString(id) {
		return 0, nil, &problem{http.StatusNotFound, "no such prefetch"}
	}
	ctx, cancel := context.WithTimeout(req.Context(), wait+writeTime)
	defer cancel()
	s, err := h.nodes.GetPrefetch(ctx, &imagewolfv1.GetPrefetchRequest{Id: id})
	if err != nil {
		return 0, nil, err
	}
	if wait > 0 && state(s) == running {
		s = h.watch(ctx, s, wait)
	}
	return http.StatusOK, describe(s), nil
}

// watch returns the last status that is told within a time, or until nothing is
// left to do.
func (h *Handler) watch(ctx context.Context, s *imagewolfv1.PrefetchStatus, wait time.Duration) *imagewolfv1.PrefetchStatus {
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	id := &imagewolfv1.GetPrefetchRequest{Id: s.GetRequest().GetId()}
	for state(s) == running && ctx.Err() == nil {
		stream, err := h.nodes.WatchPrefetch(ctx, id)
		for err == nil {
			var next *imagewolfv1.PrefetchStatus
			if next, err = stream.Recv(); err == nil {
				s = next
			}
		}
		if state(s) != running {
			break
		}
		// The node went away, and the next one may know as much.
		select {
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
	}
	return s
}
