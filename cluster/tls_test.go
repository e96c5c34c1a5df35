package cluster

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
)

func listen(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() }) // the port may have closed it already
	return l
}

// openPort runs a data port that says the peer's name to every BitTorrent
// connection.
func openPort(t *testing.T, id *Identity, change func(*DataPort)) *DataPort {
	t.Helper()
	p := NewDataPort(listen(t), id, everyone{}, silent)
	if change != nil {
		change(p)
	}
	start(t, p.Run)
	return p
}

func greet(t *testing.T, p *DataPort) {
	start(t, func(ctx context.Context) error {
		defer context.AfterFunc(ctx, func() { _ = p.BitTorrent().Close() })()
		for {
			conn, err := p.BitTorrent().Accept()
			if errors.Is(err, net.ErrClosed) {
				return nil
			}
			if err != nil {
				return err
			}
			name := conn.(*tls.Conn).ConnectionState().PeerCertificates[0].Subject.CommonName
			if _, err := io.WriteString(conn, "hello "+name); err != nil {
				t.Errorf("greet: %v", err)
			}
			_ = conn.Close() // said all it had to say
		}
	})
}

// hear reads what a data port says, "" and an error if it refuses.
func hear(conn net.Conn) (string, error) {
	if err := conn.SetReadDeadline(time.Now().Add(patience)); err != nil {
		return "", err
	}
	b, err := io.ReadAll(conn)
	return string(b), err
}

