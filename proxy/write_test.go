package proxy

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// filling is a writer that puts the first bytes of a blob there by itself when
// it is waited for.
type filling struct {
	content.Writer
	fill    []byte
	waiting chan struct{}               // if set, receives when Wait begins
	release func(context.Context) error // if set, Wait returns what it returns
	waits   int
	owned   int
}

func (w *filling) Wait(ctx context.Context) error {
	w.waits++
	if w.waiting != nil {
		w.waiting <- struct{}{}
	}
	if w.release != nil {
		if err := w.release(ctx); err != nil {
			return err
		}
	}
	_, err := w.Write(w.fill)
	return err
}

func (w *filling) WriteOwned(p []byte, _ func()) (int, error) {
	w.owned++
	return w.Write(p)
}

// fillingStore serves writers that fill themselves with fill.
func fillingStore(t *testing.T, w *filling) content.Store {
	return &fakeStore{Store: localStore(t, t.TempDir()), wrap: func(cw content.Writer) content.Writer {
		w.Writer = cw
		return w
	}}
}

func until(ctx context.Context) error {
	<-ctx.Done()
	return ctx.Err()
}

func TestFilledWhileWaiting(t *testing.T) {
	const size = 5000
	blob, d := randomBlob(t, size)
	for name, filled := range map[string]int{"full": size, "partial": 3000, "nothing": 0} {
		t.Run(name, func(t *testing.T) {
			w := &filling{fill: blob[:filled]}
			cs := fillingStore(t, w)
			conn, _ := start(t, Options{Store: cs})
			cw, err := client(conn).Writer(t.Context(), content.WithRef("k8s.io/1/layer-"+d.String()))
			if err != nil {
				t.Fatal(err)
			}
			offset := func() int64 {
				t.Helper()
				st, err := cw.Status()
				if err != nil {
					t.Fatal(err)
				}
				return st.Offset
			}
			if w.waits != 0 {
				t.Fatal("waited at the first STAT")
			}
			if got := offset(); got != int64(filled) || w.waits != 1 {
				t.Fatalf("offset %d after %d waits, want %d", got, w.waits, filled)
			}
			for pos := filled; pos < size; { // as containerd's server: a STAT before each WRITE
				n := min(700, size-pos)
				if m, err := cw.Write(blob[pos : pos+n]); err != nil || m != n {
					t.Fatalf("write at %d: %d, %v", pos, m, err)
				}
				pos += n
				if got := offset(); got != int64(pos) {
					t.Fatalf("offset %d, want %d", got, pos)
				}
			}
			if err := cw.Commit(t.Context(), size, d, content.WithLabels(map[string]string{"l": "v"})); err != nil {
				t.Fatal(err)
			}
			info, err := cs.Info(t.Context(), d)
			if err != nil || info.Size != size || info.Labels["l"] != "v" {
				t.Errorf("committed %+v, %v", info, err)
			}
			if w.waits != 1 || w.owned != (size-filled+699)/700 {
				t.Errorf("%d waits, %d owned writes", w.waits, w.owned)
			}
		})
	}
}

// exchange sends one message and returns the reply.
func exchange(s contentapi.Content_WriteClient, req *contentapi.WriteContentRequest) (*contentapi.WriteContentResponse, error) {
	if err := s.Send(req); err != nil {
		return nil, err
	}
	return s.Recv()
}

