package config

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"testing"
	"time"
)

// Every testdata/notifier/*.bad.toml has exactly these complaints: first those
// of LoadNotifier, then those of Validate. %s stands for the file.
var badNotifierFiles = map[string][]string{
	"keys.bad.toml": {
		"%s:1:1: unknown key lisen (did you mean listen?)",
		"%s:2:1: max_body: must be text in quotes, not true or false",
		"%s:4:1: queue.max_events: must be a whole number, not text",
		"%s:5:1: unknown key queue.max_event (did you mean queue.max_events?)",
		"%s:7:1: receiver.hub.type: must be text in quotes, not a number",
		"%s:8:1: unknown key receiver.hub.secrets (did you mean receiver.NAME.secret?)",
		"%s:9:1: receiver.hub.unauthenticated: must be true or false, not text",
		"%s:10:2: unknown key receiver.hub.deep",
	},
	"table.bad.toml": {
		"%s:2:7: receiver.hub: must be a table, written [receiver.hub], not text",
	},
	"values.bad.toml": {
		"listen: \"8080\" is not host:port",
		"tls_cert_file: tls_cert_file and tls_key_file go together",
		"max_body: 1KiB is out of range",
		"queue.file: \"queue.db\" is not an absolute path",
		"queue.max_events: 10 is out of range",
		"queue.dedupe_window: 48h is out of range",
		"queue.retry_for: 1s is out of range",
		"receiver: there is none",
		"allow_registries: empty: list the hosts",
	},
	"array.bad.toml": {
		"%s:2:1: rule: must be tables, each written [[rule]]",
	},
	"single.bad.toml": {
		"%s:2:2: rule: must be tables, each written [[rule]]",
	},
	"rulekeys.bad.toml": {
		"%s:5:1: unknown key rule.1.image (did you mean rule.N.images?)",
		"%s:6:1: rule.1.images: must be a list such as",
		"%s:11:1: rule.2.count: must be a whole number, not text",
		"%s:13:1: rule.2.skip: must be true or false, not a number",
		"%s:18:1: rule.3.priority: must be a whole number, not text",
		"%s:22:1: verify.x.keys: must hold texts in quotes, not a number",
	},
	"rules.bad.toml": {
		"allow_registries[0]: \"*\" would be any host",
		"allow_registries[1]: \"https://x\": write a host",
		"allow_registries[2]: \"registry-1.docker.io\": Docker Hub is docker.io",
		"registry.plain_http[0]: \"Registry.example.com\": write a host",
		"registry.token_hosts[0]: \"a/b\"",
		"registry.timeout: 0s is out of range",
		"registry.credential_files[0]: ",
		"registry.ca_file: ",
		"verify.a.wait: 2h is out of range",
		"verify.a.keys: missing",
		"verify.a.trust_policy: is for type notation only",
		"verify.b.keys: is for type cosign only",
		"verify.b.trust_policy: ",
		"verify.b.trust_store: \"store\" is not an absolute path",
		"verify.c.trust_policy: ",
		"verify.c.trust_store: /nonexistent has no directory x509",
		"verify.d.type: \"gpg\" is none of cosign, notation",
		"rule.1.name: \"\": give it a name",
		"rule.1.images: missing",
		"rule.web.media_types[0]: \"image\" is no media type",
		"rule.web.count: -1 is out of range",
		"rule.web.percent: 101 is out of range",
		"rule.web.priority: 1001 is out of range",
		"rule.web.concurrency: -1 is out of range",
		"rule.web.timeout: 1s is out of range",
		"rule.web.namespace: \"a b\"",
		"rule.web.verify: there is no table [verify.e]",
		"rule.web.name: two rules have that name",
		"rule.web.verify: means nothing with skip = true",
		"rule.web.nodes: means nothing with skip = true",
	},
	"tables.bad.toml": {
		"%s:2:1: unknown key poll.a.urll (did you mean poll.NAME.url?)",
		"%s:3:1: poll.a.interval: must be text in quotes, not a number",
		"%s:5:1: nodes.addresses: must be a list",
		"%s:6:2: unknown key polls.b; docs/notifier.md",
	},
	"ways.bad.toml": {
		"queue.workers: 0 is out of range",
		"log_level: \"loud\" is none of",
		"nodes.addresses[0]: \"node-1\": write host:port",
		"nodes.addresses[1]: \"unix://run/x.sock\": write unix://",
		"nodes.ca_file: missing: nodes on the network need it",
		"nodes.token_file: cannot be read",
		"feed.path: \"feed\": start it with /",
		"feed.history: 5 is out of range",
		"feed.token: a token of 5 bytes is too short",
		"api.token: given beside token_file",
		"metrics.address: \"8080\" is not host:port",
		"poll.A: name \"A\"",
		"poll.A.url: \"http://feed.example/feed/atom\": must be a URL of https",
		"poll.A.token: no token",
		"poll.b.url: \"https://user:pass@feed.example/feed/atom\": write https://HOST",
		"poll.b.ca_file: cannot be read",
		"poll.b.interval: 1ms is out of range",
		"receiver.a.path: /v1/prefetch is the path of the notifier itself too",
	},
	"paths.bad.toml": {
		"feed.path: /v1/prefetch/feed is at or below /v1/prefetch, where the notifier itself answers: choose another",
		"receiver.below.path: /v1/prefetch/quay is below /v1/prefetch, where the notifier itself answers: choose another, such as /hooks/below",
	},
	"receivers.bad.toml": {
		"receiver.A_b: name \"A_b\"",
		"receiver.a.type: \"\" is none of acr, aliyun, distribution",
		"receiver.b.type: \"gitlab\" is none of acr",
		"receiver.c.path: \"hooks\": start it with /",
		"receiver.c.registry: missing: events of type zot",
		"receiver.c.secret: no secret: set secret_file or secret",
		"receiver.d.registry: \"zot/x\": host or host:port, without a path",
		"receiver.d.secret: 5 bytes are too few",
		"receiver.e.auth: \"path\": senders of type ghcr can do hmac",
		"receiver.f.topic_arn: is for type ecr only",
		"receiver.f.secret: as a part of a URL",
		"receiver.g.secret: means nothing with auth = \"oidc\"",
		"receiver.g.oidc_issuer: \"http://issuer.example\": must be a URL of https",
		"receiver.g.oidc_audience: missing",
		"receiver.g.oidc_email: missing, and oidc_subject too",
		"receiver.h.username: \"\": auth = \"basic\" needs a user",
		"receiver.h.secret: given beside secret_file",
		"receiver.h.path: /hooks/g is the path of receiver.g too",
		"receiver.i.topic_arn: \"arn:aws:s3:::x\" is no ARN",
		"receiver.i.header: \"X Key\"",
		"receiver.i.secret_file: cannot be read",
		"receiver.j.registry: \"harbor\": without a dot or a port",
		"receiver.j.unauthenticated: true beside secret",
		"receiver.k.registry: \"http://x\"",
		"receiver.k.username: means nothing with auth = \"hmac\"",
		"receiver.k.secret: no secret",
		"receiver.l.topic_arn: missing",
	},
}

