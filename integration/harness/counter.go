package harness

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// NodeHeader is the request header with which every node of the harness names
// itself to the registry (its hosts.toml says so), so that the registry's own
// counter can tell the nodes apart.
const NodeHeader = "X-Imagewolf-Node"

// Request is one request that a registry has got.
type Request struct {
	Time   time.Time
	Node   string // from NodeHeader; "" for others
	Method string
	Path   string
	Digest string    // sha256:<hex> when the path ends in one
	Range  string    // the Range header
	Status int       // 0 until answered
	Bytes  int64     // of the body, handed to the network so far
	Done   bool      // the handler has returned
	Ended  time.Time // when it did

	cut  int64 // after so many bytes, where the behavior says CutWithin
	turn int   // of those that the behavior concerned when it came, the how many-th
}

// Behavior is what a registry does to GET requests for blobs and manifests.
// The zero value is to behave well.
type Behavior struct {
	// Rate bounds the body bytes per second, all bodies together, whatever is
	// said below; 0: unbounded.
	Rate int64
	// StallAfter holds each body back after so many bytes, until the behavior
	// is changed; 0: never. 1 holds it back before the second byte.
	StallAfter int64
	// CutAfter closes the connection after so many body bytes; 0: never.
	CutAfter int64
	// CutWithin is CutAfter a number of bytes drawn for each request, of 1 to so
	// many; 0: never.
	CutWithin int64
	// Status is answered in place of the content; 0: none. With RetryAfter the
	// client is told how many seconds to wait.
	Status, RetryAfter int
	// NoRange ignores that only a part of the content is asked for.
	NoRange bool
	// Corrupt sends other bytes.
	Corrupt bool

	// Node, Digest and Times restrict all this to the requests of one node, to
	// those for one blob, and to the first so many that arrive after Behave; ""
	// and 0: no restriction.
	Node, Digest string
	Times        int
}

// concerns reports whether the behavior is for a request.
func (b Behavior) concerns(r *Request) bool {
	return r.content() && (b.Node == "" || b.Node == r.Node) && (b.Digest == "" || b.Digest == r.Digest) &&
		(b.Times == 0 || r.turn <= b.Times)
}

// Counter is an http.Handler around another: it counts every request and body
// byte, and misbehaves as told. Its methods may be called at any time from any
// goroutine.
type Counter struct {
	next http.Handler

	mu       sync.Mutex // guards what follows
	requests []*Request
	behavior Behavior
	limiter  *rate.Limiter
	turns    int           // requests that behavior has concerned
	changed  chan struct{} // closed when behavior changes
	user     string        // basic auth; "" for none
	password string
}

// NewCounter wraps a handler.
func NewCounter(next http.Handler) *Counter {
	return &Counter{next: next, changed: make(chan struct{})}
}

// Behave changes the behavior, also of requests that are under way.
func (c *Counter) Behave(b Behavior) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.behavior, c.limiter, c.turns = b, nil, 0
	if b.Rate > 0 {
		// A tenth of a second at once: enough to reach the rate, and too
		// little to matter in a test that waits for a byte to be reached.
		c.limiter = rate.NewLimiter(rate.Limit(b.Rate), int(max(b.Rate/10, chunk)))
	}
	close(c.changed)
	c.changed = make(chan struct{})
}

// RequireAuth has every request refused that does not carry this user and
// password; an empty user lets everyone in again.
func (c *Counter) RequireAuth(user, password string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.user, c.password = user, password
}

// Reset forgets the requests so far. Those under way are no longer counted.
func (c *Counter) Reset() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.requests = nil
}

// Requests returns copies of the requests that keep, in order of arrival; a nil
// keep keeps all.
func (c *Counter) Requests(keep func(Request) bool) []Request {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []Request
	for _, r := range c.requests {
		if keep == nil || keep(*r) {
			out = append(out, *r)
		}
	}
	return out
}

// Gets returns the GET requests for one digest.
func (c *Counter) Gets(digest string) []Request {
	return c.Requests(func(r Request) bool { return r.Method == http.MethodGet && r.Digest == digest })
}

// Bytes returns the body bytes sent to GET requests for manifests and blobs: to
// one node, or to all of them when node is empty.
func (c *Counter) Bytes(node string) int64 {
	var n int64
	for _, r := range c.Requests(Request.content) {
		if node == "" || r.Node == node {
			n += r.Bytes
		}
	}
	return n
}

// content reports whether the request is for bytes of an image.
func (r Request) content() bool {
	return r.Method == http.MethodGet && (strings.Contains(r.Path, "/blobs/") || strings.Contains(r.Path, "/manifests/"))
}

// String is the request as a registry's access log has it.
func (r Request) String() string {
	return fmt.Sprintf("%s %s %s %s range=%q %d %d done=%t",
		r.Time.Format("15:04:05.000"), r.Node, r.Method, r.Path, r.Range, r.Status, r.Bytes, r.Done)
}

var digestAtEnd = regexp.MustCompile(`sha256:[0-9a-f]{64}$`)

// chunk is how much of a body is sent between two looks at the behavior.
const chunk = 32 << 10

