package api

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	imagewolfv1 "github.com/imagewolf/imagewolf/api/v1"
	"github.com/imagewolf/imagewolf/config"
	"github.com/imagewolf/imagewolf/notifier/event"
)

// wish is what a caller asks for.
type wish struct {
	Image     string          `json:"image"`     // host/repository:tag@digest; the tag or the digest may be left out
	Digest    digest.Digest   `json:"digest"`    // the same as behind the @
	ID        string          `json:"id"`        // the same one is taken once
	Platforms []string        `json:"platforms"` // such as linux/arm64
	Nodes     selection       `json:"nodes"`
	Referrers bool            `json:"referrers"`
	Timeout   config.Duration `json:"timeout"` // such as "10m"
}

type selection struct {
	Labels            string `json:"labels"` // selector in Kubernetes' syntax
	Count             uint32 `json:"count"`
	Percent           uint32 `json:"percent"`
	RunningRepository bool   `json:"running_repository"`
}

const (
	idPrefix     = "ci-" // callers' ids are no others'
	maxPlatforms = 32
	maxText      = 1024
)

var (
	wishID    = regexp.MustCompile(`^[A-Za-z0-9_-]{1,60}$`)
	requestID = regexp.MustCompile(`^[A-Za-z0-9_-]{1,64}$`)
)

// understand reads a wish, and the image as an event of it.
func understand(body []byte) (wish, event.Event, error) {
	var w wish
	d := json.NewDecoder(bytes.NewReader(body))
	d.DisallowUnknownFields()
	if err := d.Decode(&w); err != nil {
		return wish{}, event.Event{}, fmt.Errorf("not the JSON it should be: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return wish{}, event.Event{}, errors.New("something follows the JSON")
	}
	if w.Image == "" {
		return wish{}, event.Event{}, errors.New("image: missing")
	}
	e, err := event.Named(w.Image)
	if err == nil && w.Digest != "" {
		switch {
		case e.Digest != "" && e.Digest != w.Digest:
			err = errors.New("digest is not the image's")
		default:
			err, e.Digest = w.Digest.Validate(), w.Digest
		}
	}
	if err != nil {
		return wish{}, event.Event{}, fmt.Errorf("image: %w", err)
	}
	switch {
	case w.ID != "" && !wishID.MatchString(w.ID):
		err = errors.New("id: use letters, digits, '-' and '_', at most 60")
	case len(w.Platforms) > maxPlatforms || slices.ContainsFunc(w.Platforms, func(p string) bool { return p == "" || len(p) > maxText }):
		err = fmt.Errorf("platforms: at most %d, none of them empty", maxPlatforms)
	case len(w.Nodes.Labels) > maxText:
		err = fmt.Errorf("nodes.labels: at most %d bytes", maxText)
	case w.Nodes.Percent > 100:
		err = errors.New("nodes.percent: 1 to 100")
	case w.Timeout != 0 && w.Timeout.Duration() < time.Second:
		err = errors.New("timeout: at least 1s")
	}
	if err != nil {
		return wish{}, event.Event{}, err
	}
	if w.ID == "" {
		w.ID = strings.ToLower(rand.Text())
	}
	e.Source, e.DeliveryID = source, w.ID
	return w, e, nil
}

func (w wish) requestID() string { return idPrefix + w.ID }

// narrow takes away of what a rule asks for what is not wished. Referrers alone can
// be wished for besides.
func (w wish) narrow(r *imagewolfv1.PrefetchRequest) error {
	if len(w.Platforms) > 0 {
		for _, p := range w.Platforms {
			if len(r.Platforms) > 0 && !slices.Contains(r.Platforms, p) {
				return fmt.Errorf("platform %s is not one of %s", p, strings.Join(r.Platforms, ", "))
			}
		}
		r.Platforms = w.Platforms
	}
	if r.Nodes == nil {
		r.Nodes = &imagewolfv1.NodeSelection{}
	}
	n := r.Nodes
	switch { // a comma in a selector is an "and"
	case n.Labels == "":
		n.Labels = w.Nodes.Labels
	case w.Nodes.Labels != "":
		n.Labels += "," + w.Nodes.Labels
	}
	n.Count, n.Percent = least(n.Count, w.Nodes.Count), least(n.Percent, w.Nodes.Percent)
	n.RunningRepository = n.RunningRepository || w.Nodes.RunningRepository
	r.Referrers = r.Referrers || w.Referrers
	r.TimeoutSeconds = least(r.TimeoutSeconds, int64(w.Timeout.Duration()/time.Second))
	return nil
}

// least returns the lesser of two bounds, of which 0 is none.
func least[T uint32 | int64](a, b T) T {
	if a == 0 || b != 0 && b < a {
		return b
	}
	return a
}

// What a prefetch is at, over all nodes.
const (
	running    = "running"    // nodes have something left to do
	done       = "done"       // every node has the image
	failed     = "failed"     // some node has not, and will not
	superseded = "superseded" // every node has the image, or what a younger request pulled for the tag
	noNodes    = "no_nodes"   // none is selected
)

func state(s *imagewolfv1.PrefetchStatus) string {
	all := done
	for _, n := range s.GetNodes() {
		switch n.GetState() {
		case imagewolfv1.PrefetchState_PREFETCH_STATE_DONE:
		case imagewolfv1.PrefetchState_PREFETCH_STATE_FAILED, imagewolfv1.PrefetchState_PREFETCH_STATE_CANCELED:
			if !n.GetSuperseded() {
				all = failed
			} else if all == done {
				all = superseded
			}
		default:
			return running
		}
	}
	if len(s.GetNodes()) == 0 {
		return noNodes
	}
	return all
}

// answer is a prefetch as callers are told of it.
type answer struct {
	ID      string     `json:"id"`
	Image   string     `json:"image"`
	Digest  string     `json:"digest,omitempty"`
	Created *time.Time `json:"created,omitempty"`
	State   string     `json:"state"`
	Nodes   []node     `json:"nodes"`
}

type node struct {
	Node   string     `json:"node"`
	State  string     `json:"state"` // queued, pulling, done, failed, canceled, unreachable
	Bytes  int64      `json:"bytes"`
	Total  int64      `json:"total"`
	Reason string     `json:"reason,omitempty"`
	Digest string     `json:"digest,omitempty"`
	Ended  *time.Time `json:"ended,omitempty"`
}

func describe(s *imagewolfv1.PrefetchStatus) answer {
	r := s.GetRequest()
	a := answer{
		ID: r.GetId(), Image: r.GetImage(), Digest: r.GetDigest(), Created: moment(s.GetCreated()),
		State: state(s), Nodes: []node{},
	}
	for _, n := range s.GetNodes() {
		name := strings.ToLower(strings.TrimPrefix(n.GetState().String(), "PREFETCH_STATE_"))
		a.Nodes = append(a.Nodes, node{
			Node: n.GetNode(), State: name, Bytes: n.GetBytes(), Total: n.GetTotal(),
			Reason: n.GetReason(), Digest: n.GetDigest(), Ended: moment(n.GetEnded()),
		})
	}
	return a
}

// moment reads milliseconds since 1970, of which 0 is none.
func moment(ms int64) *time.Time {
	if ms == 0 {
		return nil
	}
	t := time.UnixMilli(ms).UTC()
	return &t
}
