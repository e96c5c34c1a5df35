// Package event reads what registries send when something happened to an
// image: one decoder per kind of webhook, from a request's headers and body to
// events. It does no I/O, keeps no state and checks no signature: package
// receive does, before anything is decoded.
//
// Nothing in a body is trusted but the image's name, and that must be a name
// that container runtimes accept. Nothing is dropped silently either: whatever
// in a body leads to no event is named in Result.Ignored, with the reason.
package event

import (
	_ "crypto/sha256" // digests of images
	_ "crypto/sha512" // the same
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

// Limits on one body, whatever its type.
const (
	maxReasons = 1000 // parts that lead to nothing whose reasons are kept; further ones are counted
	maxText    = 128  // bytes kept of an id or a media type
)

// Kind says what a registry's message is about. There are only those below, so
// that they can be counted.
type Kind string

// What a message may be. All but Pushed lead to nothing.
const (
	Pushed     Kind = "pushed"
	Deleted    Kind = "deleted"
	Pulled     Kind = "pulled"
	Ping       Kind = "ping"       // the sender only tries whether it gets through
	Handshake  Kind = "handshake"  // the sender wants proof that it is welcome
	NotImage   Kind = "not_image"  // a blob, a chart, a package of another kind
	Failed     Kind = "failed"     // a push that did not succeed
	Foreign    Kind = "foreign"    // something else, that is not about pushes
	Invalid    Kind = "invalid"    // a push of what cannot be an image's name
	Unreadable Kind = "unreadable" // a body that is not of the type it should be of, or too large
	Refused    Kind = "refused"    // a sender that did not prove who it is
	TooMany    Kind = "too_many"   // a push beyond those that are taken of one body
)

// ErrNothing is the error of work on an event that is over and led to nothing. The
// same push may lead to something when it is told anew: once it is signed, say.
var ErrNothing = errors.New("the event leads to nothing")

// Event is a push of one image as a registry told of it. The name is valid, in
// the canonical form, and has a tag or a digest or both; that the image exists
// is not known.
type Event struct {
	Kind       Kind          `json:"kind"`                 // Pushed
	Registry   string        `json:"registry"`             // host, with port if it has one: "docker.io", "registry.example.com:5000"
	Repository string        `json:"repository"`           // path within the registry: "library/nginx"
	Tag        string        `json:"tag,omitempty"`        // "" for a manifest that was pushed by digest, such as an index's children
	Digest     digest.Digest `json:"digest,omitempty"`     // "" where the registry does not tell
	MediaType  string        `json:"media_type,omitempty"` // of the manifest, or of the config where only that is told; "" where neither is
	DeliveryID string        `json:"delivery_id,omitempty"`
	Time       time.Time     `json:"time"`             // when it happened, by the sender's clock; zero where it does not tell
	Source     string        `json:"source,omitempty"` // the receiver it came through; no decoder sets it
}

// Image returns the image's name as runtimes take it: host/repository, then
// :tag and @digest as far as they are known.
func (e Event) Image() string {
	s := e.Registry + "/" + e.Repository
	if e.Tag != "" {
		s += ":" + e.Tag
	}
	if e.Digest != "" {
		s += "@" + e.Digest.String()
	}
	return s
}

// Ignored is a part of a body that leads to nothing.
type Ignored struct {
	Kind   Kind
	Reason string // in words, for a log; may quote what the sender wrote
	More   int    // further parts of this kind in the body, whose reasons are not kept
}

// Result is what a body said. At least one of the fields is set.
type Result struct {
	Events  []Event // pushes, in the body's order
	Ignored []Ignored
	Reply   []byte        // JSON that the sender needs as the answer's body (Event Grid's handshake)
	Confirm *Subscription // a subscription that waits to be confirmed (SNS)

	most int // events; 0: any number
}

// push adds an event, or the reason why it is none.
func (r *Result) push(e Event) {
	switch mt := bare(e.MediaType); {
	case mt != "" && !imageTypes[mt]:
		r.ignore(NotImage, "%s is no image but %q", clip(e.Repository), clip(e.MediaType))
	case r.most > 0 && len(r.Events) >= r.most:
		r.ignore(TooMany, "a push behind the first %d in one body: the queue takes no more at once (half of queue.max_events)", r.most)
	default:
		if err := e.normalize(); err != nil {
			r.ignore(Invalid, "%q: %w", clip(e.Registry+"/"+e.Repository), err)
			return
		}
		r.Events = append(r.Events, e)
	}
}

func (r *Result) ignore(k Kind, format string, args ...any) {
	if k == TooMany || len(r.Ignored) >= maxReasons {
		if i := slices.IndexFunc(r.Ignored, func(o Ignored) bool { return o.Kind == k }); i >= 0 {
			r.Ignored[i].More++
			return
		}
	}
	r.Ignored = append(r.Ignored, Ignored{Kind: k, Reason: fmt.Errorf(format, args...).Error()})
}

// imageTypes are the media types of what a container runtime pulls as an image:
// manifests and indexes, and the configs by which some registries name them.
// Manifests of schema 1 are not among them: containerd no longer takes them.
var imageTypes = map[string]bool{
	"application/vnd.oci.image.index.v1+json":                   true,
	"application/vnd.oci.image.manifest.v1+json":                true,
	"application/vnd.oci.image.config.v1+json":                  true,
	"application/vnd.docker.distribution.manifest.list.v2+json": true,
	"application/vnd.docker.distribution.manifest.v2+json":      true,
	"application/vnd.docker.container.image.v1+json":            true,
}

// bare returns a media type without its parameters.
func bare(mediaType string) string {
	t, _, _ := strings.Cut(mediaType, ";")
	return strings.ToLower(strings.TrimSpace(t))
}

// normalize brings the name into its canonical form, or says why it has none.
func (e *Event) normalize() error {
	if strings.Contains(e.Tag, ":") { // some registries put a digest where the tag should be
		if e.Digest == "" {
			e.Digest = digest.Digest(e.Tag)
		}
		e.Tag = ""
	}
	host := strings.ToLower(e.Registry)
	if host == "" {
		return errors.New("no registry host: the event names none, so the receiver must (registry)")
	}
	named, err := reference.ParseNormalizedNamed(host + "/" + e.Repository)
	if err != nil {
		return err
	}
	// A host without dot and port would be taken for a part of the path, and
	// the image for one of Docker Hub.
	if d := reference.Domain(named); d != host && host != "index.docker.io" || !reference.IsNameOnly(named) {
		return fmt.Errorf("%q is not the host of a registry, or the repository not a path", clip(host))
	}
	if e.Tag != "" {
		if _, err := reference.WithTag(named, e.Tag); err != nil {
			return fmt.Errorf("tag %q: %w", clip(e.Tag), err)
		}
	}
	if e.Digest != "" {
		if err := e.Digest.Validate(); err != nil {
			return fmt.Errorf("digest %q: %w", clip(e.Digest.String()), err)
		}
	}
	if e.Tag == "" && e.Digest == "" {
		return errors.New("neither tag nor digest")
	}
	e.Kind, e.Registry, e.Repository = Pushed, reference.Domain(named), reference.Path(named)
	e.MediaType, e.DeliveryID = bare(clip(e.MediaType)), clip(e.DeliveryID)
	return nil
}

// clip bounds text that is kept or quoted and that anyone may have written.
func clip(s string) string {
	if len(s) > maxText {
		s = s[:maxText]
	}
	return strings.ToValidUTF8(s, "?")
}

// Named returns the push of an image that is named as runtimes name it, with
// its host, and with a tag or a digest or both.
func Named(image string) (Event, error) {
	var e Event
	if err := e.fromReferences(image); err != nil {
		return Event{}, err
	}
	if err := e.normalize(); err != nil {
		return Event{}, err
	}
	return e, nil
}

// Check returns the event in its canonical form, or the reason why it leads to
// nothing, as decoders do. It is for events that came in another way.
func Check(e Event) Result {
	var r Result
	r.push(e)
	return r
}
