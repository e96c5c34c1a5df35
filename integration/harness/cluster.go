package harness

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
)

// Node is a containerd with its imagewolf.
type Node struct {
	// Name is its name in the cluster and in the registry's counter.
	Name string
	*Containerd
	// Wolf is its imagewolf daemon; nil in a cluster without ImageWolf.
	Wolf *ImageWolf
}

// Default returns the options of the node's containerd that a cluster starts
// it with.
func (n *Node) Default() ContainerdOptions {
	if n.Wolf == nil {
		return ContainerdOptions{}
	}
	return ContainerdOptions{ImageWolf: n.Wolf.Socket()}
}

// ClusterOptions say what a cluster is made of.
type ClusterOptions struct {
	// Name is a short word, unique in the Env, that starts the nodes' names.
	Name string
	// Nodes is their number.
	Nodes int
	// Version of containerd.
	Version string
	// Hosts are the registries that the nodes reach: host as image names have
	// it, and the URL where it really is.
	Hosts map[string]string
	// Direct leaves ImageWolf out: containerd has its builtin store.
	Direct bool
	// Machines are where the nodes run, one each; nil for this machine.
	Machines []*Machine
	// Join is the name by which the nodes find each other, of which Resolver is the
	// name server; "": each knows an address.
	Join, Resolver string
	// Settings are added to every daemon's configuration, TOML by table.
	Settings map[string]string
	// Clocked is the imagewolf that the nodes run, from BuildClocked; "": the Env's,
	// whose clock is the machine's.
	Clocked string
}

// Cluster is several nodes that know each other.
type Cluster struct {
	Nodes []*Node
	// Key is the cluster's; "" without ImageWolf.
	Key string

	direct bool
}

// NewCluster starts the nodes, all at once, and waits until they serve and know
// each other.
func NewCluster(ctx context.Context, e *Env, o ClusterOptions) (*Cluster, error) {
	c := &Cluster{direct: o.Direct}
	if !o.Direct {
		var err error
		if c.Key, err = NewClusterKey(ctx, e); err != nil {
			return nil, err
		}
	}
	for i := range o.Nodes {
		name := fmt.Sprintf("%s%d", o.Name, i+1)
		dir, err := e.Dir(name)
		if err != nil {
			return nil, err
		}
		n := &Node{Name: name}
		var on *Machine
		if o.Machines != nil {
			on = o.Machines[i]
		}
		if n.Containerd, err = newContainerd(e, on, name, dir, o.Version, o.Hosts); err != nil {
			return nil, err
		}
		c.Nodes = append(c.Nodes, n)
		if o.Direct {
			continue
		}
		if n.Wolf, err = newImageWolf(e, name, dir, c.Key, n.Containerd); err != nil {
			return nil, err
		}
		if n.Wolf.clocked = o.Clocked; o.Clocked != "" {
			if err := n.Wolf.SetClock(0); err != nil {
				return nil, err
			}
		}
		for table, text := range o.Settings {
			n.Wolf.Settings[table] += text
		}
		// The first node, as an operator would write it; the first itself knows
		// the second, so that it finds back after a restart.
		n.Wolf.join = []string{c.Nodes[0].Wolf.Gossip}
		if o.Join != "" {
			n.Wolf.join, n.Wolf.Resolver = []string{o.Join}, o.Resolver
		}
	}
	if !o.Direct && o.Nodes > 1 && o.Join == "" {
		c.Nodes[0].Wolf.join = []string{c.Nodes[1].Wolf.Gossip}
	}
	return c, c.Heal(ctx)
}

