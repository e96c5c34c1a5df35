package integration

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/imagewolf/imagewolf/integration/harness"
)

// onDisk has a node's content in a file system of its own for the length of a
// test. mount makes it, over a directory.
func onDisk(ctx context.Context, t *testing.T, n *harness.Node, mount func(dir string) error) {
	t.Helper()
	stop := func() error { return errors.Join(n.Stop(), n.Wolf.Stop()) }
	must(t, stop())
	must(t, os.MkdirAll(n.ContentDir(), 0o755))
	must(t, mount(n.ContentDir()))
	t.Cleanup(func() {
		must(t, stop())
		must(t, unix.Unmount(n.ContentDir(), unix.MNT_DETACH))
	})
	must(t, startBoth(ctx, n))
}

func startBoth(ctx context.Context, n *harness.Node) error {
	if err := n.Wolf.Start(ctx); err != nil {
		return err
	}
	return n.Start(ctx, n.Default())
}

// TestDiskIsFull: a node without room says so, gives back what it had staged, and
// goes on with what fits; the others do not notice.
func TestDiskIsFull(t *testing.T) {
	eachFault(t, "disk full on one node", func(ctx context.Context, t *testing.T, w *world, line *faultRecord) {
		line.SecondsWithout = plainPull(ctx, t, w.Nodes[:3], 0, 16, 16)
		victim := w.Nodes[1]
		onDisk(ctx, t, victim, func(dir string) error {
			return mountTmpfs(dir, 24*mib)
		})
		must(t, w.Settle(ctx))
		registry.Reset()
		img := image(ctx, t, 16, 16)
		began := time.Now()
		for _, p := range pull(ctx, w.ns, img.Ref, w.Nodes[:3]...) {
			err := <-p.done
			if p.node != victim {
				line.Seconds = max(line.Seconds, p.ended.Sub(began).Seconds())
			}
			switch {
			case p.node != victim && err != nil:
				t.Errorf("pull on %s: %v", p.node.Name, err)
			case p.node == victim && (err == nil || !strings.Contains(err.Error(), "no space left on device")):
				t.Errorf("pull on the full disk: %v", err)
			}
		}
		line.RegistryCopies = copies(img)
		line.say("of the two other nodes; the full one says so")
		if line.Seconds > line.SecondsWithout+3 {
			t.Errorf("the others took %.1f s, and %.1f s without a full disk", line.Seconds, line.SecondsWithout)
		}
		whole(ctx, t, w.ns, img, w.Nodes[0], w.Nodes[2])
		if got := registry.Bytes(""); got > img.Bytes()*2 {
			t.Errorf("the registry sent %d bytes for an image of %d", got, img.Bytes())
		}
		small := image(ctx, t, 4)
		soon, cancel := context.WithTimeout(ctx, 20*time.Second)
		defer cancel()
		// What the failed pull had brought is given back first.
		must(t, harness.Poll(soon, 500*time.Millisecond, func() error { return victim.Pull(ctx, w.ns, small.Ref) }))
		whole(ctx, t, w.ns, small, victim)
	}, harness.V2)
}

// fillsUp is a test in which the disk of a node becomes full in the middle of its pull.
type fillsUp struct {
	*world
	victim, other *harness.Node
	before        *harness.Image // what the victim has
	img           *harness.Image // what both pull
	layer         string         // img's large one
	half          int64          // of layer's bytes
	free          func()         // gives the disk room
}

// eachFillsUp runs a scenario with the victim's content on a disk of 64 MiB: ext4, and
// tmpfs as well where all is tried. The scenario has both nodes pull img, of whose large
// layer the registry sends half until it is told to go on, and returns when both pulls
// have ended. What the victim had staged is given back then, it still has what it had,
// the other has all, and the victim's next pull of the same succeeds.
func eachFillsUp(t *testing.T, fault string, scenario func(ctx context.Context, t *testing.T, f *fillsUp, line *faultRecord)) {
	for kind, mount := range disks {
		if kind != "ext4" && os.Getenv("FAULTS") != "all" {
			continue
		}
		t.Run(kind, func(t *testing.T) {
			eachFault(t, fault+", "+kind, func(ctx context.Context, t *testing.T, w *world, line *faultRecord) {
				f := &fillsUp{world: w, victim: w.Nodes[0], other: w.Nodes[1]}
				onDisk(ctx, t, f.victim, func(dir string) error { return mount(t, dir, 64*mib) })
				must(t, w.Settle(ctx))
				f.before, f.img = image(ctx, t, 4), image(ctx, t, 16)
				f.layer = f.img.Layer(0)
				f.half = f.img.Blobs[f.layer] / 2
				must(t, f.victim.Pull(ctx, w.ns, f.before.Ref))
				registry.Reset()
				registry.Behave(harness.Behavior{Digest: f.layer, StallAfter: f.half})
				scenario(ctx, t, f, line)
				line.RegistryCopies = copies(f.img)
				given(ctx, t, f.victim.ContentDir())
				whole(ctx, t, w.ns, f.before, f.victim)
				whole(ctx, t, w.ns, f.img, f.other)
				f.free()
				must(t, f.victim.Pull(ctx, w.ns, f.img.Ref))
				whole(ctx, t, w.ns, f.img, f.victim)
			}, harness.V2)
		})
	}
}

