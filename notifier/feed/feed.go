// Package feed carries events from one notifier to others that nothing from
// outside can reach: it serves those that were taken as Atom and RSS 2.0, and
// reads such feeds.
//
// An entry is an event. What a foreign reader shows is its title (the image),
// its link and its summary; what another notifier reads is the element
//
//	<imagewolf:event sequence="12" registry="registry.example.com" repository="apps/web" tag="1.4.2"
//	  digest="sha256:..." media_type="application/vnd.oci.image.index.v1+json" time="2026-08-20T09:14:26Z" source="hub"/>
//
// in the namespace of Namespace. Sequences have no gaps. The feed itself has
//
//	<imagewolf:history id="..." first="3" last="12"/>
//
// so that a reader knows whether it missed any: those before first are gone, and
// with another id the history began anew. With ?after=SEQUENCE in its URL a feed
// has the oldest entries that come after it, not the newest of all.
//
// Events that came through a feed are not served again: every notifier polls the
// one that a registry tells, and no event goes in a circle.
package feed

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/imagewolf/imagewolf/notifier/event"
)

// Namespace is that of the elements that only notifiers read.
const Namespace = "https://github.com/imagewolf/imagewolf/ns/feed/1"

const (
	pageSize  = 500             // entries of one document, at most
	sourceOf  = "poll."         // begins the source of an event that came through a feed; no receiver's name has a dot
	urnOf     = "urn:imagewolf" // begins the ids of feeds and entries
	maxAtOnce = 8               // documents that are made at the same time
)

// Polled tells whether an event came through a feed.
func Polled(e event.Event) bool { return strings.HasPrefix(e.Source, sourceOf) }

// eventElement is an event as an entry has it.
type eventElement struct {
	XMLName    struct{} `xml:"imagewolf:event"`
	Sequence   uint64   `xml:"sequence,attr"`
	Registry   string   `xml:"registry,attr"`
	Repository string   `xml:"repository,attr"`
	Tag        string   `xml:"tag,attr,omitempty"`
	Digest     string   `xml:"digest,attr,omitempty"`
	MediaType  string   `xml:"media_type,attr,omitempty"`
	Time       string   `xml:"time,attr,omitempty"`
	Source     string   `xml:"source,attr,omitempty"`
}

// historyElement says what the feed has.
type historyElement struct {
	XMLName struct{} `xml:"imagewolf:history"`
	ID      string   `xml:"id,attr"`
	First   uint64   `xml:"first,attr"`
	Last    uint64   `xml:"last,attr"`
}

func entryID(feed string, sequence uint64) string {
	return fmt.Sprintf("%s:%s:%d", urnOf, feed, sequence)
}

func formatTime(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339Nano)
}

func parseSequence(s string) (uint64, error) {
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%q is no sequence", clip(s))
	}
	return n, nil
}

// clip bounds what is quoted of a document.
func clip(s string) string { return s[:min(len(s), 128)] }
