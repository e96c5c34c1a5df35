package event

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"
)

// Delivery is one request as it came in, of a sender that has proved who it is.
type Delivery struct {
	Header http.Header
	Body   []byte // bounded by the caller
	// Registry is the host for events that carry none, or none that can be
	// relied on; "" if there is no such default. For JFrog and Nexus a path may
	// follow, in which "{repository}" stands for their repository's name.
	Registry string
	// Topic is the ARN of the only SNS topic that may send, and whose
	// subscription may be confirmed; "" confirms none, and lets any send.
	Topic string
	// MaxEvents is how many pushes are taken of one body; further ones are ignored as
	// TooMany. 0: any number.
	MaxEvents int
}

// decoders read the webhooks, by the name of their type.
var decoders = map[string]func(Delivery, *Result) error{
	"acr":          acr,
	"aliyun":       aliyun,
	"distribution": distribution,
	"dockerhub":    dockerHub,
	"ecr":          ecr,
	"generic":      generic,
	"ghcr":         ghcr,
	"gitea":        gitea,
	"google":       google,
	"harbor":       harbor,
	"jfrog":        jfrog,
	"nexus":        nexus,
	"quay":         quay,
	"zot":          zot,
}

// Types returns the names of the webhooks that Decode knows, sorted.
func Types() []string {
	out := make([]string, 0, len(decoders))
	for t := range decoders {
		out = append(out, t)
	}
	slices.Sort(out)
	return out
}

// Decode reads a delivery of one of Types. It fails on a body that is not of
// that type's form, never on one that tells of something else: that is in the
// result's Ignored. It is safe for concurrent use.
func Decode(webhook string, d Delivery) (Result, error) {
	decode, ok := decoders[webhook]
	if !ok {
		return Result{}, fmt.Errorf("%q is no type of webhook: choose one of %s", webhook, strings.Join(Types(), ", "))
	}
	r := Result{most: d.MaxEvents}
	if err := decode(d, &r); err != nil {
		return Result{}, err
	}
	if len(r.Events)+len(r.Ignored) == 0 && r.Reply == nil && r.Confirm == nil {
		r.ignore(Foreign, "nothing in it")
	}
	return r, nil
}

// formValue returns the JSON of a body that may be a form with one field,
// "payload", as GitHub and Gitea send it where their user chose so.
func formValue(d Delivery) ([]byte, error) {
	if t, _, _ := mime.ParseMediaType(d.Header.Get("Content-Type")); t != "application/x-www-form-urlencoded" {
		return d.Body, nil
	}
	form, err := url.ParseQuery(string(d.Body))
	if err != nil {
		return nil, fmt.Errorf("a form that cannot be read: %w", err)
	}
	return []byte(form.Get("payload")), nil
}

// unmarshal reads one JSON value, and nothing after it.
func unmarshal(body []byte, into any) error {
	if err := json.Unmarshal(body, into); err != nil {
		return otherJSON(err)
	}
	return nil
}

// otherJSON says what is wrong with JSON, in the sender's words and not in those of the
// program.
func otherJSON(err error) error {
	var of *json.UnmarshalTypeError
	if errors.As(err, &of) {
		return fmt.Errorf("not the JSON it should be: %s is of the wrong type (%s)", cmp.Or(of.Field, "the whole"), of.Value)
	}
	return fmt.Errorf("not the JSON it should be: %w", err)
}

// elements reads an array of JSON, each element when it is its turn, or ends with an
// error; null and nothing are an empty one. As a slice an array would take up to
// fifty times the memory of its text, for "{}" is an element, too. The array is valid
// JSON, as all is that unmarshal has read.
func elements[T any](array json.RawMessage) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		var e, zero T // one for all of them
		dec := json.NewDecoder(bytes.NewReader(array))
		switch t, err := dec.Token(); {
		case len(array) == 0 || err == nil && t == nil:
			return
		case err != nil || t != json.Delim('['):
			yield(zero, errors.New("not the JSON it should be: no array where one should be"))
			return
		}
		for dec.More() {
			e = zero
			if err := dec.Decode(&e); err != nil {
				yield(zero, otherJSON(err))
				return
			}
			if !yield(e, nil) {
				return
			}
		}
	}
}

// timestamp reads a point in time however it is written: RFC 3339 and its
// kin, or seconds since 1970, whole or broken. What it cannot read is the zero
// time: an odd clock is no reason to lose a push.
type timestamp struct{ time.Time }

// UnmarshalJSON never fails.
func (t *timestamp) UnmarshalJSON(b []byte) error {
	var seconds float64
	if json.Unmarshal(b, &seconds) == nil && seconds > 0 && seconds < 1<<33 {
		t.Time = time.Unix(int64(seconds), 0).UTC()
		return nil
	}
	t.Time = when(string(bytes.Trim(b, `"`)))
	return nil
}

// when reads a point in time as timestamp does, from a header.
func when(s string) time.Time {
	for _, layout := range []string{time.RFC3339Nano, "2006-01-02T15:04:05.999999999Z0700"} {
		if t, err := time.Parse(layout, s); err == nil && t.Year() > 0 && t.Year() < 10000 {
			return t.UTC()
		}
	}
	return time.Time{}
}

// hostOf returns the host of a URL that may lack its scheme.
func hostOf(s string) string {
	if _, rest, ok := strings.Cut(s, "://"); ok {
		s = rest
	}
	host, _, _ := strings.Cut(s, "/")
	return host
}

// placed puts an image's path into a registry that may have a path of its own,
// in which {repository} stands for the name of a repository of images. It
// returns the host and the whole path.
func placed(registry, repository, image string) (host, path string) {
	host, path, _ = strings.Cut(strings.ReplaceAll(registry, "{repository}", repository), "/")
	if path == "" {
		return host, image
	}
	return host, path + "/" + image
}
