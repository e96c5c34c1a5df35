package integration

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/imagewolf/imagewolf/integration/harness"
	"github.com/imagewolf/imagewolf/plugin/store"
)

// smallDisk is a store on a file system of 16 MiB.
type smallDisk struct {
	*testing.T
	*store.Store
	root string
}

// disks mount an empty file system of a size over a directory, one of each kind that
// full disks are tried on.
var disks = map[string]func(t *testing.T, dir string, size int64) error{
	"tmpfs": func(_ *testing.T, dir string, size int64) error { return mountTmpfs(dir, size) },
	"ext4": func(t *testing.T, dir string, size int64) error {
		disk := filepath.Join(t.TempDir(), "disk")
		return errors.Join(makeExt4(t.Context(), disk, size, "-m", "0"), mountExt4(t.Context(), disk, dir))
	},
}

// makeExt4 makes a disk of so many bytes with an empty file system on it.
func makeExt4(ctx context.Context, disk string, size int64, options ...string) error {
	if err := errors.Join(os.WriteFile(disk, nil, 0o600), os.Truncate(disk, size)); err != nil {
		return err
	}
	return command(ctx, "mkfs.ext4", append(options, "-q", disk)...)
}

// mountExt4 mounts a disk over a directory.
func mountExt4(ctx context.Context, disk, dir string) error {
	return command(ctx, "mount", "-o", "loop", disk, dir)
}

// mountTmpfs mounts an empty file system of so many bytes in memory over a directory.
func mountTmpfs(dir string, size int64) error {
	return unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprint("size=", size))
}

// command runs a program; what it says is the error's text.
func command(ctx context.Context, name string, args ...string) error {
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, out)
	}
	return nil
}

// newSmallDisk mounts one and opens a store on it.
func newSmallDisk(t *testing.T, mount func(t *testing.T, dir string, size int64) error) *smallDisk {
	t.Helper()
	s := &smallDisk{T: t, root: t.TempDir()}
	must(t, mount(t, s.root, 16*mib))
	t.Cleanup(func() {
		for _, f := range openFiles(t, s.root) {
			t.Errorf("still open: %s", f)
		}
		must(t, unix.Unmount(s.root, unix.MNT_DETACH)) // the kernel may still be writing back
	})
	s.open()
	return s
}

// openFiles returns what this process has open below a directory, but for what
// containerd's local store forgets to close as it looks for fsverity.
func openFiles(t *testing.T, dir string) []string {
	t.Helper()
	fds, err := filepath.Glob("/proc/self/fd/*")
	must(t, err)
	var out []string
	for _, fd := range fds {
		if to, err := os.Readlink(fd); err == nil && strings.HasPrefix(to, dir) && !strings.Contains(to, "/.fsverity-check-") {
			out = append(out, to)
		}
	}
	return out
}

// open opens the store and runs it until the returned function, or the test's end,
// closes it.
func (s *smallDisk) open() (closeIt func()) {
	s.Helper()
	var err error
	s.Store, err = store.Open(store.Options{Root: s.root, Log: slog.New(slog.DiscardHandler)})
	must(s.T, err)
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error, 1)
	st, over := s.Store, false
	go func() { ran <- st.Run(ctx) }()
	closeIt = func() {
		if over {
			return
		}
		over = true
		cancel()
		if err := errors.Join(<-ran, st.Close()); err != nil && !errors.Is(err, syscall.ENOSPC) {
			s.Error(err)
		}
	}
	s.Cleanup(closeIt)
	return closeIt
}

// fill takes all room that is left, until free is called.
func (s *smallDisk) fill() (free func()) {
	s.Helper()
	return fill(s.T, s.root)
}

// fill takes all room that is left on the disk of a directory, until free is called.
func fill(t *testing.T, dir string) (free func()) {
	t.Helper()
	path := filepath.Join(dir, "ballast")
	f, err := os.Create(path)
	must(t, err)
	var st unix.Statfs_t
	must(t, unix.Statfs(dir, &st))
	if most := int64(st.Bavail)*st.Bsize - mib; most > 0 {
		must(t, unix.Fallocate(int(f.Fd()), 0, 0, most)) // far sooner than what follows
		_, err = f.Seek(most, io.SeekStart)
		must(t, err)
	}
	block := make([]byte, 64<<10)
	for size := len(block); size > 0; size /= 2 { // to the last byte
		for err = nil; err == nil; {
			if _, err = f.Write(block[:size]); err == nil {
				err = f.Sync()
			}
		}
		if !errors.Is(err, syscall.ENOSPC) {
			t.Fatal(err)
		}
	}
	must(t, f.Close())
	return func() { must(t, os.Remove(path)) }
}

// pull is a blob on its way in.
type blobPull struct {
	content.Writer
	data   []byte
	digest digest.Digest
}

func (s *smallDisk) pull(size int) *blobPull {
	s.Helper()
	p := &blobPull{data: make([]byte, size)}
	_, _ = rand.NewChaCha8([32]byte{byte(size >> 10), byte(size >> 18)}).Read(p.data) // never fails
	p.digest = digest.FromBytes(p.data)
	w, err := s.Writer(s.Context(), content.WithRef("ns/1/layer-"+p.digest.String()), content.WithDescriptor(ocispec.Descriptor{Size: int64(size)}))
	must(s.T, err)
	p.Writer = w
	return p
}

// rest writes what is missing and commits.
func (p *blobPull) rest(ctx context.Context) error {
	st, err := p.Status()
	if err == nil {
		_, err = p.Write(p.data[st.Offset:])
	}
	if err == nil {
		err = p.Commit(ctx, int64(len(p.data)), p.digest)
	}
	return errors.Join(err, p.Close())
}

