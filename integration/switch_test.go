package integration

import (
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/imagewolf/imagewolf/integration/harness"
)

// installed puts a node's containerd on these options, with imagewolf running
// or not, in the order in which an operator does it.
func installed(ctx context.Context, t *testing.T, n *harness.Node, wolf bool, o harness.ContainerdOptions) {
	t.Helper()
	must(t, n.Stop())
	if wolf {
		if !n.Wolf.Process().Running() {
			must(t, n.Wolf.Start(ctx))
		}
	} else {
		must(t, n.Wolf.Stop())
	}
	must(t, n.Start(ctx, o))
}

// readable fails the test unless every image is whole, on disk and through
// containerd.
func readable(ctx context.Context, t *testing.T, ns string, n *harness.Node, imgs ...*harness.Image) {
	t.Helper()
	for _, img := range imgs {
		whole(ctx, t, ns, img, n)
		must(t, n.Readable(ctx, ns, img.Blobs))
		runs(ctx, t, ns, img, n)
	}
}

// TestSwitch: from the builtin store to ImageWolf and back, with every image
// readable at each step.
func TestSwitch(t *testing.T) {
	each(t, func(ctx context.Context, t *testing.T, w *world) {
		n := w.Nodes[3]
		a, b, c := image(ctx, t, 4), image(ctx, t, 4), image(ctx, t, 4)
		installed(ctx, t, n, false, harness.ContainerdOptions{})
		must(t, n.Pull(ctx, w.ns, a.Ref))
		readable(ctx, t, w.ns, n, a)

		installed(ctx, t, n, true, n.Default())
		readable(ctx, t, w.ns, n, a)
		must(t, n.Pull(ctx, w.ns, b.Ref))
		readable(ctx, t, w.ns, n, a, b)
		// What was there before ImageWolf came is seeded, too.
		must(t, w.Settle(ctx))
		registry.Reset()
		must(t, w.Nodes[0].Pull(ctx, w.ns, a.Ref))
		sent(t, 0)

		installed(ctx, t, n, false, harness.ContainerdOptions{})
		readable(ctx, t, w.ns, n, a, b)
		must(t, n.Pull(ctx, w.ns, c.Ref))
		readable(ctx, t, w.ns, n, a, b, c)

		installed(ctx, t, n, true, n.Default())
		readable(ctx, t, w.ns, n, a, b, c)
	})
}

// TestDropIn walks through the README: the drop-in file is put in place, the
// node pulls through ImageWolf; it is taken off, and all is as before.
func TestDropIn(t *testing.T) {
	files := map[string]string{harness.V2: "imagewolf-v3.toml", harness.V17: "imagewolf-v2.toml"}
	each(t, func(ctx context.Context, t *testing.T, w *world) {
		n := w.Nodes[3]
		data, err := os.ReadFile(filepath.Join("..", "contrib", "containerd", files[w.version]))
		must(t, err)
		const socket = "/run/imagewolf/imagewolf.sock"
		text := strings.ReplaceAll(string(data), socket, n.Wolf.Socket())
		if text == string(data) {
			t.Fatalf("the drop-in does not name %s", socket)
		}
		conf := filepath.Join(n.Dir, "conf.d")
		must(t, os.MkdirAll(conf, 0o755))
		o := harness.ContainerdOptions{Imports: filepath.Join(conf, "*.toml")}
		dropIn := filepath.Join(conf, "imagewolf.toml")

		a, b := image(ctx, t, 4), image(ctx, t, 4)
		installed(ctx, t, n, false, o)
		must(t, n.Pull(ctx, w.ns, a.Ref))

		must(t, os.WriteFile(dropIn, []byte(text), 0o644))
		installed(ctx, t, n, true, o)
		out, err := n.Ctr(ctx, w.ns, "plugins", "ls")
		must(t, err)
		if got := plugins(out, "io.containerd.content.v1"); len(got) != 1 || got["imagewolf"] != "ok" {
			t.Errorf("content plugins %v, want imagewolf alone", got)
		}
		differs := 0
		for id, status := range plugins(out, "io.containerd.differ.v1") {
			if strings.HasPrefix(id, "imagewolf") && status == "ok" {
				differs++
			}
		}
		if differs != 1 {
			t.Errorf("no differ of ImageWolf:\n%s", out)
		}
		readable(ctx, t, w.ns, n, a)
		registry.Reset()
		must(t, n.Pull(ctx, w.ns, b.Ref))
		readable(ctx, t, w.ns, n, a, b)
		// It did come through ImageWolf: the others get it from there.
		must(t, w.Settle(ctx))
		registry.Reset()
		must(t, w.Nodes[0].Pull(ctx, w.ns, b.Ref))
		sent(t, 0)

		must(t, os.Remove(dropIn))
		installed(ctx, t, n, false, o)
		out, err = n.Ctr(ctx, w.ns, "plugins", "ls")
		must(t, err)
		if got := plugins(out, "io.containerd.content.v1"); len(got) != 1 || got["content"] != "ok" {
			t.Errorf("content plugins %v, want the builtin one alone", got)
		}
		readable(ctx, t, w.ns, n, a, b)
	})
}

