package node

import (
	"context"
	"crypto/rand"
	"fmt"
	"net"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/imagewolf/imagewolf/internal/systemd"
)

// watch keeps systemd's watchdog quiet for as long as containerd would be
// answered; without a watchdog it returns at once. It asks through the socket at a path,
// as containerd does: a daemon that hangs there holds up every pull of the node,
// and is better started again.
func (n *Node) watch(ctx context.Context, socket string) {
	conn, err := dialSocket(socket)
	if err != nil {
		n.log.Error("systemd's watchdog is not served", "err", err)
		return
	}
	defer conn.Close() //nolint:errcheck // closed once, here
	client := contentapi.NewContentClient(conn)
	systemd.Watch(ctx, n.log, func(ctx context.Context) error { return answers(ctx, client) })
}

// dialSocket connects to a unix socket, whatever characters its path has.
func dialSocket(path string) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///content", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", path)
		}))
}

// answers fails if the content service does not answer before ctx ends. It asks
// for another blob each time, of which nobody has the content: one that is there
// would be used by being asked for, and anyone who knew it could bring it here.
func answers(ctx context.Context, c contentapi.ContentClient) error {
	_, err := c.Info(ctx, &contentapi.InfoRequest{Digest: digest.FromString(rand.Text()).String()})
	if err != nil && status.Code(err) != codes.NotFound {
		return fmt.Errorf("containerd's calls are not answered: %w", err)
	}
	return nil
}
