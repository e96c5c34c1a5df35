package event

import "github.com/opencontainers/go-digest"

// zot reads Zot's CloudEvents in binary mode: what happened is in the headers.
// They tell no host.
func zot(d Delivery, r *Result) error {
	var b struct {
		Name      string `json:"name"`
		Reference string `json:"reference"` // a tag, or a digest
		Digest    string `json:"digest"`
		MediaType string `json:"mediaType"`
	}
	if err := unmarshal(d.Body, &b); err != nil {
		return err
	}
	switch name := d.Header.Get("Ce-Type"); name {
	case "zotregistry.image.updated":
		r.push(Event{
			Registry: d.Registry, Repository: b.Name, Tag: b.Reference, Digest: digest.Digest(b.Digest),
			MediaType: b.MediaType, DeliveryID: d.Header.Get("Ce-Id"), Time: when(d.Header.Get("Ce-Time")),
		})
	case "zotregistry.image.deleted":
		r.ignore(Deleted, "a delete in %q", clip(b.Name))
	default:
		r.ignore(Foreign, "foreign event %q", clip(name))
	}
	return nil
}
