package proxy

import (
	"bytes"
	"context"
	"runtime"
	"slices"
	"testing"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	"github.com/containerd/containerd/v2/core/content"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/encoding"
	protobuf "google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"
)

// keeping is a writer that keeps what it is given, and lets it be used again only
// after the next.
type keeping struct {
	content.Writer
	kept [][]byte
	was  [][]byte // copies of kept, from when it was given
	free []func()
}

func (w *keeping) WriteOwned(p []byte, free func()) (int, error) {
	w.kept, w.was, w.free = append(w.kept, p), append(w.was, bytes.Clone(p)), append(w.free, free)
	return w.Write(p)
}

// TestOwnedDataStays has a writer keep the data of all messages, large and small:
// none may be touched before it is given back.
func TestOwnedDataStays(t *testing.T) {
	w := &keeping{}
	cs := &fakeStore{Store: localStore(t, t.TempDir()), wrap: func(cw content.Writer) content.Writer {
		w.Writer = cw
		return w
	}}
	conn, _ := start(t, Options{Store: cs})
	blob, d := randomBlob(t, 9<<20)
	cw, err := client(conn).Writer(t.Context(), content.WithRef("r"), content.WithDescriptor(ocispec.Descriptor{Size: int64(len(blob)), Digest: d}))
	if err != nil {
		t.Fatal(err)
	}
	large := 0
	for at, i := 0, 0; at < len(blob); i++ {
		end := min(len(blob), at+[]int{1 << 20, 1000, 300 << 10}[i%3])
		if _, err := cw.Write(blob[at:end]); err != nil {
			t.Fatal(err)
		}
		at = end
		if at > 5<<20 { // from here on some are used again
			if free := w.free[large]; free != nil {
				free()
				w.kept[large] = w.was[large]
			}
			large++
		}
	}
	for i := range w.kept {
		if !bytes.Equal(w.kept[i], w.was[i]) {
			t.Errorf("message %d of %d bytes was overwritten while it was kept", i, len(w.was[i]))
		}
	}
	if !bytes.Equal(slices.Concat(w.was...), blob) {
		t.Error("the writer was given something else than the client wrote")
	}
	if err := cw.Commit(context.Background(), int64(len(blob)), d); err != nil {
		t.Error(err)
	}
}

// TestLargeMessagesAreNotAllocated: a message's data lies in a buffer that an
// earlier one has given back.
func TestLargeMessagesAreNotAllocated(t *testing.T) {
	raw, err := proto.Marshal(&contentapi.WriteContentRequest{Action: contentapi.WriteAction_WRITE, Offset: 7, Data: make([]byte, 1<<20)})
	if err != nil {
		t.Fatal(err)
	}
	c := codec{encoding.GetCodecV2(protobuf.Name)}
	frames := mem.BufferSlice{mem.SliceBuffer(raw[:1000]), mem.SliceBuffer(raw[1000:])}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	const n = 64
	for range n {
		var req writeRequest
		if err := c.Unmarshal(frames, &req); err != nil {
			t.Fatal(err)
		}
		req.release()
	}
	runtime.ReadMemStats(&after)
	// With the race detector a pool loses every fourth.
	if got := (after.TotalAlloc - before.TotalAlloc) / n; got > 600<<10 {
		t.Errorf("%d bytes allocated for a message of 1 MiB", got)
	}
}

// FuzzWriteRequest compares with what gRPC itself would decode.
func FuzzWriteRequest(f *testing.F) {
	for _, req := range []*contentapi.WriteContentRequest{
		{},
		{Action: contentapi.WriteAction_COMMIT, Ref: "r", Total: 5, Expected: "sha256:0", Offset: 9, Data: []byte("data"), Labels: map[string]string{"a": "b"}},
		{Offset: -1, Data: []byte{}},
	} {
		raw, err := proto.Marshal(req)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw)
		f.Add(append(raw, raw...))
	}
	f.Add([]byte{0x33, 0x34})       // a group in Data's place
	f.Add([]byte{0x32, 0x05, 0x00}) // cut short
	f.Fuzz(func(t *testing.T, raw []byte) {
		var want, got contentapi.WriteContentRequest
		wantErr := proto.Unmarshal(raw, &want)
		rest, data, err := cutData(raw)
		if err == nil {
			err = proto.Unmarshal(rest, &got)
		}
		if (err == nil) != (wantErr == nil) {
			t.Fatalf("%v, and gRPC's own says %v", err, wantErr)
		}
		if got.Data = data; err == nil && !proto.Equal(&got, &want) {
			t.Errorf("got %v, want %v", &got, &want)
		}
	})
}
