package integration

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/imagewolf/imagewolf/integration/harness"
	"github.com/imagewolf/imagewolf/plugin/store"
)

// stepBlobs are the blobs of storeOnly.
var stepBlobs = map[string]*stepBlob{
	"plain":   newStepBlob(200 << 10), // written and committed, deleted at the end
	"long":    newStepBlob(18 * mib),  // the same, and its progress is kept on the way
	"torn":    newStepBlob(4 * mib),   // its second half comes from peers, then it is put aside and gone on with
	"aborted": newStepBlob(2 * mib),   // half of it is written
}

// stepBlob is a blob that is made when first asked for.
type stepBlob struct {
	data   func() []byte
	digest func() digest.Digest
}

func newStepBlob(size int) *stepBlob {
	data := sync.OnceValue(func() []byte {
		data := make([]byte, size)
		_, _ = rand.NewChaCha8([32]byte{byte(size >> 10), byte(size >> 18)}).Read(data) // never fails
		return data
	})
	return &stepBlob{data: data, digest: sync.OnceValue(func() digest.Digest { return digest.FromBytes(data()) })}
}

func (b *stepBlob) ref() string { return "ns/1/layer-" + b.digest().String() }

// pull opens a writer for the blob.
func (b *stepBlob) pull(ctx context.Context, s *store.Store) (*blobPull, error) {
	w, err := s.Writer(ctx, content.WithRef(b.ref()), content.WithDescriptor(ocispec.Descriptor{Size: int64(len(b.data()))}))
	return &blobPull{Writer: w, data: b.data(), digest: b.digest()}, err
}

// storeAt names the directory that this program, started again, is to run a store
// on.
const storeAt = "IMAGEWOLF_TEST_STORE"