// halfway starts to pull on the one node, and then on the other, and returns when both
// have what the registry sends: all blobs, and of the large layer what is whole pieces.
func (f *fillsUp) halfway(ctx context.Context, t *testing.T, nodes ...*harness.Node) []*pulling {
	t.Helper()
	var pulls []*pulling
	for _, n := range nodes {
		pulls = append(pulls, pull(ctx, f.ns, f.img.Ref, n)...)
		must(t, harness.Poll(ctx, 10*time.Millisecond, func() error { return staged(n, f.layer, f.half-mib) }))
		for blob := range f.img.Blobs {
			if blob != f.layer {
				landed(ctx, t, n, blob)
			}
		}
	}
	return pulls
}

// staged fails unless so many bytes of a blob are staged on a node.
func staged(n *harness.Node, blob string, bytes int64) error {
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(n.ContentDir(), "imagewolf", "staging", strings.TrimPrefix(blob, "sha256:")), &st); err != nil {
		return fmt.Errorf("%s is not staged on %s: %w", blob, n.Name, err)
	}
	if got := st.Blocks * 512; got < bytes {
		return fmt.Errorf("%d bytes of %s are staged on %s", got, blob, n.Name)
	}
	return nil
}

// landed waits until a blob is in its place on a node, whoever knows of it.
func landed(ctx context.Context, t *testing.T, n *harness.Node, blob string) {
	t.Helper()
	must(t, harness.Poll(ctx, 10*time.Millisecond, func() error {
		if _, err := os.Stat(n.BlobPath(blob)); err != nil {
			return fmt.Errorf("%s is not on %s: %w", blob, n.Name, err)
		}
		return nil
	}))
}

// TestDiskFullWhileHashing: half of a layer is staged and hashed on the fetcher when its
// disk becomes full, and another node has what it had: that one does not wait for more.
func TestDiskFullWhileHashing(t *testing.T) {
	eachFillsUp(t, "disk full on the fetcher while hashing", func(ctx context.Context, t *testing.T, f *fillsUp, line *faultRecord) {
		pulls := f.halfway(ctx, t, f.victim, f.other)
		f.free = fill(t, f.victim.ContentDir())
		began := time.Now()
		registry.Behave(harness.Behavior{Rate: 16 * mib})
		if err := <-pulls[0].done; err == nil || !strings.Contains(err.Error(), "no space left on device") {
			t.Errorf("pull on the full disk: %v", err)
		}
		finish(t, pulls[1:])
		line.Seconds = pulls[1].ended.Sub(began).Seconds()
		line.say("of the other node, from then on")
		// What is left takes half a second; it goes on before the stall timeout, of 2 s.
		if line.Seconds > 2 {
			t.Errorf("the other node took %.1f s for half a layer", line.Seconds)
		}
	})
}

// TestDiskFullBeforeCommit: a layer is in its place on a follower when its disk becomes
// full, and containerd has not been told: it stands still for that long. It commits then,
// which needs no room.
func TestDiskFullBeforeCommit(t *testing.T) {
	eachFillsUp(t, "disk full on a follower before it commits", func(ctx context.Context, t *testing.T, f *fillsUp, line *faultRecord) {
		pulls := f.halfway(ctx, t, f.other, f.victim)
		pid := f.victim.Process().Pid()
		must(t, unix.Kill(pid, unix.SIGSTOP))
		t.Cleanup(func() { must(t, unix.Kill(pid, unix.SIGCONT)) })
		registry.Behave(harness.Behavior{})
		landed(ctx, t, f.victim, f.layer)
		finish(t, pulls[:1])
		f.free = fill(t, f.victim.ContentDir())
		began := time.Now()
		must(t, unix.Kill(pid, unix.SIGCONT))
		finish(t, pulls[1:])
		line.Seconds = time.Since(began).Seconds()
		line.say("from then on")
		whole(ctx, t, f.ns, f.img, f.victim)
	})
}