func TestBadNotifierFiles(t *testing.T) {
	checkBadFiles(t, "testdata/notifier", badNotifierFiles, func(file string) (checked, error) { return LoadNotifier(Sources{File: file}) })
}

func TestNotifierFileIsReadWithItsDefaults(t *testing.T) {
	secret := write(t, "harbor", "harbor-0123456789abcdef\n")
	env := map[string]string{
		"IMAGEWOLF_NOTIFIER_LISTEN": "127.0.0.1:81", "IMAGEWOLF_NOTIFIER_QUEUE_MAX_EVENTS": "7000",
		"IMAGEWOLF_NOTIFIER_RECEIVER_HARBOR_PROD_SECRET_FILE": secret, "IMAGEWOLF_NOTIFIER_RECEIVER_HUB_SECRET": "fedcba9876543210",
	}
	n, err := LoadNotifier(Sources{File: "testdata/notifier/good.toml", Env: func(k string) (string, bool) { v, ok := env[k]; return v, ok }})
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Validate(); err != nil {
		t.Fatal(err)
	}
	if n.Listen != "127.0.0.1:81" || n.MaxBody != 2<<20 || n.Queue.MaxEvents != 7000 || n.Queue.RetryFor.Duration() != time.Hour {
		t.Errorf("%+v", n)
	}
	want := map[string]Receiver{
		"hub":   {Type: "dockerhub", Path: "/hubNotifications", Auth: "path", Secret: "fedcba9876543210"},
		"local": {Type: "distribution", Path: "/registryNotifications", Registry: "registry.example.com:5000", Unauthenticated: true},
		"google": {
			Type: "google", Path: "/hooks/google", Auth: "oidc", OIDCIssuer: "https://accounts.google.com",
			OIDCKeysURL: "https://www.googleapis.com/oauth2/v3/certs", OIDCAudience: "https://hooks.example.com/hooks/google",
			OIDCEmail: "push@acme-prod.iam.gserviceaccount.com",
		},
		"nexus":       {Type: "nexus", Path: "/hooks/nexus", Auth: "hmac", Registry: "nexus.example.com/{repository}", Secret: "0123456789abcdef"},
		"harbor-prod": {Type: "harbor", Path: "/hooks/harbor-prod", Auth: "header", Header: "Authorization", SecretFile: secret},
	}
	if !reflect.DeepEqual(n.Receiver, want) {
		t.Errorf("got  %+v\nwant %+v", n.Receiver, want)
	}
	if s, err := n.Receiver["harbor-prod"].ReadSecret(); s != "harbor-0123456789abcdef" || err != nil {
		t.Errorf("%q, %v", s, err)
	}
	wantRules := []Rule{
		{
			Name: "web", Images: []string{"registry.example.com/apps/*:v*"}, ImagesRegexp: []string{`.*:\d+`}, Exclude: []string{"**/test-*"},
			Labels: "tier=front", MediaTypes: []string{"application/vnd.oci.image.index.v1+json"}, Verify: "release",
			Platforms: []string{"linux/amd64"}, Nodes: "zone=a,gpu!=none", Count: 5, Percent: 50, RunningRepository: true, Namespace: "k8s.io",
			Referrers: true, Priority: -3, Concurrency: 7, Timeout: Duration(time.Hour),
		},
		{Name: "rest", Images: []string{"**"}, Skip: true},
	}
	if !reflect.DeepEqual(n.Rule, wantRules) {
		t.Errorf("got  %+v\nwant %+v", n.Rule, wantRules)
	}
	if v := n.Verify["release"]; v.Type != "cosign" || len(v.Keys) != 1 || v.Wait != defaultVerifyWait {
		t.Errorf("%+v", v)
	}
	if r := n.Registry; r.CheckTags || r.Timeout.Duration() != 5*time.Second || len(r.PlainHTTP) != 1 || len(n.AllowRegistries) != 2 {
		t.Errorf("%+v", r)
	}
	if w := n.Warnings(); len(w) != 1 || !strings.HasPrefix(w[0], "receiver.local.unauthenticated: ") {
		t.Errorf("warnings %q", w)
	}
	n.Listen = ":80"
	if w := n.Warnings(); len(w) != 2 || !strings.HasPrefix(w[1], "tls_cert_file: ") {
		t.Errorf("warnings %q", w)
	}
}

