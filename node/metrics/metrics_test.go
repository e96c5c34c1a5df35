package metrics

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func newMetrics() *Metrics {
	return New(Now{
		Members: func() int { return 5 }, TrackerBlobs: func() int { return 6 }, TrackerMembers: func() int { return 7 },
		PrefetchQueued: func() int { return 8 }, PrefetchPulling: func() int { return 9 },
	}, "swarm", "gossip")
}

// What is counted is told under the right name.
func TestCounts(t *testing.T) {
	m := newMetrics()
	m.Panicked("swarm")
	m.FellBack(NoTracker)
	m.FellBack(NoTracker)
	m.Swarm().Received(10)
	m.Swarm().Sent(20)
	m.Swarm().ShutOut()
	m.Tracker().ShutOut()
	m.Tracker().ShutOut()
	m.Tracker().Mismatched()
	m.Tracker().Broke()
	m.Tracker().Full()
	m.Tracker().Full()
	m.Tracker().Full()
	m.Store().Fetched(30)
	m.Store().Completed()
	m.Store().Failed()
	m.Store().Failed()
	m.Store().Mismatched()
	m.Prefetch().Requested()
	m.Prefetch().Retried()
	m.Prefetch().Retried()
	m.Prefetch().Ended("failed")
	m.Prefetch().Pulled(40)
	m.Prefetch().Refused()
	want := map[string]string{
		"panics_total": `{part="gossip"} 0
{part="swarm"} 1`,
		"registry_fallbacks_total": `{reason="no cluster"} 0
{reason="no progress"} 0
{reason="no tracker"} 2
{reason="wrong bytes"} 0`,
		"peers_shut_out_total": `{reason="bad hashes"} 2
{reason="bad piece"} 1`,
		"peer_received_bytes_total": " 10", "peer_sent_bytes_total": " 20", "registry_received_bytes_total": " 30",
		"blobs_completed_total": " 1", "blobs_failed_total": " 2", "digest_mismatches_total": " 1",
		"tracker_mismatches_total": " 1", "promises_broken_total": " 1", "tracker_full_total": " 3", "members": " 5", "tracker_blobs": " 6", "tracker_members": " 7",
		"prefetch_queued": " 8", "prefetch_pulling": " 9", "prefetch_requests_total": " 1", "prefetch_retries_total": " 2",
		"prefetch_bytes_total": " 40", "node_api_refused_total": " 1",
		"prefetch_ended_total": `{result="canceled"} 0
{result="done"} 0
{result="failed"} 1
{result="superseded"} 0`,
	}
	told := gathered(t, m)
	for name, lines := range want {
		full := "imagewolf_" + name
		help, ok := told[full]
		if !ok {
			t.Errorf("no %s", full)
			continue
		}
		delete(told, full)
		kind := "gauge"
		if strings.HasSuffix(name, "_total") {
			kind = "counter"
		}
		text := fmt.Sprintf("# HELP %s %s\n# TYPE %s %s\n", full, help, full, kind)
		for line := range strings.SplitSeq(lines, "\n") {
			text += full + line + "\n"
		}
		if err := testutil.GatherAndCompare(m.registry, strings.NewReader(text), full); err != nil {
			t.Error(err)
		}
	}
	for name := range told {
		t.Errorf("%s is not looked at here", name)
	}
	if problems, err := testutil.GatherAndLint(m.registry); err != nil || len(problems) > 0 {
		t.Errorf("%+v, %v", problems, err)
	}
}

// gathered returns the help of every metric of this product, by name.
func gathered(t *testing.T, m *Metrics) map[string]string {
	t.Helper()
	families, err := m.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for _, f := range families {
		if strings.HasPrefix(f.GetName(), "imagewolf_") {
			out[f.GetName()] = f.GetHelp()
		}
	}
	return out
}

// The operator's list has every metric, and no other.
func TestDocsListEveryMetric(t *testing.T) {
	doc, err := os.ReadFile("../../docs/operating.md")
	if err != nil {
		t.Fatal(err)
	}
	m := newMetrics()
	listed := map[string]bool{}
	for _, name := range regexp.MustCompile(`imagewolf_[a-z_]+`).FindAllString(string(doc), -1) {
		listed[name] = true
	}
	told := gathered(t, m)
	for name := range told {
		if !listed[name] {
			t.Errorf("docs/operating.md does not list %s", name)
		}
		delete(listed, name)
	}
	for name := range listed {
		t.Errorf("docs/operating.md lists %s, which there is not", name)
	}
	for _, reason := range []string{BadPiece, BadHashes, NoCluster, NoTracker, NoProgress, WrongBytes} {
		if !strings.Contains(string(doc), "`"+reason+"`") {
			t.Errorf("docs/operating.md does not say what %q is", reason)
		}
	}
}

func TestServe(t *testing.T) {
	m := newMetrics()
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error)
	go func() { served <- m.serve(ctx, l) }()
	get := func(method, path string) (int, string) {
		req, err := http.NewRequestWithContext(t.Context(), method, "http://"+l.Addr().String()+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, string(body)
	}
	status, body := get(http.MethodGet, "/metrics")
	for _, want := range []string{"\nimagewolf_members 5\n", "\ngo_goroutines ", "\nprocess_open_fds "} {
		if status != http.StatusOK || !strings.Contains(body, want) {
			t.Errorf("status %d, no %q in\n%s", status, want, body)
		}
	}
	if status, _ := get(http.MethodGet, "/debug/pprof/"); status != http.StatusNotFound {
		t.Errorf("status %d for a path that is none", status)
	}
	if status, _ := get(http.MethodPost, "/metrics"); status != http.StatusMethodNotAllowed {
		t.Errorf("status %d for a POST", status)
	}
	cancel()
	if err := <-served; err != nil {
		t.Error(err)
	}
	http.DefaultClient.CloseIdleConnections()
}

// An address that is taken is named, and tried again.
func TestAddressTaken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var said strings.Builder
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			newMetrics().Serve(ctx, "192.0.2.1:1", slog.New(slog.NewTextHandler(&said, nil))) // no machine has this address
		}()
		time.Sleep(retry + time.Second)
		cancel()
		<-done
		if n := strings.Count(said.String(), "metrics are not served"); n != 2 || !strings.Contains(said.String(), "192.0.2.1:1") {
			t.Errorf("said:\n%s", said.String())
		}
	})
}
