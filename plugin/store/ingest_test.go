package store

import (
	"bytes"
	"context"
	"crypto/sha256"
	"hash"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const size = 300_000

func TestPullFromRegistry(t *testing.T) {
	s := open(t, Options{Filler: &filler{}}) // Fill returns at once
	b, d := random(size, 1)
	w := writer(t, s, refFor("a", d), size)
	wait(t, w)
	if got := offset(t, w); got != 0 {
		t.Fatalf("offset %d", got)
	}
	for p := range slices.Chunk(b, 70_000) {
		write(t, w, p)
	}
	if got := offset(t, w); got != size {
		t.Fatalf("offset %d after the last byte", got)
	}
	if v := visible(t, s); v[d] {
		t.Fatal("visible before the commit")
	}
	commit(t, w, size, d)
	if v := visible(t, s); !v[d] {
		t.Fatal("not visible after the commit")
	}
	got, err := content.ReadBlob(t.Context(), s, ocispec.Descriptor{Digest: d})
	if err != nil || !bytes.Equal(got, b) {
		t.Fatalf("read %d bytes: %v", len(got), err)
	}
}

func TestPullFromPeersOnly(t *testing.T) {
	b, d := random(size, 1)
	seeding := make(chan struct{})
	f := &filler{fill: func(_ context.Context, in *Ingest) {
		peer(t, in, b, size/2, size)
		peer(t, in, b, 0, size/2)
		until(t, in, func(st State) bool { return st.Whole })
		<-seeding // goes on seeding after the blob is whole
		got := make([]byte, size)
		if _, err := in.ReadAt(got, 0); err != nil || !bytes.Equal(got, b) {
			t.Errorf("read while seeding: %v", err)
		}
	}}
	s := open(t, Options{Filler: f})
	w := writer(t, s, refFor("a", d), size)
	wait(t, w)
	if got := offset(t, w); got != size {
		t.Fatalf("offset %d", got)
	}
	commit(t, w, size, d)
	close(seeding)
}

// The prefix comes from peers, the rest from the registry, and the peers bring
// what the registry has yet to come to.
func TestPullFromBoth(t *testing.T) {
	b, d := random(size, 1)
	released := make(chan struct{})
	f := &filler{fill: func(ctx context.Context, in *Ingest) {
		peer(t, in, b, 0, 100_000)
		if !in.Fetch() {
			t.Error("nobody waited")
		}
		if in.Fetch() {
			t.Error("released twice")
		}
		peer(t, in, b, 200_000, 250_000)
		close(released)
		<-ctx.Done()
	}}
	s := open(t, Options{Filler: f})
	w := writer(t, s, refFor("a", d), size)
	wait(t, w)
	<-released
	if got := offset(t, w); got != 100_000 {
		t.Fatalf("offset %d", got)
	}
	// What is present is not believed again: these bytes would be wrong.
	p := bytes.Clone(b[100_000:])
	clear(p[100_000:150_000])
	write(t, w, p)
	commit(t, w, size, d)
}

// A client that was sent to the registry goes on there, from its own offset,
// also when others make the blob whole meanwhile.
func TestReleasedStreamIsOvertaken(t *testing.T) {
	s := open(t, Options{})
	b, d := random(size, 1)
	w, idle := writer(t, s, refFor("a", d), size), writer(t, s, refFor("b", d), size)
	told := writer(t, s, refFor("c", d), size)
	wait(t, w)
	write(t, w, b[:1000])
	if got := offset(t, told); got > 1000 {
		t.Fatalf("offset %d", got)
	}
	in := w.(*stream).in
	peer(t, in, b, 500, size)
	until(t, in, func(st State) bool { return st.Whole })
	if got := offset(t, idle); got != size {
		t.Fatalf("idle stream's offset %d", got)
	}
	for at := int64(1000); at < size; at += 1000 {
		if got := offset(t, w); got != at {
			t.Fatalf("offset %d, want %d", got, at)
		}
		write(t, w, b[at:at+1000])
	}
	commit(t, w, size, d)
	commit(t, idle, size, d)

	// One that never waited goes on from what it was told at first.
	told.(*stream).pos = 1000
	if got := offset(t, told); got != size {
		t.Fatalf("offset %d", got)
	}
	write(t, told, b[1000:])
	commit(t, told, size, d)
}

// gatedHash lets the first Write go on only when the test says so.
type gatedHash struct {
	hash.Hash
	entered, leave chan struct{}
}

func (h *gatedHash) Write(p []byte) (int, error) {
	close(h.entered)
	<-h.leave
	return h.Hash.Write(p)
}

// What is thrown away while it is being hashed must not count.
func TestTruncateWhileHashing(t *testing.T) {
	s := open(t, Options{})
	b, d := random(size, 1)
	junk, _ := random(1000, 2)
	w := writer(t, s, refFor("a", d), size)
	h := &gatedHash{sha256.New(), make(chan struct{}), make(chan struct{})}
	w.(*stream).in.hash = h
	write(t, w, junk)
	<-h.entered
	if err := w.Truncate(0); err != nil {
		t.Fatal(err)
	}
	close(h.leave)
	write(t, w, b)
	commit(t, w, size, d)
}

func TestWriteAtLeavesPresentBytesAlone(t *testing.T) {
	s := open(t, Options{})
	b, d := random(size, 1)
	w := writer(t, s, refFor("a", d), size)
	in := w.(*stream).in
	peer(t, in, b, 1000, 2000)
	junk := make([]byte, 3000)
	if n, err := in.WriteAt(junk, 0); n != len(junk) || err != nil {
		t.Fatal(n, err)
	}
	got := make([]byte, 1000)
	if _, err := in.ReadAt(got, 1000); err != nil || !bytes.Equal(got, b[1000:2000]) {
		t.Fatalf("present bytes changed (%v)", err)
	}
	// The junk beside them was never marked, so a stream overwrites it.
	write(t, w, b)
	commit(t, w, size, d)
}

func TestRangesOfPeersAreChecked(t *testing.T) {
	s := open(t, Options{})
	_, d := random(size, 1)
	in := writer(t, s, refFor("a", d), size).(*stream).in
	const most = 1<<63 - 1
	for _, r := range [][2]int64{{-1, 5}, {0, -1}, {size, 1}, {size - 1, 2}, {most, most}, {1, most}} {
		wantErr(t, in.MarkPresent(r[0], r[1]), errdefs.ErrOutOfRange)
		if in.Present(r[0], r[1]) {
			t.Errorf("%v is present", r)
		}
	}
	_, err := in.WriteAt(make([]byte, 2), size-1)
	wantErr(t, err, errdefs.ErrOutOfRange)
}

func TestStatusOfRef(t *testing.T) {
	s := open(t, Options{})
	b, d := random(size, 1)
	ref := refFor("a", d)
	w := writer(t, s, ref, size)
	in := w.(*stream).in
	at := func() int64 {
		st, err := s.Status(t.Context(), ref)
		if err != nil || st.Total != size || st.StartedAt.IsZero() || st.UpdatedAt.Before(st.StartedAt) {
			t.Fatalf("status %+v: %v", st, err)
		}
		return st.Offset
	}
	var last int64
	for lo := size - 30_000; lo > 0; lo -= 30_000 { // from the end on: the prefix stays 0
		peer(t, in, b, lo, lo+30_000)
		if now := at(); now <= last || now >= size {
			t.Fatalf("offset %d after %d", now, last)
		} else {
			last = now
		}
	}
	if got := offset(t, w); got != 0 {
		t.Fatalf("stream's offset %d", got)
	}
	write(t, w, b)
	if got := at(); got != size {
		t.Fatalf("offset %d when whole", got)
	}
	list, err := s.ListStatuses(t.Context(), "ref=="+ref)
	if err != nil || len(list) != 1 || list[0].Ref != ref {
		t.Fatalf("list %v: %v", list, err)
	}
	if list, err := s.ListStatuses(t.Context(), "ref==x"); err != nil || len(list) != 0 {
		t.Fatalf("list %v: %v", list, err)
	}
	commit(t, w, size, d)
	_, err = s.Status(t.Context(), ref)
	wantErr(t, err, errdefs.ErrNotFound)
}

// All is there but not checked yet: nobody may be told the whole size.
func TestNeverTotalBeforeWhole(t *testing.T) {
	s := open(t, Options{})
	_, d := random(size, 1)
	ref := refFor("a", d)
	w := writer(t, s, ref, size)
	in := w.(*stream).in
	in.mu.Lock()
	in.hashing = true // keeps the hasher away
	in.present.add(0, size)
	in.mu.Unlock()
	if got := offset(t, w); got != size-1 {
		t.Errorf("stream's offset %d", got)
	}
	if st, err := s.Status(t.Context(), ref); err != nil || st.Offset != size-1 {
		t.Errorf("ref's status %+v: %v", st, err)
	}
	if in.Fetch() {
		t.Error("released although nothing is missing")
	}
	in.mu.Lock()
	in.hashing, in.present = false, ranges{}
	in.mu.Unlock()
}

func TestPanicInFill(t *testing.T) {
	runs, counted := 0, 0
	s := open(t, Options{
		Filler:   &filler{fill: func(context.Context, *Ingest) { runs++; panic("boom") }},
		Panicked: func() { counted++ },
	})
	b, d := random(size, 1)
	w := writer(t, s, refFor("a", d), size)
	wait(t, w)
	write(t, w, b)
	commit(t, w, size, d)
	if runs != 1 || counted != 1 {
		t.Errorf("%d runs, %d panics counted", runs, counted)
	}
}

// A later Wait starts Fill again, and sees that somebody writes already.
func TestFillStartsAgain(t *testing.T) {
	states := make(chan State, 4)
	s := open(t, Options{Filler: &filler{fill: func(_ context.Context, in *Ingest) {
		st, _ := in.Watch()
		states <- st
	}}})
	_, d := random(size, 1)
	w1, w2 := writer(t, s, refFor("a", d), size), writer(t, s, refFor("b", d), size)
	wait(t, w1)
	<-states
	until(t, w1.(*stream).in, func(State) bool { return true })
	done := waitAsync(t, w2)
	if st := <-states; st.Writing != 1 || st.Waiting != 1 {
		t.Errorf("state %+v", st)
	}
	if err := w1.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestWrongBytesFromPeers(t *testing.T) {
	b, d := random(size, 1)
	junk, _ := random(size, 2)
	f := &filler{fill: func(ctx context.Context, in *Ingest) {
		peer(t, in, junk, 0, size)
		st := until(t, in, func(st State) bool { return st.Failed == 1 })
		if st.Present != 0 || st.Prefix != 0 || st.Waiting != 1 {
			t.Errorf("state %+v", st)
		}
		in.Fetch()
		<-ctx.Done()
	}}
	s := open(t, Options{Filler: f})
	w := writer(t, s, refFor("a", d), size)
	wait(t, w)
	if got := offset(t, w); got != 0 {
		t.Fatalf("offset %d", got)
	}
	write(t, w, b)
	commit(t, w, size, d)
}

// A client was sent to the registry behind a prefix that is wrong, which shows
// only at the end. Its own bytes are kept, and the prefix may be brought again.
func TestWrongPrefix(t *testing.T) {
	const k = 1000
	b, d := random(size, 1)
	junk, _ := random(size, 2)
	for _, tc := range []struct {
		name  string
		again []byte // what Fill brings next; nil: nothing
		stay  bool
	}{
		{"right the second time", b, true},
		{"wrong again", junk, true},
		{"nothing comes", nil, true},
		{"nobody is there any more", nil, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := &filler{fill: func(ctx context.Context, in *Ingest) {
				peer(t, in, junk, 0, k)
				in.Fetch()
				st := until(t, in, func(st State) bool { return st.Failed == 1 })
				if st.Present != size-k || st.Prefix != 0 || st.Writing != 1 {
					t.Errorf("state %+v", st)
				}
				if tc.again != nil {
					peer(t, in, tc.again, 0, k)
				}
				if tc.stay {
					<-ctx.Done()
				}
			}}
			s := open(t, Options{Filler: f, MaxWait: 50 * time.Millisecond})
			w := writer(t, s, refFor("a", d), size)
			wait(t, w)
			if got := offset(t, w); got != k {
				t.Fatalf("offset %d", got)
			}
			write(t, w, b[k:size-1])
			_, err := w.Write(b[size-1:])
			if bytes.Equal(tc.again, b) {
				if err != nil {
					t.Fatal(err)
				}
				commit(t, w, size, d)
				return
			}
			wantErr(t, err, errdefs.ErrFailedPrecondition)
			if !strings.Contains(err.Error(), "unexpected commit digest") {
				t.Error(err)
			}
		})
	}
}

// A client was sent to the registry behind a prefix that is known to be wrong
// before the end.
func TestForget(t *testing.T) {
	const k = 1000
	b, d := random(size, 1)
	junk, _ := random(size, 2)
	for _, again := range [][]byte{b, nil} {
		f := &filler{fill: func(ctx context.Context, in *Ingest) {
			peer(t, in, junk, 0, k)
			in.Fetch()
			until(t, in, func(st State) bool { return st.Present == size-1 })
			view := in.View()
			in.Forget()
			st, _ := in.Watch()
			if want := int64(size - 1 - k); st.Present != want || st.Brought != want || st.Prefix != 0 || st.Writing != 1 {
				t.Errorf("state %+v", st)
			}
			if _, err := view.WriteAt(junk[:k], 0); err == nil {
				t.Error("what was there before is brought again")
			}
			in.Forget() // has nothing more to do
			if again == nil {
				return
			}
			until(t, in, func(st State) bool { return st.Present == size-k })
			peer(t, in, again, 0, k)
			<-ctx.Done()
		}}
		s := open(t, Options{Filler: f, MaxWait: 10 * time.Second})
		w := writer(t, s, refFor("a", d), size)
		wait(t, w)
		write(t, w, b[k:size-1])
		in := w.(*stream).in
		until(t, in, func(st State) bool { return st.Prefix == 0 })
		_, err := w.Write(b[size-1:])
		if again == nil {
			wantErr(t, err, errdefs.ErrFailedPrecondition)
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		commit(t, w, size, d)
		in.Forget()
		if st, _ := in.Watch(); !st.Whole || st.Present != size {
			t.Errorf("state %+v", st)
		}
	}
}

func TestWrongBytesFromRegistry(t *testing.T) {
	s := open(t, Options{})
	b, d := random(size, 1)
	junk, junkDigest := random(size, 2)
	ref := refFor("a", d)
	w := writer(t, s, ref, size)
	wait(t, w)
	write(t, w, junk[:size-1])
	_, err := w.Write(junk[size-1:])
	wantErr(t, err, errdefs.ErrFailedPrecondition)
	for _, want := range []string{"unexpected commit digest " + junkDigest.String(), "expected " + d.String()} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q does not say %q", err, want)
		}
	}
	wantErr(t, w.Commit(t.Context(), size, d), errdefs.ErrFailedPrecondition)

	w = writer(t, s, ref, size) // the retry begins at 0
	wait(t, w)
	if got := offset(t, w); got != 0 {
		t.Fatalf("offset %d", got)
	}
	write(t, w, b)
	commit(t, w, size, d)
}

