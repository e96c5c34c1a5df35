package demo

import (
	"context"
	"fmt"
	"path"
	"time"

	"github.com/docker/go-units"

	"github.com/imagewolf/imagewolf/integration/harness"
)

const (
	receiver = "registry"
	secret   = "nobody else listens on this machine"
	// prefetchWithin is how long the nodes may take after a push.
	prefetchWithin = 2 * time.Minute
)

// prefetch pushes a new tag while a notifier listens to the registry, and watches
// the image arrive on all nodes although nobody pulls it.
func (s *show) prefetch(ctx context.Context) error {
	addresses := ""
	for _, n := range s.cluster.Nodes {
		addresses += fmt.Sprintf("%q, ", "unix://"+n.Wolf.NodeSocket())
	}
	s.notifier.Settings = fmt.Sprintf(`allow_registries = [%q]
[registry]
plain_http = [%q]
[nodes]
addresses = [%s]
[receiver.%s]
type = "distribution"
secret = %q
[[rule]]
name = "new-tags"
images = ["%s/demo/next:*"]
namespace = %q
`, s.registry.Host, s.registry.Host, addresses, receiver, secret, s.registry.Host, ns)
	if err := s.notifier.Start(ctx); err != nil {
		return err
	}
	l, err := harness.NewLayer(s.env, harness.Gzip, harness.Random(32<<20))
	if err != nil {
		return err
	}
	s.counter.Reset()
	s.say("Pushing %s/demo/next, which nobody pulls; a notifier hears of it from the registry.", s.registry.Host)
	img, err := s.registry.Push(ctx, "demo/next", s.image.Layers[0], l)
	if err != nil {
		return err
	}
	began := time.Now()
	for _, n := range s.cluster.Nodes {
		err := s.arrives(ctx, n, img.Ref, began)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			return fmt.Errorf("%w\n%s\n%s", err, harness.Tail(s.notifier.Log(), 3000), s.cluster.Logs())
		}
	}
	size, err := l.Size()
	if err != nil {
		return fmt.Errorf("layer: %w", err)
	}
	// Its first layer is on the nodes, and is not asked for again.
	r := &prefetchReport{Nodes: nodes, Seconds: time.Since(began).Seconds(), RegistryCopies: float64(s.counter.Bytes("")) / float64(size)}
	s.figures.Prefetch = r
	s.say("The registry sent %s for %d nodes: %.2f copies. %s from the push to the last node.",
		units.BytesSize(float64(s.counter.Bytes(""))), nodes, r.RegistryCopies, time.Since(began).Round(100*time.Millisecond))
	return s.notifier.Stop()
}

// arrives waits until an image is on a node and unpacked.
func (s *show) arrives(ctx context.Context, n *harness.Node, ref string, began time.Time) error {
	ctx, cancel := context.WithTimeout(ctx, prefetchWithin)
	defer cancel()
	err := harness.Poll(ctx, 20*time.Millisecond, func() error { return n.Complete(ctx, ns, ref) })
	if err != nil {
		return fmt.Errorf("%s does not get %s: %w", n.Name, ref, err)
	}
	s.say("%s has %s, unpacked, %.1f s after the push.", n.Name, path.Base(ref), time.Since(began).Seconds())
	return nil
}
