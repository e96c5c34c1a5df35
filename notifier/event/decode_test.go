package event

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/textproto"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/distribution/reference"
)

const (
	hash  = "sha256:4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945" // "D" below
	other = "sha256:cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc" // "C"
	topic = "arn:aws:sns:eu-west-1:123456789012:ecr-push"
)

// load reads a fixture: header lines, an empty line, the body.
func load(t testing.TB, path string) Delivery {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	r := bufio.NewReader(bytes.NewReader(b))
	h, err := textproto.NewReader(r).ReadMIMEHeader()
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	body, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return Delivery{Header: http.Header(h), Body: body}
}

// lines writes a result so that it can be compared and read.
func lines(r Result) []string {
	var out []string
	for _, e := range r.Events {
		s := e.Image()
		if e.DeliveryID != "" {
			s += " id " + e.DeliveryID
		}
		if !e.Time.IsZero() {
			s += " at " + e.Time.Format(time.RFC3339)
		}
		out = append(out, s)
	}
	for _, i := range r.Ignored {
		out = append(out, string(i.Kind)+": "+i.Reason)
	}
	if r.Reply != nil {
		out = append(out, "reply "+string(r.Reply))
	}
	if c := r.Confirm; c != nil {
		out = append(out, "confirm "+c.TopicARN+" at "+c.Host+" with "+c.Token)
	}
	for i := range out {
		out[i] = strings.NewReplacer(hash, "D", other, "C").Replace(out[i])
	}
	return out
}

func TestDecode(t *testing.T) {
	seen := map[string]bool{}
	for _, c := range cases {
		t.Run(c.file+" "+c.registry, func(t *testing.T) {
			path := "testdata/" + c.file + ".http"
			seen[path] = true
			webhook, _, _ := strings.Cut(c.file, "/")
			d := load(t, path)
			d.Registry, d.Topic = c.registry, c.topic
			r, err := Decode(webhook, d)
			got := lines(r)
			if err != nil {
				got = []string{"error: " + err.Error()}
			}
			if !slices.Equal(got, c.want) {
				t.Errorf("got\n\t%s\nwant\n\t%s", strings.Join(got, "\n\t"), strings.Join(c.want, "\n\t"))
			}
			for _, e := range r.Events {
				if e.Kind != Pushed {
					t.Errorf("%s is of kind %q", e.Image(), e.Kind)
				}
			}
		})
	}
	files, err := filepath.Glob("testdata/*/*.http")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if !seen[f] {
			t.Errorf("%s is not in the table", f)
		}
	}
}

// Every type has an answer to bodies of no type at all, and to none of them
// more than a complaint.
func TestBodiesOfNoType(t *testing.T) {
	broken := []string{
		"", " ", "{", `{"events":[`, "nonsense", "\xff\xfe", `"text"`, "12", "true", `{} {}`, `[[]]`, `[1]`, `{"events":{}}`,
		`{"message":{"data":"!"}}`, `{"push_data":[]}`, strings.Repeat("[", 20000),
	}
	empty := []string{"null", "{}", "{\"unrelated\":{\"a\":[1,2,3]}}"}
	for _, webhook := range Types() {
		for i, body := range slices.Concat(broken, empty) {
			r, err := Decode(webhook, Delivery{Header: headersOf(webhook, ""), Body: []byte(body), Registry: "registry.example.com"})
			if len(r.Events) > 0 {
				t.Errorf("%s made events of %.40q: %q", webhook, body, lines(r))
			}
			if err == nil && len(lines(r)) == 0 {
				t.Errorf("%s said nothing about %.40q", webhook, body)
			}
			if i < 7 && err == nil {
				t.Errorf("%s took %.40q for its own: %q", webhook, body, lines(r))
			}
		}
	}
	if _, err := Decode("gitlab", Delivery{}); err == nil || !strings.Contains(err.Error(), "quay") {
		t.Errorf("an unknown type: %v", err)
	}
}

// headersOf returns the headers without which a type's decoder does not look
// at the body; name is the event's, "" the one that is a push.
func headersOf(webhook, name string) http.Header {
	h := http.Header{}
	if key, push := eventHeader(webhook); key != "" {
		if name == "" {
			name = push
		}
		h.Set(key, name)
	}
	return h
}

func eventHeader(webhook string) (key, push string) {
	switch webhook {
	case "ghcr":
		return "X-GitHub-Event", "package"
	case "gitea":
		return "X-Gitea-Event", "package"
	case "zot":
		return "Ce-Type", "zotregistry.image.updated"
	}
	return "", ""
}

