package metrics

import (
	"fmt"
	"net/http"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/imagewolf/imagewolf/notifier/event"
	"github.com/imagewolf/imagewolf/notifier/queue"
)

func newMetrics() *Metrics {
	return New(func() queue.Stats {
		return queue.Stats{Waiting: 1, Taken: 2, Done: 3, Panics: 6, Nothing: map[event.Kind]uint64{queue.Duplicate: 4, event.Ping: 5}}
	}, "origin")
}

func TestCounts(t *testing.T) {
	m := newMetrics()
	m.Requested("web")
	m.Requested("web")
	m.Failed()
	m.Polled("origin", true)
	m.Polled("origin", false)
	m.Polled("origin", false)
	m.Missed("origin", 7)
	m.Answered("webhook", http.StatusOK, 20*time.Millisecond)
	m.Answered("webhook", http.StatusUnauthorized, 200*time.Millisecond)
	want := map[string]string{
		"events_waiting": " 1", "events_taken_total": " 2", "events_done_total": " 3",
		"events_nothing_total":     "{kind=\"duplicate\"} 4\n{kind=\"ping\"} 5",
		"prefetches_total":         `{rule="web"} 2`,
		"tries_failed_total":       " 1",
		"panics_total":             " 6",
		"polls_total":              "{outcome=\"failed\",poll=\"origin\"} 2\n{outcome=\"ok\",poll=\"origin\"} 1",
		"poll_missed_events_total": `{poll="origin"} 7`,
		"http_requests_total":      "{code=\"200\",part=\"webhook\"} 1\n{code=\"401\",part=\"webhook\"} 1",
	}
	told := map[string]bool{"poll_last_success_timestamp_seconds": true, "http_request_duration_seconds": true}
	families, err := m.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	help := map[string]string{}
	for _, f := range families {
		if name, ok := strings.CutPrefix(f.GetName(), namespace+"_"); ok {
			help[name] = f.GetHelp()
		}
	}
	for name, lines := range want {
		told[name] = true
		kind := "counter"
		if name == "events_waiting" {
			kind = "gauge"
		}
		full := namespace + "_" + name
		text := "# HELP " + full + " " + help[name] + "\n# TYPE " + full + " " + kind + "\n"
		for line := range strings.SplitSeq(lines, "\n") {
			text += full + line + "\n"
		}
		if err := testutil.GatherAndCompare(m.registry, strings.NewReader(text), full); err != nil {
			t.Error(err)
		}
	}
	for name := range help {
		if !told[name] {
			t.Errorf("%s is not looked at here", name)
		}
	}
	if at := testutil.ToFloat64(m.polled.WithLabelValues("origin")); time.Since(time.Unix(int64(at), 0)) > time.Minute {
		t.Errorf("last read at %v", at)
	}
	if n := testutil.CollectAndCount(m.took); n != 1 {
		t.Errorf("%d histograms", n)
	}
	if problems, err := testutil.GatherAndLint(m.registry); err != nil || len(problems) > 0 {
		t.Errorf("%+v, %v", problems, err)
	}
}

// Times are in seconds.
func TestTimesAreSeconds(t *testing.T) {
	m := newMetrics()
	m.Answered("webhook", http.StatusOK, 20*time.Millisecond)
	m.Answered("webhook", http.StatusOK, 2*time.Second)
	families, err := m.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != namespace+"_http_request_duration_seconds" {
			continue
		}
		if got := f.GetMetric()[0].GetHistogram().GetSampleSum(); got < 2.019 || got > 2.021 {
			t.Errorf("20 ms and 2 s are %v", got)
		}
		return
	}
	t.Error("no such metric")
}

// What has not happened yet is 0, so that an alert sees the first time that it does.
func TestPollsAreCountedFromTheStart(t *testing.T) {
	text := ""
	m := newMetrics()
	for _, name := range []string{"polls_total", "poll_missed_events_total"} {
		series, err := testutil.GatherAndCount(m.registry, namespace+"_"+name)
		if err != nil {
			t.Fatal(err)
		}
		text += fmt.Sprint(name, " ", series, "\n")
	}
	if text != "polls_total 2\npoll_missed_events_total 1\n" {
		t.Error(text)
	}
}

// The operator's list has every metric, and no other.
func TestDocsListEveryMetric(t *testing.T) {
	doc, err := os.ReadFile("../../docs/notifier.md")
	if err != nil {
		t.Fatal(err)
	}
	m := newMetrics()
	m.Requested("web")
	m.Answered("webhook", http.StatusOK, time.Millisecond)
	listed := map[string]bool{}
	for _, name := range regexp.MustCompile(namespace+`_[a-z_]+`).FindAllString(string(doc), -1) {
		listed[name] = true
	}
	families, err := m.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		name := f.GetName()
		if strings.HasPrefix(name, namespace+"_") && !listed[name] {
			t.Errorf("docs/notifier.md does not list %s", name)
		}
		delete(listed, name)
	}
	for name := range listed {
		t.Errorf("docs/notifier.md lists %s, which there is not", name)
	}
}
