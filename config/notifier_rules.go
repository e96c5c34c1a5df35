package config

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
)

// NotifierRegistry says how the notifier itself asks registries.
type NotifierRegistry struct {
	CredentialFiles []string `toml:"credential_files" comment:"Docker config files (config.json, .dockerconfigjson, .dockercfg) with the registries' credentials, or the credential helpers that have them; entries for a whole registry count. Read again when they change."`
	PlainHTTP       []string `toml:"plain_http" comment:"Registries that speak plain HTTP, as patterns of hosts."`
	CAFile          string   `toml:"ca_file" comment:"Certificates (PEM) of authorities to trust beside the system's."`
	TokenHosts      []string `toml:"token_hosts" comment:"Hosts, as patterns, that may be sent credentials for a token though they are of another domain than the registry that names them."`
	CheckTags       bool     `toml:"check_tags" comment:"Ask the registry whether the tag still points to the digest of the event, so that a late event moves no tag back."`
	Timeout         Duration `toml:"timeout" comment:"How long a registry may take for one event. 1s to 5m."`
}

// Rule says what is done with the images that it matches. Of several rules the
// first that matches counts. All conditions of a rule must hold: Images (or
// ImagesRegexp, or both), Exclude, Labels and MediaTypes.
type Rule struct {
	Name              string   `toml:"name" comment:"Name, for the log and the metrics: small letters, digits and '-'."`
	Images            []string `toml:"images" comment:"Images it is about, as patterns: host/repository, :tag and @digest; * within a part of the path, ** across parts."`
	ImagesRegexp      []string `toml:"images_regexp" comment:"The same as regular expressions (RE2), which must match all of host/repository:tag, or of host/repository@digest where there is no tag."`
	Exclude           []string `toml:"exclude" comment:"Images that it is not about, as patterns."`
	Labels            string   `toml:"labels" comment:"Labels that the image's config must have: a label selector in Kubernetes' syntax."`
	MediaTypes        []string `toml:"media_types" comment:"Media types of which the image must have one: of its manifest or index, of its config, or its artifact type."`
	Skip              bool     `toml:"skip" comment:"Do nothing with what it matches."`
	Verify            string   `toml:"verify" comment:"Table [verify.NAME] that says how the image must be signed."`
	Platforms         []string `toml:"platforms" comment:"Platforms that are pulled, such as linux/arm64. Empty: each node's own."`
	Nodes             string   `toml:"nodes" comment:"Nodes that pull: a label selector in Kubernetes' syntax. Empty: all."`
	Count             int      `toml:"count" comment:"At most so many of the nodes. 0: all."`
	Percent           int      `toml:"percent" comment:"At most this part of the nodes, 1 to 100. 0: all."`
	RunningRepository bool     `toml:"running_repository" comment:"Only nodes that already have an image of the repository."`
	Namespace         string   `toml:"namespace" comment:"Namespace of containerd. Empty: the node's setting."`
	Referrers         bool     `toml:"referrers" comment:"Pull signatures, SBOMs and what else refers to the image, too."`
	Priority          int      `toml:"priority" comment:"Of two requests that wait on a node, the higher goes first. -1000 to 1000."`
	Concurrency       int      `toml:"concurrency" comment:"Nodes that pull at the same time. 0: all."`
	Timeout           Duration `toml:"timeout" comment:"When what has not been pulled is given up. 1m to 24h; 0s: a day."`
}

// Verify says what signature an image must have.
type Verify struct {
	Type        string   `toml:"type" comment:"Kind of signature: cosign or notation."`
	Keys        []string `toml:"keys" comment:"Type cosign: files with public keys (PEM), of which one must have signed."`
	TrustPolicy string   `toml:"trust_policy" comment:"Type notation: file of the trust policy (trustpolicy.json)."`
	TrustStore  string   `toml:"trust_store" comment:"Type notation: directory of the trust store, the one that has x509/ in it."`
	Wait        Duration `toml:"wait" comment:"How long after its push an image may be without a good signature until it is refused. 0s to 1h."`
}

// VerifyTypes are the kinds of signatures there are; package notifier/verify
// has a verifier for each.
var VerifyTypes = []string{"cosign", "notation"}

const (
	defaultVerifyWait = Duration(2 * time.Minute)
	maxRules          = 1000
	maxNodes          = 100_000
)

var (
	hostPattern    = regexp.MustCompile(`^[a-z0-9*]([a-z0-9*.-]*[a-z0-9*])?(:([0-9]{1,5}|\*))?$`)
	mediaType      = regexp.MustCompile(`^[a-z0-9*]+/[A-Za-z0-9.+*_-]+$`)
	containerdName = regexp.MustCompile(`^[A-Za-z0-9]+([._-][A-Za-z0-9]+)*$`)
)

// Key names the rule in messages: by its name, or, where it has none, by its
// number; i counts from 0.
func (r Rule) Key(i int) string {
	if receiverName.MatchString(r.Name) {
		return "rule." + r.Name
	}
	return fmt.Sprintf("rule.%d", i+1)
}

