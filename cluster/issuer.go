package cluster

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"log/slog"
	"math/big"
	"sync"
	"time"
)

// leafLife is how long a certificate that a node issues itself is valid; it
// is replaced after half of it. Its start is the epoch, so that a node whose
// clock is behind is not locked out: there is nothing to gain from a late
// start, since whoever has the cluster key can issue any certificate.
const leafLife = 365 * 24 * time.Hour

// issuer is the cluster's CA, which every node has, and this node's own
// certificate, in memory only.
type issuer struct {
	name string
	log  *slog.Logger
	key  ed25519.PrivateKey
	ca   *x509.Certificate
	pool *x509.CertPool

	mu    sync.Mutex
	leaf  *tls.Certificate // guarded by mu
	renew time.Time        // guarded by mu
}

// newIssuer derives the CA from a seed: the same seed gives the same CA
// certificate to the last byte.
func newIssuer(seed []byte, name string, log *slog.Logger) (*issuer, error) {
	key := ed25519.NewKeyFromSeed(seed)
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: "imagewolf cluster"},
		NotBefore:             time.Unix(0, 0).UTC(),
		NotAfter:              time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC), // RFC 5280: no end
		KeyUsage:              x509.KeyUsageCertSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
	}
	// ed25519 signs without randomness.
	der, err := x509.CreateCertificate(nil, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("cluster CA: %w", err)
	}
	ca, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("cluster CA: %w", err)
	}
	i := &issuer{name: name, log: log, key: key, ca: ca, pool: x509.NewCertPool()}
	i.pool.AddCert(ca)
	now := time.Now()
	if i.leaf, err = i.issue(now); err != nil {
		return nil, err
	}
	i.renew = now.Add(leafLife / 2)
	return i, nil
}

// current implements credentialSource.
func (i *issuer) current() (*tls.Certificate, *x509.CertPool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if now := time.Now(); now.After(i.renew) {
		leaf, err := i.issue(now)
		if err != nil { // the old one may still do
			i.log.Error("the node's own certificate was not renewed", "err", err)
			return i.leaf, i.pool
		}
		i.leaf, i.renew = leaf, now.Add(leafLife/2)
	}
	return i.leaf, i.pool
}

func (i *issuer) issue(now time.Time) (*tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("node certificate: %w", err)
	}
	template := &x509.Certificate{
		SerialNumber: new(big.Int).SetBytes(randomSerial()),
		Subject:      pkix.Name{CommonName: i.name},
		NotBefore:    time.Unix(0, 0).UTC(),
		NotAfter:     now.Add(leafLife),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, i.ca, key.Public(), i.key)
	if err != nil {
		return nil, fmt.Errorf("node certificate: %w", err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("node certificate: %w", err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}, nil
}

// randomSerial returns 16 bytes that make a positive number.
func randomSerial() []byte {
	b := make([]byte, 16)
	_, _ = rand.Read(b) // never fails
	b[0] = b[0]&0x7f | 1
	return b
}
