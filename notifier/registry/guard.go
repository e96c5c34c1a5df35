package registry

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/net/publicsuffix"

	"github.com/imagewolf/imagewolf/config"
	"github.com/imagewolf/imagewolf/notifier/pattern"
)

// maxAnswer is how much of any answer is read, in bytes.
const maxAnswer = maxManifest + 64<<10

// target is the registry that a request is meant for; it travels in the
// request's context, also into what follows from it.
type target struct {
	host  string // as in URLs
	plain bool
}

type targetKey struct{}

// refusedError says where a registry wanted to lead us.
type refusedError struct{ what string }

func (e *refusedError) Error() string { return e.what }

// guard lets requests through to the registry that they are meant for, and
// bounds the answers. Beside it only these are asked:
//   - a host that the registry names for tokens, and that credentials are sent
//     to: of the registry's own domain, or one of token_hosts;
//   - a host that the registry redirects a GET or HEAD to, as many do for blobs:
//     without credentials, and never one of this machine or of the link, nor one
//     at which a cloud tells its machines their credentials.
//
// From HTTPS nothing leads to plain HTTP.
type guard struct {
	direct, foreign http.RoundTripper
	tokens          pattern.Hosts
}

func newGuard(c config.NotifierRegistry) (*guard, error) {
	tokens, err := pattern.NewHosts(c.TokenHosts)
	if err != nil {
		return nil, fmt.Errorf("registry.token_hosts: %w", err)
	}
	roots, err := x509.SystemCertPool()
	if err != nil {
		return nil, fmt.Errorf("the system's certificates: %w", err)
	}
	if c.CAFile != "" {
		pem, err := os.ReadFile(c.CAFile)
		if err != nil {
			return nil, fmt.Errorf("registry.ca_file: %w", err)
		}
		if !roots.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("registry.ca_file: no certificate (PEM) in %s", c.CAFile)
		}
	}
	transport := func(dial *net.Dialer) *http.Transport {
		return &http.Transport{
			Proxy: http.ProxyFromEnvironment, DialContext: dial.DialContext, ForceAttemptHTTP2: true,
			TLSClientConfig:     &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12},
			TLSHandshakeTimeout: 10 * time.Second, ResponseHeaderTimeout: time.Minute, IdleConnTimeout: time.Minute,
			MaxIdleConns: 100, MaxIdleConnsPerHost: 8, MaxResponseHeaderBytes: 64 << 10,
		}
	}
	return &guard{
		direct:  transport(&net.Dialer{Timeout: 10 * time.Second}),
		foreign: transport(&net.Dialer{Timeout: 10 * time.Second, Control: refuseOwn}),
		tokens:  tokens,
	}, nil
}

// metadata are the addresses, beside those of the link, at which clouds tell their
// machines' credentials.
var metadata = []netip.Prefix{
	netip.MustParsePrefix("100.100.100.200/32"), // Alibaba
	netip.MustParsePrefix("168.63.129.16/32"),   // Azure
	netip.MustParsePrefix("fd00:ec2::/32"),      // AWS
	netip.MustParsePrefix("fd20:ce::254/128"),   // Google
	netip.MustParsePrefix("fd00:c1::/32"),       // Oracle
	netip.MustParsePrefix("fd00:42::42/128"),    // Scaleway
}

// inIPv6 are the prefixes of addresses of IPv6 that have one of IPv4 in them, and
// the bytes that this may be. With NAT64's local one they depend on how much of it a
// network uses (RFC 6052, 2.2), which nobody tells us.
var inIPv6 = []struct {
	prefix netip.Prefix
	bytes  [][4]int
}{
	{netip.MustParsePrefix("64:ff9b::/96"), [][4]int{{12, 13, 14, 15}}}, // NAT64
	{netip.MustParsePrefix("64:ff9b:1::/48"), [][4]int{{6, 7, 9, 10}, {7, 9, 10, 11}, {9, 10, 11, 12}, {12, 13, 14, 15}}},
	{netip.MustParsePrefix("2002::/16"), [][4]int{{2, 3, 4, 5}}}, // 6to4
	{netip.MustParsePrefix("::/96"), [][4]int{{12, 13, 14, 15}}}, // out of use
}

// embedded returns the addresses of IPv4 that one of IPv6 may stand for.
func embedded(ip netip.Addr) []netip.Addr {
	var out []netip.Addr
	b := ip.As16()
	for _, in := range inIPv6 {
		if !in.prefix.Contains(ip) {
			continue
		}
		for _, at := range in.bytes {
			v4 := netip.AddrFrom4([4]byte{b[at[0]], b[at[1]], b[at[2]], b[at[3]]})
			// Bytes that are another address's in part are often such, and nothing is reached there.
			if len(in.bytes) > 1 && (v4.IsUnspecified() || v4.IsMulticast()) {
				continue
			}
			out = append(out, v4)
		}
	}
	return out
}

