// Package rules decides what becomes of an event: which nodes pull the image, if
// any, or why nothing is done. Its rules are those of notifier.toml, of which the
// first that matches counts. The registry is asked only where a rule cannot be
// decided without, or an image must be signed.
package rules

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	imagewolfv1 "github.com/imagewolf/imagewolf/api/v1"
	"github.com/imagewolf/imagewolf/config"
	"github.com/imagewolf/imagewolf/notifier/event"
	"github.com/imagewolf/imagewolf/notifier/internal/lru"
	"github.com/imagewolf/imagewolf/notifier/pattern"
	"github.com/imagewolf/imagewolf/notifier/registry"
	"github.com/imagewolf/imagewolf/notifier/verify"
)

// What may become of an event here, beside event.NotImage. All but Requested
// lead to nothing.
const (
	Requested  event.Kind = "requested"
	NotAllowed event.Kind = "not_allowed" // a registry that is not on the list
	NoMatch    event.Kind = "no_match"    // no rule is about it
	Skipped    event.Kind = "skipped"     // a rule says to do nothing
	Superseded event.Kind = "superseded"  // its tag has moved on
	Gone       event.Kind = "gone"        // the registry does not have it
	Unsigned   event.Kind = "unsigned"    // there is no signature
	Untrusted  event.Kind = "untrusted"   // no signature is a good one
)

const (
	// goneAfter is how long the registry may not know what it told of.
	goneAfter = time.Minute
	// goodFor is how long a signature is not checked again. A signature that is
	// revoked meanwhile is found by the next event.
	goodFor     = 10 * time.Minute
	maxRemember = 10_000 // events that wait, and digests that were verified
)

// Registry is what rules ask about images.
type Registry interface {
	Resolve(ctx context.Context, repo registry.Repo, tag string) (digest.Digest, error)
	Manifest(ctx context.Context, repo registry.Repo, d digest.Digest) (*registry.Manifest, error)
	Blob(ctx context.Context, repo registry.Repo, desc ocispec.Descriptor) ([]byte, error)
}

// Verifier checks whether a digest is signed, as package verify's do.
type Verifier interface {
	Verify(ctx context.Context, repo registry.Repo, d digest.Digest) error
}

// Options are what New makes itself where they are zero.
type Options struct {
	Registry  Registry
	Verifiers map[string]Verifier // by the name of their table
	Log       *slog.Logger        // nil logs nothing
}

// Decision is what becomes of an event.
type Decision struct {
	Rule    string                       // name of the rule that decided; "" where none did
	Request *imagewolfv1.PrefetchRequest // what nodes are asked, but for the id; nil: nothing is to be done
	Reason  string                       // what was decided and why, in words
	Kind    event.Kind                   // class of the reason, for metrics
}

// Rules decides. It is safe for concurrent use.
type Rules struct {
	allow     pattern.Hosts
	rules     []*rule
	registry  Registry
	verify    map[string]verifier
	checkTags bool
	timeout   time.Duration
	log       *slog.Logger

	first *lru.Cache[string, time.Time] // when an image was first asked for that cannot be decided yet
	good  *lru.Cache[string, time.Time] // when a digest was verified
}

type verifier struct {
	Verifier
	wait time.Duration
}

// New compiles the rules. Its error names every rule and key that is wrong. No
// registry is asked.
func New(c config.Notifier, o Options) (*Rules, error) {
	r := &Rules{
		registry: o.Registry, verify: map[string]verifier{}, checkTags: c.Registry.CheckTags, timeout: c.Registry.Timeout.Duration(), log: o.Log,
		first: lru.New[string, time.Time](maxRemember), good: lru.New[string, time.Time](maxRemember),
	}
	if r.log == nil {
		r.log = slog.New(slog.DiscardHandler)
	}
	if len(c.AllowRegistries) == 0 {
		return nil, errors.New("allow_registries: empty: list the hosts whose images may be pulled")
	}
	var errs []error
	var err error
	if r.allow, err = pattern.NewHosts(c.AllowRegistries); err != nil {
		errs = append(errs, fmt.Errorf("allow_registries: %w", err))
	}
	asked, err := registry.New(c.Registry, r.log)
	if err != nil {
		return nil, errors.Join(append(errs, err)...)
	}
	if r.registry == nil {
		r.registry = asked
	}
	for name, v := range c.Verify {
		made := o.Verifiers[name]
		if made == nil {
			if made, err = verify.New(v, asked); err != nil {
				errs = append(errs, fmt.Errorf("verify.%s.%w", name, err))
				continue
			}
		}
		r.verify[name] = verifier{made, v.Wait.Duration()}
	}
	for i, rule := range c.Rule {
		compiled, problems := compile(rule.Key(i), rule)
		if errs = append(errs, problems...); rule.Verify != "" {
			if _, ok := c.Verify[rule.Verify]; !ok {
				errs = append(errs, fmt.Errorf("%s.verify: there is no table [verify.%s]", rule.Key(i), rule.Verify))
			}
		}
		r.rules = append(r.rules, compiled)
	}
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	return r, nil
}