// Heal puts the cluster back as it was at the beginning, whatever a test did to
// it: every daemon running, with its default options.
func (c *Cluster) Heal(ctx context.Context) error {
	var g errgroup.Group
	g.SetLimit(starting)
	woken := false
	for _, n := range c.Nodes {
		woken = woken || n.Wolf != nil && !n.Wolf.proc.Running()
		g.Go(func() error {
			if n.Wolf != nil && !n.Wolf.proc.Running() {
				if err := n.Wolf.Start(ctx); err != nil {
					return err
				}
			}
			switch {
			case !n.proc.Running():
				return n.Start(ctx, n.Default())
			case n.opts != n.Default():
				return n.Restart(ctx, n.Default())
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	if !woken {
		return nil
	}
	return c.Settle(ctx)
}

// starting is how many nodes start at once: more would wait for the processors
// and run into the limits on their own start.
const starting = 8

// settled is how long daemons may need, after some came back, until all have
// reached their trackers again and told them what they hold. Nothing outside of
// them shows it.
const settled = 3 * time.Second

// Settle waits until the running daemons know each other and what each has. In
// the seconds before, pulls work, but may cost the registry more than one copy.
func (c *Cluster) Settle(ctx context.Context) error {
	if err := c.together(ctx); err != nil {
		return err
	}
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(settled):
		return nil
	}
}

// Stop ends the cluster's daemons, those of all nodes at once: each imagewolf may stay
// some seconds for what the others take from it.
func (c *Cluster) Stop() error {
	errs := make([]error, len(c.Nodes))
	var stopping sync.WaitGroup
	for i, n := range c.Nodes {
		stopping.Go(func() {
			errs[i] = n.Stop()
			if n.Wolf != nil {
				errs[i] = errors.Join(errs[i], n.Wolf.Stop())
			}
		})
	}
	stopping.Wait()
	return errors.Join(errs...)
}

// Close ends the cluster's daemons and removes all that they have on disk,
// which is worth it where an Env sees many clusters.
func (c *Cluster) Close() error {
	errs := []error{c.Stop()}
	for _, n := range c.Nodes {
		errs = append(errs, sweep(n.Dir))
	}
	return errors.Join(errs...)
}

// together waits until every daemon's log names every other daemon.
func (c *Cluster) together(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	err := Poll(ctx, 50*time.Millisecond, func() error {
		for _, n := range c.Nodes {
			if err := n.Wolf.knows(c.Nodes); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("%w\n%s", err, c.Logs())
	}
	return nil
}

// PullAll pulls an image on all nodes at the same moment and returns each
// node's seconds.
func (c *Cluster) PullAll(ctx context.Context, ns, ref string) ([]time.Duration, error) {
	return PullOn(ctx, c.Nodes, ns, ref)
}

// PullOn is PullAll for some of the nodes.
func PullOn(ctx context.Context, nodes []*Node, ns, ref string) ([]time.Duration, error) {
	took := make([]time.Duration, len(nodes))
	errs := make([]error, len(nodes))
	start := make(chan struct{})
	var g errgroup.Group
	for i, n := range nodes {
		g.Go(func() error {
			<-start
			began := time.Now()
			if err := n.Pull(ctx, ns, ref); err != nil {
				errs[i] = fmt.Errorf("pull on %s: %w", n.Name, err)
			}
			took[i] = time.Since(began)
			return nil
		})
	}
	close(start)
	_ = g.Wait() //nolint:errcheck // the errors are in errs, all of them
	return took, errors.Join(errs...)
}

// Logs returns the ends of all logs, for a failure's report: what the imagewolf
// daemons said, and containerd's warnings. With IMAGEWOLF_KEEP_LOGS set to a
// directory, whole logs are copied to it, too.
func (c *Cluster) Logs() string {
	var b strings.Builder
	for _, n := range c.Nodes {
		logs := []string{n.Log()}
		if n.Wolf != nil {
			logs = append(logs, n.Wolf.Log())
		}
		for _, l := range logs {
			fmt.Fprintf(&b, "---- %s %s\n%s", n.Name, filepath.Base(l), lastLines(l, 40))
			keepLog(n.Name, l)
		}
	}
	return b.String()
}

// lastLines returns the last n lines of a log that may matter, each cut to a
// length that can be read.
func lastLines(path string, n int) string {
	var lines []string
	for line := range strings.Lines(Tail(path, 256<<10)) {
		if strings.HasSuffix(path, "containerd.log") && strings.Contains(line, "level=info") {
			continue
		}
		if len(line) > 500 {
			line = line[:500] + "...\n"
		}
		lines = append(lines, line)
	}
	return strings.Join(lines[max(0, len(lines)-n):], "")
}

// KeepLogs copies the imagewolf daemons' logs, and a list of what the registry
// was asked, to the directory that IMAGEWOLF_KEEP_LOGS names; without one it does
// nothing.
func (c *Cluster) KeepLogs(r *Registry) {
	for _, n := range c.Nodes {
		if n.Wolf != nil {
			keepLog(n.Name, n.Wolf.Log())
		}
	}
	var asked strings.Builder
	for _, q := range r.Requests(nil) {
		fmt.Fprintf(&asked, "%s ended=%s\n", q, q.Ended.Format("15:04:05.000"))
	}
	keep(c.Nodes[0].Name+"-registry.log", []byte(asked.String()))
}

func keepLog(name, path string) {
	data, err := os.ReadFile(path)
	if err != nil {
		data = []byte(err.Error())
	}
	keep(name+"-"+filepath.Base(path), data)
}

func keep(file string, data []byte) {
	dir := os.Getenv("IMAGEWOLF_KEEP_LOGS")
	if dir == "" {
		return
	}
	if err := os.WriteFile(filepath.Join(dir, file), data, 0o644); err != nil {
		fmt.Fprintln(os.Stderr, "keeping a log:", err)
	}
}
