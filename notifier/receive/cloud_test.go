package receive

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"maps"
	"math/big"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/time/rate"

	"github.com/imagewolf/imagewolf/config"
)

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// snsKey makes a key, and a certificate of it as SNS has them (DER).
func snsKey(t testing.TB) (*rsa.PrivateKey, []byte) {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "sns"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return key, der
}

func TestSNSSignatures(t *testing.T) {
	key, der := snsKey(t)
	asked := 0
	client := roundTrip(func(req *http.Request) (*http.Response, error) {
		asked++
		w := httptest.NewRecorder()
		if req.URL.String() != "https://sns.eu-west-1.amazonaws.com/SimpleNotificationService-0a.pem" {
			t.Errorf("asked %s", req.URL)
		}
		if err := pem.Encode(w, &pem.Block{Type: "CERTIFICATE", Bytes: der}); err != nil {
			t.Error(err)
		}
		return w.Result(), nil
	})
	// The message and its text are written out here, as AWS documents them.
	const event = `{"id":"1","detail-type":"ECR Image Action","account":"123456789012","region":"eu-west-1","detail":{"result":"SUCCESS","repository-name":"apps/web","action-type":"PUSH","image-tag":"1"}}`
	now := time.Now().UTC().Format("2006-01-02T15:04:05.000Z")
	message := func(version string, change map[string]string) string {
		m := map[string]string{
			"Type": "Notification", "MessageId": "id", "TopicArn": topic, "Timestamp": now, "Message": event, "Subject": "s",
			"SignatureVersion": version, "SigningCertURL": "https://sns.eu-west-1.amazonaws.com/SimpleNotificationService-0a.pem",
		}
		if old := change["signed.Timestamp"]; old != "" {
			m["Timestamp"] = old
		}
		text := "Message\n" + event + "\nMessageId\nid\nSubject\ns\nTimestamp\n" + m["Timestamp"] + "\nTopicArn\n" + topic + "\nType\nNotification\n"
		long, short := sha256.Sum256([]byte(text)), sha1.Sum([]byte(text))
		hash, sum := crypto.SHA256, long[:]
		if version == "1" {
			hash, sum = crypto.SHA1, short[:]
		}
		s, err := rsa.SignPKCS1v15(rand.Reader, key, hash, sum)
		if err != nil {
			t.Fatal(err)
		}
		m["Signature"] = base64.StdEncoding.EncodeToString(s)
		maps.Copy(m, change)
		b, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	c := config.DefaultNotifier()
	c.Receiver["r"] = config.Receiver{Type: "ecr", Auth: "sns", TopicARN: topic}.WithDefaults("r")
	k := &kept{}
	h, err := New(c, k, Options{Transport: client})
	if err != nil {
		t.Fatal(err)
	}
	post := func(body string) int {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(http.MethodPost, "/hooks/r", strings.NewReader(body)))
		return w.Code
	}
	for _, version := range []string{"1", "2"} {
		if code := post(message(version, nil)); code != http.StatusOK {
			t.Errorf("version %s: %d, %+v", version, code, k.ignored)
		}
	}
	if len(k.events) != 2 || k.events[0].Image() != "123456789012.dkr.ecr.eu-west-1.amazonaws.com/apps/web:1" || asked != 1 {
		t.Errorf("%+v, asked %d times", k.events, asked)
	}
	for name, body := range map[string]string{
		"changed":    message("2", map[string]string{"Message": strings.Replace(event, "apps/web", "apps/evil", 1)}),
		"subject":    message("2", map[string]string{"Subject": "other"}),
		"version":    message("2", map[string]string{"SignatureVersion": "1"}),
		"no version": message("2", map[string]string{"SignatureVersion": ""}),
		"unsigned":   message("2", map[string]string{"Signature": ""}),
		"topic":      message("2", map[string]string{"TopicArn": topic + "2"}),
		"old":        message("2", map[string]string{"signed.Timestamp": "2020-01-01T00:00:00.000Z"}),
		"other host": message("2", map[string]string{"SigningCertURL": "https://evil.example/SimpleNotificationService-0a.pem"}),
		"suffix":     message("2", map[string]string{"SigningCertURL": "https://sns.eu-west-1.amazonaws.com.evil.example/SimpleNotificationService-0a.pem"}),
		"region":     message("2", map[string]string{"SigningCertURL": "https://sns.us-east-1.amazonaws.com/SimpleNotificationService-0a.pem"}),
		"user":       message("2", map[string]string{"SigningCertURL": "https://sns.eu-west-1.amazonaws.com@evil.example/SimpleNotificationService-0a.pem"}),
		"plain":      message("2", map[string]string{"SigningCertURL": "http://sns.eu-west-1.amazonaws.com/SimpleNotificationService-0a.pem"}),
		"other path": message("2", map[string]string{"SigningCertURL": "https://sns.eu-west-1.amazonaws.com/bucket/x.pem"}),
		"raw":        event,
		"broken":     "{",
	} {
		if code := post(body); code != http.StatusUnauthorized {
			t.Errorf("%s: %d", name, code)
		}
	}
	if len(k.events) != 2 || asked != 1 {
		t.Errorf("%d events, asked %d times", len(k.events), asked)
	}
}