func TestOffsets(t *testing.T) {
	const stat, write, commit = contentapi.WriteAction_STAT, contentapi.WriteAction_WRITE, contentapi.WriteAction_COMMIT
	blob := "0123456789"
	d := digest.FromString(blob).String()
	other := digest.FromString("abc").String()
	type step struct {
		action contentapi.WriteAction
		offset int64
		data   string
		digest string
		want   int64
		code   codes.Code
	}
	for name, tc := range map[string]struct {
		resumed, filled string
		steps           []step
	}{
		"full fill, commit at 0": {filled: blob, steps: []step{
			{action: stat, want: 0}, {action: stat, want: 10}, {action: stat, want: 10},
			{action: commit, digest: d, want: 10}}},
		"full fill of a resumed ingest": {resumed: "0123", filled: "456789", steps: []step{
			{action: stat, want: 4}, {action: stat, want: 10}, {action: commit, offset: 4, digest: d, want: 10}}},
		"partial fill, client goes on from its 0": {filled: "0123", steps: []step{
			{action: stat, want: 0}, {action: stat, want: 4},
			{action: write, data: "456", want: 3}, {action: stat, want: 7},
			{action: write, offset: 3, data: "789", want: 6}, {action: commit, offset: 6, digest: d, want: 10}}},
		"partial fill of a resumed ingest": {resumed: "01", filled: "23", steps: []step{
			{action: stat, want: 2}, {action: stat, want: 4},
			{action: write, offset: 2, data: "456789", want: 8}, {action: commit, offset: 8, digest: d, want: 10}}},
		"last bytes in the commit": {filled: "0123", steps: []step{
			{action: stat, want: 0}, {action: stat, want: 4}, {action: commit, data: "456789", digest: d, want: 10}}},
		"truncate": {steps: []step{
			{action: stat, want: 0}, {action: write, data: "xxxx", want: 4},
			{action: write, data: "01234", want: 5}, {action: write, offset: 5, data: "56789", want: 10},
			{action: commit, offset: 10, digest: d, want: 10}}},
		"truncate of a resumed ingest": {resumed: "xxxx", steps: []step{
			{action: stat, want: 4}, {action: write, data: blob, want: 10}, {action: commit, offset: 10, digest: d, want: 10}}},
		"truncate at commit": {resumed: "xxxx", steps: []step{
			{action: stat, want: 4}, {action: commit, data: "abc", digest: other, want: 3}}},
		"hole":                 {steps: []step{{action: stat}, {action: write, offset: 1, data: "x", code: codes.OutOfRange}}},
		"true offset is wrong": {filled: "0123", steps: []step{{action: stat}, {action: stat, want: 4}, {action: write, offset: 4, data: "4", code: codes.OutOfRange}}},
		"before":               {resumed: "0123", steps: []step{{action: stat, want: 4}, {action: write, offset: 3, data: "x", code: codes.OutOfRange}}},
		"negative":             {resumed: "0123", steps: []step{{action: stat, want: 4}, {action: write, offset: -1, data: "x", code: codes.OutOfRange}}},
		"commit elsewhere":     {steps: []step{{action: stat}, {action: commit, offset: 9, digest: d, code: codes.OutOfRange}}},
		"wrong digest":         {filled: blob, steps: []step{{action: stat}, {action: stat, want: 10}, {action: commit, digest: other, code: codes.FailedPrecondition}}},
		"no digest":            {steps: []step{{action: stat}, {action: commit, digest: "nonsense", code: codes.InvalidArgument}}},
	} {
		t.Run(name, func(t *testing.T) {
			w := &filling{fill: []byte(tc.filled)}
			cs := fillingStore(t, w)
			if tc.resumed != "" {
				cw, err := cs.Writer(t.Context(), content.WithRef("r"))
				if err != nil {
					t.Fatal(err)
				}
				if _, err := cw.Write([]byte(tc.resumed)); err != nil {
					t.Fatal(err)
				}
				if err := cw.Close(); err != nil {
					t.Fatal(err)
				}
			}
			conn, _ := start(t, Options{Store: cs})
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			s, err := contentapi.NewContentClient(conn).Write(ctx)
			if err != nil {
				t.Fatal(err)
			}
			for i, st := range tc.steps {
				resp, err := exchange(s, &contentapi.WriteContentRequest{Action: st.action, Ref: "r", Offset: st.offset, Data: []byte(st.data), Expected: st.digest})
				if status.Code(err) != st.code {
					t.Fatalf("step %d: %v, want %v", i, err, st.code)
				}
				if err == nil && resp.Offset != st.want {
					t.Fatalf("step %d: offset %d, want %d", i, resp.Offset, st.want)
				}
			}
		})
	}
}

