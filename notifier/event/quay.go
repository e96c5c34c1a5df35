package event

import (
	"cmp"
	"strings"
)

// quay reads Quay's "Push to Repository" notifications: one event per tag. Its
// other notifications look the same and have no tags.
func quay(d Delivery, r *Result) error {
	var b struct {
		Repository  string   `json:"repository"`
		DockerURL   string   `json:"docker_url"`
		UpdatedTags []string `json:"updated_tags"`
	}
	if err := unmarshal(d.Body, &b); err != nil {
		return err
	}
	if len(b.UpdatedTags) == 0 {
		r.ignore(Foreign, "foreign event of %q: no updated_tags", clip(b.Repository))
	}
	host, path, _ := strings.Cut(b.DockerURL, "/")
	for _, tag := range b.UpdatedTags {
		r.push(Event{Registry: cmp.Or(host, d.Registry), Repository: cmp.Or(path, b.Repository), Tag: tag})
	}
	return nil
}