// FuzzSNS: without SNS's key nothing is taken that anyone writes, and nothing is asked
// for but a certificate of SNS's own. The body's time is made now, so that it counts.
func FuzzSNS(f *testing.F) {
	const host = "https://sns.eu-west-1.amazonaws.com"
	message := func(at string) []byte {
		return []byte(`{"Type":"Notification","MessageId":"id","TopicArn":"` + topic + `","Message":"m","Subject":null,"SignatureVersion":"2",` +
			`"Signature":"AAAA","SigningCertURL":"` + at + `"}`)
	}
	f.Add(message(host + "/SimpleNotificationService-0a.pem"))
	f.Add(message(host + "/SimpleNotificationService-0a.pem?x=https://evil.example"))
	f.Add(message(host + "/bucket/x.pem"))
	f.Add(message("https://sns.eu-west-1.amazonaws.com@evil.example/SimpleNotificationService-0a.pem"))
	f.Add([]byte(`{"Type":"SubscriptionConfirmation","TopicArn":"` + topic + `","SignatureVersion":"1","Signature":"","SubscribeURL":1}`))
	_, der := snsKey(f)
	var asked []string
	s := newSNSSigned(topic, &http.Client{Transport: roundTrip(func(req *http.Request) (*http.Response, error) {
		asked = append(asked, req.URL.String())
		w := httptest.NewRecorder()
		err := pem.Encode(w, &pem.Block{Type: "CERTIFICATE", Bytes: der})
		return w.Result(), err
	})})
	s.limit = rate.NewLimiter(rate.Inf, 1)
	f.Fuzz(func(t *testing.T, body []byte) {
		asked = nil
		if i := bytes.IndexByte(body, '{'); i >= 0 {
			body = append([]byte(`{"Timestamp":"`+time.Now().UTC().Format(time.RFC3339)+`",`), body[i+1:]...)
		}
		req := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/", nil)
		if s.check(req, body) == nil {
			t.Errorf("%q is taken", body)
		}
		for _, at := range asked {
			if path, ok := strings.CutPrefix(at, host); !ok || !snsCertPath.MatchString(path) {
				t.Errorf("asked %s", at)
			}
		}
		if len(asked) > 1 || len(s.certs) > maxCerts {
			t.Errorf("asked %q, %d certificates are kept", asked, len(s.certs))
		}
	})
}

