package harness

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestDirect proves the harness with containerd alone: two nodes without
// ImageWolf get two copies, so that the figure of one copy can fail.
func TestDirect(t *testing.T) {
	for _, version := range []string{V2, V17} {
		t.Run(version, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			e, r := testEnv(t)
			img := testImage(ctx, t, e, r)
			c, err := NewCluster(ctx, e, ClusterOptions{
				Name: "d", Nodes: 2, Version: version, Direct: true,
				Hosts: map[string]string{r.Host: "http://" + r.Host},
			})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := c.PullAll(ctx, "test", img.Ref); err != nil {
				t.Fatal(err, c.Logs())
			}
			for _, n := range c.Nodes {
				if got := r.Bytes(n.Name); got != img.Bytes() {
					t.Errorf("%s got %d bytes, want %d", n.Name, got, img.Bytes())
				}
				checkNode(ctx, t, n, img)
			}
			// What the checks must find: a wrong byte, and a missing blob.
			n := c.Nodes[0]
			if err := os.WriteFile(n.BlobPath(img.Layer(0)), []byte("other"), 0o644); err != nil {
				t.Fatal(err)
			}
			if n.Rehash(img.Blobs) == nil || n.Readable(ctx, "test", img.Blobs) == nil {
				t.Error("a wrong blob was not found")
			}
			if err := n.Complete(ctx, "test", "no/such:image"); err == nil {
				t.Error("an image that is not there is complete")
			}
			second := c.Nodes[1]
			if err := second.PullCRI(ctx, img.Ref); err != nil {
				t.Error(err)
			}
			second.Kill()
			if err := c.Heal(ctx); err != nil {
				t.Fatal(err)
			}
			checkNode(ctx, t, second, img)
		})
	}
}

func checkNode(ctx context.Context, t *testing.T, n *Node, img *Image) {
	t.Helper()
	for _, err := range []error{
		n.Complete(ctx, "test", img.Ref), n.Rehash(img.Blobs), n.Readable(ctx, "test", img.Blobs),
	} {
		if err != nil {
			t.Error(err)
		}
	}
	if blobs, err := n.Blobs(ctx, "test"); err != nil || len(blobs) != len(img.Blobs) {
		t.Errorf("blobs %v, %v, want %v", blobs, err, img.Blobs)
	}
	if RuncPath() == "" {
		return
	}
	if out, err := n.Run(ctx, "test", img.Ref); err != nil || !strings.HasPrefix(out, "hello from a container") {
		t.Errorf("run: %q, %v", out, err)
	}
}

func testEnv(t *testing.T) (*Env, *Registry) {
	t.Helper()
	bin, err := FindBinaries("../../bin", V2, V17)
	if err != nil && !strings.Contains(err.Error(), "imagewolf") { // not needed here
		t.Fatal(err)
	}
	e, err := NewEnv(bin)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(e.Root); err == nil {
			t.Error("the directory is still there")
		}
	})
	r, err := NewRegistry(e)
	if err != nil {
		t.Fatal(err)
	}
	return e, r
}