// first writes the first n bytes and waits until they are in the file.
func (s *smallDisk) first(p *blobPull, n int) {
	s.Helper()
	_, err := p.Write(p.data[:n])
	must(s.T, err)
	err = harness.Poll(s.Context(), 5*time.Millisecond, func() error {
		list, err := s.ListStatuses(s.Context(), "ref==ns/1/layer-"+p.digest.String())
		if err == nil && (len(list) != 1 || list[0].Offset < int64(n)) {
			return errors.New("not there yet")
		}
		return err
	})
	must(s.T, err)
}

// given waits until nothing is staged.
func (s *smallDisk) given() {
	s.Helper()
	given(s.Context(), s.T, s.root)
}

// given waits until nothing is staged in the store of a directory.
func given(ctx context.Context, t *testing.T, root string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	must(t, harness.Poll(ctx, 10*time.Millisecond, func() error {
		files, err := os.ReadDir(filepath.Join(root, "imagewolf", "staging"))
		if err == nil && len(files) > 0 {
			err = errors.New("still staged: " + files[0].Name())
		}
		return err
	}))
}

// right fails unless the blob is there to the last byte.
func (s *smallDisk) right(p *blobPull) {
	s.Helper()
	if err := isRight(s.Context(), s.Store, p); err != nil {
		s.Error(err)
	}
}

func isRight(ctx context.Context, s *store.Store, p *blobPull) error {
	r, err := s.ReaderAt(ctx, ocispec.Descriptor{Digest: p.digest})
	if err != nil {
		return err
	}
	data, err := io.ReadAll(io.NewSectionReader(r, 0, r.Size()))
	if err = errors.Join(err, r.Close()); err != nil {
		return err
	}
	if got := digest.FromBytes(data); got != p.digest {
		return fmt.Errorf("%s has digest %s", p.digest, got)
	}
	return nil
}

// TestDiskFullAtEachStep: there is no room any more at one step of a pull. It fails
// with a clear error or, where no room is needed, not at all; what it had staged is
// given back; other pulls go on, and so does the same one when there is room.
func TestDiskFullAtEachStep(t *testing.T) {
	steps := map[string]func(ctx context.Context, s *smallDisk){
		"while staging": func(ctx context.Context, s *smallDisk) {
			other := s.pull(4 * mib)
			s.first(other, 2*mib)
			big := s.pull(32 * mib)
			if err := big.rest(ctx); !errors.Is(err, syscall.ENOSPC) {
				s.Errorf("a blob larger than the disk: %v", err)
			}
			soon, cancel := context.WithTimeout(ctx, 10*time.Second)
			defer cancel()
			must(s.T, harness.Poll(soon, 20*time.Millisecond, func() error {
				_, err := os.Stat(filepath.Join(s.root, "imagewolf", "staging", big.digest.Encoded()))
				if err == nil {
					return errors.New("still staged")
				}
				return nil
			}))
			must(s.T, other.rest(ctx))
			s.right(other)
		},
		"while hashing": func(ctx context.Context, s *smallDisk) {
			// A blob that was there before has made the directory.
			before, p := s.pull(mib), s.pull(4*mib)
			must(s.T, before.rest(ctx))
			s.first(p, len(p.data)-1)
			defer s.fill()()
			must(s.T, p.rest(ctx)) // the last byte's block is there already
			s.right(p)
			s.given()
		},
		"while committing": func(ctx context.Context, s *smallDisk) {
			p := s.pull(4 * mib)
			s.first(p, len(p.data)-1)
			free := s.fill()
			err := p.rest(ctx) // blobs/sha256 has to be made
			s.Logf("commit: %v", err)
			switch {
			case err == nil: // tmpfs needs no block for that
				s.right(p)
			case !errors.Is(err, syscall.ENOSPC):
				s.Errorf("commit: %v", err)
			}
			s.given()
			free()
			other, again := s.pull(3*mib), s.pull(2*mib)
			must(s.T, errors.Join(other.rest(ctx), again.rest(ctx)))
			if err != nil {
				p = s.pull(4 * mib)
				must(s.T, p.rest(ctx))
			}
			s.right(p)
			s.right(other)
		},
		"while the pull is put aside": func(ctx context.Context, s *smallDisk) {
			p := s.pull(4 * mib)
			s.first(p, 2*mib)
			free := s.fill()
			must(s.T, p.Close()) // its client has gone
			s.given()
			free()
			p = s.pull(4 * mib)
			must(s.T, p.rest(ctx))
			s.right(p)
		},
		"while the store opens": func(ctx context.Context, s *smallDisk) {
			p := s.pull(4 * mib)
			s.first(p, 2*mib)
			must(s.T, s.Close())
			must(s.T, os.Remove(filepath.Join(s.root, "imagewolf", "state.db")))
			defer s.fill()()
			s.open()
			s.given()
			if _, err := os.Stat(filepath.Join(s.root, "imagewolf", "state.db.bad")); !errors.Is(err, os.ErrNotExist) {
				s.Errorf("state.db was set aside as if it could not be read: %v", err)
			}
			small := s.pull(mib)
			must(s.T, small.rest(ctx))
			s.right(small)
		},
	}
	for fs, mount := range disks {
		for name, step := range steps {
			t.Run(fs+"/"+name, func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				line := record(t, "disk full "+name+", "+fs, harness.V2)
				line.say("a store by itself")
				defer timed(line)()
				step(ctx, newSmallDisk(t, mount))
			})
		}
	}
}
