package differ

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/diff/apply"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var stamp = time.Date(2021, 3, 4, 5, 6, 7, 123456789, time.UTC)

type entry struct {
	tar.Header
	body string
}

// archiveOf makes a tar of es; fields left empty get defaults.
func archiveOf(t testing.TB, es ...entry) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, e := range es {
		h := e.Header
		h.Size, h.Format = int64(len(e.body)), tar.FormatPAX
		if h.ModTime.IsZero() {
			h.ModTime = stamp
		}
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(e.body)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	// Padding behind the archive counts for the digest, too.
	buf.Write(make([]byte, 20_000))
	return buf.Bytes()
}

func file(name string, mode int64, body string) entry {
	return entry{Header: tar.Header{Name: name, Mode: mode}, body: body}
}

func dir(name string, mode int64, uid int) entry {
	return entry{Header: tar.Header{Name: name, Mode: mode, Typeflag: tar.TypeDir, Uid: uid, Gid: uid + 1}}
}

// layers are a lower and an upper one with about all that a layer may contain.
func layers(t testing.TB) [][]byte {
	capability := "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	big := strings.Repeat("many bytes that compress well; ", 100_000)
	special := func(name string, flag byte) entry {
		return entry{Header: tar.Header{Name: name, Typeflag: flag, Mode: 0o640, Devmajor: 7, Devminor: 9}}
	}
	attrs := file("attrs", 0o644, "x")
	attrs.PAXRecords = map[string]string{"SCHILY.xattr.user.a": "b\x00c", "SCHILY.xattr.security.capability": capability}
	attrDir := dir("attrdir/", 0o2770, 12)
	attrDir.PAXRecords = map[string]string{"SCHILY.xattr.user.dir": "yes"}
	owned := file("owned", 0o600, "mine")
	owned.Uid, owned.Gid = 1234567, 7654321
	lower := []entry{
		dir("dir/", 0o755, 5), dir("tmp/", 0o1777, 0), dir("keep/", 0o700, 55), dir("opaque/", 0o751, 3),
		file("setuid", 0o4755, "suid"), file("setgid", 0o2755, "sgid"), attrs, attrDir, owned,
		file("dir/gone", 0o644, "to be deleted"), file("dir/big", 0o644, big), file("opaque/hidden", 0o644, "h"),
		{Header: tar.Header{Name: "hard", Linkname: "owned", Typeflag: tar.TypeLink}},
		{Header: tar.Header{Name: "soft", Linkname: "../../etc/passwd", Typeflag: tar.TypeSymlink}},
		special("fifo", tar.TypeFifo), special("char", tar.TypeChar), special("block", tar.TypeBlock),
		file("implied/parents/"+strings.Repeat("long", 40), 0o444, "long"), file("ünïcødé", 0o644, "u"),
		file("twice", 0o644, "first"), file("twice", 0o600, "second"), file("empty", 0o644, ""),
		file("keep/a", 0o644, "a"), dir("goes/", 0o755, 0), file("goes/away", 0o644, "x"), file("becomes", 0o644, "dir"),
	}
	// Enough that gzip cannot shrink for igzip to be worth it.
	random := make([]byte, igzipMin+1000)
	_, _ = rand.Read(random)
	lower = append(lower, file("random", 0o644, string(random)))
	upper := []entry{
		file("dir/.wh.gone", 0, ""), file(".wh.goes", 0, ""), file("opaque/.wh..wh..opq", 0, ""),
		file("opaque/new", 0o644, "n"), file("keep/b", 0o644, "parent only below"), file("never/.wh.was", 0, ""),
		dir("becomes/", 0o711, 2), file("becomes/file", 0o644, "f"), file("setuid", 0o6711, "again"),
	}
	return [][]byte{archiveOf(t, lower...), archiveOf(t, upper...)}
}

// compressions are ways to store a layer.
var compressions = map[string]struct {
	mediaType string
	compress  func(t testing.TB, p []byte) []byte
}{
	"plain": {ocispec.MediaTypeImageLayer, func(_ testing.TB, p []byte) []byte { return p }},
	"gzip":  {ocispec.MediaTypeImageLayerGzip, gzipped},
	"members": {"application/vnd.docker.image.rootfs.diff.tar.gzip", func(t testing.TB, p []byte) []byte {
		return append(gzipped(t, p[:len(p)/3]), gzipped(t, p[len(p)/3:])...)
	}},
	"zstd": {ocispec.MediaTypeImageLayerZstd, func(t testing.TB, p []byte) []byte {
		w, err := zstd.NewWriter(nil)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = w.Close() }()
		return w.EncodeAll(p, nil)
	}},
}

