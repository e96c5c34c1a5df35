// Package serve holds what the servers of both programs do alike, whatever they
// serve: they end with a context, and one request that goes wrong ends nothing
// but itself.
package serve

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"net/http"
	"runtime/debug"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
)

// Bounds on a request of HTTP.
const (
	httpRead   = 5 * time.Second
	httpWrite  = 30 * time.Second
	httpIdle   = 2 * time.Minute
	httpHeader = 16 << 10 // bytes
)

// never is how gRPC writes that something does not happen.
const never = time.Duration(math.MaxInt64)

// NewGRPC returns a gRPC server that closes a connection without a call after idle,
// 0 for never, and pings no client. Whether one has said anything since a ping, gRPC
// tells by the wall clock: set back, and it takes the connection for dead.
func NewGRPC(idle time.Duration, opts ...grpc.ServerOption) *grpc.Server {
	keep := grpc.KeepaliveParams(keepalive.ServerParameters{Time: never, MaxConnectionIdle: idle})
	return grpc.NewServer(append([]grpc.ServerOption{keep}, opts...)...) //nolint:forbidigo // here it is
}

// GRPC has srv answer on l until ctx ends, and closes l. Then it calls stop,
// which has to stop srv. The error is nil if ctx ended; otherwise srv is stopped
// without stop.
func GRPC(ctx context.Context, srv *grpc.Server, l net.Listener, stop func()) error {
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	select {
	case err := <-served:
		srv.Stop()
		return fmt.Errorf("serve %s: %w", l.Addr(), err)
	case <-ctx.Done():
	}
	stop()
	<-served //nolint:errcheck // what Serve says once it was stopped is no news
	return nil
}

// HTTP has h answer on l until ctx ends, and closes l and its connections. It is
// for short answers to anyone who can reach l: a request may take 5 seconds to
// come in, and its answer 30. The error is nil if ctx ended.
func HTTP(ctx context.Context, l net.Listener, h http.Handler) error {
	srv := &http.Server{
		Handler: h, ReadTimeout: httpRead, WriteTimeout: httpWrite, IdleTimeout: httpIdle,
		MaxHeaderBytes: httpHeader, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug),
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	select {
	case err := <-served:
		return errors.Join(fmt.Errorf("serve %s: %w", l.Addr(), err), srv.Close())
	case <-ctx.Done():
	}
	err := srv.Close()
	<-served //nolint:errcheck // it says that it was closed
	return err
}

// Within is the answer of f, which may hang, or false if ctx ends before it. f must
// not panic.
func Within(ctx context.Context, f func() bool) bool {
	answer := make(chan bool, 1)
	go func() { answer <- f() }()
	select {
	case yes := <-answer:
		return yes
	case <-ctx.Done():
		return false
	}
}

// Contain keeps a panic of a gRPC handler from ending the process: its caller is
// told that it failed, and everything else goes on. The interceptors may be used
// by any number of servers.
type Contain struct {
	Log      *slog.Logger // is told of panics, with their stack
	Panicked func()       // counts one
}

// Unary is a grpc.UnaryServerInterceptor.
func (c Contain) Unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, h grpc.UnaryHandler) (resp any, err error) {
	defer c.recovered(info.FullMethod, &err)
	return h(ctx, req)
}

// Stream is a grpc.StreamServerInterceptor.
func (c Contain) Stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, h grpc.StreamHandler) (err error) {
	defer c.recovered(info.FullMethod, &err)
	return h(srv, ss)
}

// recovered must be deferred directly.
func (c Contain) recovered(method string, err *error) {
	if p := recover(); p != nil {
		c.Panicked()
		c.Log.Error("handler panicked", "method", method, "panic", p, "stack", string(debug.Stack()))
		// Who calls may be a stranger: what went wrong is for the log.
		*err = status.Errorf(codes.Internal, "%s failed: the log says why", method)
	}
}
