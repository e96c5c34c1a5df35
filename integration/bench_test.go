package integration

import (
	"context"
	"fmt"
	"os"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/imagewolf/imagewolf/integration/harness"
)

// BenchmarkLone compares a lone node's pull, unpacking included, through
// ImageWolf with one through containerd's builtin store, alternated, each with
// a fresh store. The ratio is of the medians. Run it on a quiet machine with
//
//	go test -run '^$' -bench Lone -benchtime 3x -timeout 30m
func BenchmarkLone(b *testing.B) {
	b.Run("files", func(b *testing.B) {
		// One layer of real files, 300 MB packed or a little more.
		files, err := harness.RealFiles("/usr/local", "/usr/lib", "/usr/share")
		if err != nil {
			b.Fatal(err)
		}
		lone(b, files.Take(1000*mib))
	})
	b.Run("random", func(b *testing.B) { lone(b, harness.Random(1024*mib)) })
}

func lone(b *testing.B, content harness.Content) {
	ctx := context.Background()
	layer, err := harness.NewLayer(env, harness.Gzip, content)
	if err != nil {
		b.Fatal(err)
	}
	img, err := registry.Push(ctx, fmt.Sprintf("lone-%d", time.Now().UnixNano()), layer)
	if err != nil {
		b.Fatal(err)
	}
	var builtin, wolf, commit []float64
	i := 0
	for b.Loop() {
		for _, direct := range []bool{true, false} {
			i++
			took, wait := loneOnce(ctx, b, img, fmt.Sprintf("l%dn", i), direct)
			if direct {
				builtin = append(builtin, took)
			} else {
				wolf, commit = append(wolf, took), append(commit, wait)
			}
		}
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(float64(img.Bytes())/mib, "MiB")
	b.ReportMetric(median(builtin), "builtin-s")
	b.ReportMetric(median(wolf), "imagewolf-s")
	b.ReportMetric(median(wolf)/median(builtin), "ratio")
	b.ReportMetric(median(commit), "commit-s")
	b.Logf("builtin %.2f, imagewolf %.2f s", builtin, wolf)
}

// loneOnce returns the seconds of a pull on a new node, and those between the
// layer's last byte from the registry and its commit.
func loneOnce(ctx context.Context, b *testing.B, img *harness.Image, name string, direct bool) (took, commit float64) {
	c, err := harness.NewCluster(ctx, env, harness.ClusterOptions{
		Name: name, Nodes: 1, Version: harness.V2, Direct: direct,
		Hosts: map[string]string{registry.Host: "http://" + registry.Host},
	})
	if err != nil {
		b.Fatal(err)
	}
	defer func() {
		if err := c.Close(); err != nil {
			b.Error(err)
		}
	}()
	registry.Reset()
	n, committed := c.Nodes[0], make(chan time.Time, 1)
	watching, stop := context.WithCancel(ctx)
	defer stop()
	go func() {
		err := harness.Poll(watching, time.Millisecond, func() error {
			_, err := os.Stat(n.BlobPath(img.Layer(0)))
			return err
		})
		if err == nil {
			committed <- time.Now()
		}
	}()
	unix.Sync() // neither pays for what the one before it has left to be written
	began := time.Now()
	if err := n.Pull(ctx, "lone", img.Ref); err != nil {
		b.Fatal(err, c.Logs())
	}
	took = time.Since(began).Seconds()
	gets := registry.Gets(img.Layer(0))
	if len(gets) != 1 {
		b.Fatalf("%d requests for the layer", len(gets))
	}
	if n.Wolf != nil {
		if rss, err := n.Wolf.Process().RSS(); err == nil {
			b.Logf("imagewolf's resident memory after the pull: %d MiB", rss/mib)
		}
	}
	return took, (<-committed).Sub(gets[0].Ended).Seconds()
}

func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	return v[len(v)/2]
}