func gzipped(t testing.TB, p []byte) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := gzip.NewWriter(&buf)
	_, err := w.Write(p)
	if err := cmpErr(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func cmpErr(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// blobs is a content directory of containerd's own store.
type blobs struct {
	Dir
	store content.Store
}

func newBlobs(t testing.TB) blobs {
	t.Helper()
	root := t.TempDir()
	cs, err := local.NewStore(root)
	if err != nil {
		t.Fatal(err)
	}
	return blobs{Dir(root), cs}
}

func (b blobs) add(t testing.TB, mediaType string, p []byte) ocispec.Descriptor {
	t.Helper()
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(p), Size: int64(len(p))}
	if err := content.WriteBlob(context.Background(), b.store, desc.Digest.String(), bytes.NewReader(p), desc); err != nil {
		t.Fatal(err)
	}
	return desc
}

// snapshots returns the mounts of two layers as the overlay snapshotter has
// them, and the directories the layers end up in.
func snapshots(t testing.TB) (mounts [][]mount.Mount, dirs []string) {
	t.Helper()
	root := t.TempDir()
	for _, d := range []string{"1", "2", "work"} {
		if err := os.Mkdir(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	one, two := filepath.Join(root, "1"), filepath.Join(root, "2")
	return [][]mount.Mount{
		{{Type: "bind", Source: one, Options: []string{"rw", "rbind"}}},
		{{Type: "overlay", Source: "overlay", Options: []string{"index=off", "workdir=" + filepath.Join(root, "work"), "upperdir=" + two, "lowerdir=" + one}}},
	}, []string{one, two}
}

// dump describes each inode below root.
func dump(t testing.TB, root string) map[string]string {
	t.Helper()
	all := map[string]string{}
	first := map[uint64]string{} // name of each inode that was seen first
	err := filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		fi, err := e.Info()
		if err != nil {
			return err
		}
		st := fi.Sys().(*syscall.Stat_t)
		if _, ok := first[st.Ino]; !ok {
			first[st.Ino] = name
		}
		s := fmt.Sprintf("%v %d:%d rdev=%d links=%d same=%s", fi.Mode(), st.Uid, st.Gid, st.Rdev, st.Nlink, first[st.Ino])
		// What the applier makes by itself bears the time it was made.
		if fi.ModTime().Before(stamp.AddDate(1, 0, 0)) {
			s += fmt.Sprintf(" mtime=%d", fi.ModTime().UnixNano())
		}
		switch fi.Mode().Type() {
		case 0:
			p, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			sum := sha256.Sum256(p)
			s += " " + hex.EncodeToString(sum[:])
		case fs.ModeSymlink:
			l, err := os.Readlink(path)
			if err != nil {
				return err
			}
			s += " -> " + l
		}
		xattrs, err := xattrsOf(path)
		all[name] = s + xattrs
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func xattrsOf(path string) (string, error) {
	names := make([]byte, 4096)
	n, err := unix.Llistxattr(path, names)
	if err != nil {
		return "", err
	}
	var sb strings.Builder
	list := strings.Split(strings.TrimSuffix(string(names[:n]), "\x00"), "\x00")
	slices.Sort(list)
	for _, name := range list {
		// Each mount of an overlay has a uuid of its own.
		if name == "" || name == "trusted.overlay.uuid" {
			continue
		}
		v := make([]byte, 4096)
		n, err := unix.Lgetxattr(path, name, v)
		if err != nil {
			return "", err
		}
		fmt.Fprintf(&sb, " %s=%q", name, v[:n])
	}
	return sb.String(), nil
}

func sameTree(t testing.TB, want, got map[string]string) {
	t.Helper()
	names := maps.Clone(want)
	maps.Copy(names, got)
	for _, name := range slices.Sorted(maps.Keys(names)) {
		if want[name] != got[name] {
			t.Errorf("%s:\nwant %s\ngot  %s", name, want[name], got[name])
		}
	}
}

// fileSystemApplier is containerd's own.
func fileSystemApplier(b blobs) diff.Applier { return apply.NewFileSystemApplier(b.store) }

// noMounts fails the test if anything of root is mounted.
func noMounts(t testing.TB, root string) {
	t.Helper()
	all, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(all)) {
		if strings.Contains(line, root+"/") || strings.Contains(line, root+" ") {
			t.Errorf("left behind: %s", line)
		}
	}
}

// realIgzip has the machine's igzip used, and returns how often it has run.
func realIgzip(t testing.TB) (runs func() int) {
	t.Helper()
	path, err := exec.LookPath("igzip")
	if err != nil {
		t.Fatalf("%v: `.ci/need igzip` installs it", err)
	}
	log := filepath.Join(t.TempDir(), "runs")
	asIgzip(t, fmt.Sprintf("echo >>%s\nexec %s \"$@\"\n", log, path))
	return func() int {
		p, err := os.ReadFile(log)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
		return len(p)
	}
}

// asIgzip puts a program named igzip first in PATH.
func asIgzip(t testing.TB, script string) {
	t.Helper()
	bin := t.TempDir()
	if err := os.WriteFile(filepath.Join(bin, "igzip"), []byte("#!/bin/sh\n"+script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
}
