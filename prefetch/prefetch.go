package prefetch

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"golang.org/x/time/rate"
	"google.golang.org/grpc"

	"github.com/imagewolf/imagewolf/internal/credentials"
)

const (
	// leaseFor is how long a lease protects a pull whose process has died.
	leaseFor = 24 * time.Hour
	// undoFor bounds what is put in order after a pull has ended.
	undoFor = 10 * time.Second
	// dialFor is how long containerd's socket is tried: it is on this machine.
	dialFor = 2 * time.Second
)

// Foreground tells what is being pulled on this node because somebody asked for
// it. Its methods are called often, from any goroutine, and return at once.
type Foreground interface {
	// Busy reports whether a blob is being pulled that somebody asked for.
	Busy() bool
	// Wants reports whether this one is.
	Wants(d digest.Digest) bool
}

// Options say how a Puller is to be. ContainerdSocket is required.
type Options struct {
	ContainerdSocket string       // unix socket, absolute path
	Namespace        string       // of requests that name none; "": k8s.io
	Snapshotter      string       // "": the namespace's default, which is containerd's if none is set
	CertsDir         string       // containerd's registry configuration, several separated by ':'; "": none
	CredentialFiles  []string     // as package credentials reads them; may be absent
	BandwidthLimit   int64        // bytes per second of all pulls together; 0: no limit
	Foreground       Foreground   // nil: nobody goes first
	Log              *slog.Logger // nil: discards
}

// Request is one image to be pulled.
type Request struct {
	Image     string        // reference, as a user writes it
	Digest    digest.Digest // what is pulled, whatever the tag says; "": what the tag says
	Platforms []string      // such as linux/arm64; empty: the node's own
	Namespace string        // of containerd; "": Options.Namespace
	Referrers bool          // signatures, SBOMs and what else refers to the image, too
}

// Progress is how far a pull has come, in bytes of the image's blobs for the
// platforms. Total grows until the manifests have been read.
type Progress struct {
	Bytes, Total int64
}

// Result is what a pull came to.
type Result struct {
	Digest digest.Digest // of the image: what its records point to
	Bytes  int64         // of its blobs for the platforms, whether they were here before or not
}

// Puller pulls images. Its methods may be called from any number of goroutines.
type Puller struct {
	o       Options
	log     *slog.Logger
	keys    *credentials.Keychain
	limiter *rate.Limiter // nil: no limit
}

// New returns a Puller. It starts nothing and connects to nothing.
func New(o Options) *Puller {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Namespace == "" {
		o.Namespace = criNamespace
	}
	p := &Puller{o: o, log: o.Log, keys: credentials.New(o.CredentialFiles, o.Log)}
	if o.BandwidthLimit > 0 {
		p.limiter = rate.NewLimiter(rate.Limit(o.BandwidthLimit), int(max(o.BandwidthLimit/10, minBurst)))
	}
	return p
}

// Pull pulls an image, unpacks it and makes its records. It calls progress, which
// may be nil, from one goroutine at a time and not after it has returned. When
// ctx ends it returns with what is complete kept by containerd until its next
// garbage collection; a later Pull goes on from there. Its errors name the image,
// the registry and the way out. With an error, the result has a digest if the
// image's record points to that since: what failed is beside the image itself.
func (p *Puller) Pull(ctx context.Context, r Request, progress func(Progress)) (Result, error) {
	t, err := parse(r)
	if err != nil {
		return Result{}, err
	}
	res, err := p.pull(ctx, r, t, progress)
	if err != nil {
		return Result{Digest: res.Digest}, fmt.Errorf("prefetch %s: %w", t, withoutQueries(err))
	}
	return res, nil
}

func (p *Puller) pull(ctx context.Context, r Request, t target, progress func(Progress)) (_ Result, err error) {
	j := &job{Puller: p, target: t, namespace: p.namespaceOf(r.Namespace), meter: newMeter(), slots: newSlots()}
	ctx = namespaces.WithNamespace(ctx, j.namespace)
	if err := j.connect(); err != nil {
		return Result{}, err
	}
	defer func() { err = errors.Join(err, j.close()) }()
	ctx, release, err := j.client.WithLease(ctx, leases.WithRandomID(), leases.WithExpiration(leaseFor))
	if err != nil {
		return Result{}, p.ofContainerd(err)
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoFor)
		defer cancel()
		if err := release(ctx); err != nil {
			p.log.Warn("the lease of a prefetch stays until it expires", "image", t.name, "after", leaseFor, "err", err)
		}
	}()
	stop := j.report(ctx, progress)
	defer stop()
	pulled, err := j.platforms(ctx, r.Platforms)
	if err == nil {
		err = j.record(ctx, pulled)
	}
	if err == nil && r.Referrers {
		err = j.referrers(ctx, pulled)
	}
	if err != nil {
		return Result{Digest: j.moved}, j.explain(ctx, err)
	}
	stop()
	total := j.meter.total()
	if progress != nil {
		progress(Progress{Bytes: total, Total: total})
	}
	return Result{Digest: pulled[0].Target().Digest, Bytes: total}, nil
}

