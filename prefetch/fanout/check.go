package fanout

import (
	"fmt"
	"regexp"
	"time"
	"unicode/utf8"

	"github.com/containerd/containerd/v2/pkg/identifiers"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"k8s.io/apimachinery/pkg/labels"

	imagewolfv1 "github.com/imagewolf/imagewolf/api/v1"
)

// What requests may be, and what a node holds of them.
const (
	maxRequests  = 10_000    // that a node remembers
	maxPlaces    = 1_000_000 // names of selected nodes in all of these
	maxNodes     = 10_000    // selected by one request
	maxImage     = 1024      // bytes
	maxSelector  = 4096      // bytes
	maxPlatforms = 16
	maxPlatform  = 64 // bytes
	maxNodeName  = 253
	maxReason    = 512 // bytes
	maxTimeout   = 24 * time.Hour
	maxWatches   = 256 // that are served at a time
	maxFinds     = 32  // requests that all members are asked for at a time; others wait
	maxListed    = 1000
	usualListed  = 100
)

var requestID = regexp.MustCompile(`^[A-Za-z0-9_-]{1,64}$`)

// invalid is what a caller is told that must change its request.
func invalid(format string, args ...any) error {
	return status.Error(codes.InvalidArgument, fmt.Sprintf(format, args...))
}

// checkID says what is wrong with an id.
func checkID(id string) error {
	if !requestID.MatchString(id) {
		return invalid("id: %.80q is none: use 1 to 64 letters, digits, '-' and '_'", id)
	}
	return nil
}

// check says what is wrong with a request, its id aside: every error is
// InvalidArgument, and names the field and the way out.
func check(r *imagewolfv1.PrefetchRequest) error {
	if r == nil {
		return invalid("request: it is missing")
	}
	named, err := parseImage(r.Image)
	if err != nil {
		return err
	}
	if r.Digest != "" {
		d, err := digest.Parse(r.Digest)
		if err != nil {
			return invalid("digest: %.100q is none: write sha256: and 64 hexadecimal digits, or leave it out", r.Digest)
		}
		if c, ok := named.(reference.Canonical); ok && c.Digest() != d {
			return invalid("digest: %s differs from the one in image %q: leave one of them out", d, r.Image)
		}
	}
	if len(r.Platforms) > maxPlatforms {
		return invalid("platforms: %d, at most %d", len(r.Platforms), maxPlatforms)
	}
	for _, p := range r.Platforms {
		if _, err := platforms.Parse(p); err != nil || len(p) > maxPlatform || p == "" {
			return invalid("platforms: %.80q is none: write it such as linux/arm64, or leave it out for each node's own", p)
		}
	}
	if r.Namespace != "" {
		if err := identifiers.Validate(r.Namespace); err != nil {
			return invalid("namespace: %.80q is none of containerd's: use letters, digits, '-', '_' and '.', at most 76, or leave it out", r.Namespace)
		}
	}
	if _, err := parseSelector(r.Nodes.GetLabels()); err != nil {
		return err
	}
	if p := r.Nodes.GetPercent(); p > 100 {
		return invalid("nodes.percent: %d is more than all: choose 1 to 100, or 0 for all", p)
	}
	if t := r.TimeoutSeconds; t < 0 || t > int64(maxTimeout/time.Second) {
		return invalid("timeout: %d s is out of range: choose 1 s to 24 h, or 0 for a day", t)
	}
	return nil
}

func parseImage(image string) (reference.Named, error) {
	named, err := reference.ParseNormalizedNamed(image)
	if err != nil || len(image) > maxImage {
		return nil, invalid("image: %.200q is no reference of an image: write it such as registry.example.com/team/app:1.2", image)
	}
	return named, nil
}

func parseSelector(text string) (labels.Selector, error) {
	if len(text) > maxSelector {
		return nil, invalid("nodes.labels: %d bytes, at most %d", len(text), maxSelector)
	}
	s, err := labels.Parse(text)
	if err != nil {
		return nil, invalid("nodes.labels: %.200q is no selector (%v): write it such as zone=a,gpu!=none or zone in (a,b)", text, err)
	}
	return s, nil
}

// checkStart says what is wrong with what a member asks this node to do.
func checkStart(in *imagewolfv1.StartRequest, self string) error {
	if err := check(in.GetRequest()); err != nil {
		return err
	}
	if err := checkID(in.Request.Id); err != nil {
		return err
	}
	if err := checkNodes(in); err != nil {
		return err
	}
	if position(in.Nodes, self) < 0 {
		return invalid("nodes: %s is not among them", self)
	}
	return nil
}

// checkNodes says what is wrong with the rest of a record.
func checkNodes(in *imagewolfv1.StartRequest) error {
	if len(in.Nodes) > maxNodes {
		return invalid("nodes: %d, at most %d", len(in.Nodes), maxNodes)
	}
	last := ""
	for _, n := range append(in.Nodes[:len(in.Nodes):len(in.Nodes)], in.Coordinator) {
		if n == "" || len(n) > maxNodeName || !utf8.ValidString(n) {
			return invalid("nodes: %.80q is no node's name", n)
		}
	}
	for _, n := range in.Nodes {
		if n <= last {
			return invalid("nodes: %s does not follow %s in order", n, last)
		}
		last = n
	}
	if in.Age < 0 || in.Age > 2*maxTimeout.Milliseconds() {
		return invalid("age: %d ms is out of range", in.Age)
	}
	return nil
}

// cut shortens what is only read by people.
func cut(s string) string {
	if len(s) <= maxReason {
		return s
	}
	s = s[:maxReason-len("…")]
	for !utf8.ValidString(s) && s != "" {
		s = s[:len(s)-1]
	}
	return s + "…"
}
