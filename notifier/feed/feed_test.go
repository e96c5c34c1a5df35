package feed

import (
	"bytes"
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mmcdole/gofeed"
	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"

	"github.com/imagewolf/imagewolf/config"
	"github.com/imagewolf/imagewolf/notifier/event"
	"github.com/imagewolf/imagewolf/notifier/queue"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const token = "0123456789abcdef"

var (
	_ History = (*queue.Queue)(nil)
	_ Queue   = (*queue.Queue)(nil)
)

func push(name string) event.Event {
	return event.Event{
		Kind: event.Pushed, Registry: "r.example:5000", Repository: name, Tag: "1.4", Digest: digest.FromString(name), DeliveryID: "id-" + name,
		MediaType: "application/vnd.oci.image.index.v1+json", Time: time.Date(2026, 8, 20, 9, 14, 26, 5, time.UTC), Source: "hub",
	}
}

// notifier is one side: a queue in a file, and the feed of it.
type notifier struct {
	t        *testing.T
	file     string
	settings config.NotifierFeed
	q        *queue.Queue
	server   *Handler
}

func newNotifier(t *testing.T, history int) *notifier {
	t.Helper()
	n := &notifier{t: t, file: filepath.Join(t.TempDir(), "queue.db")}
	n.settings = config.DefaultNotifier().Feed
	n.settings.Token, n.settings.History = token, history
	n.start()
	t.Cleanup(func() { n.q.Close() })
	return n
}

func (n *notifier) start() {
	n.t.Helper()
	c := config.DefaultNotifier().Queue
	c.File = n.file
	q, err := queue.Open(c, queue.Options{History: n.settings.History, Record: func(e event.Event) bool { return !Polled(e) }})
	if err != nil {
		n.t.Fatal(err)
	}
	n.q, n.server = q, NewHandler(n.settings, q, nil)
}

func (n *notifier) restart() {
	n.t.Helper()
	n.q.Close()
	n.start()
}

func (n *notifier) put(events ...event.Event) {
	n.t.Helper()
	if err := n.q.Put(n.t.Context(), event.Result{Events: events}); err != nil {
		n.t.Fatal(err)
	}
}

// taken returns the repositories of all events that were ever taken and not yet
// handed out.
func (n *notifier) taken() []event.Event {
	n.t.Helper()
	waiting := n.q.Stats().Waiting
	if waiting == 0 {
		return nil
	}
	ctx, cancel := context.WithCancel(n.t.Context())
	defer cancel()
	var mu sync.Mutex
	var out []event.Event
	err := n.q.Run(ctx, func(_ context.Context, e event.Event) error {
		mu.Lock()
		defer mu.Unlock()
		if out = append(out, e); len(out) == waiting {
			cancel()
		}
		return nil
	})
	if err != nil {
		n.t.Fatal(err)
	}
	slices.SortFunc(out, func(a, b event.Event) int { return strings.Compare(a.Repository, b.Repository) })
	return out
}

func repositories(events []event.Event) []string {
	out := []string{}
	for _, e := range events {
		out = append(out, e.Repository)
	}
	return out
}

// get asks the handler as a client would.
func get(t *testing.T, h http.Handler, path string, head ...string) *httptest.ResponseRecorder {
	t.Helper()
	req := httptest.NewRequest(http.MethodGet, path, nil)
	req.Header.Set("Authorization", "Bearer "+token)
	for i := 0; i < len(head); i += 2 {
		req.Header.Set(head[i], head[i+1])
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, req)
	return w
}

func TestForeignReadersSeeWhatWasPushed(t *testing.T) {
	n := newNotifier(t, 100)
	docker := push("library/nginx")
	docker.Registry, docker.MediaType = "docker.io", ""
	odd := push("apps/odd")
	odd.Tag, odd.Time = "", time.Time{}
	n.put(push("apps/web"), docker, odd)
	for _, kind := range []string{"atom", "rss"} {
		res := get(t, n.server, "https://feed.example/feed/"+kind)
		doc := res.Body.String()
		if res.Code != http.StatusOK || res.Header().Get("Content-Type") != "application/"+kind+"+xml; charset=utf-8" {
			t.Errorf("%s: %d %s", kind, res.Code, res.Header())
		}
		if err := xml.Unmarshal([]byte(doc), new(any)); err != nil {
			t.Errorf("%s: %v", kind, err)
		}
		f, err := gofeed.NewParser().ParseString(doc)
		if err != nil {
			t.Fatal(err)
		}
		if f.FeedType != kind || f.Title != "Images pushed" || len(f.Items) != 3 {
			t.Fatalf("%s\n%s", f, doc)
		}
		var got []string
		for _, i := range f.Items {
			got = append(got, i.Title, i.Link)
			if i.Description == "" || i.GUID == "" || i.PublishedParsed == nil && i.UpdatedParsed == nil {
				t.Errorf("%s: %+v", kind, i)
			}
		}
		want := []string{
			"r.example:5000/apps/odd@" + odd.Digest.String(), "https://r.example:5000/apps/odd",
			"docker.io/library/nginx:1.4", "https://hub.docker.com/_/nginx",
			"r.example:5000/apps/web:1.4", "https://r.example:5000/apps/web",
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s:\ngot  %q\nwant %q", kind, got, want)
		}
		// And another notifier reads the very same events.
		p, err := read([]byte(doc))
		if err != nil {
			t.Fatal(err)
		}
		var events []event.Event
		for _, e := range p.entries {
			events = append(events, e.event)
		}
		for i, want := range []event.Event{push("apps/web"), docker, odd} {
			want.Kind, want.Source = "", ""
			want.DeliveryID = fmt.Sprintf("urn:imagewolf:%s:%d", p.id, i+1)
			if events[i] != want {
				t.Errorf("%s:\ngot  %+v\nwant %+v", kind, events[i], want)
			}
		}
	}
}

func TestWhoMayReadAndWhatIsAnswered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNotifier(t, 100)
		n.put(push("a"))
		time.Sleep(time.Minute)
		first := get(t, n.server, "/feed/atom")
		etag, modified := first.Header().Get("ETag"), first.Header().Get("Last-Modified")
		if etag == "" || modified == "" {
			t.Fatalf("%s", first.Header())
		}
		for _, c := range []struct {
			path   string
			head   []string
			status int
		}{
			{"/feed/atom", nil, 200},
			{"/feed/rss", nil, 200},
			{"/feed/json", nil, 404},
			{"/feed/atom", []string{"Authorization", "Bearer 0123456789abcdeX"}, 401},
			{"/feed/atom", []string{"Authorization", "Bearer"}, 401},
			{"/feed/atom", []string{"Authorization", ""}, 401},
			{"/feed/atom", []string{"Authorization", "bearer  " + token}, 200},
			{"/feed/atom", []string{"Authorization", "Basic " + basic("x", token)}, 200},
			{"/feed/atom", []string{"Authorization", "Basic " + basic(token, "x")}, 401},
			{"/feed/atom", []string{"If-None-Match", etag}, 304},
			{"/feed/atom", []string{"If-None-Match", etag, "Authorization", ""}, 401},
			{"/feed/rss", []string{"If-None-Match", etag}, 200},
			{"/feed/atom", []string{"If-None-Match", `"other"`}, 200},
			{"/feed/atom", []string{"If-Modified-Since", modified}, 304},
			{"/feed/atom?after=0", nil, 200},
			{"/feed/atom?after=-1", nil, 400},
			{"/feed/atom?after=x", nil, 400},
		} {
			if res := get(t, n.server, c.path, c.head...); res.Code != c.status {
				t.Errorf("%s %q: %d, should be %d", c.path, c.head, res.Code, c.status)
			}
		}
		// Of two events within a second, the second is not overlooked.
		n.put(push("b"))
		second := get(t, n.server, "/feed/atom", "If-None-Match", etag)
		if second.Code != 200 || second.Header().Get("Last-Modified") != "" {
			t.Errorf("%d %s", second.Code, second.Header())
		}
		n.put(push("c"))
		if res := get(t, n.server, "/feed/atom", "If-None-Match", second.Header().Get("ETag")); res.Code != 200 {
			t.Errorf("%d", res.Code)
		}
		time.Sleep(time.Minute)
		if res := get(t, n.server, "/feed/atom", "If-Modified-Since", modified); res.Code != 200 {
			t.Errorf("%d", res.Code)
		}
		req := httptest.NewRequest(http.MethodPost, "/feed/atom", nil)
		w := httptest.NewRecorder()
		if n.server.ServeHTTP(w, req); w.Code != http.StatusMethodNotAllowed {
			t.Errorf("POST: %d", w.Code)
		}
	})
}

