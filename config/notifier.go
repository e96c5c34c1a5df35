package config

import (
	"cmp"
	"errors"
	"log/slog"
	"maps"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
)

// DefaultNotifierFile is the notifier's file where none is named.
const DefaultNotifierFile = "/etc/imagewolf/notifier.toml"

// Notifier is what the sidecar beside a registry can be told. The zero value is
// not usable: start from DefaultNotifier or LoadNotifier.
type Notifier struct {
	Listen      string              `toml:"listen" comment:"Where webhooks come in, tcp: host:port. An empty host is every address."`
	TLSCertFile string              `toml:"tls_cert_file" comment:"Certificate (PEM) to be served with, when no proxy in front ends TLS. Read again for every connection."`
	TLSKeyFile  string              `toml:"tls_key_file" comment:"Private key of tls_cert_file (PEM). Not readable by other users."`
	MaxBody     Size                `toml:"max_body" comment:"Largest body of a webhook that is read. 64KiB to 16MiB."`
	LogLevel    string              `toml:"log_level" comment:"Least level that is logged: debug, info, warn or error."`
	LogFormat   string              `toml:"log_format" comment:"How log lines look: text or json."`
	Queue       NotifierQueue       `toml:"queue" comment:"Events that were taken and wait to be worked off."`
	Nodes       NotifierNodes       `toml:"nodes" comment:"Where the nodes are that prefetch."`
	Feed        NotifierFeed        `toml:"feed" comment:"Events that were taken, served to other notifiers."`
	API         NotifierAPI         `toml:"api" comment:"Prefetches by name, for CI systems: /v1/prefetch."`
	Metrics     NotifierMetrics     `toml:"metrics" comment:"What the notifier counts, for Prometheus."`
	Receiver    map[string]Receiver `toml:"receiver" comment:"Who may send: one table for each webhook, [receiver.NAME]."`
	Poll        map[string]Poll     `toml:"poll" comment:"Feeds of other notifiers: one table for each, [poll.NAME]."`

	AllowRegistries []string          `toml:"allow_registries" comment:"Registries whose images may be pulled, as patterns of hosts. Must not be empty."`
	Registry        NotifierRegistry  `toml:"registry" comment:"How the notifier itself asks registries, where a rule needs it."`
	Verify          map[string]Verify `toml:"verify" comment:"What signatures images must have: one table for each way, [verify.NAME]."`
	Rule            []Rule            `toml:"rule" comment:"What is done with an image: tables [[rule]], of which the first that matches counts."`
}

// NotifierQueue bounds what waits.
type NotifierQueue struct {
	File         string   `toml:"file" comment:"File of the queue, which survives restarts. Absolute path; its directory exists."`
	MaxEvents    int      `toml:"max_events" comment:"Most events that wait; further ones are refused, and most registries send them again. 1000 to 1000000."`
	DedupeWindow Duration `toml:"dedupe_window" comment:"How long an event that comes again is known for one that was taken. 0s to 24h."`
	RetryFor     Duration `toml:"retry_for" comment:"How long an event is tried before it is given up. 1m to 168h."`
	Workers      int      `toml:"workers" comment:"How many events are worked on at the same time. 1 to 64."`
}

// MaxPerBody returns how many events of one body are taken: half of those that may
// wait. All of a body are taken or none, so one of more would be refused for as long
// as others wait, and a sender that repeats it would send nothing else meanwhile.
func (q NotifierQueue) MaxPerBody() int { return q.MaxEvents / 2 }

// Receiver is one webhook: where it comes in, what it is, and how its sender
// proves who it is.
type Receiver struct {
	Type            string `toml:"type" comment:"Kind of webhook: acr, aliyun, distribution, dockerhub, ecr, generic, ghcr, gitea, google, harbor, jfrog, nexus, quay or zot."`
	Path            string `toml:"path" comment:"Path of its URL. Empty: /hooks/ and the receiver's name."`
	Registry        string `toml:"registry" comment:"Host of the registry, with port if nodes pull with one, for events that name none, or none that can be relied on."`
	Auth            string `toml:"auth" comment:"How the sender proves who it is: hmac, bearer, basic, header, path, oidc or sns. Empty: what is usual for the type."`
	Secret          Secret `toml:"secret" secret:"true" comment:"What the sender and the notifier both know, at least 16 bytes. Better in secret_file, or in the environment."`
	SecretFile      string `toml:"secret_file" comment:"File with the secret. Not readable by other users."`
	Username        string `toml:"username" comment:"User of auth = \"basic\"; the secret is the password."`
	Header          string `toml:"header" comment:"Header that holds the secret with auth = \"header\". Empty: what is usual for the type."`
	TopicARN        string `toml:"topic_arn" comment:"Type ecr, behind SNS: the one topic that may send, and whose subscription is confirmed."`
	OIDCIssuer      string `toml:"oidc_issuer" comment:"Who signs the tokens of auth = \"oidc\". Empty with type google: https://accounts.google.com."`
	OIDCKeysURL     string `toml:"oidc_keys_url" comment:"Where the issuer publishes its keys (JWKS). Empty with type google: Google's."`
	OIDCAudience    string `toml:"oidc_audience" comment:"Audience that a token must have."`
	OIDCEmail       string `toml:"oidc_email" comment:"Verified e-mail that a token must have: the service account that pushes."`
	OIDCSubject     string `toml:"oidc_subject" comment:"Subject that a token must have, such as that of one CI pipeline."`
	Unauthenticated bool   `toml:"unauthenticated" comment:"Take events from anyone who reaches the path. For trying out only."`
}

