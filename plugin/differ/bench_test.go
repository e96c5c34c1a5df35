package differ

import (
	"archive/tar"
	"bytes"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/diff/apply"
	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"
)

// benchLayer is a tar of about 100 MB of the machine's own programs.
var benchLayer = sync.OnceValues(func() ([]byte, error) {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, root := range []string{"/usr/bin", "/usr/lib", "/usr/share"} {
		err := filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			if !e.Type().IsRegular() {
				return nil
			}
			if buf.Len() > 100e6 {
				return filepath.SkipAll
			}
			fi, err := e.Info()
			if err != nil || fi.Size() > 8<<20 {
				return err
			}
			p, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			if err := w.WriteHeader(&tar.Header{Name: path[1:], Mode: int64(fi.Mode().Perm()), Size: int64(len(p)), ModTime: fi.ModTime()}); err != nil {
				return err
			}
			_, err = io.Copy(w, bytes.NewReader(p))
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	return buf.Bytes(), w.Close()
})

// benchmarkApply unpacks the layer, packed as pack says, with ours and
// containerd's applier in turns.
func benchmarkApply(b *testing.B, pack string) {
	plain, err := benchLayer()
	if err != nil {
		b.Fatal(err)
	}
	c := compressions[pack]
	in := newBlobs(b)
	desc := in.add(b, c.mediaType, c.compress(b, plain))
	for name, a := range map[string]diff.Applier{
		"ours":       New(Options{Blobs: in}),
		"containerd": apply.NewFileSystemApplier(in.store),
	} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(plain)))
			var cpu time.Duration
			for range b.N {
				b.StopTimer()
				root := b.TempDir()
				m := []mount.Mount{{Type: "bind", Source: root, Options: []string{"rbind", "rw"}}}
				before := cpuTime()
				b.StartTimer()
				if _, err := a.Apply(b.Context(), desc, m); err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				cpu += cpuTime() - before
				if err := os.RemoveAll(root); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
			b.ReportMetric(float64(cpu.Milliseconds())/float64(b.N), "cpu-ms/op")
		})
	}
}

// cpuTime is what the process and its children have used so far. On a busy
// machine it says more than the clock.
func cpuTime() (sum time.Duration) {
	for _, who := range []int{unix.RUSAGE_SELF, unix.RUSAGE_CHILDREN} {
		var ru unix.Rusage
		if err := unix.Getrusage(who, &ru); err != nil {
			panic(err)
		}
		sum += time.Duration(ru.Utime.Nano() + ru.Stime.Nano())
	}
	return sum
}

func BenchmarkApplyPlain(b *testing.B) { benchmarkApply(b, "plain") }
func BenchmarkApplyGzip(b *testing.B)  { benchmarkApply(b, "gzip") }
func BenchmarkApplyZstd(b *testing.B)  { benchmarkApply(b, "zstd") }
