package event

import (
	"cmp"

	"github.com/opencontainers/go-digest"
)

// aliyun reads Alibaba Container Registry's webhooks. The host is the public
// one of the region, unless the receiver knows a better one, such as that of an
// instance of one's own. The time has no zone, so it is not taken.
func aliyun(d Delivery, r *Result) error {
	var b struct {
		PushData *struct {
			Digest string `json:"digest"`
			Tag    string `json:"tag"`
		} `json:"push_data"`
		Repository struct {
			Name      string `json:"name"`
			Namespace string `json:"namespace"`
			Region    string `json:"region"`
			FullName  string `json:"repo_full_name"`
		} `json:"repository"`
	}
	if err := unmarshal(d.Body, &b); err != nil {
		return err
	}
	if b.PushData == nil {
		r.ignore(Foreign, "foreign event: no push_data")
		return nil
	}
	host := d.Registry
	if host == "" && b.Repository.Region != "" {
		host = "registry." + b.Repository.Region + ".aliyuncs.com"
	}
	r.push(Event{
		Registry: host, Repository: cmp.Or(b.Repository.FullName, b.Repository.Namespace+"/"+b.Repository.Name),
		Tag: b.PushData.Tag, Digest: digest.Digest(b.PushData.Digest),
	})
	return nil
}