// Secret is text that no log and no print shows.
type Secret string

// String returns a stand-in; convert to string for the text itself.
func (s Secret) String() string {
	if s == "" {
		return ""
	}
	return "[secret]"
}

// GoString does as String does, for %#v.
func (s Secret) GoString() string { return s.String() }

// MarshalText does as String does, for encoders.
func (s Secret) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// LogValue does as String does, for slog.
func (s Secret) LogValue() slog.Value { return slog.StringValue(s.String()) }

// receiverType is what holds for a type of webhook.
type receiverType struct {
	auth     []string // what its registry can do, the best first
	registry bool     // its events never name the host
	path     bool     // its registries may have a path of their own
}

// receiverTypes are the types there are; package notifier/event has a decoder
// for each of them.
var receiverTypes = map[string]receiverType{
	"acr":          {auth: []string{"header", "bearer", "basic", "path"}},
	"aliyun":       {auth: []string{"path"}},
	"distribution": {auth: []string{"bearer", "basic", "header", "path"}},
	"dockerhub":    {auth: []string{"path"}},
	"ecr":          {auth: []string{"header", "bearer", "basic", "path", "sns"}},
	"generic":      {auth: []string{"hmac", "oidc", "bearer", "basic", "header", "path"}},
	"ghcr":         {auth: []string{"hmac"}},
	"gitea":        {auth: []string{"hmac", "bearer", "header"}},
	"google":       {auth: []string{"oidc", "path"}},
	"harbor":       {auth: []string{"header", "bearer", "basic", "path"}},
	"jfrog":        {auth: []string{"hmac", "header"}, path: true},
	"nexus":        {auth: []string{"hmac"}, registry: true, path: true},
	"quay":         {auth: []string{"path", "basic"}},
	"zot":          {auth: []string{"bearer", "basic", "header", "path"}, registry: true},
}

// ReceiverTypes returns, for every type of webhook, the ways in which its
// sender can prove who it is; the first is the one that holds where none is set.
func ReceiverTypes() map[string][]string {
	out := map[string][]string{}
	for name, t := range receiverTypes {
		out[name] = slices.Clone(t.auth)
	}
	return out
}

// DefaultNotifier returns the settings that hold where nothing else is said.
func DefaultNotifier() Notifier {
	return Notifier{
		Listen:    "0.0.0.0:7950",
		MaxBody:   1 << 20,
		LogLevel:  "info",
		LogFormat: "text",
		Queue: NotifierQueue{
			File:         "/var/lib/imagewolf-notifier/queue.db",
			MaxEvents:    100_000,
			DedupeWindow: Duration(10 * time.Minute),
			RetryFor:     Duration(24 * time.Hour),
			Workers:      8,
		},
		Nodes:    NotifierNodes{Addresses: []string{DefaultNodeSocket}},
		Feed:     NotifierFeed{Path: "/feed", History: 10_000},
		Receiver: map[string]Receiver{},
		Poll:     map[string]Poll{},
		Registry: NotifierRegistry{CheckTags: true, Timeout: Duration(15 * time.Second)},
		Verify:   map[string]Verify{},
	}
}

// WithDefaults returns r with what holds where it says nothing.
func (r Receiver) WithDefaults(name string) Receiver {
	r.Path = cmp.Or(r.Path, "/hooks/"+name)
	if r.Unauthenticated {
		return r
	}
	if t, ok := receiverTypes[r.Type]; ok {
		r.Auth = cmp.Or(r.Auth, t.auth[0])
	}
	switch {
	case r.Auth == "header" && r.Type == "ecr":
		r.Header = cmp.Or(r.Header, "X-Api-Key")
	case r.Auth == "header" && r.Type == "jfrog":
		r.Header = cmp.Or(r.Header, "X-JFrog-Event-Auth")
	case r.Auth == "header":
		r.Header = cmp.Or(r.Header, "Authorization")
	case r.Auth == "oidc" && r.Type == "google":
		r.OIDCIssuer = cmp.Or(r.OIDCIssuer, "https://accounts.google.com")
		r.OIDCKeysURL = cmp.Or(r.OIDCKeysURL, "https://www.googleapis.com/oauth2/v3/certs")
	}
	return r
}

// ReadSecret returns the receiver's secret, from the setting itself or from its
// file, or "" when it has none.
func (r Receiver) ReadSecret() (string, error) { return readSecret(r.Secret, r.SecretFile) }

// notifierFields returns the settings outside of receivers.
func notifierFields() []Field {
	return renamed(fieldsOf(reflect.ValueOf(DefaultNotifier()), "", nil))
}

// receiverFields returns the settings of one receiver.
func receiverFields(name string) []Field { return fieldsOfTable(Receiver{}, "receiver."+name) }

