package receive

import (
	"context"
	"crypto"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"
	"golang.org/x/time/rate"
)

const (
	maxCert  = 16 << 10      // bytes of a certificate in PEM
	maxCerts = 16            // kept; SNS has one for each region at a time
	snsFor   = 2 * time.Hour // how old a message may be: SNS tries for one
)

var snsCertPath = regexp.MustCompile(`^/SimpleNotificationService-[0-9a-zA-Z]{1,64}\.pem$`)

// snsMessage is what of a message is signed, and how.
type snsMessage struct {
	Type, MessageID, TopicArn, Timestamp, Message, Token, SubscribeURL string
	SignatureVersion, SigningCertURL                                   string
	Signature                                                          []byte // base64
	Subject                                                            *string
}

// text returns what is signed.
func (m snsMessage) text() string {
	var b strings.Builder
	add := func(key, value string) { b.WriteString(key + "\n" + value + "\n") }
	add("Message", m.Message)
	add("MessageId", m.MessageID)
	if m.Type == "Notification" {
		if m.Subject != nil {
			add("Subject", *m.Subject)
		}
	} else {
		add("SubscribeURL", m.SubscribeURL)
	}
	add("Timestamp", m.Timestamp)
	if m.Type != "Notification" {
		add("Token", m.Token)
	}
	add("TopicArn", m.TopicArn)
	add("Type", m.Type)
	return b.String()
}

// snsSigned checks SNS's own signatures, for one topic. The certificates are
// asked for at the one host that the topic's region has, over TLS, which is what
// makes them SNS's.
type snsSigned struct {
	topic  string
	client *http.Client
	limit  *rate.Limiter      // of requests for certificates: anyone can name one
	asked  singleflight.Group // requests for certificates, by path

	mu    sync.Mutex // guards what follows; not held while SNS is asked
	certs map[string]*x509.Certificate
}

func newSNSSigned(topic string, client *http.Client) *snsSigned {
	return &snsSigned{topic: topic, client: client, limit: rate.NewLimiter(rate.Every(time.Second), 5), certs: map[string]*x509.Certificate{}}
}

func (s *snsSigned) check(req *http.Request, body []byte) error {
	var m snsMessage
	if err := json.Unmarshal(body, &m); err != nil {
		return errors.New("not a message of SNS: raw message delivery has no signature, and must be off")
	}
	at, err := time.Parse(time.RFC3339, m.Timestamp)
	switch {
	case m.TopicArn != s.topic:
		return errors.New("not of the receiver's topic_arn")
	case err != nil || time.Since(at).Abs() > snsFor:
		return errors.New("a message without a time, or an old one")
	case m.SignatureVersion != "1" && m.SignatureVersion != "2":
		return errors.New("a signature of no known version")
	case len(m.Signature) == 0:
		return errors.New("no signature")
	}
	cert, err := s.cert(req.Context(), m.SigningCertURL)
	if err != nil {
		return fmt.Errorf("SNS's certificate: %w", err)
	}
	key, ok := cert.PublicKey.(*rsa.PublicKey)
	if now := time.Now(); !ok || now.Before(cert.NotBefore) || now.After(cert.NotAfter) {
		return errors.New("SNS's certificate is not valid now, or not of RSA")
	}
	hash, sum := crypto.SHA256, sha256.Sum256([]byte(m.text()))
	digest := sum[:]
	if m.SignatureVersion == "1" { // which topics have unless they are told otherwise
		short := sha1.Sum([]byte(m.text()))
		hash, digest = crypto.SHA1, short[:]
	}
	if rsa.VerifyPKCS1v15(key, hash, digest, m.Signature) != nil {
		return errors.New("the signature is wrong")
	}
	return nil
}

// cert returns the certificate at a URL, from memory if it was asked for before.
func (s *snsSigned) cert(ctx context.Context, at string) (*x509.Certificate, error) {
	region := strings.SplitN(s.topic, ":", 6)[3]
	host := "sns." + region + ".amazonaws.com"
	if strings.HasPrefix(region, "cn-") {
		host += ".cn"
	}
	u, err := url.Parse(at)
	if err != nil || u.Scheme != "https" || u.Host != host || u.User != nil || u.RawQuery != "" || !snsCertPath.MatchString(u.Path) {
		return nil, fmt.Errorf("it is not one of https://%s", host)
	}
	s.mu.Lock()
	c := s.certs[u.Path]
	s.mu.Unlock()
	if c != nil {
		return c, nil
	}
	got, err, _ := s.asked.Do(u.Path, func() (any, error) {
		c, err := s.fetch(ctx, host, u.Path)
		if err != nil {
			return nil, err
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if len(s.certs) >= maxCerts {
			clear(s.certs)
		}
		s.certs[u.Path] = c
		return c, nil
	})
	if err != nil {
		return nil, err
	}
	c, _ = got.(*x509.Certificate) // nothing else is returned
	return c, nil
}

// fetch asks SNS for a certificate, within outTime. Others wait for it, too: it does
// not end with the request that came first.
func (s *snsSigned) fetch(ctx context.Context, host, path string) (*x509.Certificate, error) {
	if !s.limit.Allow() {
		return nil, fmt.Errorf("%w: asked for too often", errNotNow)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), outTime)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+host+path, nil)
	if err != nil {
		return nil, err
	}
	res, err := s.client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errNotNow, err)
	}
	defer res.Body.Close() //nolint:errcheck // only read
	switch {
	case res.StatusCode >= http.StatusInternalServerError || res.StatusCode == http.StatusTooManyRequests:
		return nil, fmt.Errorf("%w: %s answered %d", errNotNow, host, res.StatusCode)
	case res.StatusCode != http.StatusOK:
		return nil, fmt.Errorf("%s answered %d", host, res.StatusCode)
	}
	b, err := io.ReadAll(io.LimitReader(res.Body, maxCert))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errNotNow, err)
	}
	block, _ := pem.Decode(b)
	if block == nil {
		return nil, errors.New("no PEM in it")
	}
	return x509.ParseCertificate(block.Bytes)
}
