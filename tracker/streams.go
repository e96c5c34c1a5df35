package tracker

import (
	"context"
	"errors"
	"io"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/time/rate"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	api "github.com/imagewolf/imagewolf/api/v1"
)

// service is the Server as gRPC calls it: the RPC Register cannot be a method
// of Server, whose own Register adds it to a gRPC server.
type service struct {
	api.UnimplementedTrackerServer
	s *Server
}

// ender is how a stream is ended from outside its handler.
type ender struct {
	once sync.Once
	done chan struct{} // closed by end
	err  error         // the stream's status; readable once done is closed
}

// end lets the stream's handler return err; the first call counts. It does
// not block.
func (e *ender) end(err error) {
	e.once.Do(func() {
		e.err = err
		close(e.done)
	})
}

// over is why a stream has ended, or is about to: its node has given it up; nil
// while it lives. Whoever lets a stream replace another of its node asks under the lock
// that this needs: goroutines run in any order, but a stream that was given up before
// the next one was opened on the same connection is over before that one is served.
func (e *ender) over(ctx context.Context) error {
	select {
	case <-e.done:
		return e.err
	default:
	}
	if err := ctx.Err(); err != nil {
		return status.FromContextError(err).Err()
	}
	return nil
}

// serve runs a stream's two goroutines and returns when the stream is over.
// The handler is in neither Send nor Recv itself, which block for as long as
// the other side likes; both return when the handler has, because that ends
// the stream's context. What receive takes on it gives back when it returns.
func (s *Server) serve(ctx context.Context, e *ender, send, receive func() error) error {
	if !s.enter(2) {
		return status.Error(codes.Unavailable, "tracker is closing")
	}
	broken := status.Error(codes.Internal, "tracker failed")
	go func() {
		defer s.streams.Done()
		err := broken // unless send returns
		s.o.Contain(func() { err = send() })
		if err != nil {
			e.end(err)
		}
	}()
	go func() {
		defer s.streams.Done()
		err := broken
		s.o.Contain(func() { err = receive() })
		if errors.Is(err, io.EOF) {
			err = nil
		}
		e.end(err)
	}()
	select {
	case <-e.done:
	case <-ctx.Done():
		e.end(status.FromContextError(ctx.Err()).Err())
	case <-s.closed:
		e.end(status.Error(codes.Unavailable, "tracker is closing"))
	}
	<-e.done // another call of end may be on its way to closing it
	return e.err
}

// joinStream is one member's stream.
type joinStream struct {
	ender
	name string
	blob *blob
	out  *outbox[*api.TrackerMessage]
	// counted says that the stream is one of its member's, of a blob with so many
	// segments; the receiving goroutine's, like limit.
	counted  bool
	segments int
	limit    *rate.Limiter // of what it may say
	// moved says that its member goes on at another tracker; as counted.
	moved bool
}

// Join serves one member of one blob for as long as its stream lives.
func (v service) Join(stream api.Tracker_JoinServer) error {
	st := &joinStream{ender: ender{done: make(chan struct{})}, out: newOutbox[*api.TrackerMessage](queueSlack)}
	late := time.AfterFunc(helloTimeout, func() { st.end(status.Error(codes.DeadlineExceeded, "no hello")) })
	defer late.Stop()
	ctx := stream.Context()
	return v.s.serve(ctx, &st.ender,
		func() error { return st.out.drain(ctx, stream.Send) },
		func() error {
			who, spoken, err := v.s.greet(ctx)
			if err != nil {
				return err
			}
			defer spoken()
			msg, err := stream.Recv()
			if err != nil {
				return err
			}
			spoken()
			late.Stop()
			defer v.s.uncount(st)
			if err := v.s.join(ctx, who, st, msg.GetHello()); err != nil {
				return err
			}
			defer st.leave()
			for {
				msg, err := stream.Recv()
				if err != nil {
					return err
				}
				if !st.limit.Allow() {
					return v.s.refuse(st.name, st.blob.digest, manyMessages)
				}
				if msg.GetMoved() != nil {
					st.moved = true
					return nil
				}
				if msg.GetBad() != nil {
					v.s.o.Counter.Mismatched()
				}
				st.blob.handle(st, func(m *Machine, now time.Time) []Command { return m.Message(now, st.name, msg) })
			}
		})
}

