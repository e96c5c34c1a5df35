package cluster

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"
)

// filesEvery is how long certificates from files are used before the files
// are read again. Reading three small files is cheaper than being wrong about
// what a changed time stamp means on a mounted secret.
const filesEvery = time.Second

// files is an identity of certificate files, read again when they change.
type files struct {
	cert, key, ca string // paths
	every         time.Duration
	log           *slog.Logger

	mu      sync.Mutex
	bytes   [3][]byte        // guarded by mu: what is in use
	leaf    *tls.Certificate // guarded by mu
	pool    *x509.CertPool   // guarded by mu
	checked time.Time        // guarded by mu
	before  string           // guarded by mu: fingerprint of the key that was in use before; "" if none was
	failed  string           // guarded by mu: why the files as they are now are not in use
}

func loadFiles(cert, key, ca, node string, log *slog.Logger) (*files, error) {
	f := &files{cert: cert, key: key, ca: ca, every: filesEvery, log: log}
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.load(); err != nil {
		return nil, err
	}
	f.checked = time.Now()
	if cn := f.leaf.Leaf.Subject.CommonName; cn != node {
		log.Warn("the certificate names another node than the configuration: others will know this node by both",
			"cert_file", cert, "common_name", cn, "node", node)
	}
	return f, nil
}

// current implements credentialSource. While the files cannot be used, as in
// the middle of being replaced, the last good ones stay in use. One certificate
// is for all.
func (f *files) current(int) (*tls.Certificate, *x509.CertPool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.refresh()
	return f.leaf, f.pool
}

// keys implements credentialSource: the key in use and the one before it, with
// which connections may be under way.
func (f *files) keys() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.refresh()
	out := []string{fingerprint(f.leaf.Leaf)}
	if f.before != "" {
		out = append(out, f.before)
	}
	return out
}

// refresh reads the files again if it is time. f.mu must be held.
func (f *files) refresh() {
	now := time.Now()
	if now.Sub(f.checked) < f.every {
		return
	}
	f.checked = now
	err := f.load()
	switch {
	case err == nil:
		f.failed = ""
	case err.Error() != f.failed:
		f.failed = err.Error()
		f.log.Error("certificate files are not usable: going on with the last good ones", "err", err)
	}
}

// load reads the files and takes them into use if they differ and are good.
// f.mu must be held.
func (f *files) load() error {
	var read [3][]byte
	for i, p := range []struct{ option, path string }{{"cert_file", f.cert}, {"key_file", f.key}, {"ca_file", f.ca}} {
		b, err := os.ReadFile(p.path)
		if err != nil {
			return fmt.Errorf("%s: %w", p.option, err)
		}
		read[i] = b
	}
	if f.leaf != nil && bytes.Equal(read[0], f.bytes[0]) && bytes.Equal(read[1], f.bytes[1]) && bytes.Equal(read[2], f.bytes[2]) {
		return nil
	}
	leaf, err := tls.X509KeyPair(read[0], read[1])
	if err != nil {
		return fmt.Errorf("cert_file %s with key_file %s: %w", f.cert, f.key, err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(read[2]) {
		return fmt.Errorf("ca_file %s: no certificate in PEM in it", f.ca)
	}
	if leaf.Leaf.Subject.CommonName == "" {
		return fmt.Errorf("cert_file %s: the certificate has no common name, which is what other nodes call this one by", f.cert)
	}
	if err := f.verify(&leaf, pool); err != nil {
		return err
	}
	if f.leaf != nil {
		if old := fingerprint(f.leaf.Leaf); old != fingerprint(leaf.Leaf) {
			f.before = old
		}
		f.log.Info("certificate files changed and are in use", "cert_file", f.cert, "not_after", leaf.Leaf.NotAfter)
	}
	f.bytes, f.leaf, f.pool = read, &leaf, pool
	return nil
}

// verify does what the other nodes will do, so that a certificate that none
// of them accepts is found here, where the mistake was made.
func (f *files) verify(leaf *tls.Certificate, pool *x509.CertPool) error {
	chain := []*x509.Certificate{leaf.Leaf}
	for _, der := range leaf.Certificate[1:] {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return fmt.Errorf("cert_file %s: %w", f.cert, err)
		}
		chain = append(chain, c)
	}
	for _, use := range []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth} {
		err := verifyChain(chain, pool, use)
		var invalid x509.CertificateInvalidError
		if errors.As(err, &invalid) && invalid.Reason == x509.Expired {
			f.log.Warn("the node's certificate is not valid now: other nodes will refuse it", "cert_file", f.cert,
				"not_before", leaf.Leaf.NotBefore, "not_after", leaf.Leaf.NotAfter)
			return nil
		}
		if err != nil {
			return fmt.Errorf("cert_file %s: other nodes will refuse it (it must come from ca_file and be for client and server authentication): %w", f.cert, err)
		}
	}
	return nil
}

// verifyChain checks a chain, leaf first, against the cluster's CA. Names are
// not looked at: whatever the CA signed is a member, wherever it is.
func verifyChain(chain []*x509.Certificate, pool *x509.CertPool, use x509.ExtKeyUsage) error {
	if len(chain) == 0 {
		return errors.New("no certificate was shown")
	}
	between := x509.NewCertPool()
	for _, c := range chain[1:] {
		between.AddCert(c)
	}
	_, err := chain[0].Verify(x509.VerifyOptions{
		Roots: pool, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{use},
	})
	if err != nil {
		return fmt.Errorf("certificate of %q: %w", chain[0].Subject.CommonName, err)
	}
	return nil
}
