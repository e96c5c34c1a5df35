package cluster

import (
	"context"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"time"
)

// The protocols of the data port, as ALPN names them.
const (
	ProtoGRPC       = "h2"             // tracker and Node API
	ProtoBitTorrent = "imagewolf-bt/1" // peer connections
)

// dialTimeout bounds Dial, from the first packet to the end of the handshake.
const dialTimeout = 5 * time.Second

// Why a connection was refused before a certificate was shown.
var (
	errKnock = errors.New("client does not know this cluster")
	errProto = errors.New("no protocol that this port speaks was asked for")
)

// ServerTLS accepts members of the cluster that ask for one of protos:
// TLS 1.3, both sides with a certificate. Everyone else is refused, and those
// who cannot even name the cluster are not shown this node's certificate
// either. Certificates are looked up anew for every connection.
func (id *Identity) ServerTLS(protos ...string) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		GetConfigForClient: func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			// A client says which cluster it means where web clients name the
			// host. It is no secret from who listens on the wire; it keeps
			// scanners and nodes of other clusters from learning any name. With
			// it the client says which of the cluster's keys it goes by, and
			// only of that one it is sure to know the CA.
			n := id.knocked(hello.ServerName)
			if n < 0 {
				return nil, errKnock
			}
			// Without this a client that asks for nothing would be let in.
			if !slices.ContainsFunc(hello.SupportedProtos, func(p string) bool { return slices.Contains(protos, p) }) {
				return nil, errProto
			}
			leaf, pool := id.creds.current(n)
			return &tls.Config{
				MinVersion:   tls.VersionTLS13,
				Certificates: []tls.Certificate{*leaf},
				ClientAuth:   tls.RequireAndVerifyClientCert,
				ClientCAs:    pool,
				NextProtos:   protos,
				// A resumed session would outlive the certificate it began with.
				SessionTicketsDisabled: true,
			}, nil
		},
	}
}

// OpenTLS shows this node's certificate to everyone: TLS 1.3, and no certificate
// is asked of the client, who must prove itself by other means. It is looked up
// anew for every connection.
func (id *Identity) OpenTLS() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		NextProtos: []string{ProtoGRPC},
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			leaf, _ := id.creds.current(0)
			return leaf, nil
		},
		SessionTicketsDisabled: true,
	}
}

// knocked says by which of the secrets a client names the cluster, -1 for none.
func (id *Identity) knocked(name string) int {
	found := -1
	for i := len(id.secrets) - 1; i >= 0; i-- {
		if subtle.ConstantTimeCompare([]byte(name), []byte(id.secrets[i].knock)) == 1 {
			found = i
		}
	}
	return found
}

// ClientTLS connects to a member of the cluster for proto. The server is
// checked against the cluster's CAs, not against a host name. This node speaks
// by its own key: whoever does not accept that one is of another cluster.
func (id *Identity) ClientTLS(proto string) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		ServerName: id.secrets[0].knock,
		NextProtos: []string{proto},
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			leaf, _ := id.creds.current(0)
			return leaf, nil
		},
		SessionTicketsDisabled: true,
		// Only the check of the host name is wanted off, and it cannot be had
		// alone: VerifyConnection below checks all the rest.
		InsecureSkipVerify: true,
		VerifyConnection: func(cs tls.ConnectionState) error {
			if cs.NegotiatedProtocol != proto {
				return fmt.Errorf("server speaks %q, want %q", cs.NegotiatedProtocol, proto)
			}
			_, pool := id.creds.current(0)
			return verifyChain(cs.PeerCertificates, pool, x509.ExtKeyUsageServerAuth)
		},
	}
}

// Dial connects to a member's data port for proto and finishes the TLS
// handshake, within 5 seconds. In TLS 1.3 the server checks the client last:
// that it refused this node shows only at the first read. The connection is a
// *tls.Conn.
func (id *Identity) Dial(ctx context.Context, addr, proto string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	raw, err := dialTCP(ctx, addr, deadAfter)
	if err != nil {
		return nil, err
	}
	conn := tls.Client(raw, id.ClientTLS(proto))
	if err := conn.HandshakeContext(ctx); err != nil {
		_ = raw.Close() // nothing was sent that matters
		return nil, fmt.Errorf("TLS with %s: %w", addr, err)
	}
	return conn, nil
}

