package command

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"

	imagewolfv1 "github.com/imagewolf/imagewolf/api/v1"
	"github.com/imagewolf/imagewolf/cluster"
	"github.com/imagewolf/imagewolf/internal/program"
)

// fakeAPI is a node that was asked, and answers as it is told.
type fakeAPI struct {
	imagewolfv1.UnimplementedNodeServer
	asked    *imagewolfv1.PrefetchRequest
	canceled string
	err      error
	watched  [][]*imagewolfv1.NodePrefetch // what a watch says, one status each; then it ends
	hangs    bool                          // or does not
	onWatch  func()                        // called as a watch hangs; may be nil
	breaks   int                           // watches that end as if the daemon was restarted
}

func (f *fakeAPI) status(id string, nodes []*imagewolfv1.NodePrefetch) *imagewolfv1.PrefetchStatus {
	return &imagewolfv1.PrefetchStatus{
		Request: &imagewolfv1.PrefetchRequest{Id: id, Image: "r/app:1", TimeoutSeconds: f.asked.GetTimeoutSeconds()},
		Created: time.Now().Add(-time.Hour).UnixMilli(), Nodes: nodes,
	}
}

func (f *fakeAPI) Prefetch(_ context.Context, in *imagewolfv1.PrefetchRequest) (*imagewolfv1.PrefetchStatus, error) {
	f.asked = in
	if f.err != nil {
		return nil, f.err
	}
	if len(f.watched) == 0 {
		return f.status(in.Id, nil), nil
	}
	return f.status(in.Id, f.watched[0]), nil
}

func (f *fakeAPI) WatchPrefetch(in *imagewolfv1.GetPrefetchRequest, stream grpc.ServerStreamingServer[imagewolfv1.PrefetchStatus]) error {
	for _, nodes := range f.watched {
		if err := stream.Send(f.status(in.Id, nodes)); err != nil {
			return err
		}
		if f.breaks > 0 {
			f.breaks--
			return status.Error(codes.Unavailable, "restarting")
		}
	}
	if f.hangs {
		if _, ok := stream.Context().Deadline(); ok {
			return status.Error(codes.Canceled, "the client's time is up") // as gRPC may say it
		}
		if f.onWatch != nil {
			f.onWatch()
		}
		<-stream.Context().Done()
	}
	return nil
}

func (f *fakeAPI) GetPrefetch(_ context.Context, in *imagewolfv1.GetPrefetchRequest) (*imagewolfv1.PrefetchStatus, error) {
	if f.err != nil {
		return nil, f.err
	}
	return f.status(in.Id, f.watched[0]), nil
}

func (f *fakeAPI) CancelPrefetch(_ context.Context, in *imagewolfv1.CancelPrefetchRequest) (*imagewolfv1.PrefetchStatus, error) {
	f.canceled = in.Id
	return f.status(in.Id, f.watched[0]), nil
}

func (f *fakeAPI) ListPrefetches(_ context.Context, in *imagewolfv1.ListPrefetchesRequest) (*imagewolfv1.ListPrefetchesResponse, error) {
	return &imagewolfv1.ListPrefetchesResponse{Prefetches: []*imagewolfv1.PrefetchStatus{f.status(fmt.Sprint("limit", in.Limit), f.watched[0])}}, nil
}

// serve returns the path of the node's socket.
func (f *fakeAPI) serve(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "unix", path)
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer()
	imagewolfv1.RegisterNodeServer(srv, f)
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.Serve(l) }()
	t.Cleanup(func() { srv.Stop(); <-done })
	return path
}

func part(node string, s imagewolfv1.PrefetchState, reason string) *imagewolfv1.NodePrefetch {
	return &imagewolfv1.NodePrefetch{Node: node, State: s, Reason: reason, Bytes: 1 << 20, Total: 2 << 20}
}

const (
	pulling     = imagewolfv1.PrefetchState_PREFETCH_STATE_PULLING
	done        = imagewolfv1.PrefetchState_PREFETCH_STATE_DONE
	failed      = imagewolfv1.PrefetchState_PREFETCH_STATE_FAILED
	canceled    = imagewolfv1.PrefetchState_PREFETCH_STATE_CANCELED
	unreachable = imagewolfv1.PrefetchState_PREFETCH_STATE_UNREACHABLE
)

