package feed

import (
	"bytes"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/xml"
	"fmt"
	"html"
	"log/slog"
	"net/http"
	"strings"
	"time"

	"github.com/gorilla/feeds"

	"github.com/imagewolf/imagewolf/config"
	"github.com/imagewolf/imagewolf/notifier/event"
	"github.com/imagewolf/imagewolf/notifier/queue"
)

// unsure is how old the newest event must be for its time, in whole seconds, to
// tell whether there is a newer one.
const unsure = 2 * time.Second

// History is what a feed is made of.
type History interface {
	// After returns the oldest n events that come after a sequence.
	After(sequence uint64, n int) (queue.Page, error)
	// Newest returns the newest n events.
	Newest(n int) (queue.Page, error)
}

// Handler serves the feed to who has a token, at PATH/atom and PATH/rss. It is
// safe for concurrent use.
type Handler struct {
	settings config.NotifierFeed
	history  History
	log      *slog.Logger
	slots    chan struct{}
}

// NewHandler returns a handler of the history. A nil log logs nothing.
func NewHandler(c config.NotifierFeed, h History, log *slog.Logger) *Handler {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Handler{settings: c, history: h, log: log, slots: make(chan struct{}, maxAtOnce)}
}

// ServeHTTP answers 200, 304 to a reader that has it already, 400 where after=
// is no sequence, 401 without a token, and 503 when it cannot answer now.
func (h *Handler) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	write, ok := map[string]func(document) ([]byte, error){
		h.settings.Path + "/atom": document.atom, h.settings.Path + "/rss": document.rss,
	}[req.URL.Path]
	switch {
	case !ok:
		http.NotFound(w, req)
		return
	case req.Method != http.MethodGet && req.Method != http.MethodHead:
		w.Header().Set("Allow", "GET, HEAD")
		http.Error(w, "a feed is read with GET", http.StatusMethodNotAllowed)
		return
	}
	tokens, err := h.settings.Tokens()
	if err != nil {
		h.log.ErrorContext(req.Context(), "the feed cannot be served: its tokens cannot be read", "error", err)
		later(w)
		return
	}
	if !hasToken(req, tokens) {
		w.Header().Set("WWW-Authenticate", `Basic realm="imagewolf"`) // what feed readers know; the password is a token
		http.Error(w, "not authenticated", http.StatusUnauthorized)
		return
	}
	select {
	case h.slots <- struct{}{}:
		defer func() { <-h.slots }()
	default:
		later(w)
		return
	}
	page, err := h.page(req)
	switch {
	case page == nil && err != nil:
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	case err != nil:
		h.log.ErrorContext(req.Context(), "the feed cannot be served", "error", err)
		later(w)
		return
	}
	h.send(w, req, *page, write)
}

// page returns no page if it is the request that is wrong.
func (h *Handler) page(req *http.Request) (*queue.Page, error) {
	query := req.URL.Query()
	if !query.Has("after") {
		page, err := h.history.Newest(pageSize)
		return &page, err
	}
	after, err := parseSequence(query.Get("after"))
	if err != nil {
		return nil, fmt.Errorf("after: %w", err)
	}
	page, err := h.history.After(after, pageSize)
	return &page, err
}

func (h *Handler) send(w http.ResponseWriter, req *http.Request, page queue.Page, write func(document) ([]byte, error)) {
	kind := req.URL.Path[strings.LastIndexByte(req.URL.Path, '/')+1:]
	body, err := write(newDocument(req, page))
	if err != nil {
		h.log.ErrorContext(req.Context(), "the feed cannot be written", "error", err)
		later(w)
		return
	}
	head := w.Header()
	head.Set("Content-Type", "application/"+kind+"+xml; charset=utf-8")
	head.Set("ETag", fmt.Sprintf(`"%s-%d-%d-%s"`, page.ID, page.First, page.Last, kind))
	head.Set("Cache-Control", "private, no-cache")
	head.Set("Vary", "Authorization")
	var modified time.Time // zero: not told
	if time.Since(page.Changed) >= unsure {
		modified = page.Changed.Add(time.Second - 1) // up to a whole second, for it is cut to one
	}
	http.ServeContent(w, req, "", modified, bytes.NewReader(body))
}

func later(w http.ResponseWriter) {
	w.Header().Set("Retry-After", "10")
	http.Error(w, "not now", http.StatusServiceUnavailable)
}

// hasToken compares in a time that tells nothing of any token.
func hasToken(req *http.Request, tokens []string) bool {
	_, sent, ok := req.BasicAuth()
	if scheme, token, _ := strings.Cut(req.Header.Get("Authorization"), " "); strings.EqualFold(scheme, "bearer") {
		sent, ok = strings.TrimSpace(token), true
	}
	sum, found := sha256.Sum256([]byte(sent)), 0
	for _, t := range tokens {
		want := sha256.Sum256([]byte(t))
		found |= subtle.ConstantTimeCompare(sum[:], want[:])
	}
	return ok && found == 1
}

