package nodeapi

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	imagewolfv1 "github.com/imagewolf/imagewolf/api/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// server answers every request with itself, and notes what it was told of who
// asks.
type server struct {
	imagewolfv1.UnimplementedNodeServer
	ids    []string
	tokens []string
}

func (s *server) Prefetch(ctx context.Context, in *imagewolfv1.PrefetchRequest) (*imagewolfv1.PrefetchStatus, error) {
	s.ids = append(s.ids, in.Id)
	md, _ := metadata.FromIncomingContext(ctx)
	s.tokens = append(s.tokens, strings.Join(md.Get("authorization"), ","))
	if in.Image == "again" && len(s.ids) == 1 {
		return nil, status.Error(codes.Unavailable, "on its way out")
	}
	st := &imagewolfv1.PrefetchStatus{Request: in}
	if in.Image == "on many nodes" {
		for range 50_000 {
			st.Nodes = append(st.Nodes, &imagewolfv1.NodePrefetch{Node: strings.Repeat("n", 100)})
		}
	}
	return st, nil
}

func (s *server) serve(t *testing.T, l net.Listener, opts ...grpc.ServerOption) {
	t.Helper()
	srv := grpc.NewServer(opts...)
	imagewolfv1.RegisterNodeServer(srv, s)
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.Serve(l) }()
	t.Cleanup(func() { srv.Stop(); <-done })
}