// pollFields returns the settings of one feed that is polled.
func pollFields(name string) []Field { return fieldsOfTable(Poll{}, "poll."+name) }

// verifyFields returns the settings of one way to verify.
func verifyFields(name string) []Field { return fieldsOfTable(Verify{}, "verify."+name) }

// ruleFields returns the settings of one rule, which has a number for a name.
func ruleFields(number string) []Field { return fieldsOfTable(Rule{}, "rule."+number) }

// fieldsOfTable returns the settings of one of many tables. They are no flags:
// the names of such tables stand in the file.
func fieldsOfTable(zero any, key string) []Field {
	fields := renamed(fieldsOf(reflect.ValueOf(zero), key+".", nil))
	for i := range fields {
		fields[i].Flag = ""
	}
	return fields
}

// renamed gives fields the notifier's names in the environment.
func renamed(fields []Field) []Field {
	for i, f := range fields {
		fields[i].Env = envPrefix + "NOTIFIER_" + strings.TrimPrefix(f.Env, envPrefix)
	}
	return fields
}

// LoadNotifier reads the notifier's settings as Load does the daemon's. In the
// environment, receiver.hub.secret is IMAGEWOLF_NOTIFIER_RECEIVER_HUB_SECRET;
// it sets only receivers that the file has. Rules and verify tables are in the
// file only.
func LoadNotifier(s Sources) (Notifier, error) {
	n := DefaultNotifier()
	var errs []error
	t := notifierTables{receiver: map[string]*Receiver{}, poll: map[string]*Poll{}, verify: map[string]*Verify{}, rule: map[string]*Rule{}}
	if s.File != "" {
		b, err := readFile(s.File)
		switch {
		case err == nil:
			errs = append(errs, n.decode(s.File, b, t)...)
		case !s.Optional || !errors.Is(err, os.ErrNotExist):
			errs = append(errs, unread{err})
		}
	}
	errs = append(errs, s.overlay(notifierFields(), reflect.ValueOf(&n).Elem())...)
	for _, name := range slices.Sorted(maps.Keys(t.receiver)) {
		r := t.receiver[name]
		errs = append(errs, s.overlay(receiverFields(name), reflect.ValueOf(r).Elem())...)
		n.Receiver[name] = r.WithDefaults(name)
	}
	for _, name := range slices.Sorted(maps.Keys(t.poll)) {
		p := t.poll[name]
		errs = append(errs, s.overlay(pollFields(name), reflect.ValueOf(p).Elem())...)
		n.Poll[name] = *p
	}
	for name, v := range t.verify {
		n.Verify[name] = *v
	}
	for i := range len(t.rule) {
		n.Rule = append(n.Rule, *t.rule[strconv.Itoa(i+1)])
	}
	return n, errors.Join(errs...)
}

// notifierTables are the tables of which the file may have many, by name; rules
// by their number, from 1.
type notifierTables struct {
	receiver map[string]*Receiver
	poll     map[string]*Poll
	verify   map[string]*Verify
	rule     map[string]*Rule
}

// table returns the fields of a table, and the struct that they are of; it makes
// the table if there is none. There is no such kind of table if it returns none.
func (t notifierTables) table(kind, name string) ([]Field, reflect.Value) {
	switch kind {
	case "receiver":
		return receiverFields(name), entryOf(t.receiver, name, Receiver{})
	case "poll":
		return pollFields(name), entryOf(t.poll, name, Poll{Interval: defaultInterval})
	case "verify":
		return verifyFields(name), entryOf(t.verify, name, Verify{Wait: defaultVerifyWait})
	case "rule":
		return ruleFields(name), entryOf(t.rule, name, Rule{})
	}
	return nil, reflect.Value{}
}

func entryOf[T any](tables map[string]*T, name string, fresh T) reflect.Value {
	if tables[name] == nil {
		tables[name] = &fresh
	}
	return reflect.ValueOf(tables[name]).Elem()
}

func (n *Notifier) decode(name string, doc []byte, t notifierTables) []error {
	root := reflect.ValueOf(n).Elem()
	var values map[string]any
	errs := schema{
		tables: root.Type(),
		find: func(key toml.Key) (Field, reflect.Value, bool) {
			fields, of := notifierFields(), root
			if len(key) > 2 {
				if f, in := t.table(key[0], key[1]); f != nil {
					fields, of = f, in
				}
			}
			i := slices.IndexFunc(fields, func(f Field) bool { return f.Key == strings.Join(key, ".") })
			if i < 0 {
				return Field{}, root, false
			}
			return fields[i], of, true
		},
		known: func() []Field {
			return slices.Concat(notifierFields(), receiverFields("NAME"), pollFields("NAME"), verifyFields("NAME"), ruleFields("N"))
		},
		help: "docs/notifier.md lists every key",
	}.decode(name, doc, &values)
	for _, kind := range []string{"receiver", "poll", "verify", "rule"} {
		if tables, ok := values[kind].(map[string]any); ok {
			for name := range tables { // one without a key is one too
				t.table(kind, name)
			}
		}
	}
	return errs
}