// document is a feed with its events, the newest first.
type document struct {
	page queue.Page
	feed *feeds.Feed
}

func newDocument(req *http.Request, page queue.Page) document {
	self := *req.URL
	self.Scheme, self.Host = "https", req.Host
	if req.TLS == nil && req.Header.Get("X-Forwarded-Proto") != "https" {
		self.Scheme = "http"
	}
	f := &feeds.Feed{
		Title: "Images pushed", Description: "Images that registries told " + req.Host + " of",
		Link: &feeds.Link{Href: self.String(), Rel: "self"}, Updated: page.Changed.UTC(), Author: &feeds.Author{Name: "ImageWolf"},
	}
	for i := range page.Events {
		r := page.Events[len(page.Events)-1-i]
		f.Items = append(f.Items, &feeds.Item{
			Id: entryID(page.ID, r.Sequence), IsPermaLink: "false", Title: title(r.Event), Link: &feeds.Link{Href: webPage(r.Event)},
			Description: html.EscapeString(summary(r.Event)), Created: r.Taken.UTC(), Updated: r.Taken.UTC(),
		})
	}
	return document{page: page, feed: f}
}

func (d document) history() historyElement {
	return historyElement{ID: d.page.ID, First: d.page.First, Last: d.page.Last}
}

func (d document) event(i int) eventElement {
	r := d.page.Events[len(d.page.Events)-1-i]
	e := r.Event
	return eventElement{
		Sequence: r.Sequence, Registry: e.Registry, Repository: e.Repository, Tag: e.Tag, Digest: e.Digest.String(),
		MediaType: e.MediaType, Time: formatTime(e.Time), Source: e.Source,
	}
}

// The library's elements, with ours beside them.
type (
	atomFeed struct {
		Prefix string `xml:"xmlns:imagewolf,attr"`
		*feeds.AtomFeed
		History historyElement
		Entries []atomEntry `xml:"entry"`
	}
	atomEntry struct {
		*feeds.AtomEntry
		Event eventElement
	}
	rssFeed struct {
		XMLName xml.Name `xml:"rss"`
		Version string   `xml:"version,attr"`
		Prefix  string   `xml:"xmlns:imagewolf,attr"`
		Channel rssChannel
	}
	rssChannel struct {
		*feeds.RssFeed
		History historyElement
		Items   []rssItem `xml:"item"`
	}
	rssItem struct {
		*feeds.RssItem
		Event eventElement
	}
)

// FeedXml implements feeds.XmlFeed.
func (f *atomFeed) FeedXml() any { return f } //nolint:staticcheck // the library's name

// FeedXml implements feeds.XmlFeed.
func (f *rssFeed) FeedXml() any { return f } //nolint:staticcheck // the library's name

func (d document) atom() ([]byte, error) {
	f := atomFeed{AtomFeed: (&feeds.Atom{Feed: d.feed}).AtomFeed(), Prefix: Namespace, History: d.history()}
	f.Id = urnOf + ":" + d.page.ID
	for i, e := range f.AtomFeed.Entries {
		f.Entries = append(f.Entries, atomEntry{AtomEntry: e, Event: d.event(i)})
	}
	return marshal(&f)
}

func (d document) rss() ([]byte, error) {
	channel := (&feeds.Rss{Feed: d.feed}).RssFeed()
	channel.ManagingEditor = "" // an e-mail address, of which there is none
	f := rssFeed{Version: "2.0", Prefix: Namespace, Channel: rssChannel{RssFeed: channel, History: d.history()}}
	for i, it := range channel.Items {
		f.Channel.Items = append(f.Channel.Items, rssItem{RssItem: it, Event: d.event(i)})
	}
	return marshal(&f)
}

func marshal(f feeds.XmlFeed) ([]byte, error) {
	var b bytes.Buffer
	if err := feeds.WriteXML(f, &b); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

func title(e event.Event) string {
	if e.Tag != "" {
		e.Digest = "" // it only makes it long
	}
	return e.Image()
}

func summary(e event.Event) string {
	s := e.Image() + " was pushed"
	if e.MediaType != "" {
		s += ", " + e.MediaType
	}
	return s
}

// webPage returns the page that a registry has for people, or where there would be
// one.
func webPage(e event.Event) string {
	if e.Registry != "docker.io" {
		return "https://" + e.Registry + "/" + e.Repository
	}
	if name, ok := strings.CutPrefix(e.Repository, "library/"); ok {
		return "https://hub.docker.com/_/" + name
	}
	return "https://hub.docker.com/r/" + e.Repository
}
