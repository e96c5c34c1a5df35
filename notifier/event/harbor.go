package event

import (
	"cmp"
	"encoding/json"

	"github.com/opencontainers/go-digest"
)

// harbor reads Harbor's webhooks in both their formats, its own and structured
// CloudEvents. The host is Harbor's external URL as its configuration has it,
// which the receiver's may put right.
func harbor(d Delivery, r *Result) error {
	var b struct {
		Type    string     `json:"type"` // in both formats
		ID      string     `json:"id"`   // of a CloudEvent, as time and data
		OccurAt timestamp  `json:"occur_at"`
		Time    timestamp  `json:"time"`
		Own     harborData `json:"event_data"`
		Cloud   harborData `json:"data"`
	}
	if err := unmarshal(d.Body, &b); err != nil {
		return err
	}
	data, at := b.Own, b.OccurAt.Time
	for _, err := range elements[json.RawMessage](b.Cloud.Resources) {
		if err != nil {
			return err
		}
		data, at = b.Cloud, b.Time.Time
		break
	}
	switch b.Type {
	case "PUSH_ARTIFACT", "pushImage", "harbor.artifact.pushed":
	case "DELETE_ARTIFACT", "deleteImage", "harbor.artifact.deleted":
		r.ignore(Deleted, "a delete in %q", clip(data.name()))
		return nil
	case "PULL_ARTIFACT", "pullImage", "harbor.artifact.pulled":
		r.ignore(Pulled, "a pull from %q", clip(data.name()))
		return nil
	default:
		r.ignore(Foreign, "foreign event %q", clip(b.Type))
		return nil
	}
	for res, err := range elements[harborResource](data.Resources) {
		if err != nil {
			return err
		}
		r.push(Event{
			Registry: cmp.Or(d.Registry, hostOf(res.ResourceURL)), Repository: data.name(),
			Tag: res.Tag, Digest: digest.Digest(res.Digest), DeliveryID: b.ID, Time: at,
		})
	}
	return nil
}

type harborData struct {
	Resources  json.RawMessage `json:"resources"` // of harborResource
	Repository struct {
		Name         string `json:"name"`
		Namespace    string `json:"namespace"`
		RepoFullName string `json:"repo_full_name"`
	} `json:"repository"`
}

func (h harborData) name() string {
	return cmp.Or(h.Repository.RepoFullName, h.Repository.Namespace+"/"+h.Repository.Name)
}

// harborResource is one image of an event.
type harborResource struct {
	Digest      string `json:"digest"`
	Tag         string `json:"tag"`
	ResourceURL string `json:"resource_url"`
}
