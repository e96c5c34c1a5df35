package receive

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/coreos/go-oidc/v3/oidc/oidctest"

	"github.com/imagewolf/imagewolf/config"
)

// serve runs a handler on a port of its own and returns the port's address.
func serve(t *testing.T, c config.Notifier, q Queue) string {
	t.Helper()
	h, err := New(c, q, Options{})
	if err != nil {
		t.Fatal(err)
	}
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- h.Run(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return l.Addr().String()
}

func TestRunEndsWhenItsListenerFails(t *testing.T) {
	h, err := New(config.DefaultNotifier(), &kept{}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	if err := h.Run(t.Context(), l); err == nil {
		t.Error("served on a closed listener")
	}
}

// certificate writes a certificate and its key, and returns the pool that
// trusts it.
func certificate(t *testing.T, dir, name string) *x509.CertPool {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, &template, &template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	pkcs, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	for file, block := range map[string]*pem.Block{"cert": {Type: "CERTIFICATE", Bytes: der}, "key": {Type: "PRIVATE KEY", Bytes: pkcs}} {
		b := pem.EncodeToMemory(block)
		pool.AppendCertsFromPEM(b)
		if err := os.WriteFile(filepath.Join(dir, file), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return pool
}

func TestTLSWithACertificateThatIsReplaced(t *testing.T) {
	dir := t.TempDir()
	c := config.DefaultNotifier()
	c.TLSCertFile, c.TLSKeyFile = filepath.Join(dir, "cert"), filepath.Join(dir, "key")
	c.Receiver["it"] = config.Receiver{Type: "quay", Unauthenticated: true}.WithDefaults("it")
	q := &kept{}
	certificate(t, dir, "first.example")
	address := serve(t, c, q)
	_, body := fixture(t, "quay/push")
	for _, name := range []string{"first.example", "second.example"} {
		pool := certificate(t, dir, name)
		tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, ServerName: name}, DisableKeepAlives: true}
		res, err := (&http.Client{Transport: tr}).Post("https://"+address+"/hooks/it", "application/json", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if res.StatusCode != 200 {
			t.Errorf("%s: %s", name, res.Status)
		}
	}
	if len(q.events) != 4 {
		t.Errorf("kept %d events", len(q.events))
	}
}

func TestTokensOfPubSub(t *testing.T) {
	const audience, email = "https://hooks.example.com/hooks/it", "push@acme-prod.iam.gserviceaccount.com"
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	other, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	issuer := &oidctest.Server{PublicKeys: []oidctest.PublicKey{{PublicKey: key.Public(), KeyID: "k1", Algorithm: oidc.ES256}}}
	var asked atomic.Int32
	keys := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		issuer.ServeHTTP(w, r)
	})
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: keys, ReadHeaderTimeout: time.Second}
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(l) }()
	defer func() { s.Close(); <-ended }()
	issuer.SetIssuer("http://" + l.Addr().String())

	transport := &http.Transport{DisableKeepAlives: true}
	r := config.Receiver{
		Type: "google", Auth: "oidc", OIDCIssuer: "https://accounts.google.com", OIDCAudience: audience, OIDCEmail: email,
		OIDCKeysURL: "http://" + l.Addr().String() + "/keys",
	}
	claims := func(change string, to any) string {
		m := map[string]any{
			"iss": "https://accounts.google.com", "aud": audience, "email": email, "email_verified": true, "sub": "1173",
			"iat": time.Now().Unix(), "exp": time.Now().Add(time.Hour).Unix(),
		}
		if change != "" {
			m[change] = to
		}
		var b strings.Builder
		for k, v := range m {
			if s, ok := v.(string); ok {
				v = fmt.Sprintf("%q", s)
			}
			fmt.Fprintf(&b, ",%q:%v", k, v)
		}
		return "{" + b.String()[1:] + "}"
	}
	token := func(change string, to any) string {
		return oidctest.SignIDToken(key, "k1", oidc.ES256, claims(change, to))
	}
	good := token("", nil)
	subject := r
	subject.OIDCEmail, subject.OIDCSubject = "", "1173"
	for _, c := range []struct {
		name  string
		r     config.Receiver
		token string
		ok    bool
	}{
		{"right", r, good, true},
		{"the issuer's other name", r, token("iss", "accounts.google.com"), true},
		{"right subject", subject, good, true},
		{"wrong subject", subject, token("sub", "1174"), false},
		{"wrong issuer", r, token("iss", "https://evil.example"), false},
		{"wrong audience", r, token("aud", "https://other.example"), false},
		{"wrong e-mail", r, token("email", "push@evil.iam.gserviceaccount.com"), false},
		{"e-mail not verified", r, token("email_verified", false), false},
		{"expired", r, token("exp", time.Now().Add(-time.Hour).Unix()), false},
		{"of another key", r, oidctest.SignIDToken(other, "k1", oidc.ES256, claims("", nil)), false},
		{"of an unknown key", r, oidctest.SignIDToken(other, "k2", oidc.ES256, claims("", nil)), false},
		{"not signed", r, "eyJhbGciOiJub25lIn0." + strings.Split(good, ".")[1] + ".", false},
		{"cut", r, good[:len(good)-4], false},
		{"no token", r, "", false},
		{"nonsense", r, "nonsense", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBed(t, c.r, transport)
			h, body := fixture(t, "google/push")
			if c.token != "" {
				h.Set("Authorization", "Bearer "+c.token)
			}
			w := b.post(t, "/hooks/it", h, body)
			if want := map[bool]int{true: 200, false: 401}[c.ok]; w.Code != want || (len(b.events) == 1) != c.ok {
				t.Errorf("%d, kept %s; log: %s", w.Code, b.kinds(), b.log)
			}
			if c.token != "" && strings.Contains(b.log.String(), c.token) {
				t.Errorf("the token is in the log: %s", b.log)
			}
		})
	}

	// Whoever names keys that do not exist must not make us ask for them on end.
	asked.Store(0)
	b := newBed(t, r, transport)
	for i := range 30 {
		h, body := fixture(t, "google/push")
		h.Set("Authorization", "Bearer "+oidctest.SignIDToken(other, fmt.Sprint("k", i+2), oidc.ES256, claims("", nil)))
		if w := b.post(t, "/hooks/it", h, body); w.Code != 401 && w.Code != 503 {
			t.Errorf("%d", w.Code)
		}
	}
	if n := asked.Load(); n < 1 || n > 8 {
		t.Errorf("asked %d times for keys", n)
	}
}

