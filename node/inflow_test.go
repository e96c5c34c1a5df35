package node

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"maps"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/vishvananda/netlink"
)

// A fetch whose connection moves is slow; one whose connection is silent, or whose
// node only has connections that move too much to be it, is not known to be.
func TestInflowTellsSlowFromSilent(t *testing.T) {
	const kib = 1 << 10
	tests := []struct {
		name    string
		fetches int
		perTick []uint64 // bytes that come in on each connection in half a second
		want    bool
	}{
		{"nothing comes in", 1, []uint64{0}, false},
		{"keep-alives only", 1, []uint64{100}, false},
		{"a slow registry", 1, []uint64{50 * kib}, true},
		{"a very slow one", 1, []uint64{12 * kib}, true},
		{"a program that gets a little all the time", 1, []uint64{6 * kib}, false},
		{"somebody else's download", 1, []uint64{900 * kib}, false},
		{"a slow registry beside somebody else's download", 1, []uint64{900 * kib, 50 * kib}, true},
		{"three fetches on one connection", 3, []uint64{200 * kib}, true},
		{"one fetch cannot have so much outstanding", 1, []uint64{200 * kib}, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				received := map[uint32]uint64{}
				f := &inflow{log: slog.New(slog.DiscardHandler), connections: func() (map[uint32]uint64, error) {
					out := map[uint32]uint64{}
					for i, n := range tt.perTick {
						received[uint32(i)] += n
						out[uint32(i)] = received[uint32(i)]
					}
					return out, nil
				}}
				since, got := time.Now(), false
				for range 16 { // 8 seconds
					got = f.receiving(time.Now(), since, tt.fetches, time.Minute)
					time.Sleep(sampleEvery)
				}
				if got != tt.want {
					t.Errorf("receiving = %v, want %v", got, tt.want)
				}
			})
		})
	}
}

// What comes in now is known after three seconds, of all connections together, those that
// are new among them, and no longer than it is looked at.
func TestInflowRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const kib = 1 << 10
		received := map[uint32]uint64{1: 80 << 20}
		f := &inflow{log: slog.New(slog.DiscardHandler), connections: func() (map[uint32]uint64, error) { return maps.Clone(received), nil }}
		since := time.Now()
		time.Sleep(quietFor)
		for tick := range 20 { // 10 seconds
			f.receiving(time.Now(), since, 1, time.Minute)
			got, want := f.rate(time.Now()), float64(0)
			if time.Duration(tick)*sampleEvery >= flowSpan {
				want = 150 * kib
			}
			if got != want {
				t.Fatalf("%v after the first look: %v bytes/s, want %v", time.Duration(tick)*sampleEvery, got, want)
			}
			time.Sleep(sampleEvery)
			received[1] += 50 * kib
			if tick >= 10 { // it goes on over another
				received[1] -= 50 * kib
				received[2] += 50 * kib
			}
			received[3] += 25 * kib
		}
		time.Sleep(flowSpan)
		if got := f.rate(time.Now()); got != 0 {
			t.Errorf("%v bytes/s, and nobody has looked for %v", got, flowSpan)
		}
		f.receiving(time.Now(), since, 1, time.Minute)
		if got := f.rate(time.Now()); got != 0 {
			t.Errorf("%v bytes/s, and nobody had looked for %v before", got, flowSpan)
		}
	})
}

func TestInflowForgetsWhatWasBeforeTheSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var n uint64
		f := &inflow{log: slog.New(slog.DiscardHandler), connections: func() (map[uint32]uint64, error) {
			n += 100 << 10
			return map[uint32]uint64{7: n}, nil
		}}
		since := time.Now()
		for range 120 { // a minute; every four seconds a chunk is handed on
			if time.Since(since) > 4*time.Second {
				since = time.Now()
			}
			got := f.receiving(time.Now(), since, 1, time.Minute)
			if quiet := time.Since(since); quiet >= time.Second && !got {
				t.Fatalf("%v after a chunk: not receiving", quiet)
			}
			time.Sleep(sampleEvery)
		}
		if most := int(inflowSpan/sampleEvery) + 2; len(f.samples) > most {
			t.Errorf("%d samples are kept, at most %d are needed", len(f.samples), most)
		}
	})
}

// Where nodes wait for long, a fetch may be slower than the looks that are kept are old.
func TestInflowOverALongWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var n uint64
		f := &inflow{log: slog.New(slog.DiscardHandler), connections: func() (map[uint32]uint64, error) {
			n += 5 << 9 // 5 KiB/s
			return map[uint32]uint64{7: n}, nil
		}}
		since := time.Now()
		for range 240 { // two minutes
			if got := f.receiving(time.Now(), since, 1, 4*time.Minute); time.Since(since) > inflowLately && !got {
				t.Fatalf("%v after the last chunk: not receiving", time.Since(since))
			}
			time.Sleep(sampleEvery)
		}
	})
}

func TestInflowWithoutTheKernelsWord(t *testing.T) {
	looks := 0
	f := &inflow{log: slog.New(slog.DiscardHandler), connections: func() (map[uint32]uint64, error) {
		looks++
		return nil, errors.New("no such thing here")
	}}
	now := time.Now()
	for range 100 {
		if f.receiving(now, now.Add(-time.Minute), 1, time.Minute) {
			t.Error("receiving, although nothing is known")
		}
		now = now.Add(lookAgain / 50)
	}
	if looks != 2 {
		t.Errorf("%d looks in twice the time after which one that failed is tried again", looks)
	}
}

// The kernel is asked for real: what this process has is not listed.
func TestConnectionsOfOthersAreNotOurs(t *testing.T) {
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close() //nolint:errcheck // the end of the test
	accepted := make(chan net.Conn, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			c = nil
		}
		accepted <- c
	}()
	out, err := (&net.Dialer{}).DialContext(context.Background(), "tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close() //nolint:errcheck // the end of the test
	in := <-accepted
	if in == nil {
		t.Fatal("not accepted")
	}
	defer in.Close() //nolint:errcheck // the end of the test
	if _, err := out.Write(make([]byte, 10_000)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(in, make([]byte, 10_000)); err != nil {
		t.Fatal(err)
	}
	all, err := netlink.SocketDiagTCPInfo(netlink.FAMILY_V4)
	if err != nil {
		t.Fatal(err)
	}
	port := uint16(l.Addr().(*net.TCPAddr).Port)
	others, err := connectionsOfOthers()
	if err != nil {
		t.Fatal(err)
	}
	var seen bool
	for _, c := range all {
		if c.InetDiagMsg.ID.SourcePort != port || c.TCPInfo.State != netlink.TCP_ESTABLISHED {
			continue
		}
		seen = true
		if c.TCPInfo.Bytes_received != 10_000 {
			t.Errorf("the kernel says %d bytes were received, want 10000", c.TCPInfo.Bytes_received)
		}
		if _, ok := others[c.InetDiagMsg.INode]; ok {
			t.Error("a connection of this process is taken for another's")
		}
	}
	if !seen {
		t.Error("the kernel does not list the connection")
	}
}
