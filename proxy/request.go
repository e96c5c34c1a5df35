package proxy

import (
	"sync"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// lentFrom is the size in bytes from which on a message of a Write stream lies
// in a buffer that is used again. Smaller ones are cheap to allocate, and would
// hold buffers much larger than themselves.
const lentFrom = 64 << 10

// writeRequest is a message of a Write stream. The Data of a large one belongs
// to a buffer that is used again once release is called. A new MiB for every MiB
// that containerd sends is paid for in page faults: it took twice as long as the
// socket itself.
type writeRequest struct {
	contentapi.WriteContentRequest
	buf mem.Buffer // nil: Data is nobody else's
}

// release gives the buffer back: Data must not be touched any more, except by
// whoever got take's answer. It may be called more than once.
func (r *writeRequest) release() {
	if free := r.take(); free != nil {
		r.Data = nil
		free()
	}
}

// take hands Data over, with what has to be called once it is not needed any
// more; nil if nothing has.
func (r *writeRequest) take() (free func()) {
	if r.buf == nil {
		return nil
	}
	free, r.buf = r.buf.Free, nil
	return free
}

// codec is gRPC's own for protobuf, except that it leaves the Data of a
// writeRequest where it is.
type codec struct{ encoding.CodecV2 }

// dataField is the number of Data.
var dataField = (*contentapi.WriteContentRequest)(nil).ProtoReflect().Descriptor().Fields().ByName("data").Number()

// Unmarshal implements [encoding.CodecV2].
func (c codec) Unmarshal(raw mem.BufferSlice, v any) error {
	req, ok := v.(*writeRequest)
	if !ok {
		return c.CodecV2.Unmarshal(raw, v)
	}
	if raw.Len() < lentFrom {
		return c.CodecV2.Unmarshal(raw, &req.WriteContentRequest)
	}
	buf := raw.MaterializeToBuffer(&requests)
	rest, data, err := cutData(buf.ReadOnlyData())
	if err == nil {
		err = proto.Unmarshal(rest, &req.WriteContentRequest)
	}
	if err != nil {
		buf.Free()
		return err
	}
	req.Data, req.buf = data, buf
	return nil
}

// cutData parts an encoded WriteContentRequest into a copy of what is not Data,
// and Data, which is a part of raw.
func cutData(raw []byte) (rest, data []byte, err error) {
	for len(raw) > 0 {
		number, kind, n := protowire.ConsumeField(raw)
		if n < 0 {
			return nil, nil, protowire.ParseError(n)
		}
		if number == dataField && kind == protowire.BytesType {
			_, _, tag := protowire.ConsumeTag(raw)
			data, _ = protowire.ConsumeBytes(raw[tag:]) // was parsed above
		} else {
			rest = append(rest, raw[:n]...)
		}
		raw = raw[n:]
	}
	return rest, data, nil
}

// requests are buffers for large messages. gRPC's own pool clears them before
// each use.
var requests bufferPool

// bufferPool implements [mem.BufferPool]. Containerd's messages are of one size
// nearly always, that of the buffer it copies through, and a little.
type bufferPool struct{ pool sync.Pool }

func (p *bufferPool) Get(n int) *[]byte {
	if b, ok := p.pool.Get().(*[]byte); ok && cap(*b) >= n {
		*b = (*b)[:n]
		return b
	}
	// Rounded up: lengths and offsets grow by some bytes in a blob's course.
	b := make([]byte, n, (n+lentFrom-1)/lentFrom*lentFrom)
	return &b
}

func (p *bufferPool) Put(b *[]byte) { p.pool.Put(b) }
