package feed

import (
	"bytes"
	"context"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mmcdole/gofeed"

	"github.com/imagewolf/imagewolf/config"
	"github.com/imagewolf/imagewolf/notifier/event"
	"github.com/imagewolf/imagewolf/notifier/queue"
)

// oneOf serves with one of the two headers by which a reader asks for what is new,
// and sees that each is sent for the URL only that it came from.
type oneOf struct {
	t            *testing.T
	handler      http.Handler
	answer, asks string            // the header that is left, and that by which it is asked
	given        map[string]string // by URL
}

func (o oneOf) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	if got := req.Header.Get(o.asks); got != "" && got != o.given[req.URL.RequestURI()] {
		o.t.Errorf("%s is asked with %s: %s, which is of another URL", req.URL.RequestURI(), o.asks, got)
	}
	rec := httptest.NewRecorder()
	o.handler.ServeHTTP(rec, req)
	for _, name := range []string{"ETag", "Last-Modified"} {
		if name != o.answer {
			rec.Header().Del(name)
		}
	}
	if sent := rec.Header().Get(o.answer); sent != "" { // 304 need not say it again
		o.given[req.URL.RequestURI()] = sent
	}
	maps.Copy(w.Header(), rec.Header())
	w.WriteHeader(rec.Code)
	_, _ = w.Write(rec.Body.Bytes())
}

// What is in front of a feed may take one of the headers away.
func TestWhatIsNotNewIsNotSentByEitherHeader(t *testing.T) {
	for answer, asks := range map[string]string{"ETag": "If-None-Match", "Last-Modified": "If-Modified-Since"} {
		synctest.Test(t, func(t *testing.T) {
			origin, here := newNotifier(t, 100), newNotifier(t, 100)
			origin.put(push("a"))
			time.Sleep(time.Minute)
			l := &link{handler: oneOf{t, origin.server, answer, asks, map[string]string{}}}
			r := newReader(t, here, l, true)
			time.Sleep(5 * time.Minute)
			origin.put(push("b"))
			time.Sleep(5 * time.Minute)
			r.stop()
			unchanged := 0
			for _, s := range l.since(0) {
				if strings.HasSuffix(s, " 304") {
					unchanged++
				}
			}
			if all := len(l.since(0)); unchanged < all-8 {
				t.Errorf("%s: of %d answers %d had nothing in them", answer, all, unchanged)
			}
			if got := repositories(here.taken()); !slices.Equal(got, []string{"a", "b"}) {
				t.Errorf("%s: got %q", answer, got)
			}
		})
	}
}

// A feed cannot have itself left alone for longer than an hour.
func TestAFeedThatAsksForMuchIsAskedEveryHour(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &link{handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Retry-After", "60000")
			w.WriteHeader(http.StatusServiceUnavailable)
		})}
		r := newReader(t, newNotifier(t, 100), l, true)
		time.Sleep(10 * time.Hour)
		r.stop()
		if n := len(l.since(0)); n < 9 || n > 12 {
			t.Errorf("asked %d times in 10 hours", n)
		}
	})
}

// A cache in front of a feed may know it by its path only: then what was read comes
// again, and is nothing new.
func TestAFeedThatIgnoresWhatIsAskedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		origin, here := newNotifier(t, 100), newNotifier(t, 100)
		origin.put(push("a"), push("b"))
		l := &link{handler: http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			req.URL.RawQuery = ""
			origin.server.ServeHTTP(w, req)
		})}
		r := newReader(t, here, l, true)
		time.Sleep(time.Minute)
		origin.put(push("c"))
		time.Sleep(time.Hour)
		r.stop()
		if got := repositories(here.taken()); !slices.Equal(got, []string{"a", "b", "c"}) {
			t.Errorf("got %q", got)
		}
		if s := here.q.Stats(); s.Nothing[queue.Duplicate] != 0 || r.counts.missed != 0 || r.counts.failed != 0 {
			t.Errorf("%+v %+v", s, r.counts)
		}
	})
}

// What is remembered of a feed does not grow with what it says.
func TestALongETagIsNotKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		origin, here := newNotifier(t, 100), newNotifier(t, 100)
		origin.put(push("a"))
		l := &link{handler: http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			if req.Header.Get("If-None-Match") != "" {
				t.Error("it is sent back")
			}
			rec := httptest.NewRecorder()
			origin.server.ServeHTTP(rec, req)
			maps.Copy(w.Header(), rec.Header())
			w.Header().Set("ETag", `"`+strings.Repeat("x", 10_000)+`"`)
			w.WriteHeader(rec.Code)
			_, _ = w.Write(rec.Body.Bytes())
		})}
		r := newReader(t, here, l, true)
		time.Sleep(5 * time.Minute)
		r.stop()
		if at, err := here.q.Position("origin"); err != nil || len(at) == 0 || len(at) > 500 {
			t.Errorf("%d bytes are kept, %v", len(at), err)
		}
	})
}

