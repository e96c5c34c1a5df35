// Package proxy puts a content store and a diff applier on a unix socket, in
// containerd's own gRPC API, so that containerd can use them as proxy plugins.
//
// It knows nothing of where the bytes of a blob come from: a writer that can
// be waited for (see [Waiter]) is waited for at the right message of a write
// stream, every other writer is served as containerd's own server would. It
// keeps nothing on disk and holds no state but a few open readers.
package proxy

import (
	"context"
	"log/slog"
	"net"
	"sync"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	"github.com/containerd/containerd/v2/contrib/diffservice"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/defaults"
	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding"
	protobuf "google.golang.org/grpc/encoding/proto"

	"github.com/imagewolf/imagewolf/internal/serve"
)

// stopGrace is how long the server goes on after it is told to stop, while blobs
// are being written or applied. A pull that is not through by then fails:
// containerd has no answer to a writer that has gone. Until then the server takes
// all calls, new ones as well: nobody would answer them for as long, and
// containerd gives up a connection on which nobody answers in a second or two.
const stopGrace = 10 * time.Second

// lull is how long a pull may do nothing between two calls.
const lull = 500 * time.Millisecond

// The calls that are given time to end.
const (
	writeMethod = "/containerd.services.content.v1.Content/Write"
	applyMethod = "/containerd.services.diff.v1.Diff/Apply"
)

// Options says what a Server serves.
type Options struct {
	// Store answers the content service. Required.
	Store content.Store
	// Applier answers Apply of the diff service; nil: Apply is Unimplemented.
	// Diff always is, so that containerd goes on to its own differ.
	Applier diff.Applier
	// Log receives panics of handlers; nil: slog.Default().
	Log *slog.Logger
	// Panicked is called when a handler has panicked; may be nil.
	Panicked func()
	// Needed says whether there is something else to be waited for before the server
	// stops, for as long as for blobs that are being written. It must not panic, and
	// may hang; may be nil.
	Needed func() bool
}

// Server serves the content and diff services. It is safe for concurrent use,
// and Serve may be called for several listeners.
type Server struct {
	store   content.Store
	applier diff.Applier
	log     *slog.Logger
	grace   time.Duration
	work    work

	panicked func()
	needed   func() bool
}

// work counts the calls that are not to be cut short if it can be helped.
type work struct {
	mu    sync.Mutex
	n     int           // guarded by mu
	ended chan struct{} // guarded by mu; closed when n is 0; nil if nobody waits for that
}

// begin counts a call until the returned function is called.
func (w *work) begin() (end func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.n++
	return func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		if w.n--; w.n == 0 && w.ended != nil {
			close(w.ended)
			w.ended = nil
		}
	}
}

// idle returns a channel that is closed once there is no such call.
func (w *work) idle() <-chan struct{} {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.ended == nil {
		w.ended = make(chan struct{})
	}
	ended := w.ended
	if w.n == 0 {
		close(w.ended)
		w.ended = nil
	}
	return ended
}

// New returns a server. It starts nothing.
func New(o Options) *Server {
	s := &Server{store: o.Store, applier: o.Applier, log: o.Log, grace: stopGrace, panicked: o.Panicked, needed: o.Needed}
	if s.needed == nil {
		s.needed = func() bool { return false }
	}
	if s.panicked == nil {
		s.panicked = func() {}
	}
	if s.log == nil {
		s.log = slog.Default()
	}
	return s
}

// Serve answers calls on l until ctx ends, and closes l. When ctx ends it goes on
// until no blob is being written or applied and nothing else is needed, for at most
// 10 seconds; then streams that wait for a blob are let go with Unavailable, and what
// is left is cancelled a second later. No handler runs any more when Serve returns.
// The error is nil if ctx ended.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	cache := newReaderCache(s.store)
	stopping, tell := context.WithCancel(context.WithoutCancel(ctx))
	defer tell()
	contain := serve.Contain{Log: s.log, Panicked: s.panicked}
	srv := serve.NewGRPC(0,
		grpc.ForceServerCodecV2(codec{encoding.GetCodecV2(protobuf.Name)}),
		grpc.MaxRecvMsgSize(defaults.DefaultMaxRecvMsgSize),
		grpc.MaxSendMsgSize(defaults.DefaultMaxSendMsgSize),
		grpc.WaitForHandlers(true), // the store may be closed after Serve
		grpc.ChainUnaryInterceptor(contain.Unary, s.countUnary),
		grpc.ChainStreamInterceptor(contain.Stream, s.countStream),
	)
	contentapi.RegisterContentServer(srv, newContentService(stopping, s.store, cache))
	diffapi.RegisterDiffServer(srv, diffservice.FromApplierAndComparer(s.applier, nil))

	sweepCtx, stopSweep := context.WithCancel(context.WithoutCancel(ctx))
	var sweeper sync.WaitGroup
	sweeper.Go(func() { cache.run(sweepCtx) })
	defer func() {
		stopSweep()
		sweeper.Wait()
	}()

	return serve.GRPC(ctx, srv, l, func() {
		s.drain()
		tell()
		hard := time.AfterFunc(s.grace/10, srv.Stop)
		srv.GracefulStop()
		hard.Stop()
		srv.Stop() // returns when the last handler has, also if the timer fired
	})
}

// drain returns when nothing is being written or applied and nothing else is needed,
// or after the grace.
func (s *Server) drain() {
	over, cancel := context.WithTimeout(context.Background(), s.grace)
	defer cancel()
	for {
		idle := s.work.idle()
		select {
		case <-idle:
			if !serve.Within(over, s.needed) {
				return
			}
		default:
		}
		// One layer's end is not the pull's.
		select {
		case <-idle:
		case <-over.Done():
			return
		}
		select {
		case <-time.After(lull):
		case <-over.Done():
			return
		}
	}
}

// countUnary counts the calls that are given time to end.
func (s *Server) countUnary(ctx context.Context, req any, info *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
	if info.FullMethod == applyMethod {
		defer s.work.begin()()
	}
	return h(ctx, req)
}

// countStream is countUnary for streams.
func (s *Server) countStream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, h grpc.StreamHandler) error {
	if info.FullMethod == writeMethod {
		defer s.work.begin()()
	}
	return h(srv, ss)
}