func TestPrefetchAsksForWhatTheFlagsSay(t *testing.T) {
	f := &fakeAPI{watched: [][]*imagewolfv1.NodePrefetch{{part("n1", pulling, "")}}}
	out, _, err := run(t, t.Context(), newNode, "prefetch", "--socket", f.serve(t), "--nodes", "zone=a,gpu!=none", "r/app:1",
		"--count", "3", "--percent=50", "--running", "--platform", "linux/arm64", "--platform", "linux/amd64", "--namespace", "space",
		"--digest", "sha256:1", "--referrers", "--priority", "-7", "--concurrency", "2", "--timeout", "90s")
	if err != nil || strings.TrimSpace(out) != f.asked.Id || f.asked.Id == "" {
		t.Fatalf("%q, %v", out, err)
	}
	f.asked.Id = ""
	want := &imagewolfv1.PrefetchRequest{
		Image: "r/app:1", Digest: "sha256:1", Platforms: []string{"linux/arm64", "linux/amd64"}, Namespace: "space", Referrers: true,
		Nodes:    &imagewolfv1.NodeSelection{Labels: "zone=a,gpu!=none", Count: 3, Percent: 50, RunningRepository: true},
		Priority: -7, Concurrency: 2, TimeoutSeconds: 90,
	}
	if got := f.asked.String(); got != want.String() {
		t.Errorf("asked for\n%s, want\n%s", got, want)
	}
}

func TestPrefetchEnds(t *testing.T) {
	late := part("n2", failed, "time is up")
	late.TimedOut = true
	superseded := part("n2", canceled, "superseded: request x, which is younger, has pulled sha256:1 for the same tag")
	superseded.Superseded = true
	for name, c := range map[string]struct {
		api    *fakeAPI
		args   []string
		exit   int
		stdout string
		err    string
	}{
		"done":                 {&fakeAPI{watched: [][]*imagewolfv1.NodePrefetch{{part("n1", pulling, "")}, {part("n1", done, "")}}, breaks: 2}, nil, 0, "n1  pulling  1MiB/2MiB\nn1  done  1MiB/2MiB\n", ""},
		"one failed":           {&fakeAPI{watched: [][]*imagewolfv1.NodePrefetch{{part("n1", done, ""), part("n2", failed, "no\nspace \x1b[2J")}}}, nil, 1, "n1  done  1MiB/2MiB\nn2  failed  1MiB/2MiB  no space  [2J\n", "1 of 2 nodes failed: n2"},
		"one with an odd name": {&fakeAPI{watched: [][]*imagewolfv1.NodePrefetch{{part("n\x1b[2J1", failed, "")}}}, nil, 1, "n [2J1  failed  1MiB/2MiB\n", "1 of 1 nodes failed: n [2J1"},
		"superseded": {&fakeAPI{watched: [][]*imagewolfv1.NodePrefetch{{part("n1", done, ""), superseded}}}, nil, 3, "",
			"superseded on 1 of 2 nodes: n2: a younger request pulled the tag"},
		"canceled": {&fakeAPI{watched: [][]*imagewolfv1.NodePrefetch{{part("n1", done, ""), part("n2", canceled, "")}}}, nil, 1, "", "canceled on 1 of 2 nodes: n2"},
		"one failed, one superseded": {&fakeAPI{watched: [][]*imagewolfv1.NodePrefetch{{part("n1", failed, ""), superseded}}}, nil, 1, "",
			"1 of 2 nodes failed: n1; superseded on 1 of 2 nodes: n2"},
		"time is up":  {&fakeAPI{watched: [][]*imagewolfv1.NodePrefetch{{part("n1", done, ""), late}}}, nil, 124, "", "time was up"},
		"unreachable": {&fakeAPI{watched: [][]*imagewolfv1.NodePrefetch{{part("n1", unreachable, "")}}}, nil, 124, "", "have not ended: n1"},
		"hangs":       {&fakeAPI{watched: [][]*imagewolfv1.NodePrefetch{{part("n1", pulling, "")}}, hangs: true}, []string{"--timeout", "1s"}, 124, "", "have not ended: n1"},
		"none":        {&fakeAPI{}, nil, 1, "", "no node is selected"},
		"refused":     {&fakeAPI{err: status.Error(codes.InvalidArgument, "image: none")}, nil, 2, "", "image: none"},
		"bad timeout": {&fakeAPI{}, []string{"--timeout", "1ms"}, 2, "", "--timeout: 1ms"},
		"bad count":   {&fakeAPI{}, []string{"--count", "99999999999"}, 2, "", "--count"},
		"two images":  {&fakeAPI{}, []string{"another"}, 2, "", "one IMAGE"},
		"bad flag":    {&fakeAPI{}, []string{"--frobnicate"}, 2, "", "frobnicate"},
	} {
		t.Run(name, func(t *testing.T) {
			out, _, err := run(t, t.Context(), newNode, append([]string{"prefetch", "--socket", c.api.serve(t), "--wait", "r/app:1"}, c.args...)...)
			if program.ExitStatus(err) != c.exit || c.stdout != "" && out != c.stdout || c.err != "" && !strings.Contains(fmt.Sprint(err), c.err) {
				t.Errorf("exit status %d, %v, printed\n%s", program.ExitStatus(err), err, out)
			}
		})
	}
}

