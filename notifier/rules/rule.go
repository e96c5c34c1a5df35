package rules

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strings"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"k8s.io/apimachinery/pkg/labels"

	imagewolfv1 "github.com/imagewolf/imagewolf/api/v1"
	"github.com/imagewolf/imagewolf/config"
	"github.com/imagewolf/imagewolf/notifier/event"
	"github.com/imagewolf/imagewolf/notifier/pattern"
	"github.com/imagewolf/imagewolf/notifier/registry"
)

// maxSelector bounds a label selector, in bytes: each node gets it with each
// request.
const maxSelector = 1000

const maxMediaType = 128 // bytes that are looked at

// rule is a compiled rule.
type rule struct {
	name            string
	skip            bool
	verify          string
	images, exclude []*pattern.Image
	written         []string // images, as they are in the file
	media           []*regexp.Regexp
	labels          labels.Selector // nil: any
	platforms       []ocispec.Platform
	asks            *imagewolfv1.PrefetchRequest // but for the image
}

// compile returns the rule, and everything that is wrong with it.
func compile(key string, c config.Rule) (*rule, []error) {
	var errs []error
	bad := func(setting string, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("%s.%s: %w", key, setting, err))
		}
	}
	r := &rule{name: c.Name, skip: c.Skip, verify: c.Verify}
	for i, s := range c.Images {
		p, err := pattern.NewImage(s)
		bad(fmt.Sprintf("images[%d]", i), quoting(s, err))
		r.images, r.written = append(r.images, p), append(r.written, s)
	}
	for i, s := range c.ImagesRegexp {
		p, err := pattern.NewImageRegexp(s)
		bad(fmt.Sprintf("images_regexp[%d]", i), quoting(s, err))
		r.images, r.written = append(r.images, p), append(r.written, s)
	}
	if len(r.images) == 0 {
		bad("images", errors.New("missing: name the images, or write [\"**\"] for all that allow_registries allows"))
	}
	for i, s := range c.Exclude {
		p, err := pattern.NewImage(s)
		bad(fmt.Sprintf("exclude[%d]", i), quoting(s, err))
		r.exclude = append(r.exclude, p)
	}
	for _, s := range c.MediaTypes {
		r.media = append(r.media, pattern.MediaType(s))
	}
	var err error
	if c.Labels != "" {
		r.labels, err = selector(c.Labels)
		bad("labels", err)
	}
	if c.Nodes != "" {
		_, err = selector(c.Nodes)
		bad("nodes", err)
	}
	r.asks = &imagewolfv1.PrefetchRequest{
		Namespace: c.Namespace, Referrers: c.Referrers, Priority: int32(c.Priority), Concurrency: uint32(c.Concurrency), //nolint:gosec // checked by config
		TimeoutSeconds: int64(c.Timeout.Duration().Seconds()),
	}
	if c.Nodes != "" || c.Count != 0 || c.Percent != 0 || c.RunningRepository {
		r.asks.Nodes = &imagewolfv1.NodeSelection{
			Labels: c.Nodes, Count: uint32(c.Count), Percent: uint32(c.Percent), RunningRepository: c.RunningRepository, //nolint:gosec // as above
		}
	}
	for i, s := range c.Platforms {
		p, err := platforms.Parse(s)
		if err != nil {
			bad(fmt.Sprintf("platforms[%d]", i), fmt.Errorf("%q is no platform such as linux/arm64: %w", s, err))
			continue
		}
		r.platforms = append(r.platforms, p)
		r.asks.Platforms = append(r.asks.Platforms, platforms.FormatAll(platforms.Normalize(p)))
	}
	return r, errs
}

func quoting(s string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%.100q: %w", s, err)
}

// selector reads a label selector in Kubernetes' syntax.
func selector(s string) (labels.Selector, error) {
	if len(s) > maxSelector {
		return nil, fmt.Errorf("longer than %d bytes", maxSelector)
	}
	sel, err := labels.Parse(s)
	if err != nil {
		return nil, fmt.Errorf("%q is no label selector in Kubernetes' syntax, such as zone=a,gpu!=none: %w", s, err)
	}
	return sel, nil
}

// matches tells whether the rule is about the image, and why.
func (r *rule) matches(ctx context.Context, l *look) (bool, string, error) {
	name, tag, dgst := l.repo.String(), l.event.Tag, l.event.Digest.String()
	by, hint := "", ""
	for i, p := range r.images {
		if p.Match(name, tag, dgst) {
			by = r.written[i]
			break
		}
		if tag == "" && p.MatchName(name) {
			hint = fmt.Sprintf(": %s does, but for images without a tag it must end in @*", r.written[i])
		}
	}
	if by == "" {
		return false, "no pattern matches" + hint, nil
	}
	for _, p := range r.exclude {
		if p.Match(name, tag, dgst) {
			return false, by + " matches, and exclude too", nil
		}
	}
	why := by + " matches"
	if len(r.media) > 0 {
		has, err := l.mediaTypes(ctx, r.media)
		if err != nil {
			return false, "", err
		}
		if !r.anyMedia(has) {
			return false, why + ", but of media_types none is among " + strings.Join(has, ", "), nil
		}
		why += ", and the media type"
	}
	if r.labels != nil {
		has, err := l.labels(ctx, r.platforms)
		if err != nil {
			return false, "", err
		}
		if !r.labels.Matches(labels.Set(has)) {
			return false, why + ", but not the labels", nil
		}
		why += ", and the labels"
	}
	return true, why, nil
}

func (r *rule) anyMedia(has []string) bool {
	for _, re := range r.media {
		for _, t := range has {
			if re.MatchString(strings.ToLower(t)) {
				return true
			}
		}
	}
	return false
}