func greeting(t *testing.T, id *Identity, p *DataPort) string {
	t.Helper()
	conn, err := id.Dial(t.Context(), p.listener.Addr().String(), ProtoBitTorrent)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close() //nolint:errcheck // only read from
	s, err := hear(conn)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestMembersTalk(t *testing.T) {
	key := GenerateKey()
	p := openPort(t, keyed(t, key, "server"), nil)
	greet(t, p)
	for _, name := range []string{"a", "b.example", "server"} {
		if got, want := greeting(t, keyed(t, key, name), p), "hello "+name; got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

func TestStrangersGetNothing(t *testing.T) {
	key := GenerateKey()
	member := keyed(t, key, "member")
	other := keyed(t, GenerateKey(), "other")
	p := openPort(t, keyed(t, key, "server"), nil)

	shown := 0 // certificates that the server has shown
	config := func(change func(*tls.Config)) *tls.Config {
		c := member.ClientTLS(ProtoBitTorrent)
		c.VerifyConnection = func(tls.ConnectionState) error { shown++; return nil }
		change(c)
		return c
	}
	withCert := func(c *tls.Certificate) func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		return func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return c, nil }
	}
	foreign, _ := other.creds.current(0)
	expired, err := member.creds.(*derived).issuers[0].issue(time.Now().Add(-time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		config *tls.Config
		shown  int // a certificate is shown to who knows the cluster
	}{
		"other key": {config(func(c *tls.Config) {
			c.ServerName = other.secrets[0].knock
			c.GetClientCertificate = withCert(foreign)
		}), 0},
		"does not name the cluster": {config(func(c *tls.Config) { c.ServerName = "node.example" }), 0},
		"names nothing":             {config(func(c *tls.Config) { c.ServerName = "" }), 0},
		"no protocol":               {config(func(c *tls.Config) { c.NextProtos = nil }), 0},
		"unknown protocol":          {config(func(c *tls.Config) { c.NextProtos = []string{"http/1.1"} }), 0},
		"TLS 1.2": {config(func(c *tls.Config) {
			c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
		}), 0},
		"no certificate":           {config(func(c *tls.Config) { c.GetClientCertificate = withCert(&tls.Certificate{}) }), 1},
		"certificate of other key": {config(func(c *tls.Config) { c.GetClientCertificate = withCert(foreign) }), 1},
		"expired certificate":      {config(func(c *tls.Config) { c.GetClientCertificate = withCert(expired) }), 1},
	} {
		t.Run(name, func(t *testing.T) {
			shown = 0
			raw, err := net.Dial("tcp", p.listener.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer raw.Close() //nolint:errcheck // nothing was written
			conn := tls.Client(raw, c.config)
			err = conn.HandshakeContext(t.Context())
			if err == nil { // in TLS 1.3 the client is checked last
				var said string
				said, err = hear(conn)
				if said != "" {
					t.Errorf("the stranger was told %q", said)
				}
			}
			if err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("not refused: %v", err)
			}
			if shown != c.shown {
				t.Errorf("%d certificates were shown, want %d", shown, c.shown)
			}
		})
	}
	t.Run("no TLS", func(t *testing.T) {
		raw, err := net.Dial("tcp", p.listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer raw.Close() //nolint:errcheck // the test is over
		if _, err := io.WriteString(raw, "\x13BitTorrent protocol and so on"); err != nil {
			t.Fatal(err)
		}
		if said, _ := hear(raw); len(said) > 7 { // a TLS alert
			t.Errorf("the stranger was told %q", said)
		}
	})
	if n := len(p.torrent.queue) + len(p.grpc.queue); n > 0 {
		t.Errorf("%d strangers were let in", n)
	}
}

// A server that knows the cluster's name but has no certificate of it must
// not be talked to, nor one that speaks something else.
func TestDialRefusesServers(t *testing.T) {
	key := GenerateKey()
	member, imposter := keyed(t, key, "member"), keyed(t, GenerateKey(), "imposter")
	imposter.secrets[0].knock = member.secrets[0].knock
	p := openPort(t, imposter, nil)
	_, err := member.Dial(t.Context(), p.listener.Addr().String(), ProtoBitTorrent)
	var unknown x509.UnknownAuthorityError
	if !errors.As(err, &unknown) {
		t.Errorf("dialling an imposter: %v", err)
	}
	if _, err := member.Dial(t.Context(), openPort(t, keyed(t, key, "s"), nil).listener.Addr().String(), "smtp"); err == nil {
		t.Error("a protocol that the port does not speak was agreed on")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := member.Dial(ctx, p.listener.Addr().String(), ProtoGRPC); !errors.Is(err, context.Canceled) {
		t.Errorf("dialling with a context that is over: %v", err)
	}
}

func TestGRPCKnowsItsPeer(t *testing.T) {
	key := GenerateKey()
	server := keyed(t, key, "server")
	p := openPort(t, server, nil)
	names := make(chan string, 1)
	srv := grpc.NewServer(grpc.Creds(server.ServerCredentials()), grpc.UnaryInterceptor(
		func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
			name, _ := PeerName(ctx)
			names <- name
			return h(ctx, req)
		}))
	healthv1.RegisterHealthServer(srv, health.NewServer())
	start(t, func(ctx context.Context) error {
		defer context.AfterFunc(ctx, srv.Stop)()
		return srv.Serve(p.GRPC())
	})
	call := func(id *Identity) error {
		conn, err := grpc.NewClient("passthrough:///"+p.listener.Addr().String(), id.GRPCDialOptions()...)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close() //nolint:errcheck // the call is over
		_, err = healthv1.NewHealthClient(conn).Check(t.Context(), &healthv1.HealthCheckRequest{})
		return err
	}
	t.Setenv("HTTPS_PROXY", "http://127.0.0.1:1") // where nobody answers
	if err := call(keyed(t, key, "caller")); err != nil {
		t.Fatal(err)
	}
	if got := <-names; got != "caller" {
		t.Errorf("the handler knows its peer as %q", got)
	}
	if err := call(keyed(t, GenerateKey(), "stranger")); err == nil {
		t.Error("a stranger's call was answered")
	}
	if name, ok := PeerName(t.Context()); ok {
		t.Errorf("a call from nowhere has the peer %q", name)
	}
	if _, _, err := server.ServerCredentials().ServerHandshake(&net.TCPConn{}); err == nil || !strings.Contains(err.Error(), "data port") {
		t.Errorf("a bare connection was taken: %v", err)
	}
}

func TestSlowConsumerStopsNobody(t *testing.T) {
	key := GenerateKey()
	p := openPort(t, keyed(t, key, "server"), func(p *DataPort) { p.torrent.queue = make(chan *tls.Conn, 1) })
	member := keyed(t, key, "member")
	dial := func(proto string) net.Conn {
		conn, err := member.Dial(t.Context(), p.listener.Addr().String(), proto)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() }) // may be closed from the other side
		return conn
	}
	dial(ProtoBitTorrent)
	// The queue holds one: of the next two at least one is dropped at once.
	two := []net.Conn{dial(ProtoBitTorrent), dial(ProtoBitTorrent)}
	dropped := make(chan error, len(two))
	for _, conn := range two {
		go func() { _, err := hear(conn); dropped <- err }()
	}
	if err := <-dropped; errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error(err)
	}
	dial(ProtoGRPC)
	if _, err := p.GRPC().Accept(); err != nil {
		t.Fatal(err)
	}
	if err := p.BitTorrent().Close(); err != nil {
		t.Fatal(err)
	}
	// The one in the queue, if it was one of the two.
	if err := <-dropped; errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error(err)
	}
	if _, err := p.BitTorrent().Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept after Close: %v", err)
	}
	dial(ProtoGRPC) // the other protocol goes on
	if _, err := p.GRPC().Accept(); err != nil {
		t.Fatal(err)
	}
}