// join makes the stream a member, in place of an older one of its node. The caller owes
// leave if there is no error.
func (s *Server) join(ctx context.Context, who caller, st *joinStream, hello *api.Hello) error {
	if err := checkHello(hello); err != nil {
		return status.Error(codes.InvalidArgument, err.Error())
	}
	if err := who.check(hello.GetSelf()); err != nil {
		return err
	}
	d, err := digest.Parse(hello.GetDigest())
	if err != nil {
		return status.Errorf(codes.InvalidArgument, "digest %.200q: %v", hello.GetDigest(), err)
	}
	st.name = hello.GetSelf().GetName()
	st.segments = s.o.Layout(hello.GetSize()).Segments
	st.limit = messageLimit(st.segments)
	if err := s.count(st, d); err != nil {
		return err
	}
	return s.with(d, func(b *blob) error {
		if err := st.over(ctx); err != nil {
			return err
		}
		if !s.returns.allow(b, st.name, s.limits.returns) {
			return s.refuse(st.name, d, manyReturns)
		}
		if b.machine == nil {
			if err := b.open(st.name, hello.GetSize()); err != nil {
				return err
			}
		}
		if have := b.machine.Size(); have != hello.GetSize() {
			return status.Errorf(codes.FailedPrecondition, "size of %s is %d here, not %d", d, have, hello.GetSize())
		}
		old := b.members[st.name]
		st.blob = b
		if b.members == nil {
			b.members = map[string]*joinStream{}
		}
		// The first answer may be one message per segment.
		st.out.limit += len(b.machine.segs)
		b.members[st.name] = st
		err := b.run(func(m *Machine, now time.Time) ([]Command, error) { return m.Join(now, hello) })
		switch {
		case err == nil:
			if old != nil {
				old.end(status.Errorf(codes.Aborted, "%s has joined again", st.name))
			}
			return nil
		case old != nil && b.machine != nil:
			b.members[st.name] = old
		default:
			delete(b.members, st.name)
		}
		if errors.Is(err, ErrFull) {
			return status.Error(codes.ResourceExhausted, err.Error())
		}
		return err
	})
}

// memberships is what one node has joined here.
type memberships struct{ streams, segments int }

// count enters a stream of a blob, unless its member, or all together, have too many.
func (s *Server) count(st *joinStream, d digest.Digest) error {
	s.mu.Lock()
	have := s.joined[st.name]
	var over, full string
	switch {
	case have.streams >= s.limits.memberships:
		over = manyJoins
	case have.segments+st.segments > s.limits.segments:
		over = manySegments
	case s.members >= s.limits.allMemberships:
		full = "members"
	case s.units+st.segments > s.limits.units:
		full = "segments"
	default:
		have.streams++
		have.segments += st.segments
		s.joined[st.name] = have
		s.members++
		s.units += st.segments
		st.counted = true
	}
	s.mu.Unlock()
	switch {
	case over != "":
		return s.refuse(st.name, d, over)
	case full != "":
		s.full(st.name, full)
		return status.Errorf(codes.ResourceExhausted, "too many %s here", full)
	}
	return nil
}

// uncount is the reverse of count.
func (s *Server) uncount(st *joinStream) {
	if !st.counted {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.members--
	s.units -= st.segments
	have := s.joined[st.name]
	have.streams--
	have.segments -= st.segments
	if s.joined[st.name] = have; have.streams == 0 {
		delete(s.joined, st.name)
	}
}

// leave ends the membership, unless a newer stream of the node has it.
func (st *joinStream) leave() {
	b := st.blob
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.members[st.name] != st {
		return
	}
	delete(b.members, st.name)
	if len(b.members) > 0 { // without members the machine goes anyway
		_ = b.run(func(m *Machine, now time.Time) ([]Command, error) {
			if st.moved {
				return m.Move(now, st.name), nil
			}
			return m.Leave(now, st.name), nil
		})
	}
	b.reap()
}