func basic(user, password string) string {
	r := httptest.NewRequest(http.MethodGet, "/", nil)
	r.SetBasicAuth(user, password)
	return strings.TrimPrefix(r.Header.Get("Authorization"), "Basic ")
}

func TestTokensAreReadAgain(t *testing.T) {
	n := newNotifier(t, 100)
	file := filepath.Join(t.TempDir(), "tokens")
	n.server.settings.Token, n.server.settings.TokenFile = "", file
	for _, c := range []struct {
		content string
		status  int
	}{
		{"# cluster a\nfedcba9876543210\n\n" + token + "\n", 200},
		{"fedcba9876543210\n", 401},
		{"", 503},
		{"short\n", 503},
	} {
		if err := os.WriteFile(file, []byte(c.content), 0o600); err != nil {
			t.Fatal(err)
		}
		if res := get(t, n.server, "/feed/atom"); res.Code != c.status {
			t.Errorf("%q: %d, should be %d", c.content, res.Code, c.status)
		}
	}
}

// link carries requests to a handler that may be exchanged, or be away.
type link struct {
	mu       sync.Mutex
	handler  http.Handler // nil: away
	requests []string     // "path?query status"
}

func (l *link) set(h http.Handler) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.handler = h
}

func (l *link) RoundTrip(req *http.Request) (*http.Response, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.handler == nil {
		return nil, errors.New("nobody listens")
	}
	w := httptest.NewRecorder()
	l.handler.ServeHTTP(w, req)
	l.requests = append(l.requests, fmt.Sprint(req.URL.RequestURI(), " ", w.Code))
	return w.Result(), nil
}