func TestNotifierFileMayBeAbsentOnlyWhenOptional(t *testing.T) {
	absent := filepath.Join(t.TempDir(), "none.toml")
	if _, err := LoadNotifier(Sources{File: absent, Optional: true}); err != nil {
		t.Error(err)
	}
	if _, err := LoadNotifier(Sources{File: absent}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v", err)
	}
}

func TestSecretFileOfOthersIsRefused(t *testing.T) {
	n := DefaultNotifier()
	n.AllowRegistries = []string{"registry.example.com"}
	file := write(t, "secret", "0123456789abcdef")
	n.Receiver["hub"] = Receiver{Type: "dockerhub", SecretFile: file}.WithDefaults("hub")
	if err := n.Validate(); err != nil {
		t.Error(err)
	}
	if err := os.Chmod(file, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := n.Validate(); err == nil || !strings.Contains(err.Error(), "receiver.hub.secret_file: ") {
		t.Errorf("got %v", err)
	}
}

func TestSecretsAreNotPrinted(t *testing.T) {
	const text = "0123456789abcdef"
	n := DefaultNotifier()
	n.Receiver["hub"] = Receiver{Type: "dockerhub", Secret: text}
	var log strings.Builder
	l := slog.New(slog.NewJSONHandler(&log, nil))
	l.Info("loaded", "config", n, "secret", n.Receiver["hub"].Secret)
	b, err := json.Marshal(n)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{fmt.Sprint(n), fmt.Sprintf("%v %+v %#v", n, n, n), log.String(), string(b)} {
		if strings.Contains(s, text) || !strings.Contains(s, "[secret]") {
			t.Errorf("printed: %s", s)
		}
	}
	if text != string(n.Receiver["hub"].Secret) {
		t.Error("the secret itself is gone")
	}
}

func FuzzLoadNotifier(f *testing.F) {
	files, err := filepath.Glob("testdata/notifier/*.toml")
	if err != nil {
		f.Fatal(err)
	}
	for _, path := range files {
		b, err := os.ReadFile(path)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, doc []byte) {
		n := DefaultNotifier()
		tables := notifierTables{receiver: map[string]*Receiver{}, poll: map[string]*Poll{}, verify: map[string]*Verify{}, rule: map[string]*Rule{}}
		for _, err := range n.decode("f", doc, tables) {
			if err != nil && !strings.HasPrefix(err.Error(), "f:") {
				t.Errorf("error without its place: %v", err)
			}
		}
		// Validate would open files, whatever they are.
		for name, r := range tables.receiver {
			r.SecretFile = ""
			n.Receiver[name] = r.WithDefaults(name)
		}
		for name, p := range tables.poll {
			p.TokenFile, p.CAFile = "", ""
			n.Poll[name] = *p
		}
		n.TLSCertFile, n.TLSKeyFile, n.Nodes.CAFile, n.Nodes.TokenFile, n.Feed.TokenFile, n.API.TokenFile = "", "", "", "", "", ""
		for name, v := range tables.verify {
			v.Keys, v.TrustPolicy, v.TrustStore = nil, "", ""
			n.Verify[name] = *v
		}
		for i := range len(tables.rule) {
			r, ok := tables.rule[strconv.Itoa(i+1)]
			if !ok {
				t.Fatalf("%d rules, and none has the number %d", len(tables.rule), i+1)
			}
			n.Rule = append(n.Rule, *r)
		}
		n.Registry.CAFile, n.Registry.CredentialFiles = "", nil
		for _, e := range complaints(n.Validate()) {
			if !strings.Contains(e, ": ") {
				t.Errorf("complaint without its key: %q", e)
			}
		}
	})
}
