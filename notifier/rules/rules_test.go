package rules

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/protobuf/proto"

	imagewolfv1 "github.com/imagewolf/imagewolf/api/v1"
	"github.com/imagewolf/imagewolf/config"
	"github.com/imagewolf/imagewolf/notifier/event"
	"github.com/imagewolf/imagewolf/notifier/registry"
	"github.com/imagewolf/imagewolf/notifier/verify"
)

// fake is a registry with one repository, and a log of what it was asked.
type fake struct {
	tags      map[string]digest.Digest
	manifests map[digest.Digest]*registry.Manifest
	blobs     map[digest.Digest]string
	err       error
	asked     []string
}

func (f *fake) Resolve(_ context.Context, _ registry.Repo, tag string) (digest.Digest, error) {
	f.asked = append(f.asked, "tag")
	if d, ok := f.tags[tag]; ok && f.err == nil {
		return d, nil
	}
	return "", f.orAbsent()
}

func (f *fake) Manifest(_ context.Context, _ registry.Repo, d digest.Digest) (*registry.Manifest, error) {
	f.asked = append(f.asked, "manifest")
	if m, ok := f.manifests[d]; ok && f.err == nil {
		return m, nil
	}
	return nil, f.orAbsent()
}

func (f *fake) Blob(_ context.Context, _ registry.Repo, desc ocispec.Descriptor) ([]byte, error) {
	f.asked = append(f.asked, "blob")
	if b, ok := f.blobs[desc.Digest]; ok && f.err == nil {
		return []byte(b), nil
	}
	return nil, f.orAbsent()
}

func (f *fake) orAbsent() error {
	if f.err != nil {
		return f.err
	}
	return registry.ErrNotFound
}

// signed is a verifier that knows some digests.
type signed struct {
	good  map[digest.Digest]bool
	err   error
	asked int
}

func (s *signed) Verify(_ context.Context, _ registry.Repo, d digest.Digest) error {
	s.asked++
	if s.good[d] {
		return nil
	}
	return s.err
}

const host = "registry.example.com"

var (
	index, image, arm, chart = named("index"), named("image"), named("arm"), named("chart")
	configs                  = map[digest.Digest]string{named("c1"): `{"config":{"Labels":{"tier":"front","team":"a"}}}`, named("c2"): `{"config":{"Labels":{"tier":"arm"}}}`}
)

func named(s string) digest.Digest { return digest.FromString(s) }

// newFake has an index with images for two platforms, and a chart.
func newFake() *fake {
	of := func(mediaType, cfg string, c digest.Digest) *registry.Manifest {
		return &registry.Manifest{MediaType: mediaType, Config: ocispec.Descriptor{MediaType: cfg, Digest: c}}
	}
	return &fake{
		tags: map[string]digest.Digest{"1": index, "2": image, "chart": chart},
		manifests: map[digest.Digest]*registry.Manifest{
			index: {MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{
				{Digest: named("attestation"), Platform: &ocispec.Platform{OS: "unknown", Architecture: "unknown"}},
				{Digest: arm, Platform: &ocispec.Platform{OS: "linux", Architecture: "arm64"}},
				{Digest: image, Platform: &ocispec.Platform{OS: "linux", Architecture: "amd64"}},
			}},
			image: of(ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageConfig, named("c1")),
			arm:   of(ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageConfig, named("c2")),
			chart: of(ocispec.MediaTypeImageManifest, "application/vnd.cncf.helm.config.v1+json", named("c1")),
		},
		blobs: configs,
	}
}

func push(tag string, d digest.Digest) event.Event {
	return event.Event{Kind: event.Pushed, Registry: host, Repository: "apps/web", Tag: tag, Digest: d}
}

