package event

import (
	"cmp"
	"fmt"

	"github.com/distribution/reference"
)

// google reads what Artifact Registry and Container Registry publish to the
// topic "gcr", as Pub/Sub pushes it: wrapped, or unwrapped where the
// subscription says so.
func google(d Delivery, r *Result) error {
	var b struct {
		Message *struct {
			Data        []byte    `json:"data"` // base64
			MessageID   string    `json:"messageId"`
			PublishTime timestamp `json:"publishTime"`
		} `json:"message"`
	}
	if err := unmarshal(d.Body, &b); err != nil {
		return err
	}
	inner, e := d.Body, Event{DeliveryID: d.Header.Get("X-Goog-Pubsub-Message-Id")}
	if b.Message != nil {
		inner, e.DeliveryID, e.Time = b.Message.Data, b.Message.MessageID, b.Message.PublishTime.Time
	}
	var m struct {
		Action string `json:"action"`
		Digest string `json:"digest"` // HOST/PROJECT/REPOSITORY/IMAGE@sha256:...
		Tag    string `json:"tag"`    // HOST/PROJECT/REPOSITORY/IMAGE:TAG
	}
	if err := unmarshal(inner, &m); err != nil {
		return fmt.Errorf("the message's data: %w", err)
	}
	switch m.Action {
	case "INSERT":
		if err := e.fromReferences(m.Digest, m.Tag); err != nil {
			r.ignore(Invalid, "%w", err)
			return nil
		}
		r.push(e)
	case "DELETE":
		r.ignore(Deleted, "a delete of %q", clip(cmp.Or(m.Tag, m.Digest)))
	default:
		r.ignore(Foreign, "foreign event %q", clip(m.Action))
	}
	return nil
}

// fromReferences sets the name from whole references to one image, any of
// which may be empty, but not all.
func (e *Event) fromReferences(refs ...string) error {
	for _, s := range refs {
		if s == "" {
			continue
		}
		named, err := reference.ParseNamed(s)
		if err != nil {
			return fmt.Errorf("%q: %w", clip(s), err)
		}
		host, path := reference.Domain(named), reference.Path(named)
		if e.Repository != "" && (host != e.Registry || path != e.Repository) {
			return fmt.Errorf("%q is not in the repository %q that the same event names", clip(s), clip(e.Registry+"/"+e.Repository))
		}
		e.Registry, e.Repository = host, path
		if t, ok := named.(reference.Tagged); ok {
			e.Tag = t.Tag()
		}
		if d, ok := named.(reference.Digested); ok {
			e.Digest = d.Digest()
		}
	}
	return nil
}
