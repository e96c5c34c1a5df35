package event

import (
	"cmp"
	"strings"

	"github.com/opencontainers/go-digest"
)

// ghcr reads GitHub's events "package" (of repositories and organizations) and
// "registry_package" (of GitHub Apps), which differ in one key's name.
func ghcr(d Delivery, r *Result) error {
	switch name := d.Header.Get("X-GitHub-Event"); name {
	case "package", "registry_package":
	case "ping":
		r.ignore(Ping, "a ping")
		return nil
	default:
		r.ignore(Foreign, "foreign event %q", clip(name))
		return nil
	}
	body, err := formValue(d)
	if err != nil {
		return err
	}
	var b struct {
		Action          string     `json:"action"`
		Package         *ghPackage `json:"package"`
		RegistryPackage *ghPackage `json:"registry_package"`
	}
	if err := unmarshal(body, &b); err != nil {
		return err
	}
	p := cmp.Or(b.RegistryPackage, b.Package)
	switch {
	case p == nil:
		r.ignore(Foreign, "foreign event: no package in it")
	case b.Action == "deleted":
		r.ignore(Deleted, "a delete of %q", clip(p.Name))
	case b.Action != "published" && b.Action != "updated":
		r.ignore(Foreign, "foreign event: action %q", clip(b.Action))
	case !p.container():
		r.ignore(NotImage, "package %q is of type %q", clip(p.Name), clip(p.PackageType))
	default:
		e := p.event()
		e.Registry, e.DeliveryID = cmp.Or(e.Registry, d.Registry, "ghcr.io"), d.Header.Get("X-GitHub-Delivery")
		r.push(e)
	}
	return nil
}

type ghPackage struct {
	Name           string    `json:"name"`
	Namespace      string    `json:"namespace"`
	Ecosystem      string    `json:"ecosystem"`
	PackageType    string    `json:"package_type"`
	UpdatedAt      timestamp `json:"updated_at"`
	PackageVersion struct {
		Version           string `json:"version"`
		Name              string `json:"name"`
		PackageURL        string `json:"package_url"`
		ContainerMetadata struct {
			Tag struct {
				Name   string `json:"name"`
				Digest string `json:"digest"`
			} `json:"tag"`
			Manifest struct {
				Digest    string `json:"digest"`
				MediaType string `json:"media_type"`
				Config    struct {
					MediaType string `json:"media_type"`
				} `json:"config"`
			} `json:"manifest"`
		} `json:"container_metadata"`
	} `json:"package_version"`
}

// container tells whether the package is an image. GitHub has written the type
// in both cases, and once "npm" beside the ecosystem "docker".
func (p ghPackage) container() bool {
	for _, s := range []string{p.PackageType, p.Ecosystem} {
		if strings.EqualFold(s, "container") || strings.EqualFold(s, "docker") {
			return true
		}
	}
	return false
}

// event takes the name from the package's URL, which may end in a bare colon
// and have the owner in any case.
func (p ghPackage) event() Event {
	v := p.PackageVersion
	host, path, _ := strings.Cut(v.PackageURL, "/")
	path, _, _ = strings.Cut(path, "@")
	path, _, _ = strings.Cut(path, ":")
	path = cmp.Or(path, p.Namespace+"/"+p.Name)
	e := Event{
		Registry: host, Repository: strings.ToLower(path), Tag: v.ContainerMetadata.Tag.Name, Time: p.UpdatedAt.Time,
		MediaType: v.ContainerMetadata.Manifest.MediaType,
	}
	for _, s := range []string{v.ContainerMetadata.Tag.Digest, v.ContainerMetadata.Manifest.Digest, v.Version, v.Name} {
		if e.Digest == "" && strings.Contains(s, ":") {
			e.Digest = digest.Digest(s)
		}
	}
	// The manifest's type is the same for charts and the like; their config's is not.
	if mt := v.ContainerMetadata.Manifest.Config.MediaType; mt != "" && !imageTypes[bare(mt)] {
		e.MediaType = mt
	}
	return e
}
