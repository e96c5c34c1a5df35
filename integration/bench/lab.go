package bench

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/imagewolf/imagewolf/integration/harness"
)

const (
	mib  = 1 << 20
	mbit = 1_000_000
	// port of the registry on its machine.
	port = "5000"
)

// lab has what all runs share: a registry and the images in it.
type lab struct {
	env      *harness.Env
	registry *harness.Registry
	made     map[kind]images
	runs     int
	kept     []*harness.Cluster // ended, and still on disk
}

func newLab(bin string) (*lab, error) {
	found, err := harness.FindBinaries(bin, harness.V2)
	if err != nil {
		return nil, fmt.Errorf("%w (`make bench` builds what is needed)", err)
	}
	env, err := harness.NewEnv(found)
	if err != nil {
		return nil, err
	}
	r, err := harness.NewRegistry(env)
	if err != nil {
		return nil, errors.Join(err, env.Close())
	}
	return &lab{env: env, registry: r, made: map[kind]images{}}, nil
}

func (l *lab) close() error { return l.env.Close() }

// kind of image.
type kind int

const (
	usual    kind = iota // layers and their size as the user says
	updated              // the same, and another that shares all layers but one
	tiny                 // 5 MiB in three layers
	files                // one layer of this machine's files
	gibibyte             // one layer of 1 GiB that does not compress
)

// images are what a scenario pulls.
type images struct {
	ref   string // what is pulled
	older string // kind updated: what the nodes have before
	bytes int64  // that a node needs of ref
}

// images makes and pushes a scenario's images, once.
func (l *lab) images(ctx context.Context, s *scenario, o Options) (images, error) {
	if img, ok := l.made[s.kind]; ok {
		return img, nil
	}
	var contents []harness.Content
	switch s.kind {
	case tiny:
		for range 3 {
			contents = append(contents, harness.Random(5*mib/3))
		}
	case files:
		f, err := harness.RealFiles("/usr/local", "/usr/lib", "/usr/share", "/opt")
		if err != nil {
			return images{}, err
		}
		contents = append(contents, f.Take(1500*mib))
	case gibibyte:
		contents = append(contents, harness.Random(1024*mib))
	default:
		for range o.Layers {
			contents = append(contents, harness.Random(int64(o.LayerMiB)*mib))
		}
	}
	var layers []*harness.Layer
	for _, c := range contents {
		layer, err := harness.NewLayer(l.env, harness.Gzip, c)
		if err != nil {
			return images{}, err
		}
		layers = append(layers, layer)
	}
	img, err := l.registry.Push(ctx, fmt.Sprintf("bench/image%d", s.kind), layers...)
	if err != nil {
		return images{}, err
	}
	out := images{ref: img.Ref, bytes: img.Bytes()}
	if s.kind == updated {
		if out, err = l.update(ctx, img, o); err != nil {
			return images{}, err
		}
	}
	l.made[s.kind] = out
	return out, nil
}

// update pushes an image that has another uppermost layer.
func (l *lab) update(ctx context.Context, older *harness.Image, o Options) (images, error) {
	last, err := harness.NewLayer(l.env, harness.Gzip, harness.Random(int64(o.LayerMiB)*mib))
	if err != nil {
		return images{}, err
	}
	layers := append(slices.Clone(older.Layers[:len(older.Layers)-1]), last)
	img, err := l.registry.Push(ctx, "bench/update", layers...)
	if err != nil {
		return images{}, err
	}
	out := images{ref: img.Ref, older: older.Ref}
	for digest, size := range img.Blobs {
		if _, there := older.Blobs[digest]; !there {
			out.bytes += size
		}
	}
	return out, nil
}

// site is the network that one run is in.
type site struct {
	network  *harness.Network
	registry *harness.Machine // nil on loopback
	nodes    []*harness.Machine
	uplinks  []*harness.Link // of the zones' switches
	stop     func() error
	url      string
}

