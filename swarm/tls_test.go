package swarm

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"hash"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// authority issues certificates, as a cluster's does.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pool *x509.CertPool
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	own := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, own, own, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	a := &authority{key: key, pool: x509.NewCertPool()}
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	a.pool.AddCert(a.cert)
	return a
}

// config is what a node of that name shows and demands: TLS 1.3, both ways.
func (a *authority) config(t testing.TB, name string) *tls.Config {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name}, DNSNames: []string{"node"},
		NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}, a.cert, key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Config{
		Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}},
		RootCAs:      a.pool, ServerName: "node",
		ClientCAs: a.pool, ClientAuth: tls.RequireAndVerifyClientCert,
		MinVersion: tls.VersionTLS13,
	}
}

// secure makes a peer speak TLS as the node of that name.
func (a *authority) secure(t testing.TB, name string) func(*Options) {
	c := a.config(t, name)
	return func(o *Options) {
		o.Listener = handshaking{o.Listener, c}
		o.Dial = func(ctx context.Context, addr string) (net.Conn, error) {
			return (&tls.Dialer{Config: c}).DialContext(ctx, "tcp", addr)
		}
	}
}

// handshaking hands out connections whose handshake is done. One at a time:
// only these tests connect.
type handshaking struct {
	net.Listener
	config *tls.Config
}

func (l handshaking) Accept() (net.Conn, error) {
	for {
		raw, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		c := tls.Server(raw, l.config)
		_ = c.SetDeadline(time.Now().Add(patience)) // fails at the handshake at the latest
		if c.Handshake() == nil {
			_ = c.SetDeadline(time.Time{}) // as above
			return c, nil
		}
		_ = raw.Close() // there is nobody to be told
	}
}

// Over the connections that nodes make, the bytes arrive, and a peer is the
// same one whoever has dialed whom.
func TestOverTLS(t *testing.T) {
	a := newAuthority(t)
	data := content(9<<20+17, 4)
	d := digest.FromBytes(data)
	one, two := newPeer(t, a.secure(t, "one")), newPeer(t, a.secure(t, "two"))
	stranger := newPeer(t, newAuthority(t).secure(t, "three"))
	from, sink, never := one.open(t, d, wholeMemory(data)), newMemory(len(data)), newMemory(len(data))
	to, out := two.open(t, d, sink), stranger.open(t, d, never)
	for i, pieces := range offerAll(t, from) {
		if err := out.Leech(i, pieces, addrs(one)); err != nil {
			t.Fatal(err)
		}
		if err := to.Leech(i, pieces, addrs(one)); err != nil {
			t.Fatal(err)
		}
	}
	sink.await(t, 0, int64(len(data)))
	if !sink.equal(data) {
		t.Error("other bytes")
	}
	if st := to.Stats(); st.Sources[one.addr] < int64(len(data)) || len(st.Sources) != 1 {
		t.Errorf("sources: %v", st.Sources)
	}
	if st := out.Stats(); st.Downloaded != 0 {
		t.Errorf("a stranger has got %d bytes", st.Downloaded)
	}
}

// fileData is a blob in a file, whose sha256 is computed as its bytes come.
type fileData struct {
	*os.File
	size int64

	mu     sync.Mutex
	there  map[int64]int64 // guarded by mu: pieces beyond prefix, end by offset
	prefix int64           // guarded by mu
	grown  chan struct{}
}

func newFileData(b *testing.B, dir string, size int64) *fileData {
	f, err := os.Create(filepath.Join(dir, "to"))
	if err != nil {
		b.Fatal(err)
	}
	return &fileData{File: f, size: size, there: map[int64]int64{}, grown: make(chan struct{}, 1)}
}

func (f *fileData) MarkPresent(off, n int64) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.there[off] = off + n
	for end, ok := f.there[f.prefix]; ok; end, ok = f.there[f.prefix] {
		f.prefix = end
	}
	select {
	case f.grown <- struct{}{}:
	default:
	}
	return nil
}

func (f *fileData) Present(off, n int64) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return off+n <= f.prefix || f.there[off] >= off+n
}