func (l *link) since(n int) []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.requests[n:])
}

type counted struct {
	mu         sync.Mutex
	ok, failed int
	missed     uint64
	panics     int
}

func (c *counted) Polled(_ string, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if ok {
		c.ok++
	} else {
		c.failed++
	}
}

func (c *counted) Missed(_ string, n uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.missed += n
}

func (c *counted) Panicked() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.panics++
}

// reader polls in the background until stop.
type reader struct {
	n      *notifier
	link   *link
	counts *counted
	log    *bytes.Buffer
	stop   func()
}

func newReader(t *testing.T, n *notifier, l *link, fromStart bool) *reader {
	t.Helper()
	r := &reader{n: n, link: l, counts: &counted{}, log: &bytes.Buffer{}}
	p, err := NewPoller("origin", config.Poll{
		URL: "https://feed.example/feed/atom", Token: token, Interval: config.Duration(30 * time.Second), FromStart: fromStart,
	}, n.q, PollerOptions{Transport: l, Counts: r.counts, Log: slog.New(slog.NewTextHandler(r.log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- p.Run(ctx) }()
	r.stop = func() {
		t.Helper()
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
	return r
}

func TestAFeedIsFollowed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		origin, here := newNotifier(t, 100), newNotifier(t, 100)
		origin.put(push("before"))
		l := &link{handler: origin.server}
		r := newReader(t, here, l, false)
		synctest.Wait()
		origin.put(push("a"), push("b"))
		time.Sleep(time.Minute)
		got := here.taken()
		if !slices.Equal(repositories(got), []string{"a", "b"}) {
			t.Fatalf("%+v", got)
		}
		want := push("a")
		want.Source, want.DeliveryID = "poll.origin", got[0].DeliveryID
		if got[0] != want || !strings.HasPrefix(want.DeliveryID, "urn:imagewolf:") {
			t.Errorf("got  %+v\nwant %+v", got[0], want)
		}
		// What is not new is not sent.
		n := len(l.since(0))
		time.Sleep(5 * time.Minute)
		for _, s := range l.since(n + 1) {
			if s != "/feed/atom?after=3 304" {
				t.Errorf("asked %s", s)
			}
		}
		if asked := len(l.since(n)); asked < 9 || asked > 12 {
			t.Errorf("asked %d times in 5 minutes, every 30 s", asked)
		}
		// Polled events are not served on.
		if page, err := here.q.Newest(10); err != nil || page.Last != 0 {
			t.Errorf("%+v, %v", page, err)
		}
		r.stop()
		if r.counts.failed != 0 || r.counts.missed != 0 || r.counts.ok < 10 {
			t.Errorf("%+v", r.counts)
		}
	})
}

// Nothing is missed and nothing comes twice when either side is started anew,
// also where more was pushed meanwhile than one document has.
func TestNothingIsMissedOverRestarts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		origin, here := newNotifier(t, 10_000), newNotifier(t, 100)
		l := &link{handler: origin.server}
		r := newReader(t, here, l, false)
		synctest.Wait()
		want := []string{}
		add := func(n int) {
			for range n {
				name := fmt.Sprintf("n%05d", len(want))
				want = append(want, name)
				origin.put(push(name))
			}
		}
		add(3)
		time.Sleep(time.Minute)
		l.set(nil) // the origin is started anew, and takes events before it serves
		add(4)
		origin.restart()
		add(5)
		time.Sleep(time.Hour)
		l.set(origin.server)
		time.Sleep(time.Hour)
		r.stop()
		add(2*pageSize + 7)
		origin.restart()
		l.set(origin.server)
		here.restart()
		r = newReader(t, here, l, false)
		time.Sleep(time.Minute)
		add(1)
		time.Sleep(time.Minute)
		r.stop()
		if got := repositories(here.taken()); !slices.Equal(got, want) {
			t.Errorf("got %d of %d", len(got), len(want))
		}
		if s := here.q.Stats(); s.Nothing[queue.Duplicate] != 0 || r.counts.missed != 0 {
			t.Errorf("%+v %+v", s, r.counts)
		}
	})
}