// So many strangers that say nothing are there at once and no more: the oldest makes
// room, and a member is let in at any time.
func TestSilentStrangersAreBounded(t *testing.T) {
	key := GenerateKey()
	p := openPort(t, keyed(t, key, "server"), func(p *DataPort) { p.shakes.max = many })
	greet(t, p)
	ended := make(chan int, many+2)
	for i := range many + 2 {
		conn, err := net.Dial("tcp", p.listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() }) // perhaps from the other side already
		go func() {
			if s, err := hear(conn); s != "" || errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("a silent stranger was told %q, %v", s, err)
			}
			ended <- i
		}()
		if i < many {
			eventually(t, "the stranger is seen", func() bool { return p.shakes.len() == i+1 })
		} else if got := <-ended; got != i-many {
			t.Errorf("stranger %d made room for stranger %d", got, i)
		}
	}
	if got := greeting(t, keyed(t, key, "a"), p); got != "hello a" {
		t.Errorf("beside the strangers a member hears %q", got)
	}
	if got := <-ended; got != 2 {
		t.Errorf("stranger %d made room for the member", got)
	}
	eventually(t, "who has proved itself has its place no more", func() bool { return p.shakes.len() == many-1 })
}

func (h *handshakes) len() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.open)
}

// A first packet that is lost, or a host that was away, costs half a second and not
// what the kernel waits; who answers late is heard as well, and no connection is left over.
func TestDialInsists(t *testing.T) {
	for name, c := range map[string]struct {
		answers []time.Duration // of each attempt, in order; 0 for never
		err     error
		takes   time.Duration
	}{
		"the first is lost": {answers: []time.Duration{0, 10 * time.Millisecond}, takes: 510 * time.Millisecond},
		"all take long":     {answers: []time.Duration{1200 * time.Millisecond, 1200 * time.Millisecond, 1200 * time.Millisecond}, takes: 2200 * time.Millisecond},
		"refused":           {answers: []time.Duration{0, time.Millisecond}, err: io.ErrClosedPipe, takes: 501 * time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var mu sync.Mutex
				var made []*hostConn
				began, n := time.Now(), 0
				conn, err := insist(t.Context(), func(ctx context.Context) (net.Conn, error) {
					mu.Lock()
					after := cmp.Or(c.answers[n], time.Hour)
					n++
					mu.Unlock()
					if after == time.Hour {
						<-ctx.Done()
						return nil, ctx.Err()
					}
					time.Sleep(after) // one that does not see that it is to end
					if c.err != nil {
						return nil, c.err
					}
					mu.Lock()
					defer mu.Unlock()
					made = append(made, &hostConn{})
					return made[len(made)-1], nil
				})
				synctest.Wait()
				if took := time.Since(began); took != c.takes || !errors.Is(err, c.err) {
					t.Errorf("took %v, want %v: %v", took, c.takes, err)
				}
				for _, m := range made {
					if m.closed != (net.Conn(m) != conn) {
						t.Errorf("closed: %t, of the one that is returned: %t", m.closed, net.Conn(m) == conn)
					}
				}
			})
		})
	}
}

// Of all hosts it is the one with the most connections that has its oldest closed.
func TestCrowderMakesRoom(t *testing.T) {
	h := handshakes{max: many + 1}
	open := func(host string, port int) *hostConn {
		c := &hostConn{remote: &net.TCPAddr{IP: net.ParseIP(host), Port: port}}
		h.begin(c)
		return c
	}
	quiet := open("10.0.0.1", 1)
	var crowd []*hostConn
	for port := range many {
		crowd = append(crowd, open("10.0.0.2", port))
	}
	latest := open("10.0.0.3", 1)
	if quiet.closed || latest.closed || !crowd[0].closed || crowd[1].closed {
		t.Errorf("closed: the quiet host's %t, the newest %t, the crowd's first %t and second %t", quiet.closed, latest.closed, crowd[0].closed, crowd[1].closed)
	}
}

// Members that come all at once make no room for each other, unless one takes long.
func TestNewcomerWaitsItsTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := handshakes{max: 2}
		open := func(host string) *hostConn {
			c := &hostConn{remote: &net.TCPAddr{IP: net.ParseIP(host), Port: 1}}
			h.begin(c)
			return c
		}
		first, second, third := open("10.0.0.1"), open("10.0.0.2"), open("10.0.0.3")
		if first.closed || second.closed || !third.closed || h.len() != 2 {
			t.Errorf("closed: %t %t %t of three that came at once", first.closed, second.closed, third.closed)
		}
		time.Sleep(young)
		if fourth := open("10.0.0.4"); !first.closed || second.closed || fourth.closed {
			t.Errorf("closed: %t %t, and %t of one that came later", first.closed, second.closed, fourth.closed)
		}
	})
}

// hostConn is a connection of which only the other end's address counts.
type hostConn struct {
	net.Conn
	remote net.Addr
	closed bool
}