// One line says why nobody answers, without what the library has to say of itself.
func TestPrefetchWithoutAnAnswer(t *testing.T) {
	stale := filepath.Join(t.TempDir(), "s")
	if err := os.WriteFile(stale, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	busy := &fakeAPI{err: status.Error(codes.Unavailable, "prefetches are not served at the moment")}
	for socket, want := range map[string]string{
		"/nonexistent/s": "no node answers at /nonexistent/s (no such file or directory): is the daemon running, and is that its node_api.socket?",
		stale:            "no node answers at " + stale + " (connection refused): is the daemon running, and is that its node_api.socket?",
		busy.serve(t):    "prefetches are not served at the moment",
	} {
		_, _, err := run(t, t.Context(), newNode, "prefetch", "--socket", socket, "r/app:1")
		if program.ExitStatus(err) != 1 || err.Error() != want {
			t.Errorf("got %v, want %s", err, want)
		}
	}
}

// Flags may stand after the word, as in most command lines; help there asks for nothing.
func TestFlagsAfterTheWord(t *testing.T) {
	f := &fakeAPI{watched: [][]*imagewolfv1.NodePrefetch{{part("n1", pulling, "")}}}
	socket := f.serve(t)
	for _, command := range []string{"status", "cancel"} {
		out, _, err := run(t, t.Context(), newNode, "prefetch", command, "x", "--socket", socket, "--json")
		if err != nil || !strings.HasPrefix(out, `{"request":`) {
			t.Errorf("%s: %v\n%s", command, err, out)
		}
	}
	for _, args := range [][]string{{"r/app:1", "--help"}, {"r/app:1", "-h"}, {"cancel", "y", "--help"}} {
		f.asked, f.canceled = nil, ""
		out, _, err := run(t, t.Context(), newNode, append([]string{"prefetch", "--socket", socket}, args...)...)
		if err != nil || !strings.Contains(out, "--socket PATH") || f.asked != nil || f.canceled != "" {
			t.Errorf("%v: %v, asked for %v, canceled %q, printed\n%s", args, err, f.asked, f.canceled, out)
		}
	}
	if _, _, err := run(t, t.Context(), newNode, "prefetch", "--socket", "relative", "r/app:1"); program.ExitStatus(err) != 2 || !strings.Contains(err.Error(), "--socket") {
		t.Errorf("relative socket: %v", err)
	}
}

func TestPrefetchInterrupted(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	f := &fakeAPI{watched: [][]*imagewolfv1.NodePrefetch{{part("n1", pulling, "")}}, hangs: true, onWatch: cancel}
	_, _, err := run(t, ctx, newNode, "prefetch", "--socket", f.serve(t), "--wait", "r/app:1")
	if program.ExitStatus(err) != 1 || !strings.Contains(err.Error(), "it goes on") {
		t.Errorf("got %v", err)
	}
}

func TestPrefetchShows(t *testing.T) {
	f := &fakeAPI{watched: [][]*imagewolfv1.NodePrefetch{{part("n1", pulling, ""), part("n2", failed, "no luck")}}}
	socket := f.serve(t)
	for name, want := range map[string][]string{
		"ls": {"limit100  r/app:1", "About an hour ago", "1 pulling, 1 failed"}, "ls --limit 7": {"limit7 "}, "ls --json": {`"prefetches":[`},
		"status x": {"n2    failed", "no luck"}, "cancel y": {"n1    pulling"},
	} {
		words := strings.Fields(name)
		out, _, err := run(t, t.Context(), newNode, append([]string{"prefetch", words[0], "--socket", socket}, words[1:]...)...)
		for _, w := range want {
			if err != nil || !strings.Contains(out, w) {
				t.Errorf("%s: %v, %q is not in\n%s", name, err, w, out)
			}
		}
	}
	if f.canceled != "y" {
		t.Errorf("canceled %q", f.canceled)
	}
	out, _, err := run(t, t.Context(), newNode, "prefetch", "status", "--socket", socket, "--json", "x")
	st := &imagewolfv1.PrefetchStatus{}
	if err := errors.Join(err, protojson.Unmarshal([]byte(out), st)); err != nil || st.Nodes[1].Reason != "no luck" {
		t.Errorf("%v, %v", st, err)
	}
	for _, args := range []string{"status", "cancel", "status a b", "ls a"} {
		if _, _, err := run(t, t.Context(), newNode, append([]string{"prefetch"}, strings.Fields(args)...)...); err == nil {
			t.Errorf("%s is taken", args)
		}
	}
}

// On a terminal there is a bar for each node.
func TestPrefetchOnATerminal(t *testing.T) {
	ptmx, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetPointerInt(int(ptmx.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	number, err := unix.IoctlGetInt(int(ptmx.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	tty, err := os.OpenFile(fmt.Sprint("/dev/pts/", number), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetWinsize(int(tty.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 24, Col: 120}); err != nil {
		t.Fatal(err)
	}
	var screen bytes.Buffer
	read := make(chan struct{})
	go func() {
		defer close(read)
		_, _ = io.Copy(&screen, ptmx) // ends with an error when the other side is closed
	}()
	clean(t)
	f := &fakeAPI{watched: [][]*imagewolfv1.NodePrefetch{{part("n1", pulling, "")}, {part("n1", done, ""), part("n2", failed, "no luck")}}}
	app := newApp(newNode)
	app.Writer = tty
	err = app.RunContext(t.Context(), []string{"imagewolf", "prefetch", "--socket", f.serve(t), "--wait", "r/app:1"})
	if program.ExitStatus(err) != 1 {
		t.Error(err)
	}
	tty.Close()
	<-read
	ptmx.Close()
	for _, want := range []string{"n1", "n2", "1.0 MiB / 2.0 MiB", "no luck"} {
		if !strings.Contains(screen.String(), want) {
			t.Errorf("%q is not in %q", want, screen.String())
		}
	}
}

func TestClusterKeyCA(t *testing.T) {
	own, accepted := cluster.GenerateKey(), cluster.GenerateKey()
	out, _, err := run(t, t.Context(), newNode, "cluster-key", "ca", "--config",
		write(t, "[cluster]\ncluster_key = \""+own+"\"\naccepted_cluster_keys = [\""+accepted+"\"]\n"))
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for rest := []byte(out); ; n++ {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil {
			break
		}
		if c, err := x509.ParseCertificate(b.Bytes); err != nil || !c.IsCA {
			t.Errorf("%v, %v", c, err)
		}
	}
	if n != 2 || strings.Contains(out, own) || strings.Contains(out, "PRIVATE") {
		t.Errorf("%d certificates in\n%s", n, out)
	}
	if _, _, err := run(t, t.Context(), newNode, "cluster-key", "ca", "--config", write(t, "")); err == nil || !strings.Contains(err.Error(), "ca_file") {
		t.Errorf("without a key: %v", err)
	}
}
