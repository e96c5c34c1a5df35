// Package nodeapi is the way to the Node API: for the command line, and for
// whatever else asks nodes about prefetches. It finds a node that answers and
// proves to it who asks. What can be asked is in package imagewolfv1.
package nodeapi

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
	"google.golang.org/protobuf/proto"

	imagewolfv1 "github.com/imagewolf/imagewolf/api/v1"
)

// MinToken is the least length of a token, in bytes.
const MinToken = 16

// maxAnswer bounds what a node may answer, in bytes. The state of a node is some
// 150 bytes, so that a hundred requests of a thousand nodes are 15 MB.
const maxAnswer = 256 << 20

// unixScheme begins the address of a unix socket.
const unixScheme = "unix://"

const (
	dialTimeout = 5 * time.Second // one address, with the handshake
	// A node that vanishes without a word is noticed after at most pingEvery and
	// pingTimeout. gRPC allows no shorter pings from clients.
	pingEvery, pingTimeout = 10 * time.Second, 3 * time.Second
)

// serviceConfig has the addresses tried in turn, and a call that no node
// answered tried again. Every call may be: see Client.Prefetch.
const serviceConfig = `{
	"loadBalancingConfig": [{"pick_first": {}}],
	"methodConfig": [{"name": [{}], "retryPolicy": {
		"maxAttempts": 4, "initialBackoff": "0.1s", "maxBackoff": "1s", "backoffMultiplier": 2, "retryableStatusCodes": ["UNAVAILABLE"]
	}}]
}`

// Options say where nodes are found.
type Options struct {
	// Addresses are tried in turn: "unix:///run/imagewolf/node.sock", or the
	// host:port of a node's node_api.address. At least one.
	Addresses []string
	// CAFile has the certificates (PEM) of which one must have signed a node's: what
	// 'imagewolf cluster-key ca' prints. Read at every handshake. Required for
	// host:port.
	CAFile string
	// TokenFile has what is in the nodes' node_api.token_file. Read at every call.
	// Required for host:port; it is not sent over unix sockets.
	TokenFile string
}

// Client asks nodes. Safe for concurrent use. A call that finds no node fails
// with Unavailable at once, unless it is made with grpc.WaitForReady.
type Client struct {
	imagewolfv1.NodeClient
	conn *grpc.ClientConn
}

var _ imagewolfv1.NodeClient = (*Client)(nil)

// Dial returns a client. It connects when it is first used; its error is a
// mistake in the options or a file that cannot be used. What it holds ends with
// Close.
func Dial(o Options) (*Client, error) {
	if len(o.Addresses) == 0 {
		return nil, errors.New("no address of a node: give one, such as unix:///run/imagewolf/node.sock")
	}
	var addresses []resolver.Address
	for _, a := range o.Addresses {
		if err := o.check(a); err != nil {
			return nil, err
		}
		addresses = append(addresses, resolver.Address{Addr: a})
	}
	// A scheme of the connection's own: nothing is registered for all.
	nodes := manual.NewBuilderWithScheme("imagewolf")
	nodes.InitialState(resolver.State{Addresses: addresses})
	conn, err := grpc.NewClient("imagewolf:///nodes",
		grpc.WithResolvers(nodes),
		grpc.WithDefaultServiceConfig(serviceConfig),
		grpc.WithContextDialer(dial),
		grpc.WithTransportCredentials(transport{caFile: o.CAFile}),
		grpc.WithPerRPCCredentials(token{file: o.TokenFile}),
		grpc.WithAuthority("imagewolf"),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswer)),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: pingEvery, Timeout: pingTimeout}),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 3 * time.Second},
			MinConnectTimeout: dialTimeout,
		}),
	)
	if err != nil {
		return nil, fmt.Errorf("node API: %w", err)
	}
	return &Client{NodeClient: imagewolfv1.NewNodeClient(conn), conn: conn}, nil
}

// check says what is wrong with an address, or with the files that it needs.
func (o Options) check(address string) error {
	if path, ok := strings.CutPrefix(address, unixScheme); ok {
		if !filepath.IsAbs(path) {
			return fmt.Errorf("node address %q: write the absolute path of the socket after %s", address, unixScheme)
		}
		return nil
	}
	if _, port, err := net.SplitHostPort(address); err != nil || port == "" {
		return fmt.Errorf("node address %q: write %s and the path of a socket, or host:port", address, unixScheme)
	}
	if o.CAFile == "" || o.TokenFile == "" {
		return fmt.Errorf("node address %s: a node answers on the network to those only that have its token, and is known by its CA: give the files of both", address)
	}
	if _, err := readCAs(o.CAFile); err != nil {
		return err
	}
	_, err := ReadToken(o.TokenFile)
	return err
}