// newSite builds the network of a run, with the registry in it.
func (l *lab) newSite(s *scenario, p plan) (_ *site, err error) {
	if s.place.loopback {
		return &site{stop: func() error { return nil }, url: "http://" + l.registry.Host}, nil
	}
	t := &site{network: harness.NewNetwork(), stop: func() error { return nil }}
	defer func() {
		if err != nil {
			err = errors.Join(err, t.close())
		}
	}()
	core, err := t.network.Switch()
	if err != nil {
		return nil, err
	}
	zones := []*harness.Switch{core}
	for i := range s.place.zones {
		zone, err := t.network.Switch()
		if err != nil {
			return nil, err
		}
		up, err := zone.Uplink(core, 0)
		if err != nil {
			return nil, err
		}
		zones, t.uplinks = append(zones[:i], zone), append(t.uplinks, up)
	}
	if t.registry, err = core.Machine(0); err != nil {
		return nil, err
	}
	for i := range p.n {
		m, err := zones[i%len(zones)].Machine(0)
		if err != nil {
			return nil, err
		}
		if s.place.zones > 0 {
			m.Zone = fmt.Sprintf("zone%d", i%len(zones))
		}
		t.nodes = append(t.nodes, m)
	}
	listener, err := t.registry.Listen(port)
	if err != nil {
		return nil, err
	}
	t.stop = l.registry.ServeAlso(listener)
	t.url = "http://" + net.JoinHostPort(t.registry.IP, port)
	return t, nil
}

func (t *site) close() error {
	err := t.stop()
	if t.network != nil {
		t.network.Close()
	}
	return err
}

// bound gives every NIC its rate, in Mbit/s, and the links between zones half of
// it.
func (t *site) bound(rate int) error {
	if t.network == nil {
		return nil
	}
	links := []*harness.Link{t.registry.Link}
	for _, m := range t.nodes {
		links = append(links, m.Link)
	}
	var errs []error
	for _, l := range links {
		errs = append(errs, l.SetRate(int64(rate)*mbit))
	}
	for _, l := range t.uplinks {
		errs = append(errs, l.SetRate(int64(rate)*mbit/2))
	}
	return errors.Join(errs...)
}

// run measures one mode of a scenario, on new nodes.
func (l *lab) run(ctx context.Context, s *scenario, p plan, img images, mode Mode) (out sample, err error) {
	t, err := l.newSite(s, p)
	if err != nil {
		return out, err
	}
	defer func() { err = errors.Join(err, t.close()) }()
	l.runs++
	c, err := harness.NewCluster(ctx, l.env, harness.ClusterOptions{
		Name: fmt.Sprintf("r%dn", l.runs), Nodes: p.n, Version: harness.V2, Direct: mode == Direct,
		Hosts: map[string]string{l.registry.Host: t.url}, Machines: t.nodes,
	})
	if c != nil {
		defer func() { err = errors.Join(err, l.end(c, s)) }()
	}
	if err != nil {
		return out, err
	}
	r := &run{s: s, cluster: c, image: img}
	if s.before != nil {
		if err := s.before(ctx, r); err != nil {
			return out, err
		}
		if err := rest(ctx); err != nil {
			return out, err
		}
	}
	if err := t.bound(p.rate); err != nil {
		return out, err
	}
	m, err := l.begin(t, c)
	if err != nil {
		return out, err
	}
	took, err := s.pull(ctx, r)
	if err != nil {
		m.load.stop()
		if ctx.Err() == nil {
			err = fmt.Errorf("%w\n%s", err, c.Logs())
		}
		return out, err
	}
	c.KeepLogs(l.registry)
	return m.end(took)
}

// end ends a run's nodes and removes them. Those with many files stay until
// tidy: ext4 avoids for minutes the inodes that have been freed, and looks for
// others one by one, so that the next run would unpack at a third of the speed.
func (l *lab) end(c *harness.Cluster, s *scenario) error {
	if s.kind != files {
		return c.Close()
	}
	l.kept = append(l.kept, c)
	return c.Stop()
}