// ServeHTTP implements http.Handler.
func (c *Counter) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	r := &Request{
		Time: time.Now(), Node: req.Header.Get(NodeHeader), Method: req.Method, Path: req.URL.Path,
		Digest: digestAtEnd.FindString(req.URL.Path), Range: req.Header.Get("Range"),
	}
	req.Header.Del(NodeHeader)
	c.mu.Lock()
	c.requests = append(c.requests, r)
	b, user, password := c.behavior, c.user, c.password
	if b.concerns(r) {
		c.turns++
		r.turn = c.turns
		if b.CutWithin > 0 {
			r.cut = 1 + rand.Int64N(b.CutWithin)
		}
	}
	struck := b.concerns(r)
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		r.Done, r.Ended = true, time.Now()
		c.mu.Unlock()
	}()
	cw := &countingWriter{ResponseWriter: w, c: c, r: r, ctx: req.Context()}
	if u, p, _ := req.BasicAuth(); user != "" && (u != user || p != password) {
		cw.Header().Set("Www-Authenticate", `Basic realm="harness"`)
		http.Error(cw, "who are you?", http.StatusUnauthorized)
		return
	}
	if b.Status != 0 && struck {
		if b.RetryAfter > 0 {
			cw.Header().Set("Retry-After", strconv.Itoa(b.RetryAfter))
		}
		http.Error(cw, "told to fail", b.Status)
		return
	}
	if b.NoRange && struck {
		req.Header.Del("Range")
	}
	c.next.ServeHTTP(cw, req)
}

// countingWriter counts what it passes on, and applies the behavior.
type countingWriter struct {
	http.ResponseWriter
	c   *Counter
	r   *Request
	ctx context.Context // of the request: it lives exactly as long as the writer
}

// WriteHeader implements http.ResponseWriter.
func (w *countingWriter) WriteHeader(status int) {
	w.c.mu.Lock()
	if w.r.Status == 0 {
		w.r.Status = status
	}
	w.c.mu.Unlock()
	w.ResponseWriter.WriteHeader(status)
}

// Write implements http.ResponseWriter.
func (w *countingWriter) Write(b []byte) (int, error) {
	w.c.mu.Lock()
	if w.r.Status == 0 {
		w.r.Status = http.StatusOK
	}
	w.c.mu.Unlock()
	var n int
	for len(b) > 0 {
		part := b[:min(len(b), chunk)]
		if w.r.content() {
			allowed, corrupt, err := w.admit(len(part))
			if err != nil {
				return n, err
			}
			if part = part[:allowed]; corrupt {
				part = bytes.Repeat([]byte("x"), allowed)
			}
		}
		m, err := w.ResponseWriter.Write(part)
		n += m
		w.c.mu.Lock()
		w.r.Bytes += int64(m)
		w.c.mu.Unlock()
		if err != nil {
			return n, err
		}
		b = b[m:]
	}
	return n, nil
}

// Unwrap lets http.ResponseController find the writer inside.
func (w *countingWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// admit waits until some of the next n bytes may be sent, and says how many, and
// whether they are to be others.
func (w *countingWriter) admit(n int) (allowed int, corrupt bool, err error) {
	for {
		w.c.mu.Lock()
		b, limiter, changed, sent := w.c.behavior, w.c.limiter, w.c.changed, w.r.Bytes
		if !b.concerns(w.r) {
			b = Behavior{}
		}
		if b.CutWithin > 0 {
			b.CutAfter = w.r.cut
		}
		w.c.mu.Unlock()
		switch {
		case b.CutAfter > 0 && sent >= b.CutAfter:
			_ = http.NewResponseController(w.ResponseWriter).Flush() //nolint:errcheck // what was counted is to be seen
			panic(http.ErrAbortHandler)
		case b.StallAfter > 0 && sent >= b.StallAfter:
			if err := http.NewResponseController(w.ResponseWriter).Flush(); err != nil {
				return 0, false, err
			}
			select {
			case <-changed:
				continue
			case <-w.ctx.Done():
				return 0, false, w.ctx.Err()
			}
		}
		if b.CutAfter > 0 {
			n = min(n, int(b.CutAfter-sent))
		}
		if b.StallAfter > 0 {
			n = min(n, int(b.StallAfter-sent))
		}
		if limiter != nil {
			if err := limiter.WaitN(w.ctx, n); err != nil {
				return 0, false, err
			}
			// A slow body is to arrive as it is sent, not in the server's buffer.
			if err := http.NewResponseController(w.ResponseWriter).Flush(); err != nil {
				return 0, false, err
			}
		}
		return n, b.Corrupt, nil
	}
}

// serve runs an HTTP server with this handler on a free port of the loopback
// interface, until stop is called.
func (c *Counter) serve() (host string, stop func() error, err error) {
	l, err := (&net.ListenConfig{}).Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		return "", nil, fmt.Errorf("port of the registry: %w", err)
	}
	return l.Addr().String(), c.serveOn(l), nil
}

// serveOn is serve on a listener.
func (c *Counter) serveOn(l net.Listener) (stop func() error) {
	srv := &http.Server{Handler: c, ReadHeaderTimeout: 10 * time.Second}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	return func() error {
		c.Behave(Behavior{}) // lets go of stalled bodies
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		if err := srv.Shutdown(ctx); err != nil {
			_ = srv.Close() // the shutdown's error says more
		}
		<-served //nolint:errcheck // ErrServerClosed, and said by Shutdown
		return nil
	}
}