// rules adds what is wrong with the rules and with what they need.
func (p *problems) rules(n Notifier) {
	if len(n.AllowRegistries) == 0 {
		p.add("allow_registries", "empty: list the hosts whose images may be pulled, such as [\"registry.example.com\", \"*.dkr.ecr.eu-west-1.amazonaws.com\"]")
	}
	p.hosts("allow_registries", n.AllowRegistries)
	p.hosts("registry.plain_http", n.Registry.PlainHTTP)
	p.hosts("registry.token_hosts", n.Registry.TokenHosts)
	p.between("registry.timeout", n.Registry.Timeout, time.Second, 5*time.Minute)
	for i, f := range n.Registry.CredentialFiles {
		p.file(fmt.Sprintf("registry.credential_files[%d]", i), f, true)
	}
	if n.Registry.CAFile != "" {
		p.file("registry.ca_file", n.Registry.CAFile, false)
	}
	for _, name := range slices.Sorted(maps.Keys(n.Verify)) {
		p.verify("verify."+name, name, n.Verify[name])
	}
	if len(n.Rule) > maxRules {
		p.add("rule", "%d are too many: at most %d", len(n.Rule), maxRules)
		return
	}
	names := map[string]bool{}
	for i, r := range n.Rule {
		key := r.Key(i)
		switch {
		case !receiverName.MatchString(r.Name):
			p.add(key+".name", "%q: give it a name of small letters, digits and '-', at most 63", r.Name)
		case names[r.Name]:
			p.add(key+".name", "two rules have that name: give each its own")
		}
		names[r.Name] = true
		p.rule(key, r, n.Verify)
	}
}

func (p *problems) hosts(key string, patterns []string) {
	for i, h := range patterns {
		switch at := fmt.Sprintf("%s[%d]", key, i); {
		case !hostPattern.MatchString(h):
			p.add(at, "%q: write a host as image names have it, with its port if they have one, in small letters; * stands for letters between two dots", h)
		case strings.Trim(h, "*.:") == "":
			p.add(at, "%q would be any host: name the domain", h)
		case h == "index.docker.io" || h == "registry-1.docker.io":
			p.add(at, "%q: Docker Hub is docker.io", h)
		}
	}
}

func (p *problems) rule(key string, r Rule, verify map[string]Verify) {
	if len(r.Images)+len(r.ImagesRegexp) == 0 {
		p.add(key+".images", "missing: name the images, or write [\"**\"] for all that allow_registries allows")
	}
	for i, m := range r.MediaTypes {
		if !mediaType.MatchString(m) {
			p.add(fmt.Sprintf("%s.media_types[%d]", key, i), "%q is no media type; * stands for any letters", m)
		}
	}
	if r.Skip {
		p.skips(key, r)
		return
	}
	for _, s := range []struct {
		key              string
		value, low, high int
	}{
		{"count", r.Count, 0, maxNodes}, {"percent", r.Percent, 0, 100},
		{"priority", r.Priority, -1000, 1000}, {"concurrency", r.Concurrency, 0, maxNodes},
	} {
		if s.value < s.low || s.value > s.high {
			p.add(key+"."+s.key, "%d is out of range: choose %d to %d", s.value, s.low, s.high)
		}
	}
	if r.Timeout != 0 {
		p.between(key+".timeout", r.Timeout, time.Minute, 24*time.Hour)
	}
	if r.Namespace != "" && (len(r.Namespace) > 76 || !containerdName.MatchString(r.Namespace)) {
		p.add(key+".namespace", "%q is no name of a namespace of containerd", r.Namespace)
	}
	if _, ok := verify[r.Verify]; r.Verify != "" && !ok {
		p.add(key+".verify", "there is no table [verify.%s]: add it, or name one that there is", r.Verify)
	}
}

// skips refuses what would look as if it did something beside skip.
func (p *problems) skips(key string, r Rule) {
	for _, s := range []struct {
		key string
		set bool
	}{
		{"verify", r.Verify != ""}, {"platforms", len(r.Platforms) > 0}, {"nodes", r.Nodes != ""}, {"count", r.Count != 0},
		{"percent", r.Percent != 0}, {"running_repository", r.RunningRepository}, {"namespace", r.Namespace != ""},
		{"referrers", r.Referrers}, {"priority", r.Priority != 0}, {"concurrency", r.Concurrency != 0}, {"timeout", r.Timeout != 0},
	} {
		if s.set {
			p.add(key+"."+s.key, "means nothing with skip = true: remove one of them")
		}
	}
}

func (p *problems) verify(key, name string, v Verify) {
	if !receiverName.MatchString(name) {
		p.add(key, "name %q: use small letters, digits and '-', at most 63", name)
	}
	p.between(key+".wait", v.Wait, 0, time.Hour)
	switch v.Type {
	case "cosign":
		if len(v.Keys) == 0 {
			p.add(key+".keys", "missing: name at least one file with a public key, such as cosign.pub")
		}
		for i, k := range v.Keys {
			p.file(fmt.Sprintf("%s.keys[%d]", key, i), k, false)
		}
		for _, s := range []struct{ key, value string }{{"trust_policy", v.TrustPolicy}, {"trust_store", v.TrustStore}} {
			if s.value != "" {
				p.add(key+"."+s.key, "is for type notation only: remove it")
			}
		}
	case "notation":
		if len(v.Keys) > 0 {
			p.add(key+".keys", "is for type cosign only: remove it")
		}
		p.file(key+".trust_policy", v.TrustPolicy, false)
		if !filepath.IsAbs(v.TrustStore) {
			p.add(key+".trust_store", "%q is not an absolute path: start it with /", v.TrustStore)
		} else if s, err := os.Stat(filepath.Join(v.TrustStore, "x509")); err != nil || !s.IsDir() {
			p.add(key+".trust_store", "%s has no directory x509: name the directory in which notation has it, usually .../notation/truststore", v.TrustStore)
		}
	default:
		p.add(key+".type", "%q is none of %s", v.Type, strings.Join(VerifyTypes, ", "))
	}
}

// ruleWarnings returns what is allowed and probably not meant about rules.
func (n Notifier) ruleWarnings() []string {
	if len(n.Rule) == 0 {
		return []string{"rule: there is none: no event leads to a prefetch"}
	}
	return nil
}