// tidy removes the nodes that are ended and still on disk.
func (l *lab) tidy() error {
	var errs []error
	for _, c := range l.kept {
		errs = append(errs, c.Close())
	}
	l.kept = nil
	return errors.Join(errs...)
}

// rest lets nodes tell each other what they have got.
func rest(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(2 * time.Second):
		return nil
	}
}

// meter holds the counters as they were when the pull began.
type meter struct {
	lab      *lab
	site     *site
	cluster  *harness.Cluster
	cpu      time.Duration
	registry harness.Traffic
	nodes    []harness.Traffic
	zones    int64
	load     *load
}

// begin reads the counters. What earlier runs have left to be written is
// written before, so that none pays for another.
func (l *lab) begin(t *site, c *harness.Cluster) (*meter, error) {
	unix.Sync()
	l.registry.Reset()
	m := &meter{lab: l, site: t, cluster: c}
	var err error
	if m.cpu, err = cpuOf(c); err != nil {
		return nil, err
	}
	if m.registry, m.nodes, m.zones, err = m.traffic(); err != nil {
		return nil, err
	}
	m.load, err = watchLoad()
	return m, err
}

// end reads them again.
func (m *meter) end(took []time.Duration) (sample, error) {
	s := sample{took: took}
	s.busy, s.disk = m.load.stop()
	s.said = m.lab.registry.Bytes("")
	cpu, err := cpuOf(m.cluster)
	if err != nil {
		return s, err
	}
	s.cpu = cpu - m.cpu
	registry, nodes, zones, err := m.traffic()
	if err != nil {
		return s, err
	}
	s.registry, s.zones = registry.Sub(m.registry).Sent, zones-m.zones
	for i, n := range nodes {
		d := n.Sub(m.nodes[i])
		s.sent, s.received = append(s.sent, d.Sent), append(s.received, d.Received)
	}
	for _, n := range m.cluster.Nodes {
		p := n.Process()
		if n.Wolf != nil {
			p = n.Wolf.Process()
		}
		rss, err := p.PeakRSS()
		if err != nil {
			return s, err
		}
		s.rss = max(s.rss, rss)
	}
	return s, nil
}

// traffic reads what registry, nodes and links between zones have carried. On
// loopback there is no NIC, and the registry's own counter stands in.
func (m *meter) traffic() (registry harness.Traffic, nodes []harness.Traffic, zones int64, err error) {
	if m.site.network == nil {
		registry.Sent = m.lab.registry.Bytes("")
		for _, n := range m.cluster.Nodes {
			nodes = append(nodes, harness.Traffic{Received: m.lab.registry.Bytes(n.Name)})
		}
		return registry, nodes, 0, nil
	}
	if registry, err = m.site.registry.Traffic(); err != nil {
		return registry, nil, 0, err
	}
	for _, n := range m.site.nodes {
		c, err := n.Traffic()
		if err != nil {
			return registry, nil, 0, err
		}
		nodes = append(nodes, c)
	}
	for _, up := range m.site.uplinks {
		c, err := up.Traffic()
		if err != nil {
			return registry, nil, 0, err
		}
		zones += c.Sent
	}
	if len(m.site.uplinks) > 0 {
		// The registry is in no zone: what it is asked is not between zones.
		zones -= registry.Received
	}
	return registry, nodes, zones, nil
}

// cpuOf adds up the processor time of the nodes' daemons.
func cpuOf(c *harness.Cluster) (time.Duration, error) {
	var sum time.Duration
	for _, n := range c.Nodes {
		procs := []*harness.Process{n.Process()}
		if n.Wolf != nil {
			procs = append(procs, n.Wolf.Process())
		}
		for _, p := range procs {
			t, err := p.CPU()
			if err != nil {
				return 0, err
			}
			sum += t
		}
	}
	return sum, nil
}