// Of a confirmation other fields are signed than of a notification, and they are
// written out here, as AWS documents them.
func TestSNSConfirmationsAreSigned(t *testing.T) {
	const token, host = "2336412f37fb687f5d51e6e2425c464d", "https://sns.eu-west-1.amazonaws.com/"
	const subscribe = host + "?Action=ConfirmSubscription&TopicArn=" + topic + "&Token=" + token
	key, der := snsKey(t)
	confirmed := 0
	client := roundTrip(func(req *http.Request) (*http.Response, error) {
		w := httptest.NewRecorder()
		switch req.URL.Path {
		case "/SimpleNotificationService-0a.pem":
			if err := pem.Encode(w, &pem.Block{Type: "CERTIFICATE", Bytes: der}); err != nil {
				t.Error(err)
			}
		default:
			if q := req.URL.Query(); q.Get("Action") != "ConfirmSubscription" || q.Get("Token") != token || q.Get("TopicArn") != topic {
				t.Errorf("asked %s", req.URL)
			}
			confirmed++
		}
		return w.Result(), nil
	})
	c := config.DefaultNotifier()
	c.Receiver["r"] = config.Receiver{Type: "ecr", Auth: "sns", TopicARN: topic}.WithDefaults("r")
	now := time.Now().UTC().Format("2006-01-02T15:04:05.000Z")
	message := "You have chosen to subscribe to the topic " + topic + "."
	signed := "Message\n" + message + "\nMessageId\nid\nSubscribeURL\n" + subscribe + "\nTimestamp\n" + now + "\nToken\n" + token +
		"\nTopicArn\n" + topic + "\nType\nSubscriptionConfirmation\n"
	asNotification := "Message\n" + message + "\nMessageId\nid\nTimestamp\n" + now + "\nTopicArn\n" + topic + "\nType\nSubscriptionConfirmation\n"
	for _, s := range []struct {
		name, text, change, to string
		ok                     bool
	}{
		{"right", signed, "", "", true},
		{"signed as a notification", asNotification, "", "", false},
		{"another token", signed, "Token", "00" + token[2:], false},
		{"another URL", signed, "SubscribeURL", subscribe + "&AuthenticateOnUnsubscribe=true", false},
		{"another message", signed, "Message", "x", false},
		{"another type", signed, "Type", "UnsubscribeConfirmation", false},
		{"another topic", signed, "TopicArn", topic + "2", false},
		{"another time", signed, "Timestamp", time.Now().UTC().Add(time.Minute).Format(time.RFC3339), false},
		{"no signature", signed, "Signature", "", false},
	} {
		sum := sha256.Sum256([]byte(s.text))
		signature, err := rsa.SignPKCS1v15(rand.Reader, key, crypto.SHA256, sum[:])
		if err != nil {
			t.Fatal(err)
		}
		m := map[string]string{
			"Type": "SubscriptionConfirmation", "MessageId": "id", "TopicArn": topic, "Timestamp": now, "Message": message, "Token": token,
			"SubscribeURL": subscribe, "SignatureVersion": "2", "SigningCertURL": host + "SimpleNotificationService-0a.pem",
			"Signature": base64.StdEncoding.EncodeToString(signature),
		}
		if s.change != "" {
			m[s.change] = s.to
		}
		body, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		k := &kept{}
		h, err := New(c, k, Options{Transport: client})
		if err != nil {
			t.Fatal(err)
		}
		confirmed = 0
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/hooks/r", strings.NewReader(string(body))))
		want := map[bool]int{true: http.StatusOK, false: http.StatusUnauthorized}[s.ok]
		if w.Code != want || (confirmed == 1) != s.ok || len(k.events) != 0 {
			t.Errorf("%s: %d, confirmed %d times, kept %+v", s.name, w.Code, confirmed, k.events)
		}
	}
}

// SNS gives up what is answered with 401, and repeats what is answered with 503.
func TestAnSNSCertificateThatCannotBeHadNow(t *testing.T) {
	const at = "https://sns.eu-west-1.amazonaws.com/SimpleNotificationService-0a.pem"
	body, err := json.Marshal(map[string]string{
		"Type": "Notification", "MessageId": "id", "TopicArn": topic, "Timestamp": time.Now().UTC().Format(time.RFC3339), "Message": "{}",
		"SignatureVersion": "2", "SigningCertURL": at, "Signature": base64.StdEncoding.EncodeToString([]byte("x")),
	})
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		status, want int // a status of 0: nothing answers
	}{
		"away": {0, http.StatusServiceUnavailable}, "failing": {http.StatusBadGateway, http.StatusServiceUnavailable},
		"busy": {http.StatusTooManyRequests, http.StatusServiceUnavailable}, "none there": {http.StatusNotFound, http.StatusUnauthorized},
	} {
		settings := config.DefaultNotifier()
		settings.Receiver["r"] = config.Receiver{Type: "ecr", Auth: "sns", TopicARN: topic}.WithDefaults("r")
		k := &kept{}
		h, err := New(settings, k, Options{Transport: roundTrip(func(*http.Request) (*http.Response, error) {
			if c.status == 0 {
				return nil, errors.New("no way there")
			}
			w := httptest.NewRecorder()
			w.WriteHeader(c.status)
			return w.Result(), nil
		})})
		if err != nil {
			t.Fatal(err)
		}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(http.MethodPost, "/hooks/r", strings.NewReader(string(body))))
		if w.Code != c.want || len(k.events) != 0 {
			t.Errorf("%s: %d, want %d; kept %+v", name, w.Code, c.want, k.events)
		}
	}
}

