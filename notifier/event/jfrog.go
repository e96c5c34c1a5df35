package event

import (
	"strings"

	"github.com/opencontainers/go-digest"
)

// jfrog reads Artifactory's events of the domain "docker". Where the receiver
// has no registry, the host is Artifactory's custom base URL, and the
// repository's key comes first in the path.
func jfrog(d Delivery, r *Result) error {
	var b struct {
		Domain    string `json:"domain"`
		EventType string `json:"event_type"`
		Origin    string `json:"jpd_origin"`
		Data      struct {
			RepoKey   string `json:"repo_key"`
			Path      string `json:"path"` // <image>/<tag>/<file>
			SHA256    string `json:"sha256"`
			ImageName string `json:"image_name"`
			ImageType string `json:"image_type"`
			Tag       string `json:"tag"`
		} `json:"data"`
	}
	if err := unmarshal(d.Body, &b); err != nil {
		return err
	}
	switch t := b.Data.ImageType; {
	case b.Domain != "docker":
		r.ignore(Foreign, "foreign event of domain %q", clip(b.Domain))
		return nil
	case b.EventType == "deleted":
		r.ignore(Deleted, "a delete in %q", clip(b.Data.RepoKey))
		return nil
	case b.EventType != "pushed":
		r.ignore(Foreign, "foreign event %q", clip(b.EventType))
		return nil
	case t != "" && t != "docker" && t != "oci":
		r.ignore(NotImage, "%q is of type %q", clip(b.Data.Path), clip(t))
		return nil
	}
	image := b.Data.ImageName
	if parts := strings.Split(b.Data.Path, "/"); len(parts) > 2 {
		image = strings.Join(parts[:len(parts)-2], "/")
	}
	registry := d.Registry
	if registry == "" && b.Origin != "" {
		registry = hostOf(b.Origin) + "/{repository}"
	}
	e := Event{Tag: b.Data.Tag}
	e.Registry, e.Repository = placed(registry, b.Data.RepoKey, image)
	if b.Data.SHA256 != "" {
		e.Digest = digest.Digest("sha256:" + b.Data.SHA256)
	}
	r.push(e)
	return nil
}
