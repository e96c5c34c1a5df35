package store

import (
	"context"
	"fmt"
	"io"
	"os"
	"strconv"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/plugins/content/local"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// BenchmarkWrite writes and commits a blob of random bytes in writes of 1 MiB,
// as containerd does, to this store and to containerd's own. IMAGEWOLF_BENCH_MIB
// is the blob's size in MiB; 256 unless set.
func BenchmarkWrite(b *testing.B) {
	mib := 256
	if v := os.Getenv("IMAGEWOLF_BENCH_MIB"); v != "" {
		var err error
		if mib, err = strconv.Atoi(v); err != nil {
			b.Fatal(err)
		}
	}
	data, d := random(mib<<20, 1)
	for _, tc := range []struct {
		name string
		open func(root string) (content.Store, io.Closer, error)
	}{
		{"store", func(root string) (content.Store, io.Closer, error) {
			s, err := Open(Options{Root: root})
			return s, s, err
		}},
		{"local", func(root string) (content.Store, io.Closer, error) {
			s, err := local.NewStore(root)
			return s, io.NopCloser(nil), err
		}},
	} {
		b.Run(fmt.Sprintf("%s/%dMiB", tc.name, mib), func(b *testing.B) {
			b.SetBytes(int64(len(data)))
			for b.Loop() {
				root := b.TempDir()
				s, c, err := tc.open(root)
				if err != nil {
					b.Fatal(err)
				}
				w, err := s.Writer(context.Background(), content.WithRef("layer-"+d.String()), content.WithDescriptor(ocispec.Descriptor{Size: int64(len(data))}))
				if err != nil {
					b.Fatal(err)
				}
				for at := 0; at < len(data); at += 1 << 20 {
					if _, err := w.Write(data[at : at+1<<20]); err != nil {
						b.Fatal(err)
					}
				}
				if err := w.Commit(context.Background(), int64(len(data)), d); err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				if err := c.Close(); err != nil {
					b.Fatal(err)
				}
				if err := os.RemoveAll(root); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
		})
	}
}