// One that dies between putting events and remembering it reads them again, and
// they are known.
func TestWhatWasReadTwiceIsKnown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		origin, here := newNotifier(t, 100), newNotifier(t, 100)
		noDigest := push("b")
		noDigest.Digest = ""
		origin.put(push("a"), noDigest)
		l := &link{handler: origin.server}
		for range 2 {
			r := newReader(t, here, l, true)
			time.Sleep(time.Second)
			r.stop()
			if err := here.q.SetPosition("origin", nil); err != nil {
				t.Fatal(err)
			}
		}
		if s := here.q.Stats(); s.Waiting != 2 || s.Nothing[queue.Duplicate] != 2 {
			t.Errorf("%+v", s)
		}
	})
}

func TestWhoWasAwayForTooLongIsTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		origin, here := newNotifier(t, 3), newNotifier(t, 100)
		origin.put(push("a"))
		l := &link{handler: origin.server}
		r := newReader(t, here, l, true)
		time.Sleep(time.Second)
		l.set(nil)
		origin.put(push("b"), push("c"))
		origin.put(push("d"), push("e"), push("f"))
		time.Sleep(time.Hour)
		l.set(origin.server)
		time.Sleep(time.Hour)
		r.stop()
		if got := repositories(here.taken()); !slices.Equal(got, []string{"a", "d", "e", "f"}) {
			t.Errorf("got %q", got)
		}
		if r.counts.missed != 2 || !strings.Contains(r.log.String(), "missed=2 from=2 to=3") {
			t.Errorf("%+v\n%s", r.counts, r.log)
		}
	})
}

// A feed whose history was lost, or is an older copy, is read from its start.
func TestAHistoryThatBeganAnewIsReadFromItsStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		origin, here := newNotifier(t, 100), newNotifier(t, 100)
		origin.put(push("a"), push("b"))
		l := &link{handler: origin.server}
		r := newReader(t, here, l, true)
		time.Sleep(time.Second)
		older, err := os.ReadFile(origin.file)
		if err != nil {
			t.Fatal(err)
		}
		origin.put(push("c"))
		time.Sleep(time.Minute)

		origin.q.Close()
		if err := os.WriteFile(origin.file, older, 0o600); err != nil {
			t.Fatal(err)
		}
		origin.start()
		l.set(origin.server)
		time.Sleep(time.Minute)
		origin.put(push("d"))
		time.Sleep(time.Minute)

		fresh := newNotifier(t, 100)
		fresh.put(push("e"))
		l.set(fresh.server)
		time.Sleep(time.Minute)
		// Only its id tells of this one: it has gone further than what was read.
		longer := newNotifier(t, 100)
		longer.put(push("f"), push("g"), push("h"))
		l.set(longer.server)
		time.Sleep(time.Minute)
		r.stop()
		if got := repositories(here.taken()); !slices.Equal(got, []string{"a", "b", "c", "d", "e", "f", "g", "h"}) {
			t.Errorf("got %q", got)
		}
		if n := strings.Count(r.log.String(), "history is another one"); n != 3 {
			t.Errorf("told %d times:\n%s", n, r.log)
		}
	})
}

// full is a queue that takes nothing for a while.
type full struct {
	Queue
	mu    sync.Mutex
	until time.Time
}

func (f *full) Put(ctx context.Context, r event.Result) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if time.Now().Before(f.until) {
		return queue.ErrFull
	}
	return f.Queue.Put(ctx, r)
}

func TestWhatTheQueueRefusesIsReadAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		origin, here := newNotifier(t, 100), newNotifier(t, 100)
		origin.put(push("a"))
		p, err := NewPoller("origin", config.Poll{URL: "https://feed.example/feed/rss", Token: token, Interval: config.Duration(time.Second), FromStart: true},
			&full{Queue: here.q, until: time.Now().Add(time.Hour)}, PollerOptions{Transport: &link{handler: origin.server}})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- p.Run(ctx) }()
		time.Sleep(2 * time.Hour)
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if got := repositories(here.taken()); !slices.Equal(got, []string{"a"}) {
			t.Errorf("got %q", got)
		}
	})
}