// One certificate that does not come holds up no message that is signed with
// another, and is asked for once.
func TestASlowSNSCertificateHoldsUpNoOther(t *testing.T) {
	const host = "https://sns.eu-west-1.amazonaws.com/SimpleNotificationService-"
	_, der := snsKey(t)
	asked, release := make(chan struct{}, 3), make(chan struct{}) // of the slow one
	s := newSNSSigned(topic, &http.Client{Transport: roundTrip(func(req *http.Request) (*http.Response, error) {
		if strings.HasSuffix(req.URL.Path, "-5low.pem") {
			asked <- struct{}{}
			<-release
		}
		w := httptest.NewRecorder()
		err := pem.Encode(w, &pem.Block{Type: "CERTIFICATE", Bytes: der})
		return w.Result(), err
	})})
	get := func(name string) {
		if c, err := s.cert(t.Context(), host+name+".pem"); err != nil || c == nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	get("0a")
	var slow sync.WaitGroup
	for range 3 {
		slow.Go(func() { get("5low") })
	}
	<-asked
	others := make(chan struct{})
	go func() {
		defer close(others)
		get("0a") // that is here
		get("0b") // that is asked for
	}()
	select {
	case <-others:
	case <-time.After(10 * time.Second): // only if it fails
		t.Error("others are held up")
	}
	close(release)
	<-others
	slow.Wait()
	if len(asked) != 0 {
		t.Errorf("asked %d times", 1+len(asked))
	}
}

func TestHandshakeOfCloudEvents(t *testing.T) {
	c := config.DefaultNotifier()
	c.Receiver["a"] = config.Receiver{Type: "acr", Secret: secret}.WithDefaults("a")
	c.Receiver["p"] = config.Receiver{Type: "acr", Auth: "path", Secret: secret}.WithDefaults("p")
	c.Receiver["z"] = config.Receiver{Type: "zot", Registry: "z.example", Secret: secret}.WithDefaults("z")
	k := &kept{}
	h, err := New(c, k, Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []struct {
		path, from string
		status     int
	}{
		{"/hooks/a", "eventgrid.azure.net", 200},
		{"/hooks/p/" + secret, "eventgrid.azure.net", 200},
		{"/hooks/p/wrong", "eventgrid.azure.net", 404},
		{"/hooks/a", "", 405},
		{"/hooks/a", "evil\r\nX: y", 405},
		{"/hooks/z", "eventgrid.azure.net", 405},
	} {
		req := httptest.NewRequest(http.MethodOptions, s.path, nil)
		req.Header.Set("WebHook-Request-Origin", s.from)
		req.Header.Set("WebHook-Request-Rate", "120")
		w := httptest.NewRecorder()
		h.ServeHTTP(w, req)
		if allowed := w.Header().Get("WebHook-Allowed-Origin"); w.Code != s.status || (allowed == s.from) != (s.status == 200 || s.from == "") {
			t.Errorf("%s %q: %d, allowed %q", s.path, s.from, w.Code, allowed)
		}
	}
	if code := func() int {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(http.MethodPost, "/hooks/a", strings.NewReader("{}")))
		return w.Code
	}(); code != http.StatusUnauthorized || len(k.events) != 0 {
		t.Errorf("a sender that shook hands is let in: %d", code)
	}
}
