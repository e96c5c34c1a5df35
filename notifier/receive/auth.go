package receive

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"golang.org/x/time/rate"

	"github.com/imagewolf/imagewolf/config"
)

const maxKeys = 1 << 20 // bytes of an issuer's keys

// check says why a request is not of whom it should be. Its errors hold nothing
// of the secret, nor of what was sent in its place.
type check func(req *http.Request, body []byte) error

var errWrong = errors.New("the secret is missing or wrong")

// errNotNow is the error of what could not be found out: who sends may be who it
// should be. SNS sends nothing again that was answered with 401, and Pub/Sub waits
// longer and longer.
var errNotNow = errors.New("cannot be had now")

// signature is where a sender puts the HMAC of its body, in hex.
type signature struct {
	header, prefix string
	hash           func() hash.Hash
}

// signatures are those of the types that sign; the first whose header is there
// counts.
var signatures = map[string][]signature{
	"generic": {{"X-Signature", "sha256=", sha256.New}},
	"ghcr":    {{"X-Hub-Signature-256", "sha256=", sha256.New}},
	"gitea": {
		{"X-Forgejo-Signature", "", sha256.New}, {"X-Gitea-Signature", "", sha256.New}, {"X-Hub-Signature-256", "sha256=", sha256.New},
	},
	"jfrog": {{"X-JFrog-Event-Auth", "", sha256.New}},
	"nexus": {{"X-Nexus-Webhook-Signature", "", sha1.New}},
}

// authenticate sets the receiver's checks, or says, beginning with the key, why
// there can be none.
func (r *receiver) authenticate(client *http.Client) error {
	c := r.config
	if c.Unauthenticated {
		return nil
	}
	if c.Auth == "oidc" {
		if c.OIDCAudience == "" || c.OIDCEmail == "" && c.OIDCSubject == "" {
			return errors.New(".oidc_audience: needed, and one of oidc_email and oidc_subject: a token says nothing without them")
		}
		r.before = tokenCheck(c, client)
		return nil
	}
	if c.Auth == "sns" {
		if strings.Count(c.TopicARN, ":") < 5 {
			return errors.New(".topic_arn: needed: a signature of SNS says nothing without it")
		}
		r.signed = newSNSSigned(c.TopicARN, client).check
		return nil
	}
	secret, err := c.ReadSecret()
	r.config.Secret = "" // only the checks know it from here on
	switch {
	case err != nil:
		return fmt.Errorf(".secret_file: %w", err)
	case secret == "":
		return errors.New(".secret: there is none; anyone could send: set secret_file, or unauthenticated = true")
	}
	switch c.Auth {
	case "path":
		r.atPath = func(sent string) bool { return equal(sent, secret) }
	case "hmac":
		kinds, ok := signatures[c.Type]
		if !ok {
			return fmt.Errorf(".auth: senders of type %s do not sign", c.Type)
		}
		r.signed = signatureCheck(kinds, secret, c.Type == "nexus")
	case "bearer":
		r.before = func(req *http.Request, _ []byte) error {
			return wrongUnless(equal(bearer(req), secret))
		}
	case "basic":
		r.before = func(req *http.Request, _ []byte) error {
			user, password, _ := req.BasicAuth()
			u, p := equal(user, c.Username), equal(password, secret)
			return wrongUnless(u && p)
		}
	case "header":
		r.before = func(req *http.Request, _ []byte) error {
			return wrongUnless(equal(req.Header.Get(c.Header), secret))
		}
	default:
		return fmt.Errorf(".auth: %q is no way to authenticate", c.Auth)
	}
	return nil
}

func wrongUnless(ok bool) error {
	if !ok {
		return errWrong
	}
	return nil
}

// equal compares in a time that tells nothing of either, nor of their lengths.
func equal(a, b string) bool {
	x, y := sha256.Sum256([]byte(a)), sha256.Sum256([]byte(b))
	return subtle.ConstantTimeCompare(x[:], y[:]) == 1
}

func bearer(req *http.Request) string {
	scheme, token, _ := strings.Cut(req.Header.Get("Authorization"), " ")
	if !strings.EqualFold(scheme, "bearer") {
		return ""
	}
	return strings.TrimSpace(token)
}