// A feed that does not answer as it should is asked less often, and what is
// wrong is said.
func TestBadAnswersAreNamedAndAskedLess(t *testing.T) {
	answer := func(status int, body string, head ...string) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			for i := 0; i < len(head); i += 2 {
				w.Header().Set(head[i], head[i+1])
			}
			w.WriteHeader(status)
			_, _ = io.WriteString(w, body)
		})
	}
	feed := func(history, entries string) string {
		return `<feed xmlns="http://www.w3.org/2005/Atom" xmlns:imagewolf="` + Namespace + `"><title>t</title>` + history + entries + `</feed>`
	}
	const one = `<imagewolf:history id="x" first="1" last="1"/>`
	for _, c := range []struct {
		name    string
		handler http.Handler
		said    string
		least   int // requests in an hour
		most    int
	}{
		{"away", nil, "nobody listens", 0, 0},
		{"wrong token", answer(401, ""), "is the token one of the feed's?", 5, 12},
		{"moved", answer(302, "", "Location", "https://evil.example/"), "set url to where it is", 5, 12},
		{"not found", answer(404, ""), "is the feed served there", 5, 12},
		{"later", answer(503, "", "Retry-After", "1800"), "503 Service Unavailable", 2, 3},
		{"much later", answer(503, "", "Retry-After", "60000"), "503 Service Unavailable", 1, 2},
		{"html", answer(200, "<html><body>login</body></html>"), "neither Atom nor RSS", 5, 12},
		{"nothing", answer(200, ""), "neither Atom nor RSS", 5, 12},
		{"of something else", answer(200, feed("", "")), "not one of a notifier", 5, 12},
		{"large", answer(200, strings.Repeat(" ", maxBody+1)), "larger than", 5, 12},
		{"deep", answer(200, feed(strings.Repeat("<a>", 100_000), "")), "deep in each other", 5, 12},
		{"document type", answer(200, `<!DOCTYPE x [<!ENTITY a "b">]>`+feed(one, "")), "document type", 5, 12},
		{"no sequence", answer(200, feed(`<imagewolf:history id="x" first="1" last="x"/>`, "")), "is no sequence", 5, 12},
		{"no event", answer(200, feed(one, "<entry><id>i</id></entry>")), "no imagewolf:event", 5, 12},
		{"beyond the last", answer(200, feed(one, `<entry><id>i</id><imagewolf:event sequence="2"/></entry>`)), "entry 2, of a feed whose last is 1", 5, 12},
		{"hides", answer(200, feed(one, "")), "shows none after 0", 5, 12},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := &link{handler: c.handler}
				r := newReader(t, newNotifier(t, 100), l, true)
				time.Sleep(time.Hour)
				r.stop()
				if !strings.Contains(r.log.String(), c.said) {
					t.Errorf("said\n%s", r.log)
				}
				if n := len(l.since(0)); n < c.least || n > c.most {
					t.Errorf("asked %d times, should be %d to %d", n, c.least, c.most)
				}
				if r.counts.failed == 0 || r.counts.ok != 0 || strings.Contains(r.log.String(), token) {
					t.Errorf("%+v\n%s", r.counts, r.log)
				}
			})
		})
	}
}

// What a feed names is checked as what a webhook names.
func TestEventsOfAFeedAreChecked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		here := newNotifier(t, 100)
		doc := `<rss version="2.0" xmlns:imagewolf="` + Namespace + `"><channel><title>t</title><imagewolf:history id="x" first="1" last="4"/>` +
			`<item><imagewolf:event sequence="1" registry="R.example" repository="a" tag="1"/></item>` +
			`<item><imagewolf:event sequence="2" registry="r.example" repository="../etc" tag="1"/></item>` +
			`<item><imagewolf:event sequence="3" registry="r.example" repository="c" tag="1" media_type="text/plain"/></item>` +
			`<item><imagewolf:event sequence="4" registry="r.example" repository="d" digest="sha256:1"/></item></channel></rss>`
		l := &link{handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, doc) })}
		r := newReader(t, here, l, true)
		time.Sleep(time.Second)
		r.stop()
		got := here.taken()
		if len(got) != 1 || got[0].Image() != "r.example/a:1" {
			t.Errorf("%+v", got)
		}
		if s := here.q.Stats(); s.Nothing[event.Invalid] != 2 || s.Nothing[event.NotImage] != 1 {
			t.Errorf("%+v", s)
		}
	})
}