// Decide says what becomes of an event. An error is one that may pass, such as
// that of a registry that cannot be reached, or an image that is not signed yet:
// the event should be tried again later.
func (r *Rules) Decide(ctx context.Context, e event.Event) (Decision, error) {
	ctx, cancel := context.WithTimeout(ctx, r.timeout)
	defer cancel()
	d, err := r.decide(ctx, e, r.patient, func(Step) {})
	if err == nil {
		r.first.Delete(e.Image())
	}
	return d, err
}

// patient tells whether an event that cannot be decided may be tried again: until
// so long after it was first tried.
func (r *Rules) patient(e event.Event, wait time.Duration) bool {
	now, key := time.Now(), e.Image()
	first, ok := r.first.Get(key)
	if !ok {
		first = now
		r.first.Put(key, now, 1)
	}
	return now.Sub(first) < wait
}

// attachment is a tag by which tools put what belongs to an image beside it:
// signatures, and lists of what refers to an image.
var attachment = regexp.MustCompile(`^sha(256|512)-[0-9a-f]{64,128}(\.[a-z]+)?$`)

func (r *Rules) decide(ctx context.Context, e event.Event, patient func(event.Event, time.Duration) bool, tell func(Step)) (Decision, error) {
	switch {
	case !r.allow.Match(e.Registry):
		return nothing("", NotAllowed, "registry %s is not on allow_registries", e.Registry), nil
	case attachment.MatchString(e.Tag):
		return nothing("", event.NotImage, "tag %s is one of signatures, or of what else belongs to an image", e.Tag), nil
	}
	l := &look{registry: r.registry, event: e, repo: registry.Repo{Host: e.Registry, Path: e.Repository}}
	for _, rule := range r.rules {
		ok, why, err := rule.matches(ctx, l)
		if err != nil {
			return r.failed(rule.name, e, err, patient)
		}
		tell(Step{Rule: rule.name, Matches: ok, Why: why})
		if !ok {
			continue
		}
		if rule.skip {
			return nothing(rule.name, Skipped, "the rule says to skip it"), nil
		}
		d, err := r.request(ctx, rule, l, patient)
		if err != nil {
			return r.failed(rule.name, e, err, patient)
		}
		return d, nil
	}
	return nothing("", NoMatch, "no rule matches"), nil
}

func nothing(rule string, kind event.Kind, format string, args ...any) Decision {
	return Decision{Rule: rule, Kind: kind, Reason: fmt.Errorf(format, args...).Error()}
}

// failed decides about an event of which something could not be found out.
func (r *Rules) failed(rule string, e event.Event, err error, patient func(event.Event, time.Duration) bool) (Decision, error) {
	switch {
	case errors.Is(err, registry.ErrInvalid):
		return nothing(rule, event.NotImage, "%w", err), nil
	case errors.Is(err, registry.ErrNotFound) && !patient(e, goneAfter):
		return nothing(rule, Gone, "%w", err), nil
	}
	return Decision{Rule: rule}, fmt.Errorf("rule %s: %w", rule, err)
}

// request makes the request of a rule that matches, unless the tag has moved on
// or the image is not signed as it should be.
func (r *Rules) request(ctx context.Context, rule *rule, l *look, patient func(event.Event, time.Duration) bool) (Decision, error) {
	e := l.event
	if r.checkTags && e.Tag != "" && e.Digest != "" {
		now, err := r.registry.Resolve(ctx, l.repo, e.Tag)
		if err != nil {
			return Decision{}, err
		}
		if now != e.Digest {
			return nothing(rule.name, Superseded, "tag %s pointed to %s and now points to %s: that push has an event of its own", e.Tag, e.Digest, now), nil
		}
	}
	if rule.verify != "" {
		d, err := l.digest(ctx)
		if err != nil {
			return Decision{}, err
		}
		v := r.verify[rule.verify]
		err = r.verified(ctx, rule.verify, v, l.repo, d)
		kind := Untrusted
		switch {
		case errors.Is(err, verify.ErrUnsigned):
			kind = Unsigned
		case err != nil && !errors.Is(err, verify.ErrUntrusted):
			return Decision{}, err
		}
		if err != nil && patient(e, v.wait) {
			return Decision{}, fmt.Errorf("verify %s: waiting for a good signature of %s, at most %s: %w", rule.verify, d, v.wait, err)
		}
		if err != nil {
			return nothing(rule.name, kind, "verify %s: %w", rule.verify, err), nil
		}
	}
	req := rule.request(e, l.known)
	return Decision{Rule: rule.name, Request: req, Kind: Requested, Reason: words(rule, req)}, nil
}

// verified is v.Verify for a digest that was not found good a while ago.
func (r *Rules) verified(ctx context.Context, name string, v Verifier, repo registry.Repo, d digest.Digest) error {
	key := name + " " + repo.String() + "@" + d.String()
	if at, ok := r.good.Get(key); ok && time.Since(at) < goodFor {
		return nil
	}
	if err := v.Verify(ctx, repo, d); err != nil {
		return err
	}
	r.good.Put(key, time.Now(), 1)
	r.log.DebugContext(ctx, "verified", "verify", name, "repository", repo.String(), "digest", d.String())
	return nil
}
