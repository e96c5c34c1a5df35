package proxy

import (
	"context"
	"errors"
	"io"
	"sync"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	"github.com/containerd/containerd/v2/core/content"
	ptypes "github.com/containerd/containerd/v2/pkg/protobuf/types"
	"github.com/containerd/containerd/v2/plugins/services/content/contentserver"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// maxReadReply is the number of data bytes in one reply to Read. grpc-go takes
// its buffers from tiers, one of 32 KiB and the next of 1 MiB, cleared each
// time. containerd reads 32 KiB at a time, and 32 KiB with the message's frame
// around it just miss the tier: both sides would clear 1 MiB for each.
// Cutting a little below made a pull a third faster.
const maxReadReply = 32700

// contentService is containerd's content service with handlers of our own for
// Read, where the stock one is slow, and Write, where it is wrong for a blob
// that grows without the client's doing.
type contentService struct {
	contentapi.ContentServer // everything else: containerd's own

	stopping context.Context // ends when the server is about to end the calls under way
	store    content.Store
	readers  *readerCache
	buffers  sync.Pool // *[]byte of maxReadReply bytes
}

func newContentService(stopping context.Context, store content.Store, readers *readerCache) *contentService {
	return &contentService{
		ContentServer: contentserver.New(store),
		stopping:      stopping,
		store:         store,
		readers:       readers,
		buffers:       sync.Pool{New: func() any { return new(make([]byte, maxReadReply)) }},
	}
}

// Delete deletes a blob and closes the reader that was kept open for it.
func (s *contentService) Delete(ctx context.Context, req *contentapi.DeleteContentRequest) (*ptypes.Empty, error) {
	resp, err := s.ContentServer.Delete(ctx, req)
	if d, perr := digest.Parse(req.Digest); perr == nil {
		s.readers.drop(d)
	}
	return resp, err
}

// Read sends a range of a blob. A size of 0 or less, or one past the end, means
// up to the end. The offsets of the replies count from the start of the range,
// as containerd's do.
func (s *contentService) Read(req *contentapi.ReadContentRequest, session contentapi.Content_ReadServer) error {
	d, err := digest.Parse(req.Digest)
	if err != nil {
		return status.Errorf(codes.InvalidArgument, "%v: %v", req.Digest, err)
	}
	r, err := s.readers.acquire(session.Context(), d)
	if err != nil {
		return errgrpc.ToGRPC(err)
	}
	defer s.readers.release(r)

	offset := max(req.Offset, 0)
	if offset > r.Size() {
		return status.Errorf(codes.OutOfRange, "read past object length %v bytes", r.Size())
	}
	left := r.Size() - offset
	if req.Size > 0 {
		left = min(left, req.Size)
	}

	buf := s.buffers.Get().(*[]byte) //nolint:errcheck // nothing else is put there
	defer s.buffers.Put(buf)
	for sent := int64(0); left > 0; {
		p := (*buf)[:min(left, maxReadReply)]
		n, err := r.ReadAt(p, offset+sent)
		if n < len(p) {
			if err == nil || errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return errgrpc.ToGRPCf(err, "read blob %v at %d", d, offset+sent)
		}
		// Send has encoded p when it returns, so the buffer is free again.
		if err := session.Send(&contentapi.ReadContentResponse{Offset: sent, Data: p}); err != nil {
			return err
		}
		sent += int64(n)
		left -= int64(n)
	}
	return nil
}
