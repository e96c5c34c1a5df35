package tracker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"

	api "github.com/imagewolf/imagewolf/api/v1"
)

// Session is a membership of one blob at one tracker. Its methods are safe
// for concurrent use.
type Session struct {
	c       *Client
	tracker Peer
	digest  digest.Digest
	conn    *grpc.ClientConn
	release func()
	joined  bool // has had its first answer; guarded by c.mu

	ctx    context.Context // the stream's; ended by cancel
	cancel context.CancelFunc
	out    *outbox[*api.MemberMessage]
	recv   chan *api.TrackerMessage // closed by receive
	wg     sync.WaitGroup           // send and receive
	begun  chan struct{}            // closed by receive at the first answer
	over   chan struct{}            // closed when err is final
	once   sync.Once
	err    error // guarded by over
}

// Tracker is the node that the session is with.
func (s *Session) Tracker() Peer { return s.tracker }

// Recv is what the tracker says, its first answer included. It is closed when
// the session is over; then Err tells why. The user has to keep reading, or
// the tracker ends the session.
func (s *Session) Recv() <-chan *api.TrackerMessage { return s.recv }

// Err is why the session is over, nil while it is not. After Close it is
// ErrClosed unless it was over before.
func (s *Session) Err() error {
	select {
	case <-s.over:
		return s.err
	default:
		return nil
	}
}

// Send queues a message; messages are sent in the order of the calls. It does
// not block. The message must not be changed afterwards. The error is that of
// a session that is over, which Recv tells as well.
func (s *Session) Send(msg *api.MemberMessage) error {
	if err := s.Err(); err != nil {
		return err
	}
	if !s.out.put(msg) {
		s.fail(fmt.Errorf("tracker %s does not read", s.tracker.Name))
		s.cancel()
		return s.Err()
	}
	return nil
}

// Close ends the membership and waits until the session's goroutines are
// done. It may be called more than once.
func (s *Session) Close() {
	s.fail(ErrClosed)
	s.cancel()
	s.wg.Wait()
	s.release()
	s.c.mu.Lock()
	delete(s.c.sessions, s)
	s.c.mu.Unlock()
}

// fail sets why the session is over; the first call counts.
func (s *Session) fail(err error) {
	s.once.Do(func() {
		s.err = err
		close(s.over)
	})
}

// tellEvery is how often a session that has yet to be answered is asked what there is to
// tell.
const tellEvery = 200 * time.Millisecond

// start opens the stream, says hello and waits for the first answer; see Join. The
// session is to be closed if it fails.
func (s *Session) start(ctx context.Context, hello *api.Hello, waiting func(*Session)) error {
	stream, err := api.NewTrackerClient(s.conn).Join(s.ctx)
	if err != nil {
		return attemptError(ctx, err)
	}
	if err := stream.Send(&api.MemberMessage{Message: &api.MemberMessage_Hello{Hello: hello}}); err != nil && !errors.Is(err, io.EOF) {
		return attemptError(ctx, err) // at EOF Recv has the reason
	}
	s.wg.Go(func() {
		s.c.o.Contain(func() {
			if err := s.out.drain(s.ctx, stream.Send); err != nil && s.ctx.Err() == nil && !errors.Is(err, io.EOF) {
				s.fail(err)
				s.cancel()
			}
		})
	})
	s.wg.Go(func() { s.c.o.Contain(func() { s.receive(stream) }) })
	tick := time.NewTicker(tellEvery)
	defer tick.Stop()
	for {
		select {
		case <-s.begun:
			return nil
		case <-s.ctx.Done(): // also when the stream is over, which receive has said before
			select {
			case <-s.begun:
				return nil
			default:
			}
			s.fail(s.ctx.Err())
			return attemptError(ctx, s.err)
		case <-tick.C:
			if waiting != nil {
				waiting(s)
			}
		}
	}
}

// attemptError prefers the end of the attempt's time to what came of it.
func attemptError(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("no answer in time: %w", ctx.Err())
	}
	return err
}

// receive passes on what the tracker says until the stream ends.
func (s *Session) receive(stream api.Tracker_JoinClient) {
	defer close(s.recv)
	defer s.cancel() // ends send
	begin := sync.OnceFunc(func() { close(s.begun) })
	for {
		msg, err := stream.Recv()
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = fmt.Errorf("tracker %s has ended the session: %w", s.tracker.Name, err)
			}
			s.fail(err)
			return
		}
		select {
		case s.recv <- msg:
			begin()
		case <-s.ctx.Done():
			s.fail(s.ctx.Err())
			return
		}
	}
}