func TestFirstMessage(t *testing.T) {
	blob, d := randomBlob(t, 10)
	cs := localStore(t, t.TempDir())
	if err := content.WriteBlob(t.Context(), cs, "x", bytes.NewReader(blob), ocispec.Descriptor{Digest: d, Size: 10}); err != nil {
		t.Fatal(err)
	}
	conn, _ := start(t, Options{Store: cs})
	for name, tc := range map[string]struct {
		req  *contentapi.WriteContentRequest
		code codes.Code
	}{
		"no ref":         {&contentapi.WriteContentRequest{}, codes.InvalidArgument},
		"bad digest":     {&contentapi.WriteContentRequest{Ref: "r", Expected: "sha256:xyz"}, codes.InvalidArgument},
		"negative total": {&contentapi.WriteContentRequest{Ref: "r", Total: -1}, codes.InvalidArgument},
		"is there":       {&contentapi.WriteContentRequest{Ref: "r", Expected: d.String()}, codes.AlreadyExists},
	} {
		t.Run(name, func(t *testing.T) {
			s, err := contentapi.NewContentClient(conn).Write(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if _, err := exchange(s, tc.req); status.Code(err) != tc.code {
				t.Errorf("got %v, want %v", err, tc.code)
			}
		})
	}
}

func TestLockedRef(t *testing.T) {
	conn, _ := start(t, Options{Store: localStore(t, t.TempDir())})
	cs := client(conn)
	w, err := cs.Writer(t.Context(), content.WithRef("r"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := cs.Writer(t.Context(), content.WithRef("r")); !errdefs.IsUnavailable(err) {
		t.Errorf("second writer: %v", err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	// OpenWriter retries while the ref is locked: the end of the stream unlocks it.
	w, err = content.OpenWriter(t.Context(), cs, content.WithRef("r"))
	if err != nil {
		t.Fatal(err)
	}
	_ = w.Close()
}

func TestWaitEndsWithItsStream(t *testing.T) {
	w := &filling{waiting: make(chan struct{})}
	ended := make(chan error, 1)
	w.release = func(ctx context.Context) error {
		err := until(ctx)
		ended <- err
		return err
	}
	conn, _ := start(t, Options{Store: fillingStore(t, w)})
	ctx, cancel := context.WithCancel(t.Context())
	cw, err := client(conn).Writer(ctx, content.WithRef("r"))
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		<-w.waiting
		cancel()
	}()
	if _, err := cw.Status(); !errors.Is(err, context.Canceled) {
		t.Fatalf("Status: %v", err)
	}
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("Wait: %v", err)
	}
}

func TestWaitEndsWithTheServer(t *testing.T) {
	w := &filling{waiting: make(chan struct{}), release: until}
	conn, stop := startGrace(t, Options{Store: fillingStore(t, w)}, 2*time.Second) // a tenth of it is for the answer
	cw, err := client(conn).Writer(t.Context(), content.WithRef("r"))
	if err != nil {
		t.Fatal(err)
	}
	stopped := make(chan error, 1)
	go func() {
		<-w.waiting
		stopped <- stop()
	}()
	if _, err := cw.Status(); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "stopping") {
		t.Fatalf("Status: %v", err)
	}
	if err := <-stopped; err != nil {
		t.Error(err)
	}
}

func TestWaitFails(t *testing.T) {
	w := &filling{release: func(context.Context) error { return errdefs.ErrDataLoss }}
	conn, _ := start(t, Options{Store: fillingStore(t, w)})
	cw, err := client(conn).Writer(t.Context(), content.WithRef("r"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := cw.Status(); !errdefs.IsDataLoss(err) {
		t.Errorf("Status: %v", err)
	}
}
