package receive

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/textproto"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"go.uber.org/goleak"

	"github.com/imagewolf/imagewolf/config"
	"github.com/imagewolf/imagewolf/notifier/event"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	secret = "s3cr3t-that-is-long-enough"
	topic  = "arn:aws:sns:eu-west-1:123456789012:ecr-push"
)

// kept is a queue that keeps everything in memory.
type kept struct {
	mu      sync.Mutex // guards what follows
	events  []event.Event
	ignored []event.Ignored
	err     error
}

func (k *kept) Put(_ context.Context, r event.Result) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.err != nil && len(r.Events) > 0 {
		return k.err
	}
	k.events = append(k.events, r.Events...)
	k.ignored = append(k.ignored, r.Ignored...)
	return nil
}

// kinds says what was kept, in short.
func (k *kept) kinds() string {
	k.mu.Lock()
	defer k.mu.Unlock()
	var out []string
	for _, e := range k.events {
		out = append(out, string(e.Kind))
	}
	for _, i := range k.ignored {
		out = append(out, string(i.Kind))
	}
	return strings.Join(out, " ")
}

// fixture reads one of package event's: header lines, an empty line, the body.
func fixture(t *testing.T, name string) (http.Header, string) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("../event/testdata", name+".http"))
	if err != nil {
		t.Fatal(err)
	}
	r := bufio.NewReader(bytes.NewReader(b))
	h, err := textproto.NewReader(r).ReadMIMEHeader()
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return http.Header(h), string(body)
}

func pushOf(webhook string) string {
	if webhook == "ghcr" {
		return "ghcr/registry-package"
	}
	return webhook + "/push"
}

// bed is a handler with one receiver, "it", and what it wrote and kept.
type bed struct {
	*kept
	h   *Handler
	log *bytes.Buffer
}