func newRules(t *testing.T, f *fake, v *signed, tables ...config.Rule) *Rules {
	t.Helper()
	c := config.DefaultNotifier()
	c.AllowRegistries = []string{host}
	c.Verify["release"] = config.Verify{Type: "cosign", Wait: config.Duration(2 * time.Minute)}
	for i := range tables {
		if tables[i].Name == "" {
			tables[i].Name = fmt.Sprintf("r%d", i+1)
		}
	}
	c.Rule = tables
	r, err := New(c, Options{Registry: f, Verifiers: map[string]Verifier{"release": v}})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestDecide(t *testing.T) {
	all := []string{"**", "**@*"}
	for name, c := range map[string]struct {
		event event.Event
		rules []config.Rule
		want  string // kind, rule, digest if any
		asked string // what the registry was asked
		says  string // in the reason
	}{
		"another registry": {
			event.Event{Registry: "evil.example", Repository: "a", Tag: "1"},
			[]config.Rule{{Images: all}}, "not_allowed ", "", "evil.example is not on allow_registries",
		},
		"no rule":                {push("1", index), nil, "no_match ", "", "no rule"},
		"the first counts":       {push("1", ""), []config.Rule{{Images: []string{"**/api"}}, {Images: all}, {Images: all, Skip: true}}, "requested r2", "", "on all nodes"},
		"skip":                   {push("1", ""), []config.Rule{{Images: all, Skip: true}, {Images: all}}, "skipped r1", "", "skip"},
		"exclude":                {push("1", ""), []config.Rule{{Images: all, Exclude: []string{"**/web:1"}}}, "no_match ", "", ""},
		"regexp":                 {push("1", ""), []config.Rule{{ImagesRegexp: []string{`.*/web:\d`}}}, "requested r1", "", ""},
		"the tag still points":   {push("1", index), []config.Rule{{Images: all}}, "requested r1 index", "tag", " as sha256:"},
		"the tag has moved":      {push("1", arm), []config.Rule{{Images: all}}, "superseded r1", "tag", "now points to " + index.String()},
		"without a tag":          {push("", arm), []config.Rule{{Images: []string{"**"}}, {Images: []string{"**@*"}}}, "requested r2 arm", "", "@" + arm.String()},
		"without a tag, no @":    {push("", arm), []config.Rule{{Images: []string{"**"}}}, "no_match ", "", ""},
		"signature by its tag":   {push("sha256-"+index.Encoded()+".sig", arm), []config.Rule{{Images: all}}, "not_image ", "", "signatures"},
		"fallback of referrers":  {push("sha256-"+index.Encoded(), arm), []config.Rule{{Images: all}}, "not_image ", "", "belongs to an image"},
		"labels of an image":     {push("2", ""), []config.Rule{{Images: all, Labels: "tier=front,team in (a,b)"}}, "requested r1 image", "tag manifest blob", ""},
		"labels of an index":     {push("1", index), []config.Rule{{Images: all, Labels: "tier=front"}}, "requested r1 index", "manifest manifest blob tag", ""},
		"labels of a platform":   {push("1", ""), []config.Rule{{Images: all, Labels: "tier=arm", Platforms: []string{"linux/arm64"}}}, "requested r1 index", "tag manifest manifest blob", "for linux/arm64"},
		"labels of none":         {push("1", ""), []config.Rule{{Images: all, Labels: "tier=front", Platforms: []string{"linux/arm64"}}}, "no_match ", "tag manifest manifest blob", ""},
		"labels of a chart":      {push("chart", ""), []config.Rule{{Images: all, Labels: "tier=front"}, {Images: all, Labels: "!tier"}}, "requested r2 chart", "tag manifest blob blob", ""},
		"media type of an index": {push("1", ""), []config.Rule{{Images: all, MediaTypes: []string{"application/vnd.oci.image.index.*"}}}, "requested r1 index", "tag manifest", ""},
		"media type of a config": {push("chart", ""), []config.Rule{{Images: all, MediaTypes: []string{"*/vnd.cncf.helm.*"}, Skip: true}}, "skipped r1", "tag manifest", ""},
		"another media type":     {push("2", ""), []config.Rule{{Images: all, MediaTypes: []string{"*/vnd.cncf.helm.*"}}}, "no_match ", "tag manifest", ""},
		"signed":                 {push("1", index), []config.Rule{{Images: all, Verify: "release"}}, "requested r1 index", "tag", "its signature is good"},
		"signed, no digest told": {push("1", ""), []config.Rule{{Images: all, Verify: "release"}}, "requested r1 index", "tag", ""},
		"signed, without a tag":  {push("", index), []config.Rule{{Images: all, Verify: "release"}}, "requested r1 index", "", ""},
		"moved before it was":    {push("2", arm), []config.Rule{{Images: all, Verify: "release"}}, "superseded r1", "tag", ""},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake()
			r := newRules(t, f, &signed{good: map[digest.Digest]bool{index: true}, err: verify.ErrUnsigned}, c.rules...)
			d, err := r.Decide(t.Context(), c.event)
			if err != nil {
				t.Fatal(err)
			}
			got := strings.TrimSuffix(fmt.Sprintf("%s %s %s", d.Kind, d.Rule, digestName(d.Request.GetDigest())), " ")
			if got != c.want {
				t.Errorf("got %q (%s), want %q", got, d.Reason, c.want)
			}
			if asked := strings.Join(f.asked, " "); asked != c.asked {
				t.Errorf("the registry was asked %q, want %q", asked, c.asked)
			}
			if !strings.Contains(d.Reason, c.says) || d.Reason == "" {
				t.Errorf("says %q", d.Reason)
			}
			if (d.Request == nil) != (d.Kind != Requested) {
				t.Errorf("%s, and the request is %v", d.Kind, d.Request)
			}
		})
	}
}

