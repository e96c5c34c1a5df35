package event

import (
	"cmp"
	"strings"
)

// gitea reads the package events of Gitea and Forgejo. The host is the one of
// its web pages, which the receiver's may put right.
func gitea(d Delivery, r *Result) error {
	h := d.Header
	if name := cmp.Or(h.Get("X-Forgejo-Event"), h.Get("X-Gitea-Event")); name != "package" {
		r.ignore(Foreign, "foreign event %q", clip(name))
		return nil
	}
	body, err := formValue(d)
	if err != nil {
		return err
	}
	var b struct {
		Action  string `json:"action"`
		Package struct {
			Owner struct {
				Login    string `json:"login"`
				Username string `json:"username"`
			} `json:"owner"`
			Type      string    `json:"type"`
			Name      string    `json:"name"`
			Version   string    `json:"version"` // a tag, or a digest
			HTMLURL   string    `json:"html_url"`
			CreatedAt timestamp `json:"created_at"`
		} `json:"package"`
	}
	if err := unmarshal(body, &b); err != nil {
		return err
	}
	p := b.Package
	switch {
	case p.Type != "container":
		r.ignore(NotImage, "package %q is of type %q", clip(p.Name), clip(p.Type))
	case b.Action == "deleted":
		r.ignore(Deleted, "a delete of %q", clip(p.Name))
	case b.Action != "created":
		r.ignore(Foreign, "foreign event: action %q", clip(b.Action))
	default:
		r.push(Event{
			Registry:   cmp.Or(d.Registry, hostOf(p.HTMLURL)),
			Repository: strings.ToLower(cmp.Or(p.Owner.Login, p.Owner.Username) + "/" + p.Name), Tag: p.Version,
			DeliveryID: cmp.Or(h.Get("X-Forgejo-Delivery"), h.Get("X-Gitea-Delivery")), Time: p.CreatedAt.Time,
		})
	}
	return nil
}
