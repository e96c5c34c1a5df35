package feed

import (
	"bytes"
	"cmp"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/mmcdole/gofeed"
	ext "github.com/mmcdole/gofeed/extensions"
	"github.com/opencontainers/go-digest"

	"github.com/imagewolf/imagewolf/notifier/event"
)

// maxDepth is how deep elements may be in each other: the library follows them
// with calls of itself, and ours are 4 deep.
const maxDepth = 32

// page is what a document of another notifier says.
type page struct {
	id          string
	first, last uint64
	entries     []entry // by sequence, each once
}

type entry struct {
	sequence uint64
	event    event.Event // as it was written; not checked
}

// read reads a document, Atom or RSS. Entries without an event of ours are no
// entries: the document is that of something else, which is an error.
func read(doc []byte) (page, error) {
	if err := shallow(doc); err != nil {
		return page{}, err
	}
	f, err := gofeed.NewParser().Parse(bytes.NewReader(doc))
	if err != nil {
		return page{}, fmt.Errorf("neither Atom nor RSS: %w", err)
	}
	p, err := history(f.Extensions)
	if err != nil {
		return page{}, err
	}
	for _, it := range f.Items {
		e, err := eventOf(it.Extensions)
		if err != nil {
			return page{}, fmt.Errorf("entry %q: %w", clip(it.GUID), err)
		}
		if e.sequence == 0 || e.sequence > p.last {
			return page{}, fmt.Errorf("entry %d, of a feed whose last is %d", e.sequence, p.last)
		}
		e.event.DeliveryID = entryID(p.id, e.sequence)
		p.entries = append(p.entries, e)
	}
	slices.SortFunc(p.entries, func(a, b entry) int { return cmp.Compare(a.sequence, b.sequence) })
	p.entries = slices.CompactFunc(p.entries, func(a, b entry) bool { return a.sequence == b.sequence })
	return p, nil
}

// shallow fails on what is no XML, or is deeper than any feed.
func shallow(doc []byte) error {
	d := xml.NewDecoder(bytes.NewReader(doc))
	d.Strict = false // as the library reads it
	depth := 0
	for {
		t, err := d.RawToken()
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return fmt.Errorf("no XML: %w", err)
		}
		switch t.(type) {
		case xml.StartElement:
			depth++
		case xml.EndElement:
			depth--
		case xml.Directive:
			return errors.New("a document type, of which a feed has none")
		}
		if depth > maxDepth {
			return fmt.Errorf("elements are more than %d deep in each other", maxDepth)
		}
	}
}

func history(x ext.Extensions) (page, error) {
	h := x["imagewolf"]["history"]
	if len(h) != 1 {
		return page{}, errors.New("the feed is not one of a notifier: it has no imagewolf:history")
	}
	at := h[0].Attrs
	p := page{id: at["id"]}
	if p.id == "" || len(p.id) > 64 {
		return page{}, errors.New("imagewolf:history has no id, or one of more than 64 bytes")
	}
	var err1, err2 error
	p.first, err1 = parseSequence(at["first"])
	p.last, err2 = parseSequence(at["last"])
	if err := errors.Join(err1, err2); err != nil {
		return page{}, fmt.Errorf("imagewolf:history: %w", err)
	}
	return p, nil
}

func eventOf(x ext.Extensions) (entry, error) {
	e := x["imagewolf"]["event"]
	if len(e) != 1 {
		return entry{}, errors.New("it has no imagewolf:event")
	}
	at := e[0].Attrs
	seq, err := parseSequence(at["sequence"])
	if err != nil {
		return entry{}, fmt.Errorf("imagewolf:event: %w", err)
	}
	when, err := time.Parse(time.RFC3339Nano, at["time"])
	if err != nil {
		when = time.Time{} // an odd clock is no reason to lose a push
	}
	return entry{sequence: seq, event: event.Event{
		Registry: at["registry"], Repository: at["repository"], Tag: at["tag"], Digest: digest.Digest(at["digest"]),
		MediaType: at["media_type"], Time: when.UTC(),
	}}, nil
}
