package config

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"path"
	"strings"
	"time"
)

// DefaultNodeSocket is where a node's own API is found on the node itself.
const DefaultNodeSocket = "unix:///run/imagewolf/node.sock"

const (
	defaultInterval = Duration(30 * time.Second)
	maxAddresses    = 256
	maxTokens       = 256 // in one file
)

// NotifierNodes says where the nodes are that prefetch.
type NotifierNodes struct {
	Addresses []string `toml:"addresses" comment:"Nodes, any of the cluster's: host:port of their node_api.address, or unix:// and the path of the socket. The first that answers is asked; it passes the request on."`
	CAFile    string   `toml:"ca_file" comment:"Certificates (PEM) of which one signed the nodes': what 'imagewolf cluster-key ca' prints. For host:port."`
	TokenFile string   `toml:"token_file" comment:"File with what is in the nodes' node_api.token_file. For host:port. Not readable by other users."`
}

// NotifierFeed is how the events that were taken are served to other notifiers.
type NotifierFeed struct {
	Path      string `toml:"path" comment:"Path of the feed: PATH/atom and PATH/rss are served where the webhooks come in."`
	Token     Secret `toml:"token" secret:"true" comment:"What a reader has to show, at least 16 bytes. Without it and without token_file there is no feed."`
	TokenFile string `toml:"token_file" comment:"File with such tokens, one a line, read again when it is needed. Not readable by other users."`
	History   int    `toml:"history" comment:"How many events the feed has, the newest ones. A reader that was away for longer is told how many it missed. 100 to 100000."`
}

// On tells whether there is a feed.
func (f NotifierFeed) On() bool { return f.Token != "" || f.TokenFile != "" }

// Tokens returns those of which a reader has to show one.
func (f NotifierFeed) Tokens() ([]string, error) { return tokens(f.Token, f.TokenFile) }

// Poll is a feed of another notifier.
type Poll struct {
	URL       string   `toml:"url" comment:"URL of the feed, of https: https://HOST/feed/atom."`
	Token     Secret   `toml:"token" secret:"true" comment:"Token that the feed wants. Better in token_file, or in the environment."`
	TokenFile string   `toml:"token_file" comment:"File with the token, read for every request. Not readable by other users."`
	CAFile    string   `toml:"ca_file" comment:"Certificates (PEM) of which one signed the feed's. Empty: the machine's."`
	Interval  Duration `toml:"interval" comment:"How often it is asked; later while it does not answer. 1s to 24h. Empty: 30s."`
	FromStart bool     `toml:"from_start" comment:"Take what the feed already has when it is read for the first time, and not only what comes after."`
}

// ReadToken returns the token, from the setting itself or from its file, or ""
// when there is none.
func (p Poll) ReadToken() (string, error) { return readSecret(p.Token, p.TokenFile) }

// NotifierAPI is who may ask the notifier for a prefetch by name.
type NotifierAPI struct {
	Token     Secret `toml:"token" secret:"true" comment:"What a caller of /v1/prefetch has to show, or to sign with, at least 16 bytes. Without it and without token_file there is no such path."`
	TokenFile string `toml:"token_file" comment:"File with such tokens, one a line, read again when it is needed. Not readable by other users."`
}

// On tells whether the API is served.
func (a NotifierAPI) On() bool { return a.Token != "" || a.TokenFile != "" }

// Tokens returns those of which a caller has to show one.
func (a NotifierAPI) Tokens() ([]string, error) { return tokens(a.Token, a.TokenFile) }

// NotifierMetrics says where Prometheus finds what the notifier counts.
type NotifierMetrics struct {
	Address string `toml:"address" comment:"Where GET /metrics and /healthz are answered, in plain HTTP and to everyone who can reach it: host:port. Empty: nowhere."`
}

func readSecret(value Secret, file string) (string, error) {
	if file == "" {
		return string(value), nil
	}
	b, err := readFile(file)
	if err != nil {
		return "", err
	}
	secret := strings.TrimSpace(string(b))
	if secret == "" {
		return "", fmt.Errorf("%s is empty", file)
	}
	return secret, nil
}

// tokens returns the lines of a file of tokens, but for empty ones and those
// that begin with #, or the one token.
func tokens(value Secret, file string) ([]string, error) {
	text, err := readSecret(value, file)
	if err != nil {
		return nil, err
	}
	var out []string
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		switch {
		case line == "" || strings.HasPrefix(line, "#"):
		case len(line) < minSecret:
			return nil, fmt.Errorf("a token of %d bytes is too short: take at least %d, such as 'openssl rand -hex 32' makes", len(line), minSecret)
		case len(out) == maxTokens:
			return nil, fmt.Errorf("more than %d tokens", maxTokens)
		default:
			out = append(out, line)
		}
	}
	if len(out) == 0 {
		return nil, errors.New("no token in it")
	}
	return out, nil
}

