package node

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"time"

	"golang.org/x/net/netutil"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"

	"github.com/imagewolf/imagewolf/api/nodeapi"
	imagewolfv1 "github.com/imagewolf/imagewolf/api/v1"
	"github.com/imagewolf/imagewolf/cluster"
	"github.com/imagewolf/imagewolf/internal/serve"
	"github.com/imagewolf/imagewolf/proxy"
)

const (
	apiRetry     = 5 * time.Second // before a socket or an address is listened on again
	apiHandshake = 5 * time.Second
	apiMessage   = 64 << 10    // bytes of one request
	apiHeaders   = 16 << 10    // bytes of what comes before it, the token among it
	apiStreams   = 128         // calls at the same time on one connection
	apiConns     = 256         // connections of the network at the same time
	apiIdle      = time.Minute // that a connection stays without a call

	// apiSilent is how long a client's host may be silent while a call waits, or leave
	// unconfirmed what it is sent.
	apiSilent = 12 * time.Second
)

// runAPI serves the Node API on listeners that listen makes, again and again,
// until ctx ends: nothing of it ends the node.
func (n *Node) runAPI(ctx context.Context, setting string, listen func(ctx context.Context) (net.Listener, error), opts ...grpc.ServerOption) {
	for ctx.Err() == nil {
		err := n.guard(partNodeAPI, func() error {
			l, err := listen(ctx)
			if err != nil {
				return err
			}
			n.log.Info("serving the Node API", "address", l.Addr().String())
			return n.serveAPI(ctx, l, opts...)
		})
		if ctx.Err() != nil {
			return
		}
		n.log.Error("the Node API is not served", "setting", setting, "err", err, "retry", apiRetry)
		select {
		case <-ctx.Done():
		case <-time.After(apiRetry):
		}
	}
}

// serveAPI answers on l until ctx ends, and closes it. No handler runs any more
// when it returns.
func (n *Node) serveAPI(ctx context.Context, l net.Listener, opts ...grpc.ServerOption) error {
	contain := n.contain(partNodeAPI)
	srv := serve.NewGRPC(apiIdle, append([]grpc.ServerOption{
		grpc.MaxRecvMsgSize(apiMessage), grpc.MaxHeaderListSize(apiHeaders), grpc.MaxConcurrentStreams(apiStreams), grpc.ConnectionTimeout(apiHandshake),
		grpc.WaitForHandlers(true),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: pingedEvery / 2}),
		grpc.ChainUnaryInterceptor(contain.Unary), grpc.ChainStreamInterceptor(contain.Stream),
	}, opts...)...)
	imagewolfv1.RegisterNodeServer(srv, n.fanout.Node())
	return serve.GRPC(ctx, srv, l, srv.Stop)
}

// listenSocket makes the socket of the Node API. It is open to others than root
// only when it is theirs.
func (n *Node) listenSocket(context.Context) (net.Listener, error) {
	a := n.cfg.NodeAPI
	mode, err := a.Mode()
	if err != nil {
		return nil, err
	}
	l, err := proxy.Bind(a.Socket)
	if err != nil {
		return nil, err
	}
	gid, err := a.Group()
	if err == nil && gid >= 0 {
		err = os.Chown(a.Socket, -1, gid)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("node_api.socket_group: %w", err), l.Close())
	}
	if err := os.Chmod(a.Socket, mode); err != nil {
		return nil, errors.Join(fmt.Errorf("node_api.socket_mode: %w", err), l.Close())
	}
	return l, nil
}

// listenNetwork listens on the address of the Node API.
func (n *Node) listenNetwork(ctx context.Context) (net.Listener, error) {
	l, err := listenWatchful(ctx, n.cfg.NodeAPI.Address)
	if err != nil {
		return nil, err
	}
	return netutil.LimitListener(l, apiConns), nil
}

// watchful is a listener whose connections end soon after their client's host, whether
// they are at rest or have something to send: there are not many.
type watchful struct{ net.Listener }

func listenWatchful(ctx context.Context, address string) (net.Listener, error) {
	l, err := (&net.ListenConfig{KeepAlive: -1}).Listen(ctx, "tcp", address) // Accept sets it
	if err != nil {
		return nil, err
	}
	return watchful{l}, nil
}

// Accept implements net.Listener.
func (w watchful) Accept() (net.Conn, error) {
	conn, err := w.Listener.Accept()
	if err != nil {
		return nil, err
	}
	cluster.Tune(conn, apiSilent)
	return conn, nil
}

// networkOptions serve those only that have the token, over TLS.
func (n *Node) networkOptions() []grpc.ServerOption {
	b := bearer{file: n.cfg.NodeAPI.TokenFile, refused: n.metrics.Prefetch().Refused}
	return []grpc.ServerOption{
		grpc.Creds(credentials.NewTLS(n.identity.OpenTLS())),
		// Before the request itself is read: who has no token makes the node hold nothing.
		grpc.InTapHandle(func(ctx context.Context, _ *tap.Info) (context.Context, error) { return ctx, b.check(ctx) }),
	}
}

// bearer lets in who has the token.
type bearer struct {
	file    string
	refused func()
}

// check looks at what a caller shows. The file is read for every call: it is a
// line, and may have been replaced.
func (b bearer) check(ctx context.Context) error {
	want, err := nodeapi.ReadToken(b.file)
	if err != nil {
		return status.Error(codes.Unavailable, "node_api.token_file cannot be used: nobody is let in")
	}
	md, _ := metadata.FromIncomingContext(ctx)
	var got string
	if all := md.Get("authorization"); len(all) == 1 {
		if kind, rest, ok := strings.Cut(all[0], " "); ok && strings.EqualFold(kind, "bearer") {
			got = rest
		}
	}
	// Of one length, whatever was sent.
	a, e := sha256.Sum256([]byte(got)), sha256.Sum256([]byte(want))
	if subtle.ConstantTimeCompare(a[:], e[:]) != 1 {
		b.refused()
		return status.Error(codes.Unauthenticated, "the token is missing or is not this cluster's (node_api.token_file)")
	}
	return nil
}

// contain is what keeps panics of a part's gRPC handlers from ending the process.
func (n *Node) contain(part string) serve.Contain {
	return serve.Contain{Log: n.log, Panicked: func() { n.metrics.Panicked(part) }}
}
