package event

import "cmp"

// dockerHub reads Docker Hub's webhooks, which tell of pushes only and not of
// digests. The callback URL is not asked.
func dockerHub(d Delivery, r *Result) error {
	var b struct {
		PushData *struct {
			PushedAt  timestamp `json:"pushed_at"`
			Tag       string    `json:"tag"`
			MediaType string    `json:"media_type"`
		} `json:"push_data"`
		Repository struct {
			Name      string `json:"name"`
			Namespace string `json:"namespace"`
			RepoName  string `json:"repo_name"`
		} `json:"repository"`
	}
	if err := unmarshal(d.Body, &b); err != nil {
		return err
	}
	if b.PushData == nil {
		r.ignore(Foreign, "foreign event: no push_data")
		return nil
	}
	r.push(Event{
		Registry: "docker.io", Repository: cmp.Or(b.Repository.RepoName, b.Repository.Namespace+"/"+b.Repository.Name),
		Tag: b.PushData.Tag, MediaType: b.PushData.MediaType, Time: b.PushData.PushedAt.Time,
	})
	return nil
}
