package proxy_test

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"path/filepath"
	"testing"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	"github.com/containerd/containerd/v2/core/content"
	contentproxy "github.com/containerd/containerd/v2/core/content/proxy"
	"github.com/containerd/containerd/v2/core/content/testsuite"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/imagewolf/imagewolf/plugin/store"
	"github.com/imagewolf/imagewolf/proxy"
)

// The node's own store, through the socket, has to pass for containerd's.
func TestContentSuiteOverNodeStore(t *testing.T) {
	testsuite.ContentSuite(t, "node", func(ctx context.Context, root string) (context.Context, content.Store, func() error, error) {
		log := slog.New(slog.DiscardHandler)
		cs, err := store.Open(store.Options{Root: root, Log: log})
		if err != nil {
			return nil, nil, nil, err
		}
		l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s.sock"))
		if err != nil {
			return nil, nil, nil, err
		}
		conn, err := grpc.NewClient("unix:"+l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return nil, nil, nil, err
		}
		serveCtx, cancel := context.WithCancel(context.Background())
		served := make(chan error, 2)
		go func() { served <- cs.Run(serveCtx) }()
		go func() { served <- proxy.New(proxy.Options{Store: cs, Log: log}).Serve(serveCtx, l) }()
		return ctx, contentproxy.NewContentStore(contentapi.NewContentClient(conn)), func() error {
			err := conn.Close()
			cancel()
			return errors.Join(err, <-served, <-served, cs.Close())
		}, nil
	})
}