func newBed(t *testing.T, r config.Receiver, transport http.RoundTripper) bed {
	t.Helper()
	b := bed{kept: &kept{}, log: &bytes.Buffer{}}
	c := config.DefaultNotifier()
	c.Receiver["it"] = r.WithDefaults("it")
	var err error
	b.h, err = New(c, b.kept, Options{Log: slog.New(slog.NewTextHandler(b.log, &slog.HandlerOptions{Level: slog.LevelDebug})), Transport: transport})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func (b bed) post(t *testing.T, path string, h http.Header, body string) *httptest.ResponseRecorder {
	t.Helper()
	req := httptest.NewRequestWithContext(t.Context(), http.MethodPost, path, strings.NewReader(body))
	if h != nil {
		req.Header = h
	}
	w := httptest.NewRecorder()
	b.h.ServeHTTP(w, req)
	return w
}

func TestSettingsAndDecodersKnowTheSameTypes(t *testing.T) {
	if got, want := slices.Sorted(maps.Keys(config.ReceiverTypes())), event.Types(); !slices.Equal(got, want) {
		t.Errorf("settings: %q\ndecoders: %q", got, want)
	}
}

// proof puts into a request what shows that its sender knows the secret, and
// returns the path to send to.
func proof(r config.Receiver, h http.Header, body, secret string) string {
	switch r.Auth {
	case "bearer":
		h.Set("Authorization", "bearer "+secret)
	case "basic":
		h.Set("Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(r.Username+":"+secret)))
	case "header":
		h.Set(r.Header, secret)
	case "path":
		return r.Path + "/" + secret
	case "hmac":
		k := signatures[r.Type][0]
		h.Set(k.header, k.prefix+hex.EncodeToString(sign(k, secret, []byte(body))))
	}
	return r.Path
}

// Every type with every way to authenticate that the settings allow: a push is
// taken with the secret, and not without it or with another one.
func TestEveryTypeWithEveryAuthentication(t *testing.T) {
	for webhook, auths := range config.ReceiverTypes() {
		for _, auth := range auths {
			if auth == "oidc" || auth == "sns" {
				continue // have tests of their own
			}
			r := config.Receiver{Type: webhook, Auth: auth, Secret: secret, Registry: "registry.example.com"}
			if auth == "basic" {
				r.Username = "ci"
			}
			r = r.WithDefaults("it")
			t.Run(webhook+" "+auth, func(t *testing.T) {
				b := newBed(t, r, nil)
				want := http.StatusUnauthorized
				if auth == "path" {
					want = http.StatusNotFound
				}
				h, body := fixture(t, pushOf(webhook))
				if w := b.post(t, r.Path, h.Clone(), body); w.Code != want {
					t.Errorf("without the secret: %d", w.Code)
				}
				wrong := h.Clone()
				if w := b.post(t, proof(r, wrong, body, secret+"x"), wrong, body); w.Code != want {
					t.Errorf("with a wrong secret: %d", w.Code)
				} else if auth == "basic" && !strings.HasPrefix(w.Header().Get("WWW-Authenticate"), "Basic ") {
					t.Error("SNS is not asked for its password")
				}
				if auth == "basic" {
					other := r
					other.Username = "other"
					if w := b.post(t, proof(other, wrong, body, secret), wrong, body); w.Code != want {
						t.Errorf("another user with the secret: %d", w.Code)
					}
				}
				if len(b.events) > 0 || strings.Contains(b.kinds(), "pushed") {
					t.Errorf("kept of strangers: %s", b.kinds())
				}
				path := proof(r, h, body, secret)
				if auth == "hmac" {
					if w := b.post(t, path, h.Clone(), body+" "); w.Code != want {
						t.Errorf("with the signature of another body: %d", w.Code)
					}
				}
				if w := b.post(t, path, h, body); w.Code != http.StatusOK || len(b.events) == 0 || b.events[0].Source != "it" {
					t.Errorf("with the secret: %d, %+v", w.Code, b.events)
				}
				if text := b.log.String(); strings.Contains(text, secret) || strings.Contains(text, "POST") || !strings.Contains(text, "a sender is refused") {
					t.Errorf("logged: %s", text)
				}
			})
		}
	}
}

func TestSignaturesAsRegistriesMakeThem(t *testing.T) {
	const body = `{"action":"push"}`
	for _, c := range []struct {
		webhook, secret, body, header, value string
		ok                                   bool
	}{
		{"ghcr", "It's a Secret to Everybody", "Hello, World!", "X-Hub-Signature-256", "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17", true},
		{"ghcr", "It's a Secret to Everybody", "Hello, World?", "X-Hub-Signature-256", "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17", false},
		{"ghcr", "It's a Secret to Everybody", "Hello, World!", "X-Hub-Signature-256", "757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17", false},
		{"ghcr", "It's a Secret to Everybody", "Hello, World!", "X-Hub-Signature", "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17", false},
		{"generic", "s3cr3t", body, "X-Signature", "sha256=edb2b3eec995bab6f8464cd2de3fe3259080370ee15255a750a0d37c56671d8d", true},
		{"gitea", "s3cr3t", body, "X-Gitea-Signature", "edb2b3eec995bab6f8464cd2de3fe3259080370ee15255a750a0d37c56671d8d", true},
		{"gitea", "s3cr3t", body, "X-Forgejo-Signature", "edb2b3eec995bab6f8464cd2de3fe3259080370ee15255a750a0d37c56671d8d", true},
		{"gitea", "s3cr3t", body, "X-Hub-Signature-256", "sha256=edb2b3eec995bab6f8464cd2de3fe3259080370ee15255a750a0d37c56671d8d", true},
		{"jfrog", "s3cr3t", body, "X-JFrog-Event-Auth", "edb2b3eec995bab6f8464cd2de3fe3259080370ee15255a750a0d37c56671d8d", true},
		{"jfrog", "s3cr3t", body, "X-JFrog-Event-Auth", "s3cr3t", false},
		{"nexus", "s3cr3t", body, "X-Nexus-Webhook-Signature", "d145c63db883c00cce679477e5e91dfbd7d17ce5", true},
		{"nexus", "s3cr3t", "{ \"action\" :\n \"push\" }", "X-Nexus-Webhook-Signature", "d145c63db883c00cce679477e5e91dfbd7d17ce5", true},
		{"nexus", "s3cr3t", `{"action":"pu sh"}`, "X-Nexus-Webhook-Signature", "d145c63db883c00cce679477e5e91dfbd7d17ce5", false},
		{"nexus", "s3cr3t", body, "X-Nexus-Webhook-Signature", "", false},
		{"nexus", "s3cr3t", body, "X-Nexus-Webhook-Signature", "d145", false},
	} {
		req := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/", nil)
		req.Header.Set(c.header, c.value)
		err := signatureCheck(signatures[c.webhook], c.secret, c.webhook == "nexus")(req, []byte(c.body))
		if (err == nil) != c.ok {
			t.Errorf("%s %s: %s of %s: %v", c.webhook, c.header, c.value, c.body, err)
		}
	}
}

// FuzzSignature: a body is taken with its own HMAC and nothing else, whichever headers
// come with it.
func FuzzSignature(f *testing.F) {
	var types []string
	for webhook := range signatures {
		types = append(types, webhook)
	}
	slices.Sort(types)
	for i := range types {
		f.Add(uint8(i), "", "sha256=00", []byte("{ }"))
		f.Add(uint8(i), "0", "757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17", []byte(`{"a" : 1}`))
	}
	f.Fuzz(func(t *testing.T, n uint8, first, second string, body []byte) {
		webhook := types[int(n)%len(types)]
		kinds, compact := signatures[webhook], webhook == "nexus"
		verify := signatureCheck(kinds, secret, compact)
		for _, k := range kinds {
			req := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/", nil)
			req.Header[http.CanonicalHeaderKey(kinds[0].header)] = []string{first}
			req.Header[http.CanonicalHeaderKey(k.header)] = []string{second}
			if verify(req, body) == nil {
				t.Errorf("%s: %q with %q is taken", webhook, first, second)
			}
			req.Header = http.Header{}
			req.Header.Set(k.header, k.prefix+hex.EncodeToString(sign(k, secret, body)))
			if err := verify(req, body); err != nil {
				t.Errorf("%s: %v", webhook, err)
			}
			other := append(bytes.Clone(body), 'x')
			if verify(req, other) == nil {
				t.Errorf("%s: %q is taken with the signature of another", webhook, other)
			}
		}
	})
}

func TestReceiversWithoutAuthenticationAreRefusedAtStart(t *testing.T) {
	for webhook, auths := range config.ReceiverTypes() {
		for _, auth := range append(auths, "none") {
			c := config.DefaultNotifier()
			c.Receiver["it"] = config.Receiver{Type: webhook, Auth: auth}.WithDefaults("it")
			if _, err := New(c, &kept{}, Options{}); err == nil || !strings.HasPrefix(err.Error(), "receiver.it.") {
				t.Errorf("%s %s: %v", webhook, auth, err)
			}
			c.Receiver["it"] = config.Receiver{Type: webhook, Unauthenticated: true}.WithDefaults("it")
			if _, err := New(c, &kept{}, Options{}); err != nil {
				t.Errorf("%s, though it says so: %v", webhook, err)
			}
		}
	}
	for key, r := range map[string]config.Receiver{
		"type":        {Type: "gitlab", Auth: "bearer", Secret: secret},
		"auth":        {Type: "quay", Auth: "hmac", Secret: secret},
		"secret_file": {Type: "quay", Auth: "path", SecretFile: "/nonexistent"},
	} {
		c := config.DefaultNotifier()
		c.Receiver["it"] = r
		if _, err := New(c, &kept{}, Options{}); err == nil || !strings.HasPrefix(err.Error(), "receiver.it."+key+": ") {
			t.Errorf("%s: %v", key, err)
		}
	}
}

// The first ImageWolf had these two paths, and registries still send to them.
func TestOldPaths(t *testing.T) {
	c := config.DefaultNotifier()
	c.Receiver["registry"] = config.Receiver{Type: "distribution", Path: "/registryNotifications", Auth: "bearer", Secret: secret}
	c.Receiver["hub"] = config.Receiver{Type: "dockerhub", Path: "/hubNotifications", Unauthenticated: true}
	b := bed{kept: &kept{}}
	var err error
	if b.h, err = New(c, b.kept, Options{}); err != nil {
		t.Fatal(err)
	}
	for path, name := range map[string]string{"/registryNotifications": "distribution/push", "/hubNotifications": "dockerhub/push"} {
		h, body := fixture(t, name)
		h.Set("Authorization", "Bearer "+secret)
		if w := b.post(t, path, h, body); w.Code != http.StatusOK {
			t.Errorf("%s: %d", path, w.Code)
		}
	}
	if b.kinds() != "pushed pushed" {
		t.Errorf("kept %s", b.kinds())
	}
}

// A body has as many events as its sender likes. What would need an emptier queue
// than one that works is told of and counted.
func TestManyEventsInOneBody(t *testing.T) {
	body := func(n int) string {
		return `{"events":[` + strings.TrimSuffix(strings.Repeat(`{"action":"push","target":{"repository":"a","tag":"1"}},`, n), ",") + `]}`
	}
	for most, lost := range map[int]int{100_000: 0, 6000: 0, 3000: 1500, 1000: 2500} {
		b := newBed(t, config.Receiver{Type: "distribution", Unauthenticated: true, Registry: "registry.example.com"}, nil)
		b.h.settings.Queue.MaxEvents = most
		w := b.post(t, "/hooks/it", nil, body(3000))
		counted := 0
		for _, i := range b.ignored {
			counted += 1 + i.More
		}
		told := strings.Contains(b.log.String(), `level=WARN msg="an event leads to nothing" receiver=it kind=too_many`)
		if w.Code != http.StatusOK || len(b.events) != 3000-lost || counted != lost || told != (lost > 0) {
			t.Errorf("of at most %d: %d, %d kept, %d counted, told of: %t", most, w.Code, len(b.events), counted, told)
		}
	}
}

func TestAnswers(t *testing.T) {
	huge := `{"push_data":{"tag":"1"},"repository":{"repo_name":"a/b","full_description":"` + strings.Repeat("x", 1<<20) + `"}}`
	for _, c := range []struct {
		name, webhook, fixture, body string
		full                         bool
		status                       int
		kinds                        string
	}{
		{"a push", "dockerhub", "dockerhub/push", "", false, 200, "pushed"},
		{"a delete", "harbor", "harbor/delete", "", false, 200, "deleted"},
		{"a ping", "ghcr", "ghcr/ping", "", false, 200, "ping"},
		{"a foreign event", "zot", "zot/lint", "", false, 200, "foreign"},
		{"children and an index", "distribution", "distribution/multiarch", "", false, 200, "pushed pushed not_image not_image"},
		{"odd casing", "ghcr", "ghcr/odd-casing", "", false, 200, "pushed"},
		{"no name of an image", "dockerhub", "dockerhub/odd-casing", "", false, 200, "invalid"},
		{"broken JSON", "dockerhub", "dockerhub/push", `{"push_data":`, false, 400, "unreadable"},
		{"broken JSON of a sender that repeats it", "distribution", "distribution/push", `{"events":[`, false, 200, "unreadable"},
		{"broken data of a sender that repeats it", "google", "google/broken-data", "", false, 200, "unreadable"},
		{"a huge body", "dockerhub", "dockerhub/push", huge, false, 413, "unreadable"},
		{"a huge body of a sender that repeats it", "distribution", "distribution/push", huge, false, 200, "unreadable"},
		{"a full queue", "dockerhub", "dockerhub/push", "", true, 503, ""},
		{"a full queue, nothing to keep", "harbor", "harbor/delete", "", true, 200, "deleted"},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBed(t, config.Receiver{Type: c.webhook, Unauthenticated: true, Registry: "registry.example.com"}, nil)
			if c.full {
				b.err = errors.New("full")
			}
			h, body := fixture(t, c.fixture)
			if c.body != "" {
				body = c.body
			}
			w := b.post(t, "/hooks/it", h, body)
			if w.Code != c.status || b.kinds() != c.kinds {
				t.Errorf("answered %d and kept %q", w.Code, b.kinds())
			}
			if (w.Code == 503) != (w.Header().Get("Retry-After") != "") {
				t.Errorf("Retry-After: %q", w.Header().Get("Retry-After"))
			}
		})
	}
}

