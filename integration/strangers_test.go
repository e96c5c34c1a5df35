package integration

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/memberlist"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	api "github.com/imagewolf/imagewolf/api/v1"
	"github.com/imagewolf/imagewolf/cluster"
	"github.com/imagewolf/imagewolf/integration/harness"
)

// visit is a stranger's visit to a cluster whose nodes have an image.
type visit struct {
	*testing.T
	*world
	img    *harness.Image
	member *cluster.Identity // made with the cluster's key, known to no node
	other  *cluster.Identity // of another cluster
	line   *faultRecord
}

// strangers are those who do not belong, each with what it tries.
var strangers = []struct {
	name string
	try  func(v *visit)
}{
	{"no certificate", func(v *visit) {
		v.knock(v.member, func(c *tls.Config) { show(c, &tls.Certificate{}) })
	}},
	{"certificate of another authority", func(v *visit) {
		name := v.member.ClientTLS(cluster.ProtoGRPC).ServerName
		v.knock(v.other, func(c *tls.Config) { c.ServerName = name })
	}},
	{"expired certificate of the cluster", func(v *visit) {
		expired := v.issue("expired", time.Now().Add(-time.Hour))
		v.knock(v.member, func(c *tls.Config) { show(c, expired) })
	}},
	{"certificate of the cluster, no member", func(v *visit) {
		v.knock(v.member, func(*tls.Config) {})
	}},
	{"certificate of the cluster in a member's name, no member", func(v *visit) {
		id, err := cluster.LoadIdentity(cluster.IdentityOptions{
			ClusterKey: v.Key, NodeName: v.Nodes[1].Name, Log: slog.New(slog.DiscardHandler),
		})
		must(v.T, err)
		v.knock(id, func(*tls.Config) {})
	}},
	{"another cluster's key", func(v *visit) { v.knock(v.other, func(*tls.Config) {}) }},
	{"TLS 1.2", func(v *visit) {
		v.knock(v.member, func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12 })
	}},
	{"peer protocol without TLS", func(v *visit) {
		v.plain("\x13BitTorrent protocol" + strings.Repeat("\x00", 8) + strings.Repeat("x", 40))
	}},
	{"HTTP without TLS", func(v *visit) {
		v.plain("GET /v2/ HTTP/1.1\r\nHost: node\r\n\r\n")
		v.plain("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + "\x00\x00\x00\x04\x00\x00\x00\x00\x00")
	}},
	{"gossip with another key", func(v *visit) { v.gossip(v.other.GossipKeys()[0]) }},
	{"gossip without a key", func(v *visit) { v.gossip(nil) }},
	{"another user at the unix sockets", (*visit).otherUser},
	{"1,000 connections that say nothing", (*visit).halfOpen},
	{"a node without the private image's credentials", (*visit).unauthorized},
}

// TestStrangers: whoever does not belong gets no byte, no name, and not even to
// know whether a digest is there.
func TestStrangers(t *testing.T) {
	for _, s := range strangers {
		t.Run(s.name, func(t *testing.T) {
			eachFault(t, "stranger: "+s.name, func(ctx context.Context, t *testing.T, w *world, line *faultRecord) {
				v := &visit{T: t, world: w, img: image(ctx, t, 4), line: line}
				var err error
				v.member, err = cluster.LoadIdentity(cluster.IdentityOptions{ClusterKey: w.Key, NodeName: "stranger", Log: slog.New(slog.DiscardHandler)})
				must(t, err)
				v.other, err = cluster.LoadIdentity(cluster.IdentityOptions{ClusterKey: cluster.GenerateKey(), NodeName: "stranger", Log: slog.New(slog.DiscardHandler)})
				must(t, err)
				_, err = harness.PullOn(ctx, w.Nodes[:2], w.ns, v.img.Ref)
				must(t, err)
				began := time.Now()
				s.try(v)
				if line.Seconds == unmeasured {
					line.Seconds = time.Since(began).Seconds()
				}
				if said(w.Nodes, "node joined", "name=stranger") {
					t.Error("the stranger has become a member")
				}
				// And nobody else is held up.
				registry.Reset()
				must(t, w.Nodes[2].Pull(ctx, w.ns, v.img.Ref))
				sent(t, 0)
				if line.RegistryCopies == unmeasured {
					line.RegistryCopies = copies(v.img)
					line.say("copies of a pull afterwards, two nodes having the image")
				}
			}, harness.V2)
		})
	}
}