func listen(t *testing.T, network, address string) net.Listener {
	t.Helper()
	l, err := (&net.ListenConfig{}).Listen(t.Context(), network, address)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func file(t *testing.T, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// authority returns a CA in PEM and a certificate of it for one use.
func authority(t *testing.T, use x509.ExtKeyUsage) (ca string, leaf tls.Certificate) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	make509 := func(template, parent *x509.Certificate) []byte {
		template.SerialNumber, template.NotBefore, template.NotAfter = big.NewInt(1), time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
		der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	root := &x509.Certificate{Subject: pkix.Name{CommonName: "ca"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	caDER := make509(root, root)
	der := make509(&x509.Certificate{Subject: pkix.Name{CommonName: "node"}, ExtKeyUsage: []x509.ExtKeyUsage{use}}, root)
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: caDER})), tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func newClient(t *testing.T, o Options) *Client {
	t.Helper()
	c, err := Dial(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

const secret = "a-token-of-27-bytes-for-all"

func TestAddressesAreTriedInTurn(t *testing.T) {
	var s server
	dead := listen(t, "tcp", "127.0.0.1:0")
	dead.Close()
	ca, leaf := authority(t, x509.ExtKeyUsageServerAuth)
	l := listen(t, "tcp", "127.0.0.1:0")
	s.serve(t, l, grpc.Creds(credentials.NewServerTLSFromCert(&leaf)))
	c := newClient(t, Options{
		Addresses: []string{"unix:///nonexistent/node.sock", dead.Addr().String(), l.Addr().String()},
		CAFile:    file(t, ca), TokenFile: file(t, secret+"\n"),
	})
	st, err := c.Prefetch(t.Context(), &imagewolfv1.PrefetchRequest{Image: "an image"}, grpc.WaitForReady(true))
	if err != nil || st.Request.Image != "an image" {
		t.Fatalf("%v, %v", st, err)
	}
	if len(s.tokens) != 1 || s.tokens[0] != "Bearer "+secret {
		t.Errorf("the node was told %q", s.tokens)
	}
}

func TestUnixSocketIsSentNoToken(t *testing.T) {
	var s server
	path := filepath.Join(t.TempDir(), "a?b.sock")
	s.serve(t, listen(t, "unix", path))
	c := newClient(t, Options{Addresses: []string{"unix://" + path}, TokenFile: file(t, secret)})
	if _, err := c.Prefetch(t.Context(), &imagewolfv1.PrefetchRequest{}, grpc.WaitForReady(true)); err != nil {
		t.Fatal(err)
	}
	if s.tokens[0] != "" {
		t.Errorf("the node was told %q", s.tokens)
	}
}

// A request that is sent twice is one request.
func TestRepeatedRequestKeepsItsID(t *testing.T) {
	var s server
	path := filepath.Join(t.TempDir(), "s")
	s.serve(t, listen(t, "unix", path))
	c := newClient(t, Options{Addresses: []string{"unix://" + path}})
	in := &imagewolfv1.PrefetchRequest{Image: "again"}
	st, err := c.Prefetch(t.Context(), in, grpc.WaitForReady(true))
	if err != nil {
		t.Fatal(err)
	}
	if len(s.ids) != 2 || s.ids[0] == "" || s.ids[0] != s.ids[1] || st.Request.Id != s.ids[0] || in.Id != "" {
		t.Errorf("ids %q, answer %v, request %v", s.ids, st, in)
	}
}

// gRPC alone would take 4 MiB: less than the requests of a large cluster.
func TestLongAnswerIsTaken(t *testing.T) {
	var s server
	path := filepath.Join(t.TempDir(), "s")
	s.serve(t, listen(t, "unix", path))
	c := newClient(t, Options{Addresses: []string{"unix://" + path}})
	st, err := c.Prefetch(t.Context(), &imagewolfv1.PrefetchRequest{Image: "on many nodes"}, grpc.WaitForReady(true))
	if err != nil || len(st.Nodes) != 50_000 {
		t.Errorf("%d nodes, %v", len(st.GetNodes()), err)
	}
}

func TestStrangerIsNotSpokenTo(t *testing.T) {
	_, leaf := authority(t, x509.ExtKeyUsageServerAuth)
	other, _ := authority(t, x509.ExtKeyUsageServerAuth)
	mine, client := authority(t, x509.ExtKeyUsageClientAuth)
	for name, c := range map[string]struct {
		leaf tls.Certificate
		ca   string
	}{"another's CA": {leaf, other}, "certificate for clients": {client, mine}} {
		t.Run(name, func(t *testing.T) {
			var s server
			l := listen(t, "tcp", "127.0.0.1:0")
			s.serve(t, l, grpc.Creds(credentials.NewServerTLSFromCert(&c.leaf)))
			cl := newClient(t, Options{Addresses: []string{l.Addr().String()}, CAFile: file(t, c.ca), TokenFile: file(t, secret)})
			_, err := cl.Prefetch(t.Context(), &imagewolfv1.PrefetchRequest{})
			if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "certificate of node") || len(s.ids) != 0 {
				t.Errorf("%v, and the node was told %q", err, s.tokens)
			}
		})
	}
}

func TestBadOptionsAreRefused(t *testing.T) {
	ca, _ := authority(t, x509.ExtKeyUsageServerAuth)
	caFile, tokenFile := file(t, ca), file(t, secret)
	for name, c := range map[string]struct {
		o    Options
		want string
	}{
		"no address":   {Options{}, "no address"},
		"relative":     {Options{Addresses: []string{"unix://node.sock"}}, "absolute path"},
		"no port":      {Options{Addresses: []string{"node"}}, "host:port"},
		"no token":     {Options{Addresses: []string{"node:1"}, CAFile: caFile}, "its token"},
		"short token":  {Options{Addresses: []string{"node:1"}, CAFile: caFile, TokenFile: file(t, "short")}, "at least 16"},
		"two lines":    {Options{Addresses: []string{"node:1"}, CAFile: caFile, TokenFile: file(t, secret+"\n"+secret)}, "one line"},
		"absent token": {Options{Addresses: []string{"node:1"}, CAFile: caFile, TokenFile: "/nonexistent"}, "no such file"},
		"no CA in it":  {Options{Addresses: []string{"node:1"}, CAFile: tokenFile, TokenFile: tokenFile}, "cluster-key ca"},
		"absent CA":    {Options{Addresses: []string{"node:1"}, CAFile: "/nonexistent", TokenFile: tokenFile}, "no such file"},
	} {
		t.Run(name, func(t *testing.T) {
			cl, err := Dial(c.o)
			if err == nil {
				cl.Close()
			}
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v", err)
			}
		})
	}
}