func TestABodyMayHoldAsManyEventsAsAreKept(t *testing.T) {
	repeat := func(n int, s string) string { return strings.TrimSuffix(strings.Repeat(s+",", n), ",") }
	azure := `{"action":"push","target":{"repository":"a","tag":"1"},"request":{"host":"a.azurecr.io"}}`
	for webhook, body := range map[string]func(n int) string{
		"distribution": func(n int) string { return `{"events":[` + repeat(n, azure) + `]}` },
		"quay":         func(n int) string { return `{"docker_url":"quay.io/a/b","updated_tags":[` + repeat(n, `"1"`) + `]}` },
		"acr":          func(n int) string { return `[` + repeat(n, `{"eventType":"ImagePushed","data":`+azure+`}`) + `]` },
		"harbor": func(n int) string {
			return `{"type":"PUSH_ARTIFACT","event_data":{"repository":{"repo_full_name":"a/b"},"resources":[` +
				repeat(n, `{"tag":"1","resource_url":"h.example/a/b:1"}`) + `]}}`
		},
	} {
		const n = 5000
		if r, err := Decode(webhook, Delivery{Body: []byte(body(n))}); err != nil || len(r.Events) != n || len(r.Ignored) != 0 {
			t.Errorf("%s: %d of %d events, %v: %v", webhook, len(r.Events), n, r.Ignored, err)
		}
		if r, err := Decode(webhook, Delivery{Body: []byte(body(n)), MaxEvents: n}); err != nil || len(r.Events) != n || len(r.Ignored) != 0 {
			t.Errorf("%s: %d of %d events, %v: %v", webhook, len(r.Events), n, r.Ignored, err)
		}
		r, err := Decode(webhook, Delivery{Body: []byte(body(n)), MaxEvents: 1000})
		if err != nil || len(r.Events) != 1000 || len(r.Ignored) != 1 || r.Ignored[0].Kind != TooMany || 1+r.Ignored[0].More != n-1000 {
			t.Errorf("%s: %d events, the rest %v: %v", webhook, len(r.Events), r.Ignored, err)
		}
	}
}

func TestWhatLeadsToNothingIsCountedHoweverMuchItIs(t *testing.T) {
	r, err := Decode("distribution", Delivery{Body: []byte(`{"events":[` + strings.Repeat(`{"action":"pull"},`, 3000) +
		strings.Repeat(`{"action":"delete"},`, 2000) + `{"action":"push","target":{"repository":"a","tag":"1"},"request":{"host":"h.example"}}]}`)})
	if err != nil || len(r.Events) != 1 {
		t.Errorf("%d events: %v", len(r.Events), err)
	}
	kinds := map[Kind]int{}
	for _, i := range r.Ignored {
		kinds[i.Kind] += 1 + i.More
	}
	if kinds[Pulled] != 3000 || kinds[Deleted] != 2000 || len(r.Ignored) > maxReasons+1 {
		t.Errorf("%v, %d reasons", kinds, len(r.Ignored))
	}
}

func TestTimesAreReadHoweverTheyAreWritten(t *testing.T) {
	want := time.Date(2026, 8, 20, 9, 14, 26, 0, time.UTC)
	for text, ok := range map[string]bool{
		`1787217266`: true, `1787217266.0`: true, `1.787217266e9`: true, `"2026-08-20T09:14:26Z"`: true, `"2026-08-20T11:14:26+02:00"`: true,
		`"2026-08-20T09:14:26+0000"`: true,
		`null`:                       false, `"soon"`: false, `"2026-08-20 09:14:26"`: false, `-1`: false, `1e300`: false, `{"a":1}`: false, `[]`: false, `"0000-01-01T00:00:00Z"`: false,
	} {
		var got struct{ T timestamp }
		if err := json.Unmarshal([]byte(`{"T":`+text+`}`), &got); err != nil {
			t.Errorf("%s: %v", text, err)
		}
		if got.T.Equal(want) != ok || !ok && !got.T.IsZero() {
			t.Errorf("%s was read as %s", text, got.T)
		}
	}
}