// refuseOwn refuses to connect to this machine and to what is only on its link or
// tells clouds' machines their credentials.
func refuseOwn(_, address string, _ syscall.RawConn) error {
	at, err := netip.ParseAddrPort(address)
	if err != nil {
		return err
	}
	ip := at.Addr().Unmap().WithZone("")
	for _, ip := range append(embedded(ip), ip) {
		told := slices.ContainsFunc(metadata, func(p netip.Prefix) bool { return p.Contains(ip) })
		if told || ip.IsLoopback() || ip.IsLinkLocalUnicast() || ip.IsMulticast() || ip.IsUnspecified() {
			return &refusedError{fmt.Sprintf("redirected to %s, which is an address of this machine, of its link or of its cloud's credentials", at)}
		}
	}
	return nil
}

// RoundTrip implements http.RoundTripper.
func (g *guard) RoundTrip(req *http.Request) (*http.Response, error) {
	to, ok := req.Context().Value(targetKey{}).(target)
	if !ok {
		return nil, errors.New("a request to no registry")
	}
	via, err := g.via(req, to)
	if err != nil {
		return nil, err
	}
	if via == g.foreign {
		req = req.Clone(req.Context())
		for _, h := range []string{"Authorization", "Cookie", "Www-Authenticate"} {
			req.Header.Del(h)
		}
		// What a proxy reaches is the proxy's business, and it may be on this machine.
		if p, err := http.ProxyFromEnvironment(req); err == nil && p != nil {
			via = g.direct
		}
	}
	resp, err := via.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	if req.Method != http.MethodHead && resp.ContentLength > maxAnswer {
		_ = resp.Body.Close()
		return nil, fmt.Errorf("%w: an answer of %d bytes, at most %d are read", ErrInvalid, resp.ContentLength, maxAnswer)
	}
	resp.Body = &bounded{resp.Body, maxAnswer}
	return resp, nil
}

// via says how a request may be sent, if at all.
func (g *guard) via(req *http.Request, to target) (http.RoundTripper, error) {
	u := req.URL
	switch {
	case u.Scheme != "https" && (u.Scheme != "http" || !to.plain):
		return nil, &refusedError{fmt.Sprintf("registry %s leads to %s://%s: only HTTPS is asked where the registry has it", to.host, u.Scheme, u.Host)}
	case u.User != nil:
		return nil, &refusedError{fmt.Sprintf("registry %s leads to a URL with a user in it", to.host)}
	case sameHost(u, to):
		return g.direct, nil
	case req.Response != nil:
		if req.Method != http.MethodGet && req.Method != http.MethodHead {
			return nil, &refusedError{fmt.Sprintf("registry %s redirects a %s to %s", to.host, req.Method, u.Host)}
		}
		return g.foreign, nil
	case g.mayTellTokens(u, to):
		return g.direct, nil
	}
	return nil, &refusedError{fmt.Sprintf("registry %s wants its credentials sent to %s, of another domain: if that is right, add it to registry.token_hosts", to.host, u.Host)}
}

func sameHost(u *url.URL, to target) bool {
	port := func(host string) string {
		if _, p, err := net.SplitHostPort(host); err == nil {
			return p
		}
		if to.plain {
			return "80"
		}
		return "443"
	}
	return strings.EqualFold(u.Hostname(), hostname(to.host)) && port(u.Host) == port(to.host)
}

func hostname(host string) string {
	if h, _, err := net.SplitHostPort(host); err == nil {
		return h
	}
	return host
}

func (g *guard) mayTellTokens(u *url.URL, to target) bool {
	own, other := strings.ToLower(hostname(to.host)), strings.ToLower(u.Hostname())
	if own == other || g.tokens.Match(strings.ToLower(u.Host)) {
		return true
	}
	domain, err := publicsuffix.EffectiveTLDPlusOne(own)
	return err == nil && net.ParseIP(own) == nil && strings.HasSuffix("."+other, "."+domain)
}

// bounded is a body of which only so much is read.
type bounded struct {
	io.ReadCloser
	left int64
}

func (b *bounded) Read(p []byte) (int, error) {
	if b.left <= 0 {
		return 0, fmt.Errorf("%w: an answer of more than %d bytes", ErrInvalid, maxAnswer)
	}
	n, err := b.ReadCloser.Read(p[:min(int64(len(p)), b.left)])
	b.left -= int64(n)
	return n, err
}