// Who was told an offset before the bytes were thrown away must not write there.
func TestOffsetThatIsNoMore(t *testing.T) {
	s := open(t, Options{})
	b, d := random(size, 1)
	junk, _ := random(size, 2)
	w := writer(t, s, refFor("a", d), size)
	in := w.(*stream).in
	peer(t, in, junk, 0, 1000)
	if got := offset(t, w); got != 1000 {
		t.Fatalf("offset %d", got)
	}
	peer(t, in, junk, 1000, size)
	until(t, in, func(st State) bool { return st.Failed == 1 })
	_, err := w.Write(b[1000:2000])
	wantErr(t, err, errdefs.ErrFailedPrecondition)
}

func TestCommitOfTooLittle(t *testing.T) {
	s := open(t, Options{})
	b, d := random(size, 1)
	_, other := random(size, 2)
	ref := refFor("a", d)
	w := writer(t, s, ref, size)
	write(t, w, b[:1000])
	err := w.Commit(t.Context(), size, d)
	wantErr(t, err, errdefs.ErrFailedPrecondition)
	if !strings.Contains(err.Error(), "unexpected commit size 1000, expected 300000") {
		t.Error(err)
	}
	wantErr(t, w.Commit(t.Context(), size, d), errdefs.ErrFailedPrecondition) // closed

	w = writer(t, s, ref, size)
	if got := offset(t, w); got != 1000 {
		t.Fatalf("offset %d", got)
	}
	write(t, w, b[1000:])
	wantErr(t, w.Commit(t.Context(), size, other), errdefs.ErrFailedPrecondition)
	w = writer(t, s, ref, size)
	wantErr(t, w.Commit(t.Context(), size+1, d), errdefs.ErrFailedPrecondition)
	w = writer(t, s, ref, size)
	if _, err := w.Write(b[:1]); err == nil {
		t.Error("wrote beyond the end")
	}
	commit(t, w, size, "")
}