// sum waits for all bytes and returns their sha256.
func (f *fileData) sum(b *testing.B) []byte {
	h := sha256.New()
	buf := make([]byte, 1<<20)
	for at := int64(0); at < f.size; {
		f.mu.Lock()
		end := f.prefix
		f.mu.Unlock()
		if end == at {
			<-f.grown
			continue
		}
		n, err := io.CopyBuffer(struct{ io.Writer }{h}, struct{ io.Reader }{io.NewSectionReader(f.File, at, end-at)}, buf)
		if err != nil {
			b.Fatal(err)
		}
		at += n
	}
	return h.Sum(nil)
}

// BenchmarkAgainstTLS is one seeder to one leecher, from file to file with the
// sha256 of the whole, next to the same bytes over one TLS connection into a
// file with its sha256. The ratio is what BitTorrent leaves of the speed.
func BenchmarkAgainstTLS(b *testing.B) {
	const size = 512 << 20
	dir := b.TempDir()
	data := content(size, 1)
	source := filepath.Join(dir, "from")
	if err := os.WriteFile(source, data, 0o600); err != nil {
		b.Fatal(err)
	}
	want := sha256.Sum256(data)
	a := newAuthority(b)
	from, err := os.Open(source)
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = from.Close() }()
	seeder, leecher := newPeer(b, a.secure(b, "one")), newPeer(b, a.secure(b, "two"))
	d := digest.NewDigestFromBytes(digest.SHA256, want[:])
	blob, err := seeder.Open(d, size, wholeFile{from})
	if err != nil {
		b.Fatal(err)
	}
	pieces := offerAll(b, blob)
	check := func(got []byte) {
		if [32]byte(got) != want {
			b.Fatal("other bytes")
		}
	}
	var plain, swarm time.Duration
	for b.Loop() {
		start := time.Now()
		check(overTLS(b, a, source, dir))
		plain += time.Since(start)

		start = time.Now()
		sink := newFileData(b, dir, size)
		to, err := leecher.Open(d, size, sink)
		if err != nil {
			b.Fatal(err)
		}
		for i, p := range pieces {
			if err := to.Leech(i, p, addrs(seeder)); err != nil {
				b.Fatal(err)
			}
		}
		check(sink.sum(b))
		swarm += time.Since(start)
		if err := to.Close(); err != nil {
			b.Fatal(err)
		}
		if err := sink.Close(); err != nil {
			b.Fatal(err)
		}
	}
	if err := blob.Close(); err != nil {
		b.Fatal(err)
	}
	mb := float64(b.N) * size / 1e6
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(mb/plain.Seconds(), "tls-MB/s")
	b.ReportMetric(mb/swarm.Seconds(), "swarm-MB/s")
	b.ReportMetric(plain.Seconds()/swarm.Seconds(), "ratio")
}

type wholeFile struct{ *os.File }

func (wholeFile) MarkPresent(int64, int64) error { return nil }
func (wholeFile) Present(int64, int64) bool      { return true }

// overTLS is the baseline: file, connection, hash and file.
func overTLS(b *testing.B, a *authority, source, dir string) []byte {
	l, err := tls.Listen("tcp", "127.0.0.1:0", a.config(b, "one"))
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	sent := make(chan error, 1)
	go func() { sent <- send(l, source) }()
	c, err := tls.Dial("tcp", l.Addr().String(), a.config(b, "two"))
	if err != nil {
		b.Fatal(err)
	}
	h, err := receive(c, filepath.Join(dir, "to"))
	if err != nil {
		b.Fatal(err)
	}
	if err := <-sent; err != nil {
		b.Fatal(err)
	}
	return h.Sum(nil)
}

func send(l net.Listener, source string) error {
	c, err := l.Accept()
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	f, err := os.Open(source)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	_, err = io.CopyBuffer(struct{ io.Writer }{c}, struct{ io.Reader }{f}, make([]byte, 1<<20))
	return err
}

func receive(c net.Conn, name string) (hash.Hash, error) {
	defer func() { _ = c.Close() }()
	f, err := os.Create(name)
	if err != nil {
		return nil, err
	}
	h := sha256.New()
	_, err = io.CopyBuffer(io.MultiWriter(f, h), struct{ io.Reader }{c}, make([]byte, 1<<20))
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		return nil, fmt.Errorf("receive: %w", err)
	}
	return h, nil
}
