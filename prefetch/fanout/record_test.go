package fanout

import (
	"encoding/json"
	"errors"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	imagewolfv1 "github.com/imagewolf/imagewolf/api/v1"
)

// That the disk is full says nothing against the requests that are in the file.
func TestAFullDiskLosesNoRequests(t *testing.T) {
	path := filepath.Join(t.TempDir(), "prefetch.db")
	if err := os.Symlink("/dev/full", path); err != nil {
		t.Fatal(err)
	}
	if _, _, err := openDB(path, "a", slog.New(slog.DiscardHandler)); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("got %v", err)
	}
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("it was set aside: %v", err)
	}
}

// FuzzRecord reads anything as a record on disk: what is taken is one that can be gone
// on with, and is kept as it was read.
func FuzzRecord(f *testing.F) {
	r := newRecord(&imagewolfv1.StartRequest{
		Request: &imagewolfv1.PrefetchRequest{Id: "x", Image: image}, Nodes: []string{"a", "b"}, Coordinator: "a", Created: 1787217266402,
	}, time.UnixMilli(1787217266402), "a")
	r.untold["b"], r.asked = true, 5
	for range 2 {
		value, err := r.encode()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(value)
		r.state.State, r.state.Digest, r.canceled = done, testDigest, true
	}
	f.Add([]byte(`{"start":"","born":-1,"untold":["",""]}`))
	f.Fuzz(func(t *testing.T, value []byte) {
		r, err := decode(value, "a")
		var said stored
		if err != nil || json.Unmarshal(value, &said) != nil {
			return
		}
		if check(r.start.Request) != nil || checkNodes(r.start) != nil || r.state == nil && position(r.start.Nodes, "a") >= 0 ||
			r.born.UnixMilli() != said.Born || r.changed.UnixMilli() != said.Changed || r.canceled != said.Canceled || r.asked != said.Asked {
			t.Fatalf("%q is read as %+v", value, r)
		}
		kept, err := r.encode()
		if err != nil {
			t.Fatal(err)
		}
		again, err := decode(kept, "a")
		if err != nil {
			t.Fatalf("%q is kept as %q, and cannot be read: %v", value, kept, err)
		}
		if !proto.Equal(again.start, r.start) || !proto.Equal(again.state, r.state) || !again.born.Equal(r.born) || !again.changed.Equal(r.changed) ||
			again.canceled != r.canceled || again.asked != r.asked || !maps.Equal(again.untold, r.untold) {
			t.Errorf("%q is read as %+v, and then as %+v", value, r, again)
		}
	})
}
