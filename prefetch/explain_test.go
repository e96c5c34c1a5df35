package prefetch

import (
	"errors"
	"net/url"
	"strings"
	"testing"

	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
)

// Where a registry sends its clients on to storage, the URL is a credential.
func TestErrorsTellNoSignedURL(t *testing.T) {
	const signed = "https://storage.example.com/blob?X-Amz-Credential=wolf&X-Amz-Signature=howl"
	for _, err := range []error{
		&url.Error{Op: "Get", URL: signed, Err: errors.New("no route to host")},
		remoteerrors.ErrUnexpectedStatus{Status: "403 Forbidden", StatusCode: 403, RequestMethod: "GET", RequestURL: signed},
	} {
		safe := withoutQueries(err)
		if text := safe.Error(); strings.Contains(text, "howl") || strings.Contains(text, "wolf") || !strings.Contains(text, "storage.example.com/blob") {
			t.Errorf("it says %s", text)
		}
		if _, ok := safe.(interface{ Unwrap() error }); !ok {
			t.Errorf("%v is no longer what it was", safe)
		}
	}
}