// storeOnly runs a store through everything that it does with blobs and ends the
// program, if that is what it was started for. Each step is told on standard output
// when it is through, a removal before it begins.
func storeOnly() {
	root := os.Getenv(storeAt)
	if root == "" {
		return
	}
	if err := stepStore(context.Background(), root); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// secondHalf is a swarm that has the second half of the torn blob.
type secondHalf struct{}

func (secondHalf) Fill(_ context.Context, in *store.Ingest) {
	torn := stepBlobs["torn"]
	data := torn.data()
	half := int64(len(data) / 2)
	if in.Digest() != torn.digest() || in.Present(half, half) {
		return
	}
	if _, err := in.WriteAt(data[half:], half); err == nil {
		_ = in.MarkPresent(half, half) //nolint:errcheck // then the store asks the registry
	}
}
func (secondHalf) Added(digest.Digest, int64) {}
func (secondHalf) Removed(digest.Digest)      {}

func stepStore(ctx context.Context, root string) error {
	// The machine that starts again after the power loss has another boot id.
	boot := filepath.Join(filepath.Dir(root), "boot_id")
	if err := unix.Mount(boot, "/proc/sys/kernel/random/boot_id", "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("boot id: %w", err)
	}
	s, err := store.Open(store.Options{Root: root, Filler: secondHalf{}})
	if err != nil {
		return err
	}
	say := func(what, name string) { fmt.Printf("%s %s\n", what, name) }
	staged := func(p *blobPull) error {
		soon, cancel := context.WithTimeout(ctx, 5*time.Minute) // it stands still for most of the time
		defer cancel()
		return harness.Poll(soon, 5*time.Millisecond, func() error {
			_, err := os.Stat(filepath.Join(root, "imagewolf", "staging", p.digest.Encoded()+".json"))
			return err
		})
	}
	long, err := stepBlobs["long"].pull(ctx, s)
	if err == nil {
		_, err = long.Write(long.data[:17*mib])
	}
	if err == nil {
		err = staged(long)
	}
	if err != nil {
		return fmt.Errorf("long: %w", err)
	}
	// What syncs this one has the disk learn of the long one's progress, too.
	plain, err := stepBlobs["plain"].pull(ctx, s)
	if err == nil {
		err = plain.rest(ctx)
	}
	if err != nil {
		return fmt.Errorf("plain: %w", err)
	}
	say("committed", "plain")
	if err := long.rest(ctx); err != nil {
		return fmt.Errorf("long: %w", err)
	}
	say("committed", "long")
	torn, err := stepBlobs["torn"].pull(ctx, s)
	if err == nil {
		err = torn.Writer.(store.Waiter).Wait(ctx)
	}
	if err == nil {
		_, err = torn.Write(torn.data[:mib])
	}
	if err == nil {
		err = torn.Close()
	}
	if err == nil {
		err = staged(torn) // kept on the disk in the background
	}
	if err != nil {
		return fmt.Errorf("torn: %w", err)
	}
	say("aside", "torn")
	if torn, err = stepBlobs["torn"].pull(ctx, s); err == nil {
		err = torn.rest(ctx)
	}
	if err != nil {
		return fmt.Errorf("torn: %w", err)
	}
	say("committed", "torn")
	aborted, err := stepBlobs["aborted"].pull(ctx, s)
	if err == nil {
		_, err = aborted.Write(aborted.data[:mib])
	}
	if err = errors.Join(err, s.Abort(ctx, stepBlobs["aborted"].ref())); err != nil {
		return fmt.Errorf("aborted: %w", err)
	}
	say("removing", "plain")
	return errors.Join(s.Delete(ctx, stepBlobs["plain"].digest()), s.Close())
}

// TestPowerLossAtEachStep: the power goes before each call by which a store changes a
// file (one of three of a name, unless FAULTS=all): between each write, fsync and
// rename of blobs that are written, put aside, gone on with, aborted and removed. What
// the disk has at that moment is mounted as a machine that starts again would: no blob
// is wrong, none is missing that was committed, and every blob can be pulled then, going
// on from what was put aside.
func TestPowerLossAtEachStep(t *testing.T) {
	line := record(t, "power loss at each step", harness.V2)
	defer timed(line)()
	dir := t.TempDir()
	disk, root := filepath.Join(dir, "disk"), filepath.Join(dir, "mounted")
	must(t, errors.Join(os.Mkdir(root, 0o755), os.WriteFile(filepath.Join(dir, "boot_id"), []byte("before-the-power-went\n"), 0o600)))
	must(t, makeExt4(t.Context(), disk, 64*mib))
	must(t, mountExt4(t.Context(), disk, root))
	t.Cleanup(func() { must(t, unix.Unmount(root, unix.MNT_DETACH)) })

	self, err := os.Executable()
	must(t, err)
	out, in, err := os.Pipe()
	must(t, err)
	defer out.Close()     //nolint:errcheck // only read
	told := int(out.Fd()) // once: it makes reads wait
	must(t, unix.SetNonblock(told, true))
	var stderr bytes.Buffer
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, self)
	// GODEBUG: fewer signals, each of which is a stop.
	cmd.Env = append(os.Environ(), storeAt+"="+root, "GODEBUG=asyncpreemptoff=1")
	cmd.Stdout, cmd.Stderr = in, &stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	every := 3
	if os.Getenv("FAULTS") == "all" {
		every = 1
	}
	l := &powerLosses{T: t, every: every, dir: dir, disk: disk, out: told, made: map[string]int{}, lost: map[string]int{}}
	err = stepThrough(cmd, root, l.lose)
	if err == nil {
		err = l.lose("the end")
	}
	if err = errors.Join(err, in.Close()); err != nil {
		t.Fatalf("%v\n%s", err, stderr.String())
	}
	line.say("a store by itself; the power went before %v of %v; pulls went on from what was kept %d times", l.lost, l.made, l.resumed)
	t.Log(line.Note)
	for _, call := range []string{"write", "fsync", "rename"} {
		if l.lost[call] == 0 {
			t.Errorf("the power never went before a %s", call)
		}
	}
	if every == 1 && l.resumed == 0 {
		t.Error("no pull went on from what was kept")
	}
	if want := []string{"committed plain", "committed long", "aside torn", "committed torn", "removing plain"}; !slices.Equal(l.told, want) {
		t.Errorf("the store told %q, want %q", l.told, want)
	}
}

// powerLosses are moments at which the power goes.
type powerLosses struct {
	*testing.T
	dir, disk string
	out       int // what the store tells, to be read without waiting
	told      []string

	every      int            // the power goes before one of so many calls of each name
	made, lost map[string]int // how many calls there were, and before how many of them it went
	resumed    int            // how many pulls went on from what was kept
}

// lose looks at what would be left if the power went now, before a call.
func (l *powerLosses) lose(call string) error {
	l.made[call]++
	if (l.made[call]-1)%l.every != 0 {
		return nil
	}
	l.lost[call]++
	moment := fmt.Sprintf("%s %d", call, l.made[call])
	var said bytes.Buffer
	for buf := make([]byte, 4096); ; {
		n, err := unix.Read(l.out, buf)
		if n <= 0 || err != nil { // nothing more now
			break
		}
		said.Write(buf[:n])
	}
	l.told = append(l.told, strings.FieldsFunc(said.String(), func(r rune) bool { return r == '\n' })...)
	copied, root := filepath.Join(l.dir, "disk before "+moment), filepath.Join(l.dir, "after "+moment)
	if err := errors.Join(copyDisk(copied, l.disk), os.Mkdir(root, 0o755)); err != nil {
		return err
	}
	if err := mountExt4(l.Context(), copied, root); err != nil {
		return err
	}
	err := l.startAgain(root)
	if err != nil {
		err = fmt.Errorf("power lost before %s, after %q: %w", moment, l.told, err)
	}
	return errors.Join(err, unix.Unmount(root, unix.MNT_DETACH), os.Remove(copied))
}

