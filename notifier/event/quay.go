package event

import (
	"cmp"
	"encoding/json"
	"strings"
)

// quay reads Quay's "Push to Repository" notifications: one event per tag. Its
// other notifications look the same and have no tags.
func quay(d Delivery, r *Result) error {
	var b struct {
		Repository  string          `json:"repository"`
		DockerURL   string          `json:"docker_url"`
		UpdatedTags json.RawMessage `json:"updated_tags"`
	}
	if err := unmarshal(d.Body, &b); err != nil {
		return err
	}
	host, path, _ := strings.Cut(b.DockerURL, "/")
	some := false
	for tag, err := range elements[string](b.UpdatedTags) {
		if err != nil {
			return err
		}
		some = true
		r.push(Event{Registry: cmp.Or(host, d.Registry), Repository: cmp.Or(path, b.Repository), Tag: tag})
	}
	if !some {
		r.ignore(Foreign, "foreign event of %q: no updated_tags", clip(b.Repository))
	}
	return nil
}