// slow is a history that answers when it is let go.
type slow struct {
	History
	letGo chan struct{}
}

func (s slow) Newest(n int) (queue.Page, error) {
	<-s.letGo
	return s.History.Newest(n)
}

// Readers that come all at once do not have the notifier make a document for each at
// the same time.
func TestAFewReadersOnlyAreServedAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNotifier(t, 100)
		letGo := make(chan struct{})
		h := NewHandler(n.settings, slow{n.q, letGo}, nil)
		answered := make(chan int, maxAtOnce)
		for range maxAtOnce {
			go func() { answered <- get(t, h, "/feed/atom").Code }()
		}
		synctest.Wait()
		if res := get(t, h, "/feed/atom"); res.Code != http.StatusServiceUnavailable || res.Header().Get("Retry-After") == "" {
			t.Errorf("one more: %d %s", res.Code, res.Header())
		}
		close(letGo)
		for range maxAtOnce {
			if code := <-answered; code != http.StatusOK {
				t.Errorf("answered %d", code)
			}
		}
		if res := get(t, h, "/feed/atom"); res.Code != http.StatusOK {
			t.Errorf("afterwards: %d", res.Code)
		}
	})
}

// What is for those with a token is not kept by caches for others.
func TestCachesKeepNoFeed(t *testing.T) {
	h := get(t, newNotifier(t, 100).server, "/feed/atom").Header()
	if h.Get("Cache-Control") != "private, no-cache" || h.Get("Vary") != "Authorization" {
		t.Errorf("%s", h)
	}
}

// Readers for people take a summary for HTML: what was pushed writes none.
func TestASummaryIsNoHTML(t *testing.T) {
	n := newNotifier(t, 100)
	e := push("a")
	e.MediaType = "text/<script>alert(1)</script>"
	n.put(e)
	for _, kind := range []string{"atom", "rss"} {
		f, err := gofeed.NewParser().ParseString(get(t, n.server, "/feed/"+kind).Body.String())
		if err != nil {
			t.Fatal(err)
		}
		if got := f.Items[0].Description; !strings.Contains(got, "&lt;script&gt;") || strings.Contains(got, "<") {
			t.Errorf("%s: %q", kind, got)
		}
	}
}

// Readers that began together do not stay so.
func TestIntervalsAreATenthMoreOrLess(t *testing.T) {
	const interval = 30 * time.Second
	seen := map[time.Duration]bool{}
	for range 1000 {
		d := jittered(interval)
		if d < interval*9/10 || d > interval*11/10 {
			t.Fatalf("%v", d)
		}
		seen[d/time.Second] = true
	}
	if len(seen) < 5 {
		t.Errorf("only %d different seconds", len(seen))
	}
}

// broken is a queue that panics over what it is given.
type broken struct {
	*queue.Queue
	left int // times
}

func (b *broken) Put(ctx context.Context, r event.Result) error {
	if b.left--; b.left >= 0 {
		panic("over a page")
	}
	return b.Queue.Put(ctx, r)
}

// A panic over a page ends that round only: it is counted, and the page is read
// again.
func TestAPanicOverAFeedIsContained(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		origin, here := newNotifier(t, 100), newNotifier(t, 100)
		origin.put(push("a"), push("b"))
		var log bytes.Buffer
		counts := &counted{}
		p, err := NewPoller("origin", config.Poll{
			URL: "https://feed.example/feed/atom", Token: token, Interval: config.Duration(30 * time.Second), FromStart: true,
		}, &broken{here.q, 2}, PollerOptions{Transport: &link{handler: origin.server}, Counts: counts, Log: slog.New(slog.NewTextHandler(&log, nil))})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
		defer cancel()
		if err := p.Run(ctx); err != nil {
			t.Fatal(err)
		}
		if got := repositories(here.taken()); !slices.Equal(got, []string{"a", "b"}) {
			t.Errorf("got %v", got)
		}
		if counts.panics != 2 || counts.failed != 2 || counts.ok < 5 {
			t.Errorf("%d panics, %d failed, %d went well", counts.panics, counts.failed, counts.ok)
		}
		if s := log.String(); strings.Count(s, "panic over a feed") != 2 || !strings.Contains(s, "odd_test.go") {
			t.Errorf("the log: %s", s)
		}
	})
}