// plugins returns what `ctr plugins ls` says about the plugins of a type.
func plugins(out, typ string) map[string]string {
	found := map[string]string{}
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); len(f) > 3 && f[0] == typ {
			found[f[1]] = f[len(f)-1]
		}
	}
	return found
}

// TestImport: blobs that come from no registry never wait.
func TestImport(t *testing.T) {
	each(t, func(ctx context.Context, t *testing.T, w *world) {
		img := image(ctx, t, 4, 4)
		from, to := w.Nodes[0], w.Nodes[1]
		must(t, from.Pull(ctx, w.ns, img.Ref))
		dir := t.TempDir()
		tar := filepath.Join(dir, "image.tar")
		_, err := from.Ctr(ctx, w.ns, "images", "export", tar, img.Ref)
		must(t, err)
		registry.Reset()
		_, err = to.Ctr(ctx, w.ns, "images", "import", tar)
		must(t, err)
		sent(t, 0)
		whole(ctx, t, w.ns, img, to)
		must(t, to.Readable(ctx, w.ns, img.Blobs))

		for i, flags := range [][]string{nil, {"--expected-digest", "--expected-size"}} {
			data := make([]byte, 3*mib+i)
			copy(data, t.Name())
			digest := fmt.Sprintf("sha256:%x", sha256.Sum256(data))
			path := filepath.Join(dir, fmt.Sprint("data", i))
			must(t, os.WriteFile(path, data, 0o644))
			args := []string{"content", "ingest"}
			if flags != nil {
				args = append(args, flags[0], digest, flags[1], fmt.Sprint(len(data)))
			}
			f, err := os.Open(path)
			must(t, err)
			_, err = to.CtrIn(ctx, w.ns, f, append(args, fmt.Sprint("thing", i))...)
			must(t, f.Close())
			must(t, err)
			must(t, to.Readable(ctx, w.ns, map[string]int64{digest: int64(len(data))}))
		}
	})
}

// TestForeignLayer: a layer that only containerd can open is unpacked as it is
// without ImageWolf: through its own differ, with its stream processor.
func TestForeignLayer(t *testing.T) {
	each(t, func(ctx context.Context, t *testing.T, w *world) {
		sealed := newLayer(t, harness.Gzip, harness.Join(harness.Program(env), harness.Random(mib)))
		sealed.Seal()
		img, err := registry.Push(ctx, fmt.Sprintf("sealed-%d", time.Now().UnixNano()), sealed)
		must(t, err)
		n := w.Nodes[0]
		must(t, n.Pull(ctx, w.ns, img.Ref))
		whole(ctx, t, w.ns, img, n)
		runs(ctx, t, w.ns, img, n)
		must(t, w.Nodes[1].PullCRI(ctx, img.Ref))
		if w.version == harness.V2 {
			must(t, w.Nodes[2].Pull(ctx, w.ns, img.Ref, "--local"))
		}
	})
}