func TestOtherPathsAndMethods(t *testing.T) {
	b := newBed(t, config.Receiver{Type: "quay", Secret: secret}, nil)
	for _, c := range []struct {
		method, path string
		status       int
	}{
		{"POST", "/", 404}, {"POST", "/hooks", 404}, {"POST", "/hooks/it", 404}, {"POST", "/hooks/it/", 404}, {"GET", "/hooks/it/no", 404},
		{"POST", "/hooks/it/" + secret + "/x", 404}, {"POST", "/hooks/it/../it/" + secret, 404}, {"POST", "/HOOKS/it/" + secret, 404},
		{"GET", "/hooks/it/" + secret, 405}, {"PUT", "/hooks/it/" + secret, 405}, {"POST", "/hooks/it/" + secret, 400},
	} {
		w := httptest.NewRecorder()
		b.h.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), c.method, c.path, strings.NewReader("{")))
		if w.Code != c.status {
			t.Errorf("%s %s: %d", c.method, c.path, w.Code)
		}
	}
	if len(b.events) > 0 {
		t.Errorf("kept %+v", b.events)
	}
	w := httptest.NewRecorder()
	req := httptest.NewRequestWithContext(t.Context(), "POST", "/hooks/it/x", nil)
	req.URL.Path = "" // an asterisk, or what a proxy makes of it
	if b.h.ServeHTTP(w, req); w.Code != 404 {
		t.Errorf("no path: %d", w.Code)
	}
}