// dialGRPC is dialTCP for connections that carry little, and whose loss is to be
// noticed soon.
func dialGRPC(ctx context.Context, addr string) (net.Conn, error) {
	return dialTCP(ctx, addr, deafAfter)
}

// dialTCP never goes through a proxy: members reach each other directly. What the
// other side leaves unconfirmed for so long ends the connection.
func dialTCP(ctx context.Context, addr string, unconfirmed time.Duration) (net.Conn, error) {
	d := net.Dialer{KeepAlive: -1} // Tune sets it
	conn, err := insist(ctx, func(ctx context.Context) (net.Conn, error) { return d.DialContext(ctx, "tcp", addr) })
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", addr, err)
	}
	Tune(conn, unconfirmed)
	return conn, nil
}

// dialAgain is how long a connection may take before another is begun beside it.
const dialAgain = 500 * time.Millisecond

// insist dials again and again beside what it has begun, until one has succeeded or
// failed: the kernel asks a host that is back only one, three and seven seconds after
// the first packet was lost, and a slow line answers the first. It waits for all.
func insist(ctx context.Context, dial func(context.Context) (net.Conn, error)) (net.Conn, error) {
	type result struct {
		conn net.Conn
		err  error
	}
	ctx, cancel := context.WithCancel(ctx)
	var dialing sync.WaitGroup
	defer dialing.Wait()
	defer cancel()
	results := make(chan result)
	begin := func() {
		dialing.Go(func() {
			conn, err := dial(ctx)
			select {
			case results <- result{conn, err}:
			case <-ctx.Done():
				if err == nil {
					_ = conn.Close() // nobody has seen it
				}
			}
		})
	}
	begin()
	again := time.NewTicker(dialAgain)
	defer again.Stop()
	for {
		select {
		case r := <-results:
			return r.conn, r.err
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-again.C:
			begin()
		}
	}
}

// deadAfter is how long a peer's host may be silent before its connections
// are dropped: a host that lost power ends no connection by itself.
const deadAfter = 10 * time.Second

// deafAfter is how long a tracker may leave unconfirmed what it was sent: the least
// that has room for as many probes as a connection at rest is to survive the loss of.
const deafAfter = 3500 * time.Millisecond

// heldAfter is how long a tracker's member may leave unconfirmed what it was sent: not
// much longer, since the others are sent to members that are gone for as long. But both
// sides probe, and where packets are lost the tracker is not to end as many connections
// once more as its members do: its own survive the loss of one probe more.
const heldAfter = 4500 * time.Millisecond

// lostProbes is how many probes in a row must be lost before a connection at rest is,
// and heldProbes the same where it is to a tracker, at that end.
const (
	lostProbes = 3
	heldProbes = lostProbes + 1
)

// maxUnsent is how many bytes of a connection may wait in the kernel that are
// not on the wire: enough for a few milliseconds at 1 Gbit/s.
const maxUnsent = 256 << 10

// Tune has the kernel notice dead hosts, on TCP connections: by probes while a
// connection rests, and by a limit on how long sent bytes may go unconfirmed, which is
// not below 3.5 seconds. Linux ends a connection at rest by the same limit, however
// many probes were to be sent: all of them have to fit into it.
func Tune(conn net.Conn, unconfirmed time.Duration) { tune(conn, unconfirmed, lostProbes) }

// tune is Tune, with how many probes in a row must be lost.
func tune(conn net.Conn, unconfirmed time.Duration, probes int) {
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return
	}
	// The kernel counts in seconds. The last probe goes out half an interval before
	// the limit, and is answered or the connection closed half a one after it.
	interval := max((unconfirmed / 5).Truncate(time.Second), time.Second)
	idle := (unconfirmed - time.Duration(probes-1)*interval - interval/2).Truncate(time.Second)
	// An error means that the connection is dead already: its first use tells.
	_ = tcp.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: idle, Interval: interval, Count: probes})
	setTCP(tcp, unconfirmed, maxUnsent)
}