// show has a client show a certificate.
func show(c *tls.Config, cert *tls.Certificate) {
	c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil }
}

// knock tries both protocols of the data port with an identity's TLS, changed.
func (v *visit) knock(id *cluster.Identity, change func(*tls.Config)) {
	v.Helper()
	config := func(proto string) *tls.Config {
		c := id.ClientTLS(proto)
		c.VerifyConnection = nil // a stranger takes any server
		change(c)
		return c
	}
	for _, proto := range []string{cluster.ProtoBitTorrent, cluster.ProtoGRPC} {
		v.listen(proto, func(ctx context.Context, raw net.Conn) (net.Conn, error) {
			conn := tls.Client(raw, config(proto))
			if err := conn.HandshakeContext(ctx); err != nil {
				return nil, err
			}
			return conn, nil
		})
	}
	answers := map[string]bool{}
	for _, d := range []string{v.img.Layer(0), "sha256:" + strings.Repeat("0", 64)} {
		for call, err := range v.call(config(cluster.ProtoGRPC), d) {
			if err == nil {
				v.Errorf("%s about %s was answered", call, d)
			}
			answers[fmt.Sprint(call, status.Code(err))] = true
		}
	}
	if len(answers) != 2 {
		v.Errorf("a blob that is there is answered in another way than one that is not: %v", answers)
	}
}

// listen makes a connection to each node and fails the test if there is anything
// to be heard.
func (v *visit) listen(what string, wrap func(context.Context, net.Conn) (net.Conn, error)) {
	v.Helper()
	for _, n := range v.Nodes[:2] {
		ctx, cancel := context.WithTimeout(v.Context(), 10*time.Second)
		raw, err := (&net.Dialer{}).DialContext(ctx, "tcp", n.Wolf.Data)
		must(v.T, err)
		conn, err := wrap(ctx, raw)
		if err == nil {
			must(v.T, conn.SetDeadline(time.Now().Add(10*time.Second)))
			_, _ = io.WriteString(conn, "\x13BitTorrent protocol") // refused, perhaps
			heard, err := io.ReadAll(conn)
			if len(heard) > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
				v.Errorf("%s: %s says %q, %v", what, n.Name, heard, err)
			}
		}
		_ = raw.Close() // by the other side before
		cancel()
	}
}

// plain sends bytes without TLS. The answer may be a TLS alert and nothing else.
func (v *visit) plain(text string) {
	v.Helper()
	raw, err := (&net.Dialer{}).DialContext(v.Context(), "tcp", v.Nodes[0].Wolf.Data)
	must(v.T, err)
	defer raw.Close() //nolint:errcheck // by the other side before
	_, err = io.WriteString(raw, text)
	must(v.T, err)
	must(v.T, raw.SetReadDeadline(time.Now().Add(10*time.Second)))
	heard, err := io.ReadAll(raw)
	if errors.Is(err, os.ErrDeadlineExceeded) || len(heard) > 7 || len(heard) > 0 && heard[0] != 21 {
		v.Errorf("the node says %q, %v", heard, err)
	}
}

// call asks a node's tracker for a blob in both ways, and returns how each ended.
func (v *visit) call(config *tls.Config, d string) map[string]error {
	v.Helper()
	conn, err := grpc.NewClient("passthrough:///"+v.Nodes[0].Wolf.Data, grpc.WithTransportCredentials(credentials.NewTLS(config)), grpc.WithNoProxy())
	must(v.T, err)
	defer conn.Close() //nolint:errcheck // nothing is left to be said
	ctx, cancel := context.WithTimeout(v.Context(), 10*time.Second)
	defer cancel()
	client, self := api.NewTrackerClient(conn), &api.Peer{Name: "stranger", Address: "127.0.0.1:1"}
	out := map[string]error{}
	join, err := client.Join(ctx)
	if err == nil {
		_ = join.Send(&api.MemberMessage{Message: &api.MemberMessage_Hello{Hello: &api.Hello{
			Digest: d, Size: v.img.Blobs[v.img.Layer(0)], Self: self, Status: &api.Status{CanFetch: true},
		}}})
		_, err = join.Recv()
	}
	out["Join"] = err
	register, err := client.Register(ctx)
	if err == nil {
		_ = register.Send(&api.RegisterMessage{Self: self, Added: []*api.Held{{Digest: d, Size: v.img.Blobs[v.img.Layer(0)]}}})
		_, err = register.Recv()
	}
	out["Register"] = err
	return out
}