// tokens checks a table that has a token, or a file of them.
func (p *problems) tokens(key string, value Secret, file string) {
	where := key + ".token"
	switch {
	case value != "" && file != "":
		p.add(where, "given beside token_file: keep one of them")
		return
	case file != "":
		where = key + ".token_file"
		before := len(*p)
		if p.file(where, file, true); len(*p) > before {
			return
		}
	}
	if _, err := tokens(value, file); err != nil {
		p.add(where, "%w", err)
	}
}

func (p *problems) feed(f NotifierFeed) {
	if !receiverPath.MatchString(f.Path) || path.Clean(f.Path) != f.Path || len(f.Path) > 200 {
		p.add("feed.path", "%q: start it with /, and use letters, digits, '.', '_', '~', '-' and '/' as in a URL, at most 200", f.Path)
	}
	if f.Path == apiPath || strings.HasPrefix(f.Path, apiPath+"/") {
		p.add("feed.path", "%s is at or below %s, where the notifier itself answers: choose another, such as /feed", f.Path, apiPath)
	}
	if f.History < 100 || f.History > 100_000 {
		p.add("feed.history", "%d is out of range: choose 100 to 100000", f.History)
	}
	if f.On() {
		p.tokens("feed", f.Token, f.TokenFile)
	}
}

func (p *problems) poll(key, name string, f Poll) {
	if !receiverName.MatchString(name) {
		p.add(key, "name %q: use small letters, digits and '-', at most 63", name)
	}
	at, err := url.Parse(f.URL)
	switch {
	case err != nil || at.Host == "" || at.User != nil || at.Fragment != "":
		p.add(key+".url", "%q: write https://HOST/feed/atom, the token in token_file", f.URL)
	case at.Scheme == "http" && isLoopback(at.Hostname()):
	case at.Scheme != "https":
		p.add(key+".url", "%q: must be a URL of https: whoever is between could name images", f.URL)
	}
	if f.CAFile != "" {
		p.file(key+".ca_file", f.CAFile, false)
	}
	switch {
	case f.Token == "" && f.TokenFile == "":
		p.add(key+".token", "no token: set token_file or token to one of the feed's")
	case f.Token != "" || f.TokenFile != "":
		p.tokens(key, f.Token, f.TokenFile)
	}
	p.between(key+".interval", f.Interval, time.Second, 24*time.Hour)
}

func isLoopback(host string) bool {
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.IsLoopback()
}

func (p *problems) nodes(n NotifierNodes) {
	if len(n.Addresses) == 0 || len(n.Addresses) > maxAddresses {
		p.add("nodes.addresses", "%d addresses: give 1 to %d; a few suffice, each can reach the others", len(n.Addresses), maxAddresses)
	}
	network := false
	for i, a := range n.Addresses {
		key := fmt.Sprintf("nodes.addresses[%d]", i)
		if socket, ok := strings.CutPrefix(a, "unix://"); ok {
			if !strings.HasPrefix(socket, "/") || len(socket) > maxSocketPath {
				p.add(key, "%q: write unix:// and an absolute path of at most %d bytes", a, maxSocketPath)
			}
			continue
		}
		network = true
		if _, _, err := net.SplitHostPort(a); err != nil || checkPeer(a) != nil {
			p.add(key, "%q: write host:port, or unix:// and the path of a node's socket", a)
		}
	}
	if !network {
		return
	}
	for _, f := range []struct {
		key, path string
		private   bool
		help      string
	}{
		{"nodes.ca_file", n.CAFile, false, "'imagewolf cluster-key ca' on a node prints it"},
		{"nodes.token_file", n.TokenFile, true, "the token of the nodes' node_api.token_file"},
	} {
		if f.path == "" {
			p.add(f.key, "missing: nodes on the network need it (%s)", f.help)
			continue
		}
		p.file(f.key, f.path, f.private)
	}
}

// apiPath is where the API answers, and below it.
const apiPath = "/v1/prefetch"

// ownPaths are those that the notifier itself answers on, in the order in which
// they are checked against receivers' paths.
func (n Notifier) ownPaths() []string {
	return []string{"/healthz", apiPath, n.Feed.Path + "/atom", n.Feed.Path + "/rss"}
}