// TestPowerLoss: whatever of a node's content had not reached the disk is gone
// from one moment to the next. No blob is wrong afterwards, none is missing that
// containerd was told of, and the next pull succeeds.
func TestPowerLoss(t *testing.T) {
	rounds := 3
	if os.Getenv("FAULTS") == "all" {
		rounds = 12
	}
	eachFault(t, "power loss", func(ctx context.Context, t *testing.T, w *world, line *faultRecord) {
		n := w.Nodes[0]
		line.SecondsWithout = undisturbed(ctx, t, w.Nodes[:1], 0, 1, 1, 1, 1, 8)
		line.say("%d times; the longest pull after one, and the most copies for both pulls", rounds)
		disk := filepath.Join(n.Dir, "disk")
		must(t, makeExt4(ctx, disk, 512*mib))
		t.Cleanup(func() { must(t, os.Remove(disk)) })
		mount := func(dir string) error { return mountExt4(ctx, disk, dir) }
		onDisk(ctx, t, n, mount)
		for round := range rounds {
			img := image(ctx, t, 1, 1, 1, 1, 8)
			registry.Reset()
			registry.Behave(harness.Behavior{Rate: 12 * mib})
			pulling := pull(ctx, w.ns, img.Ref, n)
			time.Sleep(time.Duration(100+rand.IntN(1500)) * time.Millisecond)
			must(t, cutPower(n.ContentDir()))
			n.Wolf.Kill()
			n.Kill()
			err := <-pulling[0].done
			must(t, unix.Unmount(n.ContentDir(), unix.MNT_DETACH))
			must(t, mount(n.ContentDir()))
			must(t, startBoth(ctx, n))
			registry.Behave(harness.Behavior{})
			must(t, rightOnDisk(n))
			began := time.Now()
			again := n.Pull(ctx, w.ns, img.Ref)
			if left := inTheWay(again); left != "" {
				line.say("a snapshot that containerd had left was in the way, and removed by hand")
				must(t, os.RemoveAll(left))
				again = n.Pull(ctx, w.ns, img.Ref)
			}
			if again != nil {
				t.Errorf("round %d, in which the pull ended with %v: %v", round, err, again)
			}
			line.Seconds, line.RegistryCopies = max(line.Seconds, time.Since(began).Seconds()), max(line.RegistryCopies, copies(img))
			whole(ctx, t, w.ns, img, n)
			must(t, n.Remove(ctx, w.ns, img.Ref))
		}
	}, harness.V2)
}

// snapshotLeft is what containerd's snapshotter says of a directory that it has left.
var snapshotLeft = regexp.MustCompile(`failed to prepare extraction snapshot .*: rename \S+ (/\S+/snapshots/\d+): file exists`)

// inTheWay returns the directory of a snapshot that was left when containerd was killed
// between its rename and the note of it in the snapshotter's metadata; "" for none. No
// snapshot can be made then until it is gone, with and without ImageWolf, which has no
// part in snapshots (as github.com/containerd/accelerated-container-image/issues/102).
func inTheWay(err error) string {
	if err == nil {
		return ""
	}
	if m := snapshotLeft.FindStringSubmatch(err.Error()); m != nil {
		return m[1]
	}
	return ""
}

// cutPower takes an ext4 file system down without writing its journal or
// anything else (EXT4_IOC_SHUTDOWN with EXT4_GOING_FLAGS_NOLOGFLUSH).
func cutPower(dir string) error {
	const shutdown, noFlush = 0x8004587d, 2
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // opened for reading
	return unix.IoctlSetPointerInt(int(f.Fd()), shutdown, noFlush)
}

// rightOnDisk fails unless every blob in a node's store has the digest that its
// name says.
func rightOnDisk(n *harness.Node) error {
	files, err := filepath.Glob(filepath.Join(n.ContentDir(), "blobs", "sha256", "*"))
	if err != nil {
		return err
	}
	blobs := map[string]int64{}
	for _, f := range files {
		info, err := os.Stat(f)
		if err != nil {
			return err
		}
		blobs["sha256:"+filepath.Base(f)] = info.Size()
	}
	return n.Rehash(blobs)
}
