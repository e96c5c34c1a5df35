package cluster

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"time"
)

// What the cluster's key makes is valid from the beginning of Unix time, and for
// ever (RFC 5280: no end), so that no node is locked out whatever its clock says:
// some have none that goes on while they are off. There is nothing to gain from
// less, since whoever has the key of such a certificate was on the node and has
// the cluster's key, and can issue any.
var (
	always  = time.Unix(0, 0).UTC()
	forever = time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC)
)

// derived is an identity made from the keys of the cluster.
type derived struct {
	issuers []*issuer      // of the node's own key first
	pool    *x509.CertPool // the CAs of all
	own     []string       // what keys returns
}

// newDerived makes the CAs that follow from seeds, and certificates of them all
// for one key pair: the node is known by that, and keeps it for as long as it
// runs.
func newDerived(seeds [][]byte, name string) (*derived, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("node certificate: %w", err)
	}
	d := &derived{pool: x509.NewCertPool()}
	for _, seed := range seeds {
		i, err := newIssuer(seed, name, key)
		if err != nil {
			return nil, err
		}
		d.pool.AddCert(i.ca)
		d.issuers = append(d.issuers, i)
	}
	d.own = []string{fingerprint(d.issuers[0].leaf.Leaf)}
	return d, nil
}

// current implements credentialSource.
func (d *derived) current(n int) (*tls.Certificate, *x509.CertPool) {
	return d.issuers[n].leaf, d.pool
}

// keys implements credentialSource.
func (d *derived) keys() []string { return d.own }

// issuer is the CA of one key of the cluster, which every node has, and this
// node's own certificate of it, in memory only. It does not change.
type issuer struct {
	name string
	key  ed25519.PrivateKey
	ca   *x509.Certificate
	leaf *tls.Certificate
	own  *ecdsa.PrivateKey // this node's
}

// newIssuer derives the CA from a seed: the same seed gives the same CA
// certificate to the last byte.
func newIssuer(seed []byte, name string, own *ecdsa.PrivateKey) (*issuer, error) {
	key := ed25519.NewKeyFromSeed(seed)
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: "imagewolf cluster"},
		NotBefore:             always,
		NotAfter:              forever,
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
	i := &issuer{name: name, key: key, ca: ca, own: own}
	if i.leaf, err = i.issue(forever); err != nil {
		return nil, err
	}
	return i, nil
}

// AuthorityPEM returns the certificate of the CA that follows from a cluster key,
// by which nodes are known. It is no secret. The error is a mistake in the key.
func AuthorityPEM(key string) ([]byte, error) {
	root, err := ParseKey(key)
	if err != nil {
		return nil, err
	}
	seed, err := derive(root, "ca", 32)
	if err != nil {
		return nil, err
	}
	own, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("cluster CA: %w", err)
	}
	i, err := newIssuer(seed, "nobody", own)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: i.ca.Raw}), nil
}

// issue makes a certificate of this node that is valid until then.
func (i *issuer) issue(until time.Time) (*tls.Certificate, error) {
	template := &x509.Certificate{
		SerialNumber: new(big.Int).SetBytes(randomSerial()),
		Subject:      pkix.Name{CommonName: i.name},
		NotBefore:    always,
		NotAfter:     until,
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, i.ca, i.own.Public(), i.key)
	if err != nil {
		return nil, fmt.Errorf("node certificate: %w", err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("node certificate: %w", err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: i.own, Leaf: leaf}, nil
}

// randomSerial returns 16 bytes that make a positive number.
func randomSerial() []byte {
	b := make([]byte, 16)
	_, _ = rand.Read(b) // never fails
	b[0] = b[0]&0x7f | 1
	return b
}