func TestTruncate(t *testing.T) {
	s := open(t, Options{})
	b, d := random(size, 1)
	junk, _ := random(1000, 2)
	w1 := writer(t, s, refFor("a", d), size)
	wantErr(t, w1.Truncate(5), errdefs.ErrNotImplemented)
	write(t, w1, junk)
	if err := w1.Truncate(0); err != nil { // alone: the junk goes
		t.Fatal(err)
	}
	if st, _ := w1.(*stream).in.Watch(); st.Present != 0 || offset(t, w1) != 0 {
		t.Fatalf("state %+v", st)
	}
	write(t, w1, b[:1000])
	w2 := writer(t, s, refFor("b", d), size)
	if got := offset(t, w2); got > 1000 {
		t.Fatalf("offset %d", got)
	}
	if err := w1.Truncate(0); err != nil { // not alone: what is there stays
		t.Fatal(err)
	}
	if st, _ := w1.(*stream).in.Watch(); st.Present != 1000 || offset(t, w1) != 0 {
		t.Fatalf("state %+v", st)
	}
	write(t, w1, b)
	commit(t, w1, size, d)
	commit(t, w2, size, d)

	w3 := writer(t, s, refFor("c", d), size) // whole already
	if err := w3.Truncate(0); err != nil || offset(t, w3) != 0 {
		t.Fatal(err)
	}
	wantErr(t, w3.Commit(t.Context(), size, d), errdefs.ErrFailedPrecondition)
}