func digestName(s string) string {
	for _, n := range []string{"index", "image", "arm", "chart"} {
		if named(n).String() == s {
			return n
		}
	}
	return s
}

func TestRequestHasAllThatTheRuleSays(t *testing.T) {
	r := newRules(t, newFake(), &signed{}, config.Rule{
		Images: []string{"**"}, Platforms: []string{"linux/aarch64", "linux/amd64"}, Nodes: "zone=a,gpu!=none", Count: 5, Percent: 50,
		RunningRepository: true, Namespace: "k8s.io", Referrers: true, Priority: -3, Concurrency: 7, Timeout: config.Duration(time.Hour),
	})
	for range 2 { // one request is not the other's
		d, err := r.Decide(t.Context(), push("1", index))
		want := &imagewolfv1.PrefetchRequest{
			Image: host + "/apps/web:1", Digest: index.String(), Platforms: []string{"linux/arm64", "linux/amd64"}, Namespace: "k8s.io",
			Nodes:     &imagewolfv1.NodeSelection{Labels: "zone=a,gpu!=none", Count: 5, Percent: 50, RunningRepository: true},
			Referrers: true, Priority: -3, Concurrency: 7, TimeoutSeconds: 3600,
		}
		if err != nil || !proto.Equal(d.Request, want) {
			t.Fatalf("got %v, %v", d.Request, err)
		}
		d.Request.Id, d.Request.Image, d.Request.Nodes.Labels = "x", "y", "z"
	}
}

func TestTagsAreNotCheckedWhereThatIsOff(t *testing.T) {
	f := newFake()
	r := newRules(t, f, &signed{}, config.Rule{Images: []string{"**"}})
	r.checkTags = false
	if d, err := r.Decide(t.Context(), push("1", arm)); err != nil || d.Kind != Requested || d.Request.GetDigest() != arm.String() || len(f.asked) > 0 {
		t.Errorf("%+v, %v; asked %q", d, err, f.asked)
	}
}

func TestAWayThatFailsIsTriedAgain(t *testing.T) {
	away := errors.New("connection refused")
	for name, c := range map[string]config.Rule{
		"tag": {Images: []string{"**"}}, "labels": {Images: []string{"**"}, Labels: "a=b"}, "media types": {Images: []string{"**"}, MediaTypes: []string{"x/y"}},
	} {
		f := newFake()
		f.err = away
		if d, err := newRules(t, f, &signed{}, c).Decide(t.Context(), push("1", index)); !errors.Is(err, away) || d.Kind != "" || !strings.Contains(err.Error(), "r1") {
			t.Errorf("%s: %+v, %v", name, d, err)
		}
	}
	r := newRules(t, newFake(), &signed{err: away}, config.Rule{Images: []string{"**"}, Verify: "release"})
	if d, err := r.Decide(t.Context(), push("1", index)); !errors.Is(err, away) || d.Kind != "" {
		t.Errorf("verify: %+v, %v", d, err)
	}
}

func TestWhatIsNoImageLeadsToNothing(t *testing.T) {
	f := newFake()
	f.err = registry.ErrInvalid
	d, err := newRules(t, f, &signed{}, config.Rule{Images: []string{"**"}, Labels: "a=b"}).Decide(t.Context(), push("1", index))
	if err != nil || d.Kind != event.NotImage || d.Rule != "r1" {
		t.Errorf("%+v, %v", d, err)
	}
}