// gossip tries to join the membership with a key, or none.
func (v *visit) gossip(key []byte) {
	v.Helper()
	cfg := memberlist.DefaultLocalConfig()
	cfg.Name, cfg.BindAddr, cfg.BindPort, cfg.AdvertisePort = "stranger", "127.0.0.1", 0, 0
	cfg.SecretKey = key
	cfg.Logger = log.New(io.Discard, "", 0)
	ml, err := memberlist.Create(cfg)
	must(v.T, err)
	defer ml.Shutdown() //nolint:errcheck // the test is over
	for _, n := range v.Nodes {
		if joined, err := ml.Join([]string{n.Wolf.Gossip}); err == nil {
			v.Errorf("%s let it in: %d", n.Name, joined)
		}
		// Nor by a packet.
		_ = ml.SendToAddress(memberlist.Address{Addr: n.Wolf.Gossip}, []byte(`{"k":["AAAAAAAAAAAAAAAAAAAAAA"]}`))
	}
	if n := ml.NumMembers(); n != 1 {
		v.Errorf("it knows %d members", n)
	}
}

// unauthorized pulls a private image that the neighbours have, from a registry that
// knows its users by an htpasswd file.
func (v *visit) unauthorized() {
	v.Helper()
	ctx, ns, n := v.Context(), v.ns+"-private", v.Nodes[3]
	r, err := harness.NewRegistryProcess(ctx, env, harness.Distribution, harness.RegistryOptions{User: "wolf", Password: "howl"})
	must(v.T, err)
	defer func() { must(v.T, r.Stop()) }()
	for _, n := range v.Nodes {
		must(v.T, n.AddHost(r.Host, "http://"+r.Host))
	}
	img, err := r.Push(ctx, "private/shop", newLayer(v.T, harness.Gzip, harness.Random(4*mib)))
	must(v.T, err)
	for _, n := range v.Nodes[:2] {
		must(v.T, n.Pull(ctx, ns, img.Ref, "--user", "wolf:howl"))
	}
	for _, flags := range [][]string{nil, {"--user", "wolf:bark"}} {
		err := n.Pull(ctx, ns, img.Ref, flags...)
		if err == nil {
			v.Errorf("pulled with %v, since other nodes have it", flags)
		} else if !strings.Contains(err.Error(), "401") && !strings.Contains(err.Error(), "authorization failed") {
			v.Errorf("with %v: %v, which is not the registry's answer", flags, err)
		}
	}
	for d := range img.Blobs {
		lacks(ctx, v.T, ns, d, n)
	}
	r.Reset()
	must(v.T, n.Pull(ctx, ns, img.Ref, "--user", "wolf:howl")) // who may, gets it from the neighbours
	if got := r.Bytes(""); got != 0 {
		v.Errorf("the registry sent %d bytes of what two other nodes have", got)
	}
}

// nobody is the user and group nobody.
const nobody = 65534

// knockAt names the socket at which this program, as another user, is to knock.
const knockAt = "IMAGEWOLF_TEST_KNOCK_AT"

// knockOnly connects to a socket, says on the standard output how that went and ends
// the process, if it was started for that by visit.knockAs, and else returns.
func knockOnly() {
	path := os.Getenv(knockAt)
	if path == "" {
		return
	}
	if _, err := os.Stat(path); err != nil {
		fmt.Println("the socket is not seen:", err)
		os.Exit(0)
	}
	conn, err := net.Dial("unix", path)
	if err == nil {
		err = conn.Close()
	}
	fmt.Println("knocked:", err)
	os.Exit(0)
}

// knockAs connects to a unix socket as a user, and returns what comes of it. The
// directories above the one that the socket is in, which are root's alone in a test,
// do not stand in the way.
func (v *visit) knockAs(user uint32, socket string) string {
	v.Helper()
	dir, err := os.Open(filepath.Dir(socket))
	must(v.T, err)
	defer dir.Close() //nolint:errcheck // only named
	cmd := exec.CommandContext(v.Context(), "/proc/self/exe")
	cmd.Env = []string{knockAt + "=/proc/self/fd/3/" + filepath.Base(socket)}
	cmd.ExtraFiles = []*os.File{dir}
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: user, Gid: user}}
	out, err := cmd.CombinedOutput()
	if err != nil {
		v.Fatalf("knocking as %d: %v: %s", user, err, out)
	}
	return strings.TrimSpace(string(out))
}

