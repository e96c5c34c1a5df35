package proxy

import (
	"context"
	"crypto/rand"
	"log/slog"
	"maps"
	"path/filepath"
	"sync"
	"testing"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	"github.com/containerd/containerd/v2/core/content"
	contentproxy "github.com/containerd/containerd/v2/core/content/proxy"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// memoryLabels is a local.LabelStore.
type memoryLabels struct {
	mu     sync.Mutex
	labels map[digest.Digest]map[string]string
}

func (m *memoryLabels) Get(d digest.Digest) (map[string]string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return maps.Clone(m.labels[d]), nil
}

func (m *memoryLabels) Set(d digest.Digest, labels map[string]string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.labels[d] = maps.Clone(labels)
	return nil
}

func (m *memoryLabels) Update(d digest.Digest, update map[string]string) (map[string]string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.labels[d] == nil {
		m.labels[d] = map[string]string{}
	}
	for k, v := range update {
		if v == "" {
			delete(m.labels[d], k)
		} else {
			m.labels[d][k] = v
		}
	}
	return maps.Clone(m.labels[d]), nil
}

func localStore(t testing.TB, root string) content.Store {
	t.Helper()
	cs, err := local.NewLabeledStore(root, &memoryLabels{labels: map[digest.Digest]map[string]string{}})
	if err != nil {
		t.Fatal(err)
	}
	return cs
}

// start serves o on a unix socket. stop ends the server and returns Serve's
// error; it may be called more than once and is called at the test's end.
func start(t testing.TB, o Options) (conn *grpc.ClientConn, stop func() error) {
	t.Helper()
	return startGrace(t, o, stopGrace)
}

// startGrace is start with another grace than the usual one.
func startGrace(t testing.TB, o Options, grace time.Duration) (conn *grpc.ClientConn, stop func() error) {
	t.Helper()
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	path := filepath.Join(t.TempDir(), "s.sock")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	srv := New(o)
	srv.grace = grace
	go func() { served <- srv.Serve(ctx, l) }()
	conn, err = grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(16<<20), grpc.MaxCallSendMsgSize(16<<20)))
	if err != nil {
		t.Fatal(err)
	}
	stop = sync.OnceValue(func() error {
		cancel()
		return <-served
	})
	t.Cleanup(func() {
		_ = conn.Close()
		if err := stop(); err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return conn, stop
}

// client is containerd's own client of the content service.
func client(conn *grpc.ClientConn) content.Store {
	return contentproxy.NewContentStore(contentapi.NewContentClient(conn))
}

func randomBlob(t testing.TB, size int) ([]byte, digest.Digest) {
	t.Helper()
	p := make([]byte, size)
	_, _ = rand.Read(p)
	return p, digest.FromBytes(p)
}

// fakeStore is a local store whose writers come from wrap.
type fakeStore struct {
	content.Store
	wrap   func(content.Writer) content.Writer
	opens  int // calls of ReaderAt; guarded by mu
	closed int // Closes of those readers; guarded by mu
	mu     sync.Mutex
}

func (s *fakeStore) Writer(ctx context.Context, opts ...content.WriterOpt) (content.Writer, error) {
	w, err := s.Store.Writer(ctx, opts...)
	if err != nil || s.wrap == nil {
		return w, err
	}
	return s.wrap(w), nil
}
