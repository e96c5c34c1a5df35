package node

import (
	"context"
	"net"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

// nothing is a blob that nobody has: asking for it shows whether the store
// answers, and reads nothing.
var nothing = digest.FromString("imagewolf watchdog")

// tell says something to systemd, if that started the daemon.
func (n *Node) tell(state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		n.log.Warn("systemd was not told", "state", state, "err", err)
	}
}

// watch keeps systemd's watchdog quiet for as long as containerd would be
// answered; without a watchdog it returns at once. It asks through the socket,
// as containerd does: a daemon that hangs there holds up every pull of the node,
// and is better started again.
func (n *Node) watch(ctx context.Context) {
	limit, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		n.log.Warn("systemd's watchdog is not served", "err", err)
	}
	if limit == 0 {
		return
	}
	conn, err := dialSocket(n.cfg.Socket)
	if err != nil {
		n.log.Error("systemd's watchdog is not served", "err", err)
		return
	}
	defer conn.Close() //nolint:errcheck // closed once, here
	tick := time.NewTicker(limit / 4)
	defer tick.Stop()
	for {
		if err := answers(ctx, contentapi.NewContentClient(conn), limit/2); err == nil {
			n.tell(daemon.SdNotifyWatchdog)
		} else if ctx.Err() == nil {
			n.log.Error("containerd's calls are not answered: systemd will start the daemon again", "err", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// dialSocket connects to a unix socket, whatever characters its path has.
func dialSocket(path string) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///content", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", path)
		}))
}

// answers fails if the content service does not answer in time.
func answers(ctx context.Context, c contentapi.ContentClient, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	_, err := c.Info(ctx, &contentapi.InfoRequest{Digest: nothing.String()})
	if status.Code(err) == codes.NotFound {
		return nil
	}
	return err
}