// While the issuer's keys cannot be had nobody knows who sends: Pub/Sub is to send
// again, soon. Who is known by keys that are here is let in meanwhile.
func TestKeysOfAnIssuerThatCannotBeHadNow(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	issuer := &oidctest.Server{PublicKeys: []oidctest.PublicKey{{PublicKey: key.Public(), KeyID: "k1", Algorithm: oidc.ES256}}}
	issuer.SetIssuer("https://issuer.example")
	r := config.Receiver{
		Type: "google", Auth: "oidc", OIDCIssuer: "https://accounts.google.com", OIDCAudience: "us", OIDCSubject: "1173",
		OIDCKeysURL: "https://issuer.example/keys",
	}
	token := func(kid, subject string) string {
		return oidctest.SignIDToken(key, kid, oidc.ES256, fmt.Sprintf(
			`{"iss":"https://accounts.google.com","aud":"us","sub":%q,"iat":%d,"exp":%d}`, subject, time.Now().Unix(), time.Now().Add(time.Hour).Unix()))
	}
	keys := func(req *http.Request) (*http.Response, error) {
		w := httptest.NewRecorder()
		issuer.ServeHTTP(w, req)
		return w.Result(), nil
	}
	answers := func(status int, body io.Reader) roundTrip {
		return func(*http.Request) (*http.Response, error) {
			return &http.Response{StatusCode: status, Body: io.NopCloser(body), Header: http.Header{}}, nil
		}
	}
	for name, away := range map[string]roundTrip{
		"away": func(*http.Request) (*http.Response, error) { return nil, errors.New("no way there") },
		"hangs": func(req *http.Request) (*http.Response, error) {
			<-req.Context().Done()
			return nil, req.Context().Err()
		},
		"hangs in the middle": func(req *http.Request) (*http.Response, error) {
			r, w := io.Pipe()
			context.AfterFunc(req.Context(), func() { w.CloseWithError(req.Context().Err()) })
			return &http.Response{StatusCode: http.StatusOK, Body: r, Header: http.Header{}}, nil
		},
		"failing": answers(http.StatusBadGateway, strings.NewReader("")),
		"absent":  answers(http.StatusNotFound, strings.NewReader("{}")),
		"no keys": answers(http.StatusOK, strings.NewReader("<html>")),
		"cut":     answers(http.StatusOK, io.MultiReader(strings.NewReader("{"), iotest.ErrReader(io.ErrUnexpectedEOF))),
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				now := away
				b := newBed(t, r, roundTrip(func(req *http.Request) (*http.Response, error) { return now(req) }))
				post := func(token string, want int) {
					t.Helper()
					h, body := fixture(t, "google/push")
					h.Set("Authorization", "Bearer "+token)
					w := b.post(t, "/hooks/it", h, body)
					if w.Code != want || (want == 503) != (w.Header().Get("Retry-After") != "") {
						t.Errorf("%d, want %d; log: %s", w.Code, want, b.log)
					}
					synctest.Wait() // for what is left of asking for keys
				}
				post(token("k1", "1173"), 503)
				now = keys
				post(token("k1", "1173"), 200)
				now = away
				post(token("k1", "1173"), 200)
				post(token("k1", "another"), 401)
				post(token("k2", "1173"), 503) // a new key, as far as can be told
			})
		})
	}
}