func (c *hostConn) RemoteAddr() net.Addr { return c.remote }
func (c *hostConn) Close() error         { c.closed = true; return nil }

// A member keeps so many connections open and no more, whatever their protocol; others
// do not notice, and one that is closed makes room.
func TestConnectionsOfAMemberAreBounded(t *testing.T) {
	key := GenerateKey()
	said := newRecorder(slog.LevelWarn)
	p := openPort(t, keyed(t, key, "server"), func(p *DataPort) {
		p.places.max = 3
		p.log = slog.New(said)
	})
	flood, other := keyed(t, key, "flood"), keyed(t, key, "other")
	dial := func(id *Identity, proto string) error {
		conn, err := id.Dial(t.Context(), p.listener.Addr().String(), proto)
		if err != nil {
			return err
		}
		t.Cleanup(func() { _ = conn.Close() }) // perhaps from the other side already
		return nil
	}
	var kept []net.Conn
	for _, proto := range []string{ProtoBitTorrent, ProtoGRPC, ProtoBitTorrent} {
		if err := dial(flood, proto); err != nil {
			t.Fatal(err)
		}
		l := p.BitTorrent()
		if proto == ProtoGRPC {
			l = p.GRPC()
		}
		conn, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		kept = append(kept, conn)
	}
	_ = dial(flood, ProtoBitTorrent) // the handshake may be through before the port hangs up
	said.await(t, "too many connections, one more dropped name=flood")
	if err := dial(other, ProtoBitTorrent); err != nil {
		t.Fatal(err)
	}
	conn, err := p.BitTorrent().Accept()
	if err != nil {
		t.Fatal(err)
	}
	if name := conn.(*tls.Conn).ConnectionState().PeerCertificates[0].Subject.CommonName; name != "other" {
		t.Errorf("%s is let in", name)
	}
	for range 2 {
		_ = kept[0].Close() // twice: one place
	}
	_ = conn.Close()
	if err := dial(flood, ProtoBitTorrent); err != nil {
		t.Fatal(err)
	}
	if conn, err = p.BitTorrent().Accept(); err != nil {
		t.Fatal(err)
	}
	for _, c := range append(kept[1:], conn) {
		_ = c.Close()
	}
	p.places.mu.Lock()
	defer p.places.mu.Unlock()
	if len(p.places.open) != 0 {
		t.Errorf("places are taken for ever: %v", p.places.open)
	}
}

// flaky fails to accept a few times, as a process without file descriptors.
type flaky struct {
	net.Listener
	failures int
}

func (l *flaky) Accept() (net.Conn, error) {
	if l.failures > 0 {
		l.failures--
		return nil, &net.OpError{Op: "accept", Err: syscall.EMFILE}
	}
	return l.Listener.Accept()
}

func TestPortOutlivesFailures(t *testing.T) {
	key := GenerateKey()
	p := NewDataPort(&flaky{Listener: listen(t), failures: 3}, keyed(t, key, "server"), everyone{}, silent)
	start(t, p.Run)
	greet(t, p)
	if got := greeting(t, keyed(t, key, "a"), p); got != "hello a" {
		t.Errorf("a member hears %q", got)
	}
}

func TestPortCloses(t *testing.T) {
	key := GenerateKey()
	p := NewDataPort(listen(t), keyed(t, key, "server"), everyone{}, silent)
	stop := start(t, p.Run)
	conn, err := keyed(t, key, "a").Dial(t.Context(), p.listener.Addr().String(), ProtoGRPC)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close() //nolint:errcheck // closed from the other side
	stop()
	if said, err := hear(conn); said != "" || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("heard %q from a closed port, %v", said, err)
	}
	for _, l := range []net.Listener{p.GRPC(), p.BitTorrent()} {
		if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Accept after the end: %v", err)
		}
		if l.Addr().String() != p.listener.Addr().String() {
			t.Error("a listener has another address than the port")
		}
	}

	broken := NewDataPort(listen(t), keyed(t, key, "server"), everyone{}, silent)
	_ = broken.listener.Close() // by someone else
	if err := broken.Run(t.Context()); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Run on a closed listener: %v", err)
	}
}

func TestQueuedConnectionsAreDropped(t *testing.T) {
	l := newPortListener(&net.TCPAddr{})
	here, there := net.Pipe()
	if !l.offer(tls.Server(here, &tls.Config{MinVersion: tls.VersionTLS13})) {
		t.Fatal("an empty queue is full")
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := hear(there); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("the connection that nobody accepted is open")
	}
	if l.offer(tls.Server(here, &tls.Config{MinVersion: tls.VersionTLS13})) {
		t.Error("a closed queue takes connections")
	}
	if err := l.Close(); err != nil {
		t.Errorf("the second Close: %v", err)
	}
}