func TestTextOfOthersIsBounded(t *testing.T) {
	long := strings.Repeat("é", 5000)
	r, err := Decode("distribution", Delivery{Body: fmt.Appendf(nil,
		`{"events":[{"action":%q},{"id":%q,"action":"push","target":{"repository":"a","tag":%q},"request":{"host":"r.example"}},`+
			`{"id":%q,"action":"push","target":{"repository":"a","tag":"1"},"request":{"host":"r.example"}}]}`, long, long, long, long)})
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range lines(r) {
		if len(l) > 1000 {
			t.Errorf("%d bytes: %.100s", len(l), l)
		}
	}
	if len(r.Events) != 1 || len(r.Events[0].DeliveryID) > maxText+1 {
		t.Errorf("%+v", r.Events)
	}
}

// Whatever the body: no panic, and what comes out is a name that runtimes
// accept or a reason.
func fuzzDecoder(f *testing.F, webhook string) {
	files, err := filepath.Glob("testdata/" + webhook + "/*.http")
	if err != nil || len(files) == 0 {
		f.Fatalf("%d fixtures: %v", len(files), err)
	}
	key, _ := eventHeader(webhook)
	for _, file := range files {
		d := load(f, file)
		f.Add(d.Header.Get(key), d.Header.Get("Content-Type"), d.Body, "")
		f.Add("", d.Header.Get("Content-Type"), d.Body, "registry.example.com:5000/{repository}")
	}
	f.Fuzz(func(t *testing.T, name, contentType string, body []byte, registry string) {
		h := headersOf(webhook, name)
		h.Set("Content-Type", contentType)
		r, err := Decode(webhook, Delivery{Header: h, Body: body, Registry: registry, Topic: topic})
		if err != nil {
			if len(r.Events) > 0 {
				t.Error("events beside an error")
			}
			return
		}
		if len(lines(r)) == 0 || len(r.Ignored) > maxReasons+20 { // a few kinds
			t.Errorf("%d events, %d ignored", len(r.Events), len(r.Ignored))
		}
		for _, e := range r.Events {
			checkEvent(t, e)
		}
		for _, i := range r.Ignored {
			if i.Reason == "" || i.Kind == "" || i.Kind == Pushed {
				t.Errorf("no reason: %+v", i)
			}
		}
		if c := r.Confirm; c != nil && (c.TopicARN != topic || c.Host != "sns.eu-west-1.amazonaws.com") {
			t.Errorf("%+v would be confirmed", c)
		}
	})
}

func checkEvent(t *testing.T, e Event) {
	t.Helper()
	named, err := reference.ParseNamed(e.Image())
	if err != nil {
		t.Fatalf("%q: %v", e.Image(), err)
	}
	if reference.Domain(named) != e.Registry || reference.Path(named) != e.Repository || e.Kind != Pushed || e.Tag == "" && e.Digest == "" {
		t.Errorf("%+v is not %s", e, named)
	}
	if len(e.DeliveryID) > maxText+3 || len(e.MediaType) > maxText+3 {
		t.Errorf("long: %+v", e)
	}
	b, err := json.Marshal(e)
	if err != nil {
		t.Fatal(err)
	}
	var again Event
	if err := json.Unmarshal(b, &again); err != nil || again.Image() != e.Image() || !again.Time.Equal(e.Time) {
		t.Errorf("%+v was stored and read as %+v: %v", e, again, err)
	}
}

func FuzzACR(f *testing.F)          { fuzzDecoder(f, "acr") }
func FuzzAliyun(f *testing.F)       { fuzzDecoder(f, "aliyun") }
func FuzzDistribution(f *testing.F) { fuzzDecoder(f, "distribution") }
func FuzzDockerHub(f *testing.F)    { fuzzDecoder(f, "dockerhub") }
func FuzzECR(f *testing.F)          { fuzzDecoder(f, "ecr") }
func FuzzGeneric(f *testing.F)      { fuzzDecoder(f, "generic") }
func FuzzGHCR(f *testing.F)         { fuzzDecoder(f, "ghcr") }
func FuzzGitea(f *testing.F)        { fuzzDecoder(f, "gitea") }
func FuzzGoogle(f *testing.F)       { fuzzDecoder(f, "google") }
func FuzzHarbor(f *testing.F)       { fuzzDecoder(f, "harbor") }
func FuzzJFrog(f *testing.F)        { fuzzDecoder(f, "jfrog") }
func FuzzNexus(f *testing.F)        { fuzzDecoder(f, "nexus") }
func FuzzQuay(f *testing.F)         { fuzzDecoder(f, "quay") }
func FuzzZot(f *testing.F)          { fuzzDecoder(f, "zot") }