func TestABodyThatBreaksOffIsNotTaken(t *testing.T) {
	b := newBed(t, config.Receiver{Type: "quay", Unauthenticated: true}, nil)
	req := httptest.NewRequestWithContext(t.Context(), "POST", "/hooks/it", io.MultiReader(strings.NewReader(`{"updated_tags":`), broken{}))
	w := httptest.NewRecorder()
	if b.h.ServeHTTP(w, req); w.Code != 400 || b.kinds() != "" {
		t.Errorf("answered %d and kept %q", w.Code, b.kinds())
	}
}

type broken struct{}

func (broken) Read([]byte) (int, error) { return 0, errors.New("connection reset") }

func TestEventGridsHandshakeIsAnswered(t *testing.T) {
	b := newBed(t, config.Receiver{Type: "acr", Auth: "path", Secret: secret}, nil)
	h, body := fixture(t, "acr/grid-handshake")
	w := b.post(t, "/hooks/it/"+secret, h, body)
	if w.Code != 200 || w.Body.String() != `{"validationResponse":"512d38b6-c7b8-40c8-89fe-f46f9e9622b6"}` || w.Header().Get("Content-Type") != "application/json" {
		t.Errorf("%d, %s", w.Code, w.Body)
	}
	if w := b.post(t, "/hooks/it/wrong", h, body); w.Code != 404 || strings.Contains(w.Body.String(), "512d38b6") {
		t.Errorf("a stranger's handshake: %d, %s", w.Code, w.Body)
	}
}

