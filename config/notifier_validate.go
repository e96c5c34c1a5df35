package config

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"net/url"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
)

// minSecret is the least length of a receiver's secret, in bytes: what signs
// can be guessed at offline, and what is sent can be guessed at online.
const minSecret = 16

var (
	receiverName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
	receiverPath = regexp.MustCompile(`^(/[A-Za-z0-9._~-]+)+$`)
	pathSecret   = regexp.MustCompile(`^[A-Za-z0-9_~-]+$`)
	registryPath = regexp.MustCompile(`^(/([a-z0-9._-]+|\{repository\}))+$`)
	headerName   = regexp.MustCompile(`^[A-Za-z0-9-]{1,64}$`)
	snsTopic     = regexp.MustCompile(`^arn:(aws|aws-cn|aws-us-gov):sns:[a-z0-9-]{1,32}:[0-9]{12}:[A-Za-z0-9_.-]{1,256}$`)
)

// Validate returns everything that is wrong with the settings, as that of
// Config does.
func (n Notifier) Validate() error {
	var p problems
	p.listen("listen", n.Listen)
	switch {
	case (n.TLSCertFile == "") != (n.TLSKeyFile == ""):
		p.add("tls_cert_file", "tls_cert_file and tls_key_file go together: set both, or none behind a proxy that ends TLS")
	case n.TLSCertFile != "":
		p.file("tls_cert_file", n.TLSCertFile, false)
		p.file("tls_key_file", n.TLSKeyFile, true)
	}
	if n.MaxBody < 64<<10 || n.MaxBody > 16<<20 {
		p.add("max_body", "%s is out of range: choose 64KiB to 16MiB", n.MaxBody)
	}
	if !filepath.IsAbs(n.Queue.File) {
		p.add("queue.file", "%q is not an absolute path: start it with /", n.Queue.File)
	}
	if n.Queue.MaxEvents < 1000 || n.Queue.MaxEvents > 1_000_000 {
		p.add("queue.max_events", "%d is out of range: choose 1000 to 1000000", n.Queue.MaxEvents)
	}
	p.between("queue.dedupe_window", n.Queue.DedupeWindow, 0, 24*time.Hour)
	p.between("queue.retry_for", n.Queue.RetryFor, time.Minute, 168*time.Hour)
	if n.Queue.Workers < 1 || n.Queue.Workers > 64 {
		p.add("queue.workers", "%d is out of range: choose 1 to 64", n.Queue.Workers)
	}
	p.logging(n.LogLevel, n.LogFormat)
	p.nodes(n.Nodes)
	p.feed(n.Feed)
	if n.API.On() {
		p.tokens("api", n.API.Token, n.API.TokenFile)
	}
	if n.Metrics.Address != "" {
		p.listen("metrics.address", n.Metrics.Address)
		p.distinct("metrics.address", n.Metrics.Address, listener{"listen", n.Listen})
	}
	if len(n.Receiver) == 0 && len(n.Poll) == 0 && !n.API.On() {
		p.add("receiver", "there is none: add a table [receiver.NAME] for each webhook, or [poll.NAME] for each feed, or a token for [api]")
	}
	for _, name := range slices.Sorted(maps.Keys(n.Poll)) {
		p.poll("poll."+name, name, n.Poll[name])
	}
	p.rules(n)
	paths := map[string]string{}
	for _, own := range n.ownPaths() {
		paths[own] = "" // the notifier's own
	}
	for _, name := range slices.Sorted(maps.Keys(n.Receiver)) {
		r := n.Receiver[name]
		p.receiver("receiver."+name, name, r)
		if before, ok := paths[r.Path]; ok {
			who := "receiver." + before
			if before == "" {
				who = "the notifier itself"
			}
			p.add("receiver."+name+".path", "%s is the path of %s too: give each its own", r.Path, who)
		}
		if strings.HasPrefix(r.Path, apiPath+"/") {
			p.add("receiver."+name+".path", "%s is below %s, where the notifier itself answers: choose another, such as /hooks/%s", r.Path, apiPath, name)
		}
		paths[r.Path] = name
	}
	return errors.Join(p...)
}

// Warnings returns what is allowed and probably not meant, each with its key.
func (n Notifier) Warnings() []string {
	var out []string
	for _, name := range slices.Sorted(maps.Keys(n.Receiver)) {
		if n.Receiver[name].Unauthenticated {
			out = append(out, "receiver."+name+".unauthenticated: anyone who reaches the path can have images pulled")
		}
	}
	if host, _, err := net.SplitHostPort(n.Listen); err == nil && n.TLSCertFile == "" {
		if ip, err := netip.ParseAddr(host); err != nil || !ip.IsLoopback() {
			out = append(out, "tls_cert_file: not set: secrets cross the network in the clear, unless a proxy in front ends TLS")
		}
	}
	return append(out, n.ruleWarnings()...)
}

