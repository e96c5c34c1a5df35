package prefetch

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"path"
	"regexp"
	"strings"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// platformError says that an image is not made for a platform.
type platformError struct {
	platform string
	err      error
}

func (e platformError) Error() string {
	return fmt.Sprintf("the image is not made for %s: %v", e.platform, e.err)
}
func (e platformError) Unwrap() error { return e.err }

// forPlatform gives a platform's name to the error that there is none in an index.
func forPlatform(err error, spec ocispec.Platform) error {
	// containerd has no kind of its own for it.
	if errdefs.IsNotFound(err) && strings.Contains(err.Error(), "no match for platform") {
		return platformError{platforms.FormatAll(spec), err}
	}
	return err
}

// query is what follows the path in a URL within a text.
var query = regexp.MustCompile(`(https?://[^\s"?]+)\?[^\s"]*`)

// quiet is an error with a text of its own.
type quiet struct {
	text string
	error
}

func (q *quiet) Error() string { return q.text }
func (q *quiet) Unwrap() error { return q.error }

// withoutQueries leaves out of an error's text what a registry adds to the URL of
// the storage that it sends its clients to: for some minutes it is the right to read.
func withoutQueries(err error) error {
	text := err.Error()
	if safe := query.ReplaceAllString(text, "$1"); safe != text {
		return &quiet{safe, err}
	}
	return err
}

// explain puts before an error what an operator needs to know: which host, and
// what to do about it.
func (j *job) explain(ctx context.Context, err error) error {
	var status remoteerrors.ErrUnexpectedStatus
	var platform platformError
	var reach *url.Error
	refused := errors.Is(err, docker.ErrInvalidAuthorization)
	if errors.As(err, &status) {
		refused = refused || status.StatusCode == http.StatusUnauthorized || status.StatusCode == http.StatusForbidden
	}
	switch {
	case ctx.Err() != nil, errors.As(err, &platform):
		return err
	case refused:
		return fmt.Errorf("%s; %w", j.refusal(), err)
	case errors.As(err, &reach):
		return fmt.Errorf("%s cannot be reached: %w", hostOf(reach.URL, j.target.host), err)
	case status.StatusCode != 0:
		return fmt.Errorf("%s answers %s: %w", hostOf(status.RequestURL, j.target.host), status.Status, err)
	case errdefs.IsNotFound(err):
		hint := ""
		if len(j.registry.challenges()) == 0 {
			hint = ", or not for those without credentials"
		}
		return fmt.Errorf("%s does not have it%s: %w", j.target.host, hint, err)
	case errdefs.IsUnavailable(err):
		return j.ofContainerd(err)
	}
	return err
}

// ofContainerd says whose error it is, and where one who does not answer was looked for.
func (p *Puller) ofContainerd(err error) error {
	if s := status.Code(err); errdefs.IsUnavailable(err) || s == codes.Unavailable || errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("containerd at %s does not answer: is it running, and is that its containerd_socket? (%w)", p.o.ContainerdSocket, err)
	}
	return fmt.Errorf("containerd at %s: %w", p.o.ContainerdSocket, err)
}

// refusal says who was refused where, and how that is changed.
func (j *job) refusal() string {
	files := "prefetch.credential_files, which is empty"
	if paths := j.keys.Paths(); len(paths) > 0 {
		files = fmt.Sprintf("prefetch.credential_files (%s)", strings.Join(paths, ", "))
	}
	asked := j.registry.challenges()
	if len(asked) == 0 {
		return fmt.Sprintf("%s refuses it", j.target.host)
	}
	last := asked[len(asked)-1]
	if last.source != "" {
		return fmt.Sprintf("%s refuses it with the credential of %s: it is wrong, has expired, or may not pull %s",
			last.host, last.source, j.target.path)
	}
	entry := last.host
	if dir := path.Dir(j.target.path); dir != "." {
		return fmt.Sprintf("%s refuses it without credentials: put an entry %q, or %q for these repositories alone, into a file of %s",
			last.host, entry, entry+"/"+dir, files)
	}
	return fmt.Sprintf("%s refuses it without credentials: put an entry %q into a file of %s", last.host, entry, files)
}

// hostOf returns the host of a URL, or the other name.
func hostOf(address, other string) string {
	if u, err := url.Parse(address); err == nil && u.Host != "" {
		return u.Host
	}
	return other
}
