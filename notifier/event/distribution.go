package event

import (
	"cmp"
	"encoding/json"

	"github.com/opencontainers/go-digest"
)

// registryEvent is an event of CNCF Distribution, which Azure sends too.
type registryEvent struct {
	ID        string    `json:"id"`
	Timestamp timestamp `json:"timestamp"`
	Action    string    `json:"action"`
	Target    struct {
		MediaType  string `json:"mediaType"`
		Digest     string `json:"digest"`
		Repository string `json:"repository"`
		URL        string `json:"url"`
		Tag        string `json:"tag"`
	} `json:"target"`
	Request struct {
		Host string `json:"host"`
	} `json:"request"`
}

// distribution reads the envelopes of CNCF Distribution (registry v2 and v3)
// and of a self-managed GitLab. The host is what the pusher's client called the
// registry, so the receiver's, where it is set, is the better one.
func distribution(d Delivery, r *Result) error {
	var envelope struct {
		Events json.RawMessage `json:"events"`
	}
	if err := unmarshal(d.Body, &envelope); err != nil {
		return err
	}
	for e, err := range elements[registryEvent](envelope.Events) {
		if err != nil {
			return err
		}
		e.add(r, cmp.Or(d.Registry, e.Request.Host, hostOf(e.Target.URL)))
	}
	return nil
}

func (e registryEvent) add(r *Result, host string) {
	switch e.Action {
	case "push":
		r.push(Event{
			Registry: host, Repository: e.Target.Repository, Tag: e.Target.Tag, Digest: digest.Digest(e.Target.Digest),
			MediaType: e.Target.MediaType, DeliveryID: e.ID, Time: e.Timestamp.Time,
		})
	case "mount":
		r.ignore(NotImage, "a blob mounted in %q", clip(e.Target.Repository))
	case "pull":
		r.ignore(Pulled, "a pull from %q", clip(e.Target.Repository))
	case "delete":
		r.ignore(Deleted, "a delete in %q", clip(e.Target.Repository))
	case "ping":
		r.ignore(Ping, "a ping")
	case "chart_push", "chart_delete":
		r.ignore(NotImage, "a chart in %q", clip(e.Target.Repository))
	default:
		r.ignore(Foreign, "foreign event %q", clip(e.Action))
	}
}