func (p *problems) receiver(key, name string, r Receiver) {
	if !receiverName.MatchString(name) {
		p.add(key, "name %q: use small letters, digits and '-', at most 63", name)
	}
	t, ok := receiverTypes[r.Type]
	if !ok {
		p.add(key+".type", "%q is none of %s", r.Type, strings.Join(slices.Sorted(maps.Keys(receiverTypes)), ", "))
		return
	}
	if !receiverPath.MatchString(r.Path) || path.Clean(r.Path) != r.Path || len(r.Path) > 200 {
		p.add(key+".path", "%q: start it with /, and use letters, digits, '.', '_', '~', '-' and '/' as in a URL, at most 200", r.Path)
	}
	p.registry(key+".registry", r, t)
	if r.TopicARN != "" && r.Type != "ecr" {
		p.add(key+".topic_arn", "is for type ecr only: remove it")
	} else if r.TopicARN != "" && !snsTopic.MatchString(r.TopicARN) {
		p.add(key+".topic_arn", "%q is no ARN of an SNS topic (arn:aws:sns:REGION:ACCOUNT:NAME)", r.TopicARN)
	}
	if r.Unauthenticated {
		for _, s := range r.authSettings() {
			if s.value != "" {
				p.add(key+".unauthenticated", "true beside %s: remove one of them", s.key)
			}
		}
		return
	}
	if !slices.Contains(t.auth, r.Auth) {
		p.add(key+".auth", "%q: senders of type %s can do %s", r.Auth, r.Type, strings.Join(t.auth, ", "))
		return
	}
	p.receiverAuth(key, r)
}

func (p *problems) registry(key string, r Receiver, t receiverType) {
	host, rest, hasPath := strings.Cut(r.Registry, "/")
	switch {
	case r.Registry == "" && t.registry:
		p.add(key, "missing: events of type %s do not name the registry's host", r.Type)
	case r.Registry == "":
	case hasPath && !t.path:
		p.add(key, "%q: host or host:port, without a path", r.Registry)
	case hasPath && !registryPath.MatchString("/"+rest):
		p.add(key, "%q: the path is small letters, digits, '.', '_', '-', '/' and {repository}", r.Registry)
	case checkPeer(host) != nil:
		p.add(key, "%q: write a name or an IP address, with or without :port", r.Registry)
	case !strings.ContainsAny(host, ".:") && host != "localhost":
		p.add(key, "%q: without a dot or a port it would be taken for a part of the image's path", r.Registry)
	}
}

// authSettings are those that only mean something with some auth.
func (r Receiver) authSettings() []struct{ key, value, auth string } {
	return []struct{ key, value, auth string }{
		{"auth", r.Auth, ""},
		{"secret", string(r.Secret), "hmac bearer basic header path"},
		{"secret_file", r.SecretFile, "hmac bearer basic header path"},
		{"username", r.Username, "basic"},
		{"header", r.Header, "header"},
		{"oidc_issuer", r.OIDCIssuer, "oidc"},
		{"oidc_keys_url", r.OIDCKeysURL, "oidc"},
		{"oidc_audience", r.OIDCAudience, "oidc"},
		{"oidc_email", r.OIDCEmail, "oidc"},
		{"oidc_subject", r.OIDCSubject, "oidc"},
	}
}

func (p *problems) receiverAuth(key string, r Receiver) {
	for _, s := range r.authSettings()[1:] {
		if s.value != "" && !slices.Contains(strings.Fields(s.auth), r.Auth) {
			p.add(key+"."+s.key, "means nothing with auth = %q: remove it", r.Auth)
		}
	}
	switch r.Auth {
	case "oidc":
		p.oidc(key, r)
		return
	case "basic":
		if r.Username == "" || strings.Contains(r.Username, ":") {
			p.add(key+".username", "%q: auth = \"basic\" needs a user, without ':'", r.Username)
		}
	case "header":
		if !headerName.MatchString(r.Header) {
			p.add(key+".header", "%q: use letters, digits and '-', at most 64", r.Header)
		}
	}
	if r.Auth == "sns" {
		if r.TopicARN == "" {
			p.add(key+".topic_arn", "missing: without it any topic could send")
		}
		return
	}
	where := key + ".secret"
	switch {
	case r.Secret != "" && r.SecretFile != "":
		p.add(where, "given beside secret_file: keep one of them")
		return
	case r.Secret == "" && r.SecretFile == "":
		p.add(where, "no secret: set secret_file or secret ('openssl rand -hex 32' makes one), or, to try it out where nobody else is, unauthenticated = true")
		return
	case r.SecretFile != "":
		where = key + ".secret_file"
		before := len(*p)
		if p.file(where, r.SecretFile, true); len(*p) > before {
			return
		}
	}
	secret, err := r.ReadSecret()
	switch {
	case err != nil:
		p.add(where, "cannot be read: %w", err)
	case len(secret) < minSecret:
		p.add(where, "%d bytes are too few: take at least %d, such as 'openssl rand -hex 32' makes", len(secret), minSecret)
	case r.Auth == "path" && !pathSecret.MatchString(secret):
		p.add(where, "as a part of a URL: use letters, digits, '_', '~' and '-'")
	}
}

func (p *problems) oidc(key string, r Receiver) {
	for _, u := range []struct{ key, url string }{{"oidc_issuer", r.OIDCIssuer}, {"oidc_keys_url", r.OIDCKeysURL}} {
		if at, err := url.Parse(u.url); err != nil || at.Scheme != "https" || at.Host == "" {
			p.add(fmt.Sprintf("%s.%s", key, u.key), "%q: must be a URL of https", u.url)
		}
	}
	if r.OIDCAudience == "" {
		p.add(key+".oidc_audience", "missing: without it a token made for anyone else would do")
	}
	if r.OIDCEmail == "" && r.OIDCSubject == "" {
		p.add(key+".oidc_email", "missing, and oidc_subject too: without one of them any customer of the issuer could send")
	}
}
