// Package demo pulls one image on four nodes at the same moment and shows where
// its bytes came from.
//
// Everything runs on this machine: a registry, and four nodes of containerd and
// imagewolf, which share its processors and its disk. So the demo shows bytes,
// not speed.
package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/distribution/reference"
	"github.com/docker/go-units"

	"github.com/imagewolf/imagewolf/integration/harness"
)

const (
	nodes   = 4
	version = harness.V2
	ns      = "demo"
)

// Options are what the user can choose.
type Options struct {
	// Image is pulled in place of one made from this machine's files; "" makes
	// one.
	Image string
	// JSON is a file that gets the figures; "" for none.
	JSON string
	// Bin is the directory of the programs to run.
	Bin string
	// Out gets everything that is shown.
	Out io.Writer
	// MinBytes is the least size of an image that is made, packed, and
	// LayerBytes the bytes of files in each of its layers. 0: 256 MiB, 192 MiB.
	MinBytes, LayerBytes int64
}

// counter is what counts the registry's bytes: the registry itself, or a mirror
// before it.
type counter interface {
	Bytes(node string) int64
	Reset()
}

// show is one demo under way.
type show struct {
	Options
	env      *harness.Env
	registry *harness.Registry // nil with Options.Image
	counter  counter
	hosts    map[string]string
	ref      string
	image    *harness.Image // nil with Options.Image
	cluster  *harness.Cluster
	notifier *harness.Notifier // nil with Options.Image
	figures  *report
}

// Run runs the demo and leaves nothing behind, whatever ends it.
func Run(ctx context.Context, o Options) (err error) {
	bin, err := harness.FindBinaries(o.Bin, version)
	if err != nil {
		return fmt.Errorf("%w (`make demo` builds what is needed)", err)
	}
	env, err := harness.NewEnv(bin)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, env.Close()) }()
	s := &show{Options: o, env: env}
	if o.Image != "" {
		err = s.takeImage()
	} else {
		err = s.makeImage(ctx)
	}
	if err != nil {
		return err
	}
	s.say("Starting %d nodes, each containerd %s and imagewolf.", nodes, version)
	s.cluster, err = harness.NewCluster(ctx, env, harness.ClusterOptions{Name: "node", Nodes: nodes, Version: version, Hosts: s.hosts})
	if err != nil {
		return err
	}
	if err := s.pull(ctx); err != nil {
		return err
	}
	s.run(ctx)
	if s.image != nil {
		if err := s.second(ctx); err != nil {
			return err
		}
		if err := s.prefetch(ctx); err != nil {
			return err
		}
	}
	return s.figures.write(s.JSON)
}

func (s *show) say(format string, args ...any) {
	_, _ = fmt.Fprintf(s.Out, format+"\n", args...) //nolint:errcheck // nobody to tell that nothing can be told
}

// takeImage prepares for an image of the user's, from its own registry.
func (s *show) takeImage() error {
	named, err := reference.ParseDockerRef(s.Image)
	if err != nil {
		return fmt.Errorf("IMAGE: %w", err)
	}
	host := reference.Domain(named)
	upstream := "https://" + host
	switch {
	case host == "docker.io":
		upstream = "https://registry-1.docker.io"
	case host == "localhost" || strings.HasPrefix(host, "localhost:") || strings.HasPrefix(host, "127."):
		upstream = "http://" + host // as containerd itself takes them
	}
	m, err := harness.NewMirror(s.env, upstream)
	if err != nil {
		return err
	}
	s.ref, s.counter, s.hosts = named.String(), m, map[string]string{host: m.URL}
	return nil
}

// makeImage starts a registry and pushes an image of this machine's files.
func (s *show) makeImage(ctx context.Context) error {
	least, each := s.MinBytes, s.LayerBytes
	if least == 0 {
		least = 256 << 20
	}
	if each == 0 {
		each = 192 << 20
	}
	s.say("Making an image from files of this machine.")
	var err error
	if s.notifier, err = harness.NewNotifier(s.env, "notifier"); err != nil {
		return err
	}
	if s.registry, err = harness.NewRegistry(s.env, harness.Webhook{URL: s.notifier.URL(receiver), Token: secret}); err != nil {
		return err
	}
	files, err := harness.RealFiles("/usr/local", "/usr/lib", "/usr/share")
	if err != nil {
		return err
	}
	program, err := harness.NewLayer(s.env, harness.Gzip, harness.Program(s.env))
	if err != nil {
		return err
	}
	layers, size := []*harness.Layer{program}, int64(0)
	for size < least && ctx.Err() == nil {
		content := files.Take(each)
		if files.Empty() { // a small machine: the rest is not real
			content = harness.Random(min(each, least-size))
		}
		l, err := harness.NewLayer(s.env, harness.Gzip, content)
		if err != nil {
			return err
		}
		n, err := l.Size()
		if err != nil {
			return fmt.Errorf("layer: %w", err)
		}
		layers, size = append(layers, l), size+n
	}
	if s.image, err = s.registry.Push(ctx, "demo/image", layers...); err != nil {
		return err
	}
	s.ref, s.counter = s.image.Ref, s.registry
	s.hosts = map[string]string{s.registry.Host: "http://" + s.registry.Host}
	return nil
}

// pull pulls the image on all nodes, and shows what came from where.
func (s *show) pull(ctx context.Context) error {
	s.say("Pulling %s on all of them at the same moment.", s.ref)
	s.counter.Reset()
	total := int64(0)
	if s.image != nil {
		total = s.image.Bytes()
	}
	stop := s.watch(ctx, total)
	took, err := s.cluster.PullAll(ctx, ns, s.ref)
	stop()
	if err != nil {
		return s.failed(ctx, err)
	}
	if s.figures, err = s.report(ctx, took); err != nil {
		return err
	}
	return s.figures.print(s.Out)
}

// failed adds the daemons' logs to an error that is not the user's own ctrl-C.
func (s *show) failed(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return fmt.Errorf("%w\n%s", err, s.cluster.Logs())
}

// run runs the image on every node. A failure is shown: an image of the user's
// may have reasons of its own.
func (s *show) run(ctx context.Context) {
	if harness.RuncPath() == "" {
		s.say("No runc on this machine: the image is not run.")
		return
	}
	if s.image == nil {
		return // who knows what it does, and when it ends
	}
	for _, n := range s.cluster.Nodes {
		out, err := n.Run(ctx, ns, s.ref)
		if err != nil {
			out = err.Error()
		}
		s.say("%s runs it: %s", n.Name, strings.TrimSpace(out))
	}
}

// second pulls another image that shares a layer with the first.
func (s *show) second(ctx context.Context) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	l, err := harness.NewLayer(s.env, harness.Gzip, harness.Random(16<<20))
	if err != nil {
		return err
	}
	shared := s.image.Layers[1]
	img, err := s.registry.Push(ctx, "demo/second", shared, l)
	if err != nil {
		return err
	}
	s.counter.Reset()
	began := time.Now()
	if _, err := s.cluster.PullAll(ctx, ns, img.Ref); err != nil {
		return s.failed(ctx, err)
	}
	size, err := shared.Size()
	if err != nil {
		return fmt.Errorf("layer: %w", err)
	}
	s.say("A second image of %s, of which %s are a layer of the first: pulled on all nodes in %.1f s, the registry sent %s.",
		units.BytesSize(float64(img.Bytes())), units.BytesSize(float64(size)), time.Since(began).Seconds(),
		units.BytesSize(float64(s.counter.Bytes(""))))
	return nil
}
