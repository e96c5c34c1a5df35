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
	"fmt"
	"log/slog"
	"net"
	"runtime/debug"
	"sync"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	"github.com/containerd/containerd/v2/contrib/diffservice"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/defaults"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// stopGrace is how long calls under way may go on once the server is told to
// stop. Commits need milliseconds; a long apply or a write from the registry
// is cut, and containerd retries it.
const stopGrace = 5 * time.Second

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
}

// Server serves the content and diff services. It is safe for concurrent use,
// and Serve may be called for several listeners.
type Server struct {
	store   content.Store
	applier diff.Applier
	log     *slog.Logger

	panicked func()
}

// New returns a server. It starts nothing.
func New(o Options) *Server {
	s := &Server{store: o.Store, applier: o.Applier, log: o.Log, panicked: o.Panicked}
	if s.panicked == nil {
		s.panicked = func() {}
	}
	if s.log == nil {
		s.log = slog.Default()
	}
	return s
}

// Serve answers calls on l until ctx ends, and closes l. When ctx ends, streams
// that wait for a blob are let go with Unavailable at once, other calls have 5
// seconds to finish; then they are cancelled. No handler runs any more when
// Serve returns. The error is nil if ctx ended.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	cache := newReaderCache(s.store)
	srv := grpc.NewServer(
		grpc.MaxRecvMsgSize(defaults.DefaultMaxRecvMsgSize),
		grpc.MaxSendMsgSize(defaults.DefaultMaxSendMsgSize),
		grpc.WaitForHandlers(true), // the store may be closed after Serve
		grpc.UnaryInterceptor(s.recoverUnary),
		grpc.StreamInterceptor(s.recoverStream),
	)
	contentapi.RegisterContentServer(srv, newContentService(ctx, s.store, cache))
	diffapi.RegisterDiffServer(srv, diffservice.FromApplierAndComparer(s.applier, nil))

	sweepCtx, stopSweep := context.WithCancel(context.WithoutCancel(ctx))
	var sweeper sync.WaitGroup
	sweeper.Go(func() { cache.run(sweepCtx) })
	defer func() {
		stopSweep()
		sweeper.Wait()
	}()

	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	select {
	case err := <-served:
		srv.Stop()
		return fmt.Errorf("serve %s: %w", l.Addr(), err)
	case <-ctx.Done():
	}
	hard := time.AfterFunc(stopGrace, srv.Stop)
	srv.GracefulStop()
	hard.Stop()
	srv.Stop() // returns when the last handler has, also if the timer fired
	<-served   //nolint:errcheck // what Serve says once it was stopped is no news
	return nil
}

// recoverUnary turns a panic of a handler into an error of that one call: the
// node's containers must not lose their content store to one bad request.
func (s *Server) recoverUnary(ctx context.Context, req any, info *grpc.UnaryServerInfo, h grpc.UnaryHandler) (resp any, err error) {
	defer s.recovered(info.FullMethod, &err)
	return h(ctx, req)
}

func (s *Server) recoverStream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, h grpc.StreamHandler) (err error) {
	defer s.recovered(info.FullMethod, &err)
	return h(srv, ss)
}

// recovered must be deferred directly.
func (s *Server) recovered(method string, err *error) {
	if p := recover(); p != nil {
		s.panicked()
		s.log.Error("handler panicked", "method", method, "panic", p, "stack", string(debug.Stack()))
		*err = status.Errorf(codes.Internal, "%s panicked: %v", method, p)
	}
}
