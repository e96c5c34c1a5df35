package swarm

import (
	"log/slog"
	"runtime"
	"strconv"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// BenchmarkOneToOne is one seeder and one leecher, content in memory.
func BenchmarkOneToOne(b *testing.B) {
	for _, size := range []int{64 << 20, 256 << 20} {
		b.Run(fmtMiB(size), func(b *testing.B) { transfer(b, size) })
	}
}

// BenchmarkLimits should show about the limit, in both directions.
func BenchmarkLimits(b *testing.B) {
	const limit = 20e6
	b.Run("upload", func(b *testing.B) {
		transfer(b, 40<<20, func(o *Options) { o.UploadLimit = limit })
	})
	b.Run("download", func(b *testing.B) {
		transfer(b, 40<<20, func(o *Options) { o.DownloadLimit = limit })
	})
}

func transfer(b *testing.B, size int, change ...func(*Options)) {
	data := content(size, 1)
	d := digest.FromBytes(data)
	seeder, leecher := newPeer(b, change...), newPeer(b, change...)
	from := seeder.open(b, d, wholeMemory(data))
	all := offerAll(b, from)
	b.SetBytes(int64(size))
	b.ResetTimer()
	for b.Loop() {
		b.StopTimer()
		sink := newMemory(size)
		runtime.GC()
		b.StartTimer()
		to, err := leecher.Open(d, int64(size), sink)
		if err != nil {
			b.Fatal(err)
		}
		for i, pieces := range all {
			if err := to.Leech(i, pieces, addrs(seeder)); err != nil {
				b.Fatal(err)
			}
		}
		sink.await(b, 0, int64(size))
		b.StopTimer()
		if err := to.Close(); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}

// BenchmarkIdle reports what a segment costs that is offered and that nobody
// asks for.
func BenchmarkIdle(b *testing.B) {
	const blobs = 1000
	data := content(minSegment, 1)
	source := wholeMemory(data)
	for b.Loop() {
		p := newPeer(b, func(o *Options) { o.Log = slog.New(slog.DiscardHandler) })
		first, err := p.Open(digest.FromString("first"), minSegment, source)
		if err != nil {
			b.Fatal(err)
		}
		pieces, err := first.Offer(b.Context(), 0, nil)
		if err != nil {
			b.Fatal(err)
		}
		heap, goroutines := resting()
		start := time.Now()
		for i := range blobs {
			blob, err := p.Open(digest.FromString(name(i)), minSegment, source)
			if err != nil {
				b.Fatal(err)
			}
			if _, err := blob.Offer(b.Context(), 0, pieces); err != nil {
				b.Fatal(err)
			}
		}
		b.ReportMetric(float64(time.Since(start).Microseconds())/blobs, "µs/add")
		heap2, goroutines2 := resting()
		b.ReportMetric(float64(heap2-heap)/blobs/1024, "KiB/torrent")
		b.ReportMetric(float64(goroutines2-goroutines)/blobs, "goroutines/blob")
		p.stop()
	}
}

// resting returns the live heap and the number of goroutines.
func resting() (heap int64, goroutines int) {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc), runtime.NumGoroutine()
}

func fmtMiB(n int) string { return strconv.Itoa(n>>20) + "MiB" }