// otherUser knocks at the nodes' sockets, containerd's and the Node API's, as a user
// who is not root.
func (v *visit) otherUser() {
	for _, n := range v.Nodes {
		for _, socket := range []string{n.Wolf.Socket(), n.Wolf.NodeSocket()} {
			if got := v.knockAs(0, socket); got != "knocked: <nil>" {
				v.Errorf("root at %s: %s", socket, got)
			}
			if got := v.knockAs(nobody, socket); !strings.HasPrefix(got, "knocked: ") || !strings.HasSuffix(got, "connect: permission denied") {
				v.Errorf("nobody at %s: %s", socket, got)
			}
		}
		info, err := os.Stat(n.Wolf.Socket())
		must(v.T, err)
		if info.Mode().Perm() != 0o600 {
			v.Errorf("%s's socket has mode %s", n.Name, info.Mode())
		}
	}
}

// halfOpen makes a thousand connections to the data port of the node that tracks an
// image's layer, says nothing on them, makes each again when the node closes it, and
// has three nodes pull the image meanwhile.
func (v *visit) halfOpen() {
	const many, makeAgain = 1000, time.Second
	v.line.SecondsWithout = plainPull(v.Context(), v.T, v.Nodes[:3], faultRate, 24)
	img := image(v.Context(), v.T, 24)
	at := trackerOf(img.Layer(0), v.Nodes)
	ctx, cancel := context.WithCancel(v.Context())
	var made atomic.Int64
	var holders sync.WaitGroup
	defer func() {
		cancel()
		holders.Wait()
	}()
	for range many {
		holders.Go(func() {
			for ctx.Err() == nil {
				conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", at.Wolf.Data)
				if err != nil {
					if ctx.Err() == nil {
						v.Errorf("connection %d: %v", made.Load(), err)
					}
					return
				}
				made.Add(1)
				hangUp := context.AfterFunc(ctx, func() { _ = conn.Close() }) // perhaps by the node already
				_, _ = conn.Read(make([]byte, 1))                             // until it is closed
				hangUp()
				_ = conn.Close() // as above
				select {
				case <-ctx.Done():
				case <-time.After(makeAgain):
				}
			}
		})
	}
	soon, stop := context.WithTimeout(ctx, 10*time.Second)
	defer stop()
	must(v.T, harness.Poll(soon, 10*time.Millisecond, func() error {
		if n := made.Load(); n < many {
			return fmt.Errorf("%d connections could be made, not %d", n, many)
		}
		return nil
	}))
	registry.Reset()
	registry.Behave(harness.Behavior{Rate: faultRate})
	defer registry.Behave(harness.Behavior{})
	before := made.Load()
	took, err := harness.PullOn(ctx, v.Nodes[:3], v.ns, img.Ref)
	must(v.T, err)
	whole(ctx, v.T, v.ns, img, v.Nodes[:3]...)
	v.line.Seconds, v.line.RegistryCopies = slices.Max(took).Seconds(), copies(img)
	again := made.Load() - before
	v.line.say("%d connections at a time, %d made again during the pull", many, again)
	v.Logf("%.1f s, registry copies %.3f, %d connections made again during the pull", v.line.Seconds, v.line.RegistryCopies, again)
	if again == 0 {
		v.Error("no connection had to be made again during the pull: the node has no bound, or the pull was too short to see it")
	}
	if most := v.line.SecondsWithout + usualExtra.Seconds(); v.line.Seconds > most {
		v.Errorf("took %.1f s, more than %.1f", v.line.Seconds, most)
	}
	if v.line.RegistryCopies > 1.05 {
		v.Errorf("the registry sent %.3f copies", v.line.RegistryCopies)
	}
}

// issue makes a certificate of the cluster's authority, as every node that has
// the cluster's key can.
func (v *visit) issue(name string, end time.Time) *tls.Certificate {
	v.Helper()
	secret, err := cluster.ParseKey(v.Key)
	must(v.T, err)
	seed, err := hkdf.Key(sha256.New, secret, nil, "imagewolf v1 ca", ed25519.SeedSize)
	must(v.T, err)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(v.T, err)
	authority := &x509.Certificate{Subject: pkix.Name{CommonName: "imagewolf cluster"}}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Unix(0, 0), NotAfter: end, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, authority, key.Public(), ed25519.NewKeyFromSeed(seed))
	must(v.T, err)
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}