func testImage(ctx context.Context, t *testing.T, e *Env, r *Registry) *Image {
	t.Helper()
	files, err := RealFiles("/etc")
	if err != nil {
		t.Fatal(err)
	}
	var layers []*Layer
	for _, l := range []struct {
		c       Compression
		content Content
	}{{Gzip, files.Take(1 << 20)}, {Zstd, Random(1 << 20)}, {Plain, Random(1 << 20)}, {Gzip, Program(e)}} {
		layer, err := NewLayer(e, l.c, l.content)
		if err != nil {
			t.Fatal(err)
		}
		layers = append(layers, layer)
	}
	img, err := r.Push(ctx, "test/image", layers...)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// TestCounter: what a registry is told to do to bodies, it does, and counts.
func TestCounter(t *testing.T) {
	const size = 1 << 20
	c := NewCounter(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write(make([]byte, size)) //nolint:errcheck // a client that goes away is part of the test
	}))
	srv := httptest.NewServer(c)
	defer srv.Close()
	digest := "sha256:" + strings.Repeat("0", 64)
	get := func(ctx context.Context) (int64, error) {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, srv.URL+"/v2/x/blobs/"+digest, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set(NodeHeader, "n1")
		resp, err := srv.Client().Do(req)
		if err != nil {
			return 0, err
		}
		defer resp.Body.Close()
		n, err := io.Copy(io.Discard, resp.Body)
		if err == nil && resp.StatusCode != http.StatusOK {
			err = http.ErrNotSupported
		}
		return n, err
	}
	ctx := t.Context()
	if n, err := get(ctx); n != size || err != nil || c.Bytes("n1") != size || c.Bytes("n2") != 0 {
		t.Errorf("plain: %d, %v, counted %d", n, err, c.Bytes("n1"))
	}
	c.Behave(Behavior{CutAfter: 100_000})
	if n, err := get(ctx); n != 100_000 || err == nil {
		t.Errorf("cut: %d, %v", n, err)
	}
	c.Behave(Behavior{StallAfter: 200_000})
	short, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
	defer cancel()
	if n, err := get(short); n != 200_000 || err == nil {
		t.Errorf("stalled: %d, %v", n, err)
	}
	c.Behave(Behavior{Rate: 4 * size})
	began := time.Now()
	if n, err := get(ctx); n != size || err != nil || time.Since(began) < 150*time.Millisecond {
		t.Errorf("throttled: %d, %v in %s", n, err, time.Since(began))
	}
	c.Behave(Behavior{Status: 503})
	if _, err := get(ctx); err == nil {
		t.Error("told to fail: no error")
	}
	c.Behave(Behavior{})
	c.RequireAuth("user", "secret")
	if _, err := get(ctx); err == nil {
		t.Error("no credentials: no error")
	}
	if got := c.Gets(digest); len(got) != 6 || got[1].Bytes != 100_000 || got[4].Status != 503 || got[5].Status != 401 {
		t.Errorf("requests: %v", got)
	}
}

// TestReaper: the owner of an environment dies, and nothing of it stays.
func TestReaper(t *testing.T) {
	if root := os.Getenv("HARNESS_TEST_DIE"); root != "" {
		e, err := NewEnv(Binaries{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := e.start("sleeper", filepath.Join(e.Root, "log"), nil, "sleep", "1000"); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command("mount", "-t", "tmpfs", "x", mkdir(t, e, "m")).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if err := os.WriteFile(root, []byte(e.Root), 0o600); err != nil {
			t.Fatal(err)
		}
		panic("as a test may")
	}
	note := filepath.Join(t.TempDir(), "root")
	cmd := exec.Command(os.Args[0], "-test.run=^TestReaper$")
	cmd.Env = append(os.Environ(), "HARNESS_TEST_DIE="+note)
	if out, err := cmd.CombinedOutput(); err == nil {
		t.Fatalf("it did not die: %s", out)
	}
	root, err := os.ReadFile(note)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	err = Poll(ctx, 20*time.Millisecond, func() error {
		if _, err := os.Stat(string(root)); err == nil {
			return os.ErrExist
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	if n := killAll(string(root)); n != 0 {
		t.Errorf("%d processes were left", n)
	}
}

func mkdir(t *testing.T, e *Env, name string) string {
	t.Helper()
	dir, err := e.Dir(name)
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestRunSaysWhy: what a command says on its standard error is in the error, also
// where much that it said on its standard output is read after that.
func TestRunSaysWhy(t *testing.T) {
	out, err := run(t.Context(), nil, nil, "sh", "-c", "echo no such $0 >&2; sleep 0.1; seq 10000; exit 3", "image")
	if err == nil || !strings.Contains(err.Error(), "exit status 3") || !strings.Contains(err.Error(), "no such image") {
		t.Errorf("it ended with %v", err)
	}
	if n := len(err.Error()); n > 5000 {
		t.Errorf("the error has %d bytes", n)
	}
	if !strings.HasPrefix(out, "1\n2\n") || !strings.HasSuffix(out, "\n10000\n") {
		t.Errorf("%d bytes of its output", len(out))
	}
}