// Prefetch gives a request that has no id one of its own, so that it is the same
// request when it is sent again because an answer was missed.
func (c *Client) Prefetch(ctx context.Context, in *imagewolfv1.PrefetchRequest, opts ...grpc.CallOption) (*imagewolfv1.PrefetchStatus, error) {
	if in.GetId() == "" {
		in = proto.CloneOf(in)
		in.Id = NewID()
	}
	return c.NodeClient.Prefetch(ctx, in, opts...)
}

// NewID returns an id for a request that no other has.
func NewID() string { return strings.ToLower(rand.Text()) }

// Close ends the connection, and the calls on it.
func (c *Client) Close() error { return c.conn.Close() }

// dial connects to one address.
func dial(ctx context.Context, address string) (net.Conn, error) {
	d := net.Dialer{Timeout: dialTimeout}
	if path, ok := strings.CutPrefix(address, unixScheme); ok {
		return d.DialContext(ctx, "unix", path)
	}
	return d.DialContext(ctx, "tcp", address)
}

// ReadToken returns the token in a file, without white space around it.
func ReadToken(file string) (string, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("token of the node API: %w", err)
	}
	t := strings.TrimSpace(string(b))
	switch {
	case len(t) < MinToken:
		return "", fmt.Errorf("token of the node API: %s has %d bytes, and must have at least %d ('openssl rand -hex 32' makes one)", file, len(t), MinToken)
	case len(t) > 4096 || strings.ContainsFunc(t, func(r rune) bool { return r <= ' ' || r > '~' }):
		return "", fmt.Errorf("token of the node API: %s must have one line of letters, digits and signs, at most 4096", file)
	}
	return t, nil
}

// token proves to a node on the network who asks. It is sent under TLS only.
type token struct{ file string }

var _ credentials.PerRPCCredentials = token{}

// GetRequestMetadata implements credentials.PerRPCCredentials.
func (t token) GetRequestMetadata(ctx context.Context, _ ...string) (map[string]string, error) {
	info, ok := credentials.RequestInfoFromContext(ctx)
	if _, secure := info.AuthInfo.(credentials.TLSInfo); !ok || !secure {
		return nil, nil
	}
	text, err := ReadToken(t.file)
	if err != nil {
		return nil, err
	}
	return map[string]string{"authorization": "Bearer " + text}, nil
}

// RequireTransportSecurity implements credentials.PerRPCCredentials: a unix
// socket has none, and is sent nothing.
func (token) RequireTransportSecurity() bool { return false }

func readCAs(file string) (*x509.CertPool, error) {
	pem, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("CA of the nodes: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("CA of the nodes: no certificate in PEM in %s ('imagewolf cluster-key ca' on a node prints it)", file)
	}
	return pool, nil
}

// transport speaks TLS to nodes on the network, and nothing to those behind a
// unix socket.
type transport struct{ caFile string }

var _ credentials.TransportCredentials = transport{}

// localInfo is what is known of the other side of a unix socket.
type localInfo struct{ credentials.CommonAuthInfo }

// AuthType implements credentials.AuthInfo.
func (localInfo) AuthType() string { return "unix" }

// ClientHandshake implements credentials.TransportCredentials.
func (t transport) ClientHandshake(ctx context.Context, authority string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	if conn.RemoteAddr().Network() == "unix" {
		return conn, localInfo{credentials.CommonAuthInfo{SecurityLevel: credentials.NoSecurity}}, nil
	}
	pool, err := readCAs(t.caFile)
	if err != nil {
		return nil, nil, err
	}
	return credentials.NewTLS(&tls.Config{
		MinVersion: tls.VersionTLS13,
		ServerName: authority,
		// Nodes have the names of machines, which need not be those that they are
		// reached by. VerifyConnection checks all the rest.
		InsecureSkipVerify: true,
		VerifyConnection:   func(cs tls.ConnectionState) error { return verify(cs.PeerCertificates, pool) },
	}).ClientHandshake(ctx, authority, conn)
}

// verify checks a node's certificates, its own first.
func verify(chain []*x509.Certificate, pool *x509.CertPool) error {
	if len(chain) == 0 {
		return errors.New("the node showed no certificate")
	}
	between := x509.NewCertPool()
	for _, c := range chain[1:] {
		between.AddCert(c)
	}
	_, err := chain[0].Verify(x509.VerifyOptions{
		Roots: pool, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	})
	if err != nil {
		return fmt.Errorf("certificate of node %q: %w", chain[0].Subject.CommonName, err)
	}
	return nil
}

// ServerHandshake implements credentials.TransportCredentials; these
// credentials are a client's.
func (transport) ServerHandshake(net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("these credentials are for clients")
}

// Info implements credentials.TransportCredentials.
func (transport) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}

// Clone implements credentials.TransportCredentials.
func (t transport) Clone() credentials.TransportCredentials { return t }

// OverrideServerName implements credentials.TransportCredentials; names are not
// looked at.
func (transport) OverrideServerName(string) error { return nil }