// signatureCheck checks an HMAC of the body as it came. Nexus says that it
// signs without whitespace: that the body has some is no fault then.
func signatureCheck(kinds []signature, secret string, compact bool) check {
	return func(req *http.Request, body []byte) error {
		for _, k := range kinds {
			sent := req.Header.Get(k.header)
			if sent == "" {
				continue
			}
			sum, ok := strings.CutPrefix(sent, k.prefix)
			mac, err := hex.DecodeString(sum)
			if !ok || err != nil {
				return fmt.Errorf("the signature in %s is not of the form %shex", k.header, k.prefix)
			}
			if hmac.Equal(mac, sign(k, secret, body)) {
				return nil
			}
			var b bytes.Buffer
			if compact && json.Compact(&b, body) == nil && hmac.Equal(mac, sign(k, secret, b.Bytes())) {
				return nil
			}
			return fmt.Errorf("the signature in %s is wrong", k.header)
		}
		return fmt.Errorf("no signature (%s)", kinds[len(kinds)-1].header)
	}
}

func sign(k signature, secret string, body []byte) []byte {
	m := hmac.New(k.hash, []byte(secret))
	m.Write(body)
	return m.Sum(nil)
}

// tokenCheck checks tokens of an OIDC issuer: signature, issuer, audience, time,
// and for whom it was made. Keys are asked for when a token names one that is
// not known, one request at a time and not often: anyone can name a key.
func tokenCheck(c config.Receiver, client *http.Client) check {
	limited := *client
	limited.Timeout = 0 // its error would hide what seldom's says, which has a bound of its own
	limited.Transport = &seldom{next: client.Transport, limit: rate.NewLimiter(rate.Every(time.Second), 5)}
	keys := keySet{oidc.NewRemoteKeySet(oidc.ClientContext(context.Background(), &limited), c.OIDCKeysURL)}
	verifier := oidc.NewVerifier(c.OIDCIssuer, keys, &oidc.Config{
		ClientID: c.OIDCAudience, SupportedSigningAlgs: []string{oidc.RS256, oidc.ES256},
	})
	return func(req *http.Request, _ []byte) error {
		raw := bearer(req)
		if raw == "" {
			return errors.New("no token")
		}
		var away error
		token, err := verifier.Verify(context.WithValue(req.Context(), awayKey{}, &away), raw)
		if away != nil {
			return fmt.Errorf("the issuer's keys: %w", away)
		}
		if err != nil {
			return fmt.Errorf("the token: %w", err)
		}
		var claims struct {
			Email    string `json:"email"`
			Verified bool   `json:"email_verified"`
		}
		if err := token.Claims(&claims); err != nil {
			return fmt.Errorf("the token's claims: %w", err)
		}
		switch {
		case c.OIDCEmail != "" && (claims.Email != c.OIDCEmail || !claims.Verified):
			return errors.New("the token is not of oidc_email")
		case c.OIDCSubject != "" && token.Subject != c.OIDCSubject:
			return errors.New("the token is not of oidc_subject")
		}
		return nil
	}
}

// keySet tells, through the context, that keys could not be had: the verifier's
// error does not say what it is of.
type keySet struct{ *oidc.RemoteKeySet }

type awayKey struct{}

// VerifySignature implements oidc.KeySet.
func (k keySet) VerifySignature(ctx context.Context, jwt string) ([]byte, error) {
	payload, err := k.RemoteKeySet.VerifySignature(ctx, jwt)
	if away, ok := ctx.Value(awayKey{}).(*error); ok && errors.Is(err, errNotNow) {
		*away = err
	}
	return payload, err
}

// seldom is a transport for keys, which fails when it is used too often. All its
// errors are errNotNow: whatever goes wrong here, no sender can help it.
type seldom struct {
	next  http.RoundTripper // nil: the default one
	limit *rate.Limiter
}

// RoundTrip implements http.RoundTripper. The answer is there as a whole, within
// outTime.
func (s *seldom) RoundTrip(req *http.Request) (*http.Response, error) {
	if !s.limit.Allow() {
		return nil, fmt.Errorf("%w: asked for too often", errNotNow)
	}
	next := s.next
	if next == nil {
		next = http.DefaultTransport
	}
	ctx, cancel := context.WithTimeout(req.Context(), outTime)
	defer cancel()
	res, err := next.RoundTrip(req.WithContext(ctx))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errNotNow, err)
	}
	defer res.Body.Close() //nolint:errcheck // only read
	body, err := io.ReadAll(io.LimitReader(res.Body, maxKeys))
	switch {
	case err != nil:
		return nil, fmt.Errorf("%w: %w", errNotNow, err)
	case res.StatusCode != http.StatusOK:
		return nil, fmt.Errorf("%w: %s answered %d", errNotNow, req.URL.Host, res.StatusCode)
	case !json.Valid(body):
		return nil, fmt.Errorf("%w: %s answered with no JSON, or with more than %d bytes", errNotNow, req.URL.Host, maxKeys)
	}
	res.Body = io.NopCloser(bytes.NewReader(body))
	return res, nil
}