// Signing comes after pushing: a signature may be missing for a while.
func TestASignatureIsWaitedFor(t *testing.T) {
	for _, c := range []struct {
		err  error
		kind event.Kind
	}{{verify.ErrUnsigned, Unsigned}, {fmt.Errorf("%w: wrong key", verify.ErrUntrusted), Untrusted}} {
		synctest.Test(t, func(t *testing.T) {
			v := &signed{good: map[digest.Digest]bool{}, err: c.err}
			r := newRules(t, newFake(), v, config.Rule{Images: []string{"**"}, Verify: "release"})
			for range 2 {
				if d, err := r.Decide(t.Context(), push("1", index)); !errors.Is(err, c.err) || d.Kind != "" {
					t.Errorf("at first: %+v, %v", d, err)
				}
				time.Sleep(119 * time.Second / 2)
			}
			if x, err := r.Explain(t.Context(), push("1", index)); err != nil || x.Decision.Kind != c.kind {
				t.Errorf("explained: %+v, %v", x, err)
			}
			time.Sleep(2 * time.Second)
			if d, err := r.Decide(t.Context(), push("1", index)); err != nil || d.Kind != c.kind || d.Request != nil || d.Rule != "r1" {
				t.Errorf("at last: %+v, %v", d, err)
			}
			if _, err := r.Decide(t.Context(), push("1", index)); err == nil {
				t.Error("another event of the image is not waited for anew")
			}
			v.good[index] = true
			if d, err := r.Decide(t.Context(), push("1", index)); err != nil || d.Kind != Requested {
				t.Errorf("signed: %+v, %v", d, err)
			}
			asked := v.asked
			for range 5 {
				if _, err := r.Decide(t.Context(), push("1", "")); err != nil {
					t.Error(err)
				}
			}
			if v.asked != asked {
				t.Errorf("a good signature was looked at %d times more", v.asked-asked)
			}
			time.Sleep(goodFor)
			v.good[index] = false
			if d, err := r.Decide(t.Context(), push("1", "")); err == nil {
				t.Errorf("a signature is good for ever: %+v", d)
			}
		})
	}
}

// A restart puts the refusal off, and lets nothing in.
func TestARestartGivesASignatureItsWholeWaitAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := &signed{err: verify.ErrUnsigned}
		for range 2 {
			r := newRules(t, newFake(), v, config.Rule{Images: []string{"**"}, Verify: "release"})
			for range 2 {
				if d, err := r.Decide(t.Context(), push("1", index)); !errors.Is(err, verify.ErrUnsigned) || d.Request != nil {
					t.Errorf("at first: %+v, %v", d, err)
				}
				time.Sleep(119 * time.Second / 2)
			}
		}
		r := newRules(t, newFake(), v, config.Rule{Images: []string{"**"}, Verify: "release"})
		_, _ = r.Decide(t.Context(), push("1", index))
		time.Sleep(2 * time.Minute)
		if d, err := r.Decide(t.Context(), push("1", index)); err != nil || d.Kind != Unsigned || d.Request != nil {
			t.Errorf("at last: %+v, %v", d, err)
		}
	})
}

func TestWhatIsGoneIsGivenUpAfterAWhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRules(t, newFake(), &signed{}, config.Rule{Images: []string{"**"}})
		if d, err := r.Decide(t.Context(), push("9", index)); !errors.Is(err, registry.ErrNotFound) {
			t.Errorf("at first: %+v, %v", d, err)
		}
		time.Sleep(goneAfter)
		if d, err := r.Decide(t.Context(), push("9", index)); err != nil || d.Kind != Gone {
			t.Errorf("at last: %+v, %v", d, err)
		}
	})
}