// startAgain opens what is left, checks it, and pulls everything.
func (l *powerLosses) startAgain(root string) error {
	files, err := filepath.Glob(filepath.Join(root, "blobs", "sha256", "*"))
	if err != nil {
		return err
	}
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err != nil {
			return err
		}
		if got := digest.FromBytes(data).Encoded(); got != filepath.Base(f) {
			return fmt.Errorf("blob %s has %d bytes with digest %s", filepath.Base(f), len(data), got)
		}
	}
	s, err := store.Open(store.Options{Root: root})
	if err != nil {
		return err
	}
	err = l.pullAll(s)
	if err = errors.Join(err, s.Close()); err != nil {
		return err
	}
	left, err := filepath.Glob(filepath.Join(root, "imagewolf", "*"))
	staged, err2 := filepath.Glob(filepath.Join(root, "imagewolf", "staging", "*"))
	if len(staged) > 0 || slices.Contains(left, filepath.Join(root, "imagewolf", "state.db.bad")) {
		err2 = errors.Join(err2, fmt.Errorf("left behind: %q and %q", left, staged))
	}
	return errors.Join(err, err2)
}

func (l *powerLosses) pullAll(s *store.Store) error {
	for name, b := range stepBlobs {
		_, err := s.Info(l.Context(), b.digest())
		if slices.Contains(l.told, "committed "+name) && !slices.Contains(l.told, "removing "+name) && err != nil {
			return fmt.Errorf("%s was committed: %w", name, err)
		}
		if err != nil && !errdefs.IsNotFound(err) {
			return err
		}
		p, err := b.pull(l.Context(), s)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		st, err := p.Status()
		if err == nil && st.Offset > 0 && st.Offset < st.Total {
			l.resumed++
		}
		if err = errors.Join(err, p.rest(l.Context())); err != nil {
			return fmt.Errorf("%s, from byte %d on: %w", name, st.Offset, err)
		}
		if err := isRight(l.Context(), s, p); err != nil {
			return err
		}
	}
	return nil
}

// copyDisk copies what a mounted disk has, as it is at one moment: the kernel goes on
// writing back while the store stands still.
func copyDisk(to, from string) error {
	for range 50 {
		before, idle, err := diskWrites(from)
		if err == nil {
			err = copyFile(to, from)
		}
		after, _, err2 := diskWrites(from)
		if err = errors.Join(err, err2); err != nil {
			return err
		}
		if idle && before == after {
			return nil
		}
	}
	return errors.New("the kernel does not stop writing")
}

// diskWrites is what the kernel has written to the loop device of a file, and whether
// nothing is on its way there (Documentation/block/stat.rst).
func diskWrites(file string) (written string, idle bool, err error) {
	backing, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return "", false, err
	}
	for _, b := range backing {
		if name, err := os.ReadFile(b); err != nil || strings.TrimSpace(string(name)) != file {
			continue
		}
		stat, err := os.ReadFile(filepath.Join(filepath.Dir(b), "..", "stat"))
		if err != nil {
			return "", false, err
		}
		f := strings.Fields(string(stat))
		if len(f) < 9 {
			return "", false, fmt.Errorf("statistics of %s: %q", file, stat)
		}
		return f[4] + " writes of " + f[6] + " sectors", f[8] == "0", nil
	}
	return "", false, fmt.Errorf("%s is on no loop device", file)
}

// copyFile copies a file but for its holes.
func copyFile(to, from string) (err error) {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close() //nolint:errcheck // only read
	info, err := src.Stat()
	if err != nil {
		return err
	}
	dst, err := os.Create(to)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dst.Close()) }()
	for at := int64(0); ; {
		lo, err := unix.Seek(int(src.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return dst.Truncate(info.Size())
		}
		if err != nil {
			return err
		}
		hi, err := unix.Seek(int(src.Fd()), lo, unix.SEEK_HOLE)
		if err != nil {
			return err
		}
		if _, err := io.Copy(io.NewOffsetWriter(dst, lo), io.NewSectionReader(src, lo, hi-lo)); err != nil {
			return err
		}
		at = hi
	}
}
