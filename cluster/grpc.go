package cluster

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
)

// GRPCDialOptions connects a gRPC client to a member's data port: the
// cluster's TLS, no proxy, and a second try soon after the first failed.
func (id *Identity) GRPCDialOptions() []grpc.DialOption {
	return []grpc.DialOption{
		grpc.WithTransportCredentials(credentials.NewTLS(id.ClientTLS(ProtoGRPC))),
		grpc.WithContextDialer(dialGRPC),
		grpc.WithNoProxy(),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
			MinConnectTimeout: dialTimeout,
		}),
	}
}

// ServerCredentials is for a gRPC server on DataPort.GRPC(), whose
// connections have their TLS handshake behind them: it hands the peer's
// certificate on to the handlers (see PeerName).
func (id *Identity) ServerCredentials() credentials.TransportCredentials { return portCredentials{} }

// PeerName is the common name in the verified certificate of the peer that
// called a handler; false if the call did not come through the data port.
// Certificates that nodes issue themselves carry the node's name.
func PeerName(ctx context.Context) (string, bool) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return "", false
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok || len(info.State.PeerCertificates) == 0 {
		return "", false
	}
	return info.State.PeerCertificates[0].Subject.CommonName, true
}

// portCredentials takes over connections that DataPort has let in.
type portCredentials struct{}

var _ credentials.TransportCredentials = portCredentials{}

// ServerHandshake implements credentials.TransportCredentials.
func (portCredentials) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	c, ok := conn.(*tls.Conn)
	if !ok {
		return nil, nil, fmt.Errorf("connection from %s does not come from the data port", conn.RemoteAddr())
	}
	state := c.ConnectionState()
	if !state.HandshakeComplete || state.NegotiatedProtocol != ProtoGRPC || len(state.PeerCertificates) == 0 {
		return nil, nil, fmt.Errorf("connection from %s is not a member's for gRPC", conn.RemoteAddr())
	}
	return conn, credentials.TLSInfo{
		State:          state,
		CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity},
	}, nil
}

// ClientHandshake implements credentials.TransportCredentials; these
// credentials are a server's.
func (portCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("these credentials are for servers: clients use GRPCDialOptions")
}

// Info implements credentials.TransportCredentials.
func (portCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}

// Clone implements credentials.TransportCredentials.
func (c portCredentials) Clone() credentials.TransportCredentials { return c }

// OverrideServerName implements credentials.TransportCredentials; a server
// has no server's name to override.
func (portCredentials) OverrideServerName(string) error { return nil }