// An abort ends the ref's stream and no other; what has come of the blob is
// resumed by whoever wants it next, or removed when nobody does.
func TestAbort(t *testing.T) {
	started, leave := make(chan *Ingest, 1), make(chan struct{})
	f := &filler{fill: func(_ context.Context, in *Ingest) {
		started <- in
		<-leave
	}}
	s := open(t, Options{Filler: f})
	b, d := random(size, 1)
	refA, refB := refFor("a", d), refFor("b", d)
	wA, wB := writer(t, s, refA, size), writer(t, s, refB, size)
	doneA := waitAsync(t, wA)
	in := <-started
	peer(t, in, b, 0, 1000)

	if err := s.Abort(t.Context(), refA); err != nil {
		t.Fatal(err)
	}
	wantErr(t, <-doneA, errdefs.ErrAborted)
	if got := offset(t, wB); got != 1000 {
		t.Fatalf("the other ref's offset is %d", got)
	}
	if err := s.Abort(t.Context(), refB); err != nil {
		t.Fatal(err)
	}
	wantErr(t, wB.Commit(t.Context(), size, d), errdefs.ErrAborted)
	if _, err := s.Status(t.Context(), refB); !errdefs.IsNotFound(err) {
		t.Errorf("status of an aborted ref: %v", err)
	}
	close(leave)

	w := writer(t, s, refA, size)
	if got := offset(t, w); got != 1000 {
		t.Fatalf("offset %d after the abort", got)
	}
	write(t, w, b[1000:])
	commit(t, w, size, d)
}

