package event

import (
	"bytes"
	"cmp"
	"encoding/json"

	"github.com/opencontainers/go-digest"
)

// generic reads our own form, for CI systems and for registries that are not
// known here, and CloudEvents of type container.image.push. Our own is strict:
// a key that is not known would be a wish that is not heard.
func generic(d Delivery, r *Result) error {
	var cloud struct {
		SpecVersion string    `json:"specversion"`
		ID          string    `json:"id"`
		Type        string    `json:"type"`
		Time        timestamp `json:"time"`
		Data        struct {
			Repository  string `json:"repository"`
			Tag         string `json:"tag"`
			Digest      string `json:"digest"`
			RegistryURL string `json:"registryUrl"`
		} `json:"data"`
	}
	if err := unmarshal(d.Body, &cloud); err != nil {
		return err
	}
	if cloud.SpecVersion != "" {
		if cloud.Type != "container.image.push" {
			r.ignore(Foreign, "foreign event %q", clip(cloud.Type))
			return nil
		}
		r.push(Event{
			Registry: cmp.Or(hostOf(cloud.Data.RegistryURL), d.Registry), Repository: cloud.Data.Repository, Tag: cloud.Data.Tag,
			Digest: digest.Digest(cloud.Data.Digest), DeliveryID: cloud.ID, Time: cloud.Time.Time,
		})
		return nil
	}
	var own struct {
		Image string    `json:"image"` // host/repository:tag@digest; the tag or the digest may be left out
		ID    string    `json:"id"`    // of the delivery: the same id is taken once
		Time  timestamp `json:"time"`
	}
	dec := json.NewDecoder(bytes.NewReader(d.Body))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&own); err != nil {
		return otherJSON(err)
	}
	if own.Image == "" {
		r.ignore(Foreign, "no image in it")
		return nil
	}
	e := Event{DeliveryID: own.ID, Time: own.Time.Time}
	if err := e.fromReferences(own.Image); err != nil {
		r.ignore(Invalid, "%w", err)
		return nil
	}
	r.push(e)
	return nil
}