// outside stands for the network that our own requests go to.
type outside func(*http.Request) (int, string, error)

func (o outside) RoundTrip(req *http.Request) (*http.Response, error) {
	status, location, err := o(req)
	if err != nil {
		return nil, err
	}
	return &http.Response{StatusCode: status, Header: http.Header{"Location": {location}}, Body: http.NoBody, Request: req}, nil
}

func TestSNSIsConfirmedForTheOneTopic(t *testing.T) {
	const token = "2336412f37fb687f5d51e6e2425c464d"
	for _, c := range []struct {
		fixture, topic string
		asked          bool
		answer         int
		fail           error
		status         int
	}{
		{"sns-confirm", topic, true, 200, nil, 200},
		{"sns-confirm", topic, true, 500, nil, 503},
		{"sns-confirm", topic, true, 302, nil, 503},
		{"sns-confirm", topic, true, 0, errors.New("no route"), 503},
		{"sns-confirm", "", false, 200, nil, 200},
		{"sns-confirm", topic + "2", false, 200, nil, 200},
		{"sns-confirm-other-topic", topic, false, 200, nil, 200},
		{"sns-confirm-evil-host", topic, false, 200, nil, 200},
		{"sns-confirm-userinfo", topic, false, 200, nil, 200},
		{"sns-confirm-http", topic, false, 200, nil, 200},
		{"sns-confirm-bad-token", topic, false, 200, nil, 200},
	} {
		var asked []string
		b := newBed(t, config.Receiver{Type: "ecr", Auth: "basic", Username: "sns", Secret: secret, TopicARN: c.topic}, outside(func(req *http.Request) (int, string, error) {
			asked = append(asked, req.Method+" "+req.URL.String())
			return c.answer, "https://evil.example/", c.fail
		}))
		h, body := fixture(t, "ecr/"+c.fixture)
		if w := b.post(t, "/hooks/it", h.Clone(), body); w.Code != 401 || len(asked) > 0 {
			t.Errorf("%s of a stranger: %d, asked %q", c.fixture, w.Code, asked)
		}
		h.Set("Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte("sns:"+secret)))
		w := b.post(t, "/hooks/it", h, body)
		want := []string{"GET https://sns.eu-west-1.amazonaws.com/?Action=ConfirmSubscription&Token=" + token + "&TopicArn=arn%3Aaws%3Asns%3Aeu-west-1%3A123456789012%3Aecr-push"}
		if !c.asked {
			want = nil
		}
		if w.Code != c.status || !slices.Equal(asked, want) {
			t.Errorf("%s %s: %d, asked %q", c.fixture, c.topic, w.Code, asked)
		}
		if strings.Contains(b.log.String(), token) {
			t.Errorf("the token is in the log: %s", b.log)
		}
	}
}

// The bodies in memory are bounded: a receiver has only so many under way.
func TestTooManyRequestsAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, config.Receiver{Type: "dockerhub", Unauthenticated: true}, nil)
		_, body := fixture(t, "dockerhub/push")
		gate := &gated{kept: b.kept, open: make(chan struct{})}
		b.h.queue = gate
		codes := make(chan int, maxAtOnce+2)
		for range maxAtOnce {
			go func() { codes <- b.post(t, "/hooks/it", nil, body).Code }()
		}
		synctest.Wait()
		if w := b.post(t, "/hooks/it", nil, body); w.Code != 503 { // after slotWait
			t.Errorf("one too many: %d", w.Code)
		}
		go func() { codes <- b.post(t, "/hooks/it", nil, body).Code }()
		synctest.Wait()
		close(gate.open) // within slotWait
		synctest.Wait()
		for range maxAtOnce + 1 {
			if c := <-codes; c != 200 {
				t.Errorf("one that waited: %d", c)
			}
		}
	})
}

type gated struct {
	*kept
	open chan struct{}
}

func (g *gated) Put(ctx context.Context, r event.Result) error {
	<-g.open
	return g.kept.Put(ctx, r)
}

func TestSecretsOfPrintedHandler(t *testing.T) {
	file := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(file, []byte(secret+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	b := newBed(t, config.Receiver{Type: "quay", SecretFile: file}, nil)
	if s := fmt.Sprintf("%+v %#v", *b.h.secret["/hooks/it"], b.h.settings); strings.Contains(s, secret) {
		t.Errorf("printed: %s", s)
	}
	_, body := fixture(t, "quay/push")
	if w := b.post(t, "/hooks/it/"+secret, nil, body); w.Code != 200 {
		t.Errorf("the secret of a file: %d", w.Code)
	}
}