// Staging that no ref claims goes sooner than one that is to be resumed.
func TestUnclaimedStagingGoesSooner(t *testing.T) {
	s := open(t, Options{})
	b, claimed := random(size, 1)
	c, unclaimed := random(size, 2)
	for d, p := range map[digest.Digest][]byte{claimed: b, unclaimed: c} {
		w := writer(t, s, refFor("a", d), size)
		write(t, w, p[:1000])
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Abort(t.Context(), refFor("a", unclaimed)); err != nil {
		t.Fatal(err)
	}
	s.work.Wait() // kept on disk, dropped from memory
	s.sweep(time.Now().Add(unclaimedAfter / 2))
	if !exists(t, s.stagingPath(unclaimed)) {
		t.Error("unclaimed staging is gone at once")
	}
	s.sweep(time.Now().Add(2 * unclaimedAfter))
	if exists(t, s.stagingPath(unclaimed)) {
		t.Error("unclaimed staging is there after its time")
	}
	if !exists(t, s.stagingPath(claimed)) {
		t.Error("staging of a ref is gone before its time")
	}
	s.sweep(time.Now().Add(2 * abandonedAfter))
}

// Streams gone, the swarm brings the rest: the blob is kept, hidden, and shows
// in no list meanwhile.
func TestFillWithoutStreams(t *testing.T) {
	b, d := random(size, 1)
	gone := make(chan struct{})
	f := &filler{hear: make(chan struct{}, 8)}
	f.fill = func(_ context.Context, in *Ingest) {
		<-gone
		if st, _ := in.Watch(); st.Waiting+st.Writing != 0 {
			t.Errorf("state %+v", st)
		}
		peer(t, in, b, 0, size)
		until(t, in, func(st State) bool { return st.Whole })
	}
	s := open(t, Options{Filler: f, SeedQuota: 1 << 30})
	defer runStore(t, s)()
	ref := refFor("a", d)
	ctx, cancel := context.WithCancel(t.Context())
	w := writer(t, s, ref, size)
	in := w.(*stream).in
	done := make(chan error, 1)
	go func() { done <- w.(Waiter).Wait(ctx) }()
	until(t, in, func(st State) bool { return st.Waiting == 1 })
	cancel()
	wantErr(t, <-done, context.Canceled)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	close(gone)
	<-f.hear
	if visible(t, s)[d] {
		t.Error("visible")
	}
	blob, err := s.OpenBlob(d)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = blob.Close() }()
	if got, err := io.ReadAll(io.NewSectionReader(blob, 0, blob.Size())); err != nil || !bytes.Equal(got, b) {
		t.Errorf("read %d bytes: %v", len(got), err)
	}
}

// runStore runs Run until the returned function is called.
func runStore(t testing.TB, s *Store) func() {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := s.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	return func() {
		cancel()
		wg.Wait()
	}
}
