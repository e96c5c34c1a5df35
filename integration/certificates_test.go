package integration

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/imagewolf/imagewolf/integration/harness"
)

// TestCertificatesAreExchanged takes half a minute, and is one of those that make faults
// alone has: that files are read again is tested of the part.
func TestCertificatesAreExchanged(t *testing.T) {
	if os.Getenv("FAULTS") == "all" {
		t.Run("three nodes", exchangeCertificates)
	}
}

// exchangeCertificates has nodes with certificates of the operator's own, which get new
// ones of a new authority in three steps, by files that are replaced under them one node
// after the other, while images are pulled. No daemon is restarted, no pull fails, and the
// registry sends one copy each time.
func exchangeCertificates(t *testing.T) {
	ctx, cancel := context.WithTimeoutCause(t.Context(), 3*time.Minute, errors.New("the exchange takes too long"))
	defer cancel()
	steps := []string{"both authorities are trusted", "certificates of the new one", "the old one is not trusted any more"}
	var lines []*faultRecord
	for _, step := range steps {
		lines = append(lines, record(t, "the nodes' certificates are exchanged: "+step, harness.V2))
	}
	c := threeNodes(ctx, t, "ce")
	former, next := newAuthority(t, "former"), newAuthority(t, "next")
	for _, n := range c.Nodes {
		must(t, n.Wolf.Stop())
		n.Wolf.UseKeys("")
		dir := n.Wolf.Dir
		put(t, dir, "ca.pem", former.bundle())
		former.issue(t, dir, n.Name)
		put(t, dir, "gossip.key", strings.Repeat("0f", 32)+"\n")
		n.Wolf.Settings["cluster"] += fmt.Sprintf("cert_file = %q\nkey_file = %q\nca_file = %q\ngossip_key_file = %q\n",
			filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem"), filepath.Join(dir, "ca.pem"), filepath.Join(dir, "gossip.key"))
	}
	for _, n := range c.Nodes {
		must(t, n.Wolf.Start(ctx))
	}
	must(t, c.Settle(ctx))
	for step, exchange := range []func(n *harness.Node){
		func(n *harness.Node) { put(t, n.Wolf.Dir, "ca.pem", former.bundle()+next.bundle()) },
		func(n *harness.Node) { next.issue(t, n.Wolf.Dir, n.Name) },
		func(n *harness.Node) { put(t, n.Wolf.Dir, "ca.pem", next.bundle()) },
	} {
		line := lines[step]
		line.Seconds, line.RegistryCopies = 0, 0
		for _, nodes := range [][]*harness.Node{c.Nodes, nil} { // while files are replaced, and once after
			img := image(ctx, t, int64(6+4*len(nodes)))
			registry.Reset()
			began := time.Now()
			pulls := pull(ctx, "certificates", img.Ref, c.Nodes...)
			for _, n := range nodes {
				exchange(n)
				inUse(ctx, t, n, step+1)
			}
			finish(t, pulls)
			ended := slices.MaxFunc(pulls, func(a, b *pulling) int { return a.ended.Compare(b.ended) }).ended
			line.Seconds = max(line.Seconds, ended.Sub(began).Seconds())
			line.RegistryCopies = max(line.RegistryCopies, copies(img))
			whole(ctx, t, "certificates", img, c.Nodes...)
		}
		if line.RegistryCopies > usualCopies {
			t.Errorf("while %s the registry sent %.2f copies, more than %.2f", steps[step], line.RegistryCopies, usualCopies)
		}
	}
}

// inUse waits until a daemon has taken the files that were put under it so many times.
func inUse(ctx context.Context, t *testing.T, n *harness.Node, times int) {
	t.Helper()
	must(t, harness.Poll(ctx, 100*time.Millisecond, func() error {
		log, err := os.ReadFile(n.Wolf.Log())
		if err != nil {
			return err
		}
		if got := strings.Count(string(log), "certificate files changed and are in use"); got < times {
			return fmt.Errorf("%s has taken new files %d times, not %d", n.Name, got, times)
		}
		return nil
	}))
}

// authority signs certificates, as an operator's own does.
type authority struct {
	key  ed25519.PrivateKey
	cert *x509.Certificate
}

func newAuthority(t *testing.T, name string) *authority {
	t.Helper()
	public, key, err := ed25519.GenerateKey(rand.Reader)
	must(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, public, key)
	must(t, err)
	cert, err := x509.ParseCertificate(der)
	must(t, err)
	return &authority{key, cert}
}

// bundle is the authority's certificate as in a ca_file.
func (a *authority) bundle() string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw}))
}

// issue puts a node's certificate and key into dir.
func (a *authority) issue(t *testing.T, dir, name string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}, a.cert, key.Public(), a.key)
	must(t, err)
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	must(t, err)
	// The key first: a node that reads them in between keeps to the former ones.
	put(t, dir, "key.pem", string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})))
	put(t, dir, "cert.pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))
}

// put replaces a file of dir at once.
func put(t *testing.T, dir, name, text string) {
	t.Helper()
	file := filepath.Join(dir, name)
	must(t, os.WriteFile(file+".new", []byte(text), 0o600))
	must(t, os.Rename(file+".new", file))
}