// Record names the image record that pulls of a request make or move, with its
// namespace. It is "" for a request that cannot be pulled, and where the record's
// name holds the digest, so that it is never moved.
func (p *Puller) Record(r Request) string {
	t, err := parse(r)
	if err != nil || t.name == t.repo+"@"+t.want.String() {
		return ""
	}
	return p.namespaceOf(r.Namespace) + " " + t.name
}

func (p *Puller) namespaceOf(name string) string {
	if name == "" {
		return p.o.Namespace
	}
	return name
}

// HasRepository reports whether containerd has an image of the same repository in
// the namespace ("": Options.Namespace), whatever its tag. A record suffices: its
// blobs may be incomplete.
func (p *Puller) HasRepository(ctx context.Context, namespace, image string) (bool, error) {
	named, err := reference.ParseDockerRef(image)
	if err != nil {
		return false, fmt.Errorf("image %q: %w", image, err)
	}
	client, err := containerd.New(p.o.ContainerdSocket, containerd.WithTimeout(dialFor))
	if err != nil {
		return false, p.ofContainerd(err)
	}
	ctx = namespaces.WithNamespace(ctx, p.namespaceOf(namespace))
	list, err := client.ImageService().List(ctx,
		"name~="+strconv.Quote("^"+regexp.QuoteMeta(named.Name())+"[:@]"))
	if err = errors.Join(err, client.Close()); err != nil {
		return false, fmt.Errorf("images of %s: %w", named.Name(), p.ofContainerd(err))
	}
	return len(list) > 0, nil
}

// job is one pull.
type job struct {
	*Puller
	target    target
	namespace string
	meter     *meter
	slots     slots
	client    *containerd.Client // whose content store is gated
	base      *containerd.Client // owns the connection
	registry  *registry
	moved     digest.Digest // what the image's record points to since; "": it was not touched
}

// connect makes the clients; nothing is sent yet.
func (j *job) connect() error {
	base, err := containerd.New(j.o.ContainerdSocket, containerd.WithTimeout(dialFor))
	if err != nil {
		return j.ofContainerd(err)
	}
	conn, ok := base.Conn().(*grpc.ClientConn)
	if !ok {
		return errors.Join(fmt.Errorf("containerd's client has no connection: %w", errdefs.ErrUnavailable), base.Close())
	}
	j.base = base
	j.registry = newRegistry(j.o.CertsDir, j.target, j.keys)
	j.client, err = containerd.NewWithConn(conn, containerd.WithServices(
		containerd.WithContentStore(&gate{Store: base.ContentStore(), job: j})))
	if err != nil {
		return errors.Join(err, base.Close())
	}
	return nil
}

func (j *job) close() error {
	j.registry.close()
	return j.base.Close()
}

// platforms pulls the image for each platform, one after the other; the first
// resolves the tag for all.
func (j *job) platforms(ctx context.Context, names []string) ([]containerd.Image, error) {
	if len(names) == 0 {
		names = []string{""}
	}
	var out []containerd.Image
	for _, name := range names {
		opts := []containerd.RemoteOpt{
			containerd.WithResolver(j.registry.resolver(ctx)),
			containerd.WithPullLabels(labelsIn(j.namespace)),
			containerd.WithImageHandlerWrapper(j.meter.watch),
		}
		spec, err := platforms.DefaultSpec(), error(nil)
		if name != "" {
			if spec, err = platforms.Parse(name); err != nil {
				return nil, fmt.Errorf("platform %q: %w", name, err)
			}
			opts = append(opts, containerd.WithPlatformMatcher(platforms.Only(spec)))
		}
		if spec.OS == runtime.GOOS { // another system's layers cannot be unpacked here
			opts = append(opts, containerd.WithPullUnpack, containerd.WithPullSnapshotter(j.o.Snapshotter),
				containerd.WithUnpackOpts([]containerd.UnpackOpt{containerd.WithUnpackFetchAllContent()}))
		}
		image, err := j.client.Pull(ctx, j.target.name, opts...)
		if err != nil {
			return nil, forPlatform(err, spec)
		}
		j.moved = image.Target().Digest
		out = append(out, image)
	}
	slices.SortStableFunc(out, nativeFirst)
	return out, nil
}

// report calls progress now and then until the returned function is called,
// which waits for it.
func (j *job) report(ctx context.Context, progress func(Progress)) (stop func()) {
	if progress == nil {
		return func() {}
	}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() { j.meter.run(ctx, j.base.ContentStore(), progress) })
	return func() {
		cancel()
		wg.Wait()
	}
}
