package proxy

import (
	"context"
	"errors"
	"io"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/protobuf"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Waiter is what a writer may be able to do beyond content.Writer: Wait blocks
// until the blob is whole or the client is to write the rest, from the offset
// that Status says then. It is called at most once per writer, and returns
// promptly when ctx ends.
type Waiter interface {
	Wait(ctx context.Context) error
}

// ownedWriter is a writer that keeps the slice it is given, to hash or write it
// after WriteOwned has returned. It calls free, which may be nil, once it does not
// need it any more, from any goroutine; after an error it may leave that out.
type ownedWriter interface {
	WriteOwned(p []byte, free func()) (int, error)
}

// waitingStat is the STAT of a stream that waits. containerd sends the first
// one inside a transaction of its database, and so the third and later ones:
// they would hold up the whole of containerd. The second comes from outside,
// right before it would ask the registry.
const waitingStat = 2

// digestUpTo is the offset in bytes up to which the digest so far goes into
// every reply: containerd's conformance suite wants it, and the hasher cannot be
// far behind.
const digestUpTo = 64 << 10

// writeStream is one call of Write. It belongs to that call's goroutine.
type writeStream struct {
	svc     *contentService
	session contentapi.Content_WriteServer
	wr      content.Writer

	ref      string
	total    int64         // latest that the client said; 0: unknown
	expected digest.Digest // latest that the client said; "": unknown
	stats    int           // STATs so far

	// clientOff is where the client believes to be, which is not where the
	// writer is once the blob grew by itself. containerd takes its offset from
	// the reply to its first message, ignores the offset of all later STATs,
	// and adds up its own writes; it sends that offset with WRITE and COMMIT.
	clientOff int64
}

// Write serves one stream of writes to one ref. It differs from containerd's
// own in how it takes offsets (see [writeStream]); that one truncates when it
// gets an offset of 0 for an ingest that is further, and this is just what a
// client sends after an ingest was filled without it. Nor does it look for the
// blob itself: whether it exists is the store's Writer and Commit to say, as a
// blob that was filled while the client waited is there and still to be
// committed.
func (s *contentService) Write(session contentapi.Content_WriteServer) (err error) {
	req := new(writeRequest)
	if err := session.RecvMsg(req); err != nil {
		return err
	}
	if req.Ref == "" {
		return status.Error(codes.InvalidArgument, "first message must have a reference")
	}
	st := &writeStream{svc: s, session: session, ref: req.Ref}
	if err := st.take(req); err != nil {
		return err
	}
	wr, err := s.store.Writer(session.Context(),
		content.WithRef(st.ref),
		content.WithDescriptor(ocispec.Descriptor{Size: st.total, Digest: st.expected}))
	if err != nil {
		return errgrpc.ToGRPC(err)
	}
	st.wr = wr
	// The ref stays locked until then. What a failing Close means shows when
	// the ref is opened next.
	defer func() { _ = wr.Close() }()

	ws, err := wr.Status()
	if err != nil {
		return errgrpc.ToGRPC(err)
	}
	st.clientOff = ws.Offset
	return st.loop(req)
}

// loop answers req and all messages after it.
func (st *writeStream) loop(req *writeRequest) error {
	for {
		resp, err := st.handle(req)
		if err != nil {
			return err
		}
		req.release()
		if err := st.session.Send(resp); err != nil {
			return err
		}
		if req.Action == contentapi.WriteAction_COMMIT {
			return nil
		}
		req = new(writeRequest)
		if err := st.session.RecvMsg(req); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		if err := st.take(req); err != nil {
			return err
		}
	}
}

// take checks a message and notes the total and digest it carries.
func (st *writeStream) take(req *writeRequest) error {
	if req.Total < 0 {
		return status.Errorf(codes.InvalidArgument, "ref %q: total %d is negative", st.ref, req.Total)
	}
	if req.Total > 0 {
		st.total = req.Total
	}
	if req.Expected != "" {
		d, err := digest.Parse(req.Expected)
		if err != nil {
			return status.Errorf(codes.InvalidArgument, "ref %q: %q failed validation", st.ref, req.Expected)
		}
		st.expected = d
	}
	return nil
}

func (st *writeStream) handle(req *writeRequest) (*contentapi.WriteContentResponse, error) {
	if req.Action == contentapi.WriteAction_STAT {
		return st.stat(req)
	}
	ws, err := st.wr.Status()
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	resp := &contentapi.WriteContentResponse{Action: req.Action}
	offset := ws.Offset
	switch req.Action {
	case contentapi.WriteAction_WRITE, contentapi.WriteAction_COMMIT:
		if offset, err = st.write(req, offset); err != nil {
			return nil, err
		}
	default: // containerd's own server answers these with the offset
	}
	if req.Action == contentapi.WriteAction_COMMIT {
		var opts []content.Opt
		if req.Labels != nil {
			opts = append(opts, content.WithLabels(req.Labels))
		}
		if err := st.wr.Commit(st.session.Context(), st.total, st.expected, opts...); err != nil {
			return nil, errgrpc.ToGRPC(err)
		}
		resp.Offset = offset // the client compares it with the blob's size
		resp.Digest = st.wr.Digest().String()
		return resp, nil
	}
	resp.Offset = st.clientOff // the client subtracts its own offset from it
	resp.Digest = st.digestAt(offset)
	return resp, nil
}

// stat answers a STAT with the true offset: the client asks the registry for
// what is behind it.
func (st *writeStream) stat(req *writeRequest) (*contentapi.WriteContentResponse, error) {
	if st.stats++; st.stats == waitingStat {
		if err := st.wait(); err != nil {
			return nil, err
		}
	}
	ws, err := st.wr.Status()
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return &contentapi.WriteContentResponse{
		Action:    req.Action,
		Offset:    ws.Offset,
		Total:     st.total,
		Digest:    st.digestAt(ws.Offset),
		StartedAt: protobuf.ToTimestamp(ws.StartedAt),
		UpdatedAt: protobuf.ToTimestamp(ws.UpdatedAt),
	}, nil
}

// wait waits if the writer can be waited for.
func (st *writeStream) wait() error {
	w, ok := st.wr.(Waiter)
	if !ok {
		return nil
	}
	ctx, cancel := context.WithCancel(st.session.Context())
	defer cancel()
	// Whoever still waits then is to hear why it ends.
	defer context.AfterFunc(st.svc.stopping, cancel)()
	err := w.Wait(ctx)
	if err != nil && st.svc.stopping.Err() != nil && st.session.Context().Err() == nil {
		return status.Errorf(codes.Unavailable, "ref %q: the server is stopping", st.ref)
	}
	return errgrpc.ToGRPC(err)
}

// write appends the data of req and returns the true offset behind it.
func (st *writeStream) write(req *writeRequest, offset int64) (int64, error) {
	if req.Offset != st.clientOff {
		// An offset the client cannot have got by writing: it wants to start
		// over. From clientOff 0 that cannot be told from going on; containerd
		// does the one never and the other always, and the digest has the
		// last word.
		if req.Offset != 0 {
			return 0, status.Errorf(codes.OutOfRange, "ref %q: write @%v must occur at current offset %v", st.ref, req.Offset, st.clientOff)
		}
		if err := st.wr.Truncate(0); err != nil {
			return 0, errgrpc.ToGRPCf(err, "ref %q: truncate failed", st.ref)
		}
		st.clientOff, offset = 0, 0
	}
	if len(req.Data) == 0 {
		return offset, nil
	}
	var n int
	var err error
	want := len(req.Data)
	if ow, ok := st.wr.(ownedWriter); ok {
		n, err = ow.WriteOwned(req.Data, req.take())
	} else {
		n, err = st.wr.Write(req.Data)
	}
	if err != nil {
		return 0, errgrpc.ToGRPC(err)
	}
	if n != want {
		return 0, status.Errorf(codes.DataLoss, "ref %q: wrote %v of %v bytes", st.ref, n, want)
	}
	st.clientOff += int64(n)
	return offset + int64(n), nil
}

// digestAt returns the digest for a reply. It is left out in the middle of a
// blob of known size if the writer hashes in the background: it would have to
// be waited for at every message, and nobody looks at it before the end.
func (st *writeStream) digestAt(offset int64) string {
	if _, ok := st.wr.(ownedWriter); ok && offset > digestUpTo && offset < st.total {
		return ""
	}
	return st.wr.Digest().String()
}
