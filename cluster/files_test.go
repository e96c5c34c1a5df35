package cluster

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"log/slog"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// authority is a CA as a user might run one.
type authority struct {
	key  ed25519.PrivateKey
	cert *x509.Certificate
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	pub, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: "user's CA"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, pub, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &authority{key, cert}
}

// issue writes the files of a node into dir.
func (a *authority) issue(t *testing.T, dir, name string, change func(*x509.Certificate)) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	if change != nil {
		change(template)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	write(t, dir, "cert.pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))
	write(t, dir, "key.pem", string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})))
	write(t, dir, "ca.pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw})))
	write(t, dir, "gossip", strings.Repeat("0f", 32)+"\n")
}

func write(t *testing.T, dir, file, text string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, file), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func filesIn(dir, name string, log *slog.Logger) IdentityOptions {
	return IdentityOptions{
		CertFile: filepath.Join(dir, "cert.pem"), KeyFile: filepath.Join(dir, "key.pem"),
		CAFile: filepath.Join(dir, "ca.pem"), GossipKeyFile: filepath.Join(dir, "gossip"),
		NodeName: name, Log: log,
	}
}

// filed issues and loads an identity that looks at its files at every use.
func (a *authority) filed(t *testing.T, dir, name string) *Identity {
	t.Helper()
	a.issue(t, dir, name, nil)
	id, err := LoadIdentity(filesIn(dir, name, silent))
	if err != nil {
		t.Fatal(err)
	}
	id.creds.(*files).every = 0
	return id
}

func TestFilesAreReadAgain(t *testing.T) {
	old, serverDir, clientDir := newAuthority(t), t.TempDir(), t.TempDir()
	server, client := old.filed(t, serverDir, "server"), old.filed(t, clientDir, "client")
	p := openPort(t, server, nil)
	greet(t, p)
	if got := greeting(t, client, p); got != "hello client" {
		t.Fatalf("got %q", got)
	}
	if server.secrets[0].knock != client.secrets[0].knock {
		t.Error("two nodes with one gossip key are of two clusters")
	}

	// A new name, and in between files that do not belong together.
	goodKey, err := os.ReadFile(filepath.Join(clientDir, "key.pem"))
	if err != nil {
		t.Fatal(err)
	}
	old.issue(t, clientDir, "renamed", nil)
	newKey, err := os.ReadFile(filepath.Join(clientDir, "key.pem"))
	if err != nil {
		t.Fatal(err)
	}
	write(t, clientDir, "key.pem", string(goodKey))
	if got := greeting(t, client, p); got != "hello client" {
		t.Errorf("with half of the new files: got %q", got)
	}
	write(t, clientDir, "key.pem", string(newKey))
	if got := greeting(t, client, p); got != "hello renamed" {
		t.Errorf("with all of the new files: got %q", got)
	}

	// A new CA for both; who stays behind is out.
	behind := old.filed(t, t.TempDir(), "behind")
	next := newAuthority(t)
	next.issue(t, serverDir, "server", nil)
	next.issue(t, clientDir, "client2", nil)
	if got := greeting(t, client, p); got != "hello client2" {
		t.Errorf("with a new CA: got %q", got)
	}
	if conn, err := behind.Dial(t.Context(), p.listener.Addr().String(), ProtoBitTorrent); err == nil {
		_ = conn.Close() // the failure is told below
		t.Error("a certificate of the old CA is still good")
	}
}

func TestFileMistakes(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(t *testing.T, dir string, a *authority)
		want  string // "" if the node is to start all the same
	}{
		"good": {func(*testing.T, string, *authority) {}, ""},
		"expired": {func(t *testing.T, dir string, a *authority) {
			a.issue(t, dir, "n", func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) })
		}, ""},
		"key of another": {func(t *testing.T, dir string, a *authority) {
			other := t.TempDir()
			a.issue(t, other, "n", nil)
			b, err := os.ReadFile(filepath.Join(other, "key.pem"))
			if err != nil {
				t.Fatal(err)
			}
			write(t, dir, "key.pem", string(b))
		}, "key_file"},
		"CA of another": {func(t *testing.T, dir string, _ *authority) {
			other := newAuthority(t)
			write(t, dir, "ca.pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: other.cert.Raw})))
		}, "must come from ca_file"},
		"empty CA": {func(t *testing.T, dir string, _ *authority) { write(t, dir, "ca.pem", "") }, "ca_file"},
		"for servers only": {func(t *testing.T, dir string, a *authority) {
			a.issue(t, dir, "n", func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[1:] })
		}, "client and server authentication"},
		"no common name": {func(t *testing.T, dir string, a *authority) {
			a.issue(t, dir, "", func(c *x509.Certificate) { c.DNSNames = []string{"n"} })
		}, "no common name"},
		"short gossip key": {func(t *testing.T, dir string, _ *authority) { write(t, dir, "gossip", "0f0f") }, "gossip_key_file"},
		"no file": {func(t *testing.T, dir string, _ *authority) {
			if err := os.Remove(filepath.Join(dir, "cert.pem")); err != nil {
				t.Fatal(err)
			}
		}, "cert_file"},
	} {
		t.Run(name, func(t *testing.T) {
			dir, a := t.TempDir(), newAuthority(t)
			a.issue(t, dir, "n", nil)
			c.spoil(t, dir, a)
			_, err := LoadIdentity(filesIn(dir, "n", silent))
			switch {
			case c.want == "" && err != nil:
				t.Fatal(err)
			case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
				t.Fatalf("err = %v, want one with %q", err, c.want)
			}
		})
	}
}