// request returns what nodes are asked to pull: by its digest, where that is
// known.
func (r *rule) request(e event.Event, d digest.Digest) *imagewolfv1.PrefetchRequest {
	image := e.Registry + "/" + e.Repository
	if e.Tag != "" {
		image += ":" + e.Tag
	} else {
		image += "@" + e.Digest.String()
	}
	if e.Digest != "" {
		d = e.Digest
	}
	req := &imagewolfv1.PrefetchRequest{
		Image: image, Digest: d.String(), Platforms: r.asks.GetPlatforms(), Namespace: r.asks.GetNamespace(), Referrers: r.asks.GetReferrers(),
		Priority: r.asks.GetPriority(), Concurrency: r.asks.GetConcurrency(), TimeoutSeconds: r.asks.GetTimeoutSeconds(),
	}
	if n := r.asks.GetNodes(); n != nil {
		req.Nodes = &imagewolfv1.NodeSelection{
			Labels: n.GetLabels(), Count: n.GetCount(), Percent: n.GetPercent(), RunningRepository: n.GetRunningRepository(),
		}
	}
	return req
}

// words says what a request asks for.
func words(r *rule, q *imagewolfv1.PrefetchRequest) string {
	var b strings.Builder
	b.WriteString("pull " + q.GetImage())
	if q.GetDigest() != "" && !strings.HasSuffix(q.GetImage(), q.GetDigest()) {
		b.WriteString(" as " + q.GetDigest())
	}
	if len(q.GetPlatforms()) > 0 {
		b.WriteString(" for " + strings.Join(q.GetPlatforms(), ", "))
	}
	n := q.GetNodes()
	b.WriteString(" on ")
	switch {
	case n.GetCount() > 0:
		fmt.Fprintf(&b, "%d nodes", n.GetCount())
	case n.GetPercent() > 0:
		fmt.Fprintf(&b, "%d%% of the nodes", n.GetPercent())
	default:
		b.WriteString("all nodes")
	}
	if n.GetLabels() != "" {
		b.WriteString(" with " + n.GetLabels())
	}
	if n.GetRunningRepository() {
		b.WriteString(" that have an image of the repository")
	}
	if q.GetNamespace() != "" {
		b.WriteString(" in namespace " + q.GetNamespace())
	}
	if r.verify != "" {
		b.WriteString("; its signature is good (verify " + r.verify + ")")
	}
	return b.String()
}

// look is what is known about the image of one event; the registry is asked
// when something is wanted, and once.
type look struct {
	registry Registry
	event    event.Event
	repo     registry.Repo

	known    digest.Digest // that the tag was found to point to; "" where it was not asked for
	manifest *registry.Manifest
}

// digest returns the event's digest, or what its tag points to.
func (l *look) digest(ctx context.Context) (digest.Digest, error) {
	if l.known == "" {
		l.known = l.event.Digest
	}
	if l.known == "" {
		d, err := l.registry.Resolve(ctx, l.repo, l.event.Tag)
		if err != nil {
			return "", err
		}
		l.known = d
	}
	return l.known, nil
}

func (l *look) image(ctx context.Context) (*registry.Manifest, error) {
	if l.manifest != nil {
		return l.manifest, nil
	}
	d, err := l.digest(ctx)
	if err != nil {
		return nil, err
	}
	l.manifest, err = l.registry.Manifest(ctx, l.repo, d)
	return l.manifest, err
}

// mediaTypes returns the types by which the image may be called. What the event
// says is enough, if that is one of those that are wanted.
func (l *look) mediaTypes(ctx context.Context, wanted []*regexp.Regexp) ([]string, error) {
	if t := l.event.MediaType; t != "" && (&rule{media: wanted}).anyMedia([]string{t}) {
		return []string{t}, nil
	}
	m, err := l.image(ctx)
	if err != nil {
		return nil, err
	}
	out := []string{m.MediaType}
	for _, t := range []string{m.ArtifactType, m.Config.MediaType} {
		if t != "" {
			out = append(out, strings.ToValidUTF8(t[:min(len(t), maxMediaType)], "?"))
		}
	}
	return out, nil
}

// labels returns the labels of the image's config; of an index, those of the
// first image for one of the platforms, or else for linux/amd64, or else of the
// first image.
func (l *look) labels(ctx context.Context, wanted []ocispec.Platform) (map[string]string, error) {
	m, err := l.image(ctx)
	if err != nil {
		return nil, err
	}
	for depth := 0; m.Index(); depth++ {
		child, ok := pick(m.Manifests, wanted)
		if !ok || depth > 2 {
			return nil, nil
		}
		if m, err = l.registry.Manifest(ctx, l.repo, child); err != nil {
			return nil, err
		}
	}
	b, err := l.registry.Blob(ctx, l.repo, m.Config)
	if err != nil {
		return nil, err
	}
	return registry.Labels(m.Config.MediaType, b)
}

// pick returns the image of an index that has the labels.
func pick(all []ocispec.Descriptor, wanted []ocispec.Platform) (digest.Digest, bool) {
	if len(wanted) == 0 {
		wanted = []ocispec.Platform{{OS: "linux", Architecture: "amd64"}}
	}
	match := platforms.Any(wanted...)
	var first digest.Digest
	for _, d := range all {
		if d.Platform != nil && (d.Platform.OS == "unknown" || d.Annotations["vnd.docker.reference.type"] != "") {
			continue // what builders add about an image
		}
		if d.Platform != nil && match.Match(*d.Platform) {
			return d.Digest, true
		}
		if first == "" {
			first = d.Digest
		}
	}
	return first, first != ""
}