func TestExplain(t *testing.T) {
	f := newFake()
	r := newRules(t, f, &signed{err: verify.ErrUnsigned},
		config.Rule{Name: "untagged", Images: []string{"**@*"}},
		config.Rule{Name: "rc", Images: []string{"**"}, Exclude: []string{"**:1"}},
		config.Rule{Name: "arm", Images: []string{"**:1"}, Labels: "tier=arm"},
		config.Rule{Name: "charts", Images: []string{"**:1"}, MediaTypes: []string{"*/*helm*"}},
		config.Rule{Name: "web", Images: []string{"**/web"}, Verify: "release"},
		config.Rule{Name: "rest", Images: []string{"**"}})
	x, err := r.Explain(t.Context(), push("1", ""))
	want := `registry.example.com/apps/web:1
  - rule untagged: no pattern matches
  - rule rc: ** matches, and exclude too
  - rule arm: **:1 matches, but not the labels
  - rule charts: **:1 matches, but of media_types none is among application/vnd.oci.image.index.v1+json
  + rule web: **/web matches
    1 further rules are not looked at
  unsigned: verify release: not signed
`
	if err != nil || x.String() != want {
		t.Errorf("got %v\n%s\nwant\n%s", err, x, want)
	}
	x, err = r.Explain(t.Context(), push("", arm))
	if err != nil || !strings.Contains(x.String(), "+ rule untagged") || x.Rest != 5 {
		t.Errorf("%v\n%s", err, x)
	}
	x, err = newRules(t, f, &signed{}, config.Rule{Images: []string{"**"}}).Explain(t.Context(), push("", arm))
	if err != nil || !strings.Contains(x.String(), "must end in @*") {
		t.Errorf("%v\n%s", err, x)
	}
	f.err = errors.New("away")
	if x, err = r.Explain(t.Context(), push("1", "")); err == nil || len(x.Steps) != 2 {
		t.Errorf("%v\n%s", err, x)
	}
}

func TestEverythingThatIsWrongIsNamed(t *testing.T) {
	c := config.DefaultNotifier()
	c.AllowRegistries = []string{"https://x"}
	c.Verify = map[string]config.Verify{"a": {Type: "cosign", Keys: []string{"/nonexistent"}}, "b": {Type: "notation", TrustPolicy: "/nonexistent"}, "c": {Type: "x"}}
	c.Rule = []config.Rule{
		{Name: "web", Images: []string{"ok/a", "nginx"}, ImagesRegexp: []string{"("}, Exclude: []string{"{"}, Labels: "a=(", Nodes: "=b", Platforms: []string{"x/y/z/a"}},
		{Verify: "none"},
		{Name: "long", Images: []string{"**"}, Nodes: strings.Repeat("a,", 600)},
	}
	_, err := New(c, Options{Registry: newFake()})
	for _, want := range []string{
		`allow_registries: "https://x"`, `rule.web.images[1]: "nginx": has no host`, `rule.web.images_regexp[0]: "(": `, `rule.web.exclude[0]: "{"`,
		`rule.web.labels: "a=(" is no label selector`, `rule.web.nodes: "=b" is no label selector`, `rule.web.platforms[0]: "x/y/z/a" is no platform`,
		`rule.2.images: missing`, `rule.2.verify: there is no table [verify.none]`, `verify.a.keys: `, `verify.b.trust_policy: `, `verify.c.type: `,
		`rule.long.nodes: longer`,
	} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("missing: %s", want)
		}
	}
	if n := len(strings.Split(fmt.Sprint(err), "\n")); n != 13 {
		t.Errorf("%d lines:\n%v", n, err)
	}
	for _, c := range []config.Notifier{{}, {AllowRegistries: []string{"a.example"}, Registry: config.NotifierRegistry{CAFile: "/nonexistent"}}} {
		if _, err := New(c, Options{}); err == nil {
			t.Errorf("%+v was taken", c)
		}
	}
}

// Whatever the selector: no panic, and what is taken can be used.
func FuzzSelector(f *testing.F) {
	for _, s := range []string{"zone=a,gpu!=none", "a in (b,c),!d", "x notin ()", "a>1", "=", "(", strings.Repeat("a,", 600)} {
		f.Add(s, "a", "b")
	}
	f.Fuzz(func(t *testing.T, s, key, value string) {
		r, errs := compile("rule.1", config.Rule{Name: "a", Images: []string{"**"}, Labels: s, Nodes: s, Platforms: []string{s}})
		if len(errs) == 0 && r.labels != nil {
			r.labels.Matches(fakeSet{key: value})
		}
		for _, err := range errs {
			if !strings.HasPrefix(err.Error(), "rule.1.") {
				t.Errorf("an error without its key: %v", err)
			}
		}
	})
}

type fakeSet map[string]string

func (f fakeSet) Has(k string) bool              { _, ok := f[k]; return ok }
func (f fakeSet) Get(k string) string            { return f[k] }
func (f fakeSet) Lookup(k string) (string, bool) { v, ok := f[k]; return v, ok }
