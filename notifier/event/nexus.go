package event

import "strings"

// nexus reads the webhooks of Sonatype Nexus 3, of components and of assets.
// They tell neither host nor digest.
func nexus(d Delivery, r *Result) error {
	type item struct {
		Format  string `json:"format"`
		Name    string `json:"name"`
		Version string `json:"version"`
	}
	var b struct {
		Timestamp  timestamp `json:"timestamp"`
		Repository string    `json:"repositoryName"`
		Action     string    `json:"action"`
		Component  *item     `json:"component"`
		Asset      *item     `json:"asset"` // named v2/<image>/manifests/<tag or digest>
	}
	if err := unmarshal(d.Body, &b); err != nil {
		return err
	}
	if b.Component == nil && b.Asset == nil {
		r.ignore(Foreign, "foreign event %q", clip(d.Header.Get("X-Nexus-Webhook-Id")))
		return nil
	}
	var it item
	if b.Component != nil {
		it = *b.Component
	} else {
		it = *b.Asset
		image, ref, ok := strings.Cut(strings.TrimPrefix(strings.TrimPrefix(it.Name, "/"), "v2/"), "/manifests/")
		if !ok {
			r.ignore(NotImage, "asset %q is no manifest", clip(it.Name))
			return nil
		}
		it.Name, it.Version = image, ref
	}
	switch {
	case it.Format != "docker":
		r.ignore(NotImage, "%q is of format %q", clip(it.Name), clip(it.Format))
	case b.Action == "DELETED" || b.Action == "PURGED":
		r.ignore(Deleted, "a delete of %q", clip(it.Name))
	case b.Action != "CREATED" && b.Action != "UPDATED":
		r.ignore(Foreign, "foreign event: action %q", clip(b.Action))
	default:
		e := Event{Tag: it.Version, DeliveryID: d.Header.Get("X-Nexus-Webhook-Delivery"), Time: b.Timestamp.Time}
		e.Registry, e.Repository = placed(d.Registry, b.Repository, it.Name)
		r.push(e)
	}
	return nil
}
