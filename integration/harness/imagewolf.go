package harness

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// ImageWolf is one imagewolf daemon. Its methods must not be called
// concurrently.
type ImageWolf struct {
	// Dir holds its configuration, socket and log.
	Dir string
	// Gossip, Data and Metrics are its addresses, host:port.
	Gossip, Data, Metrics string
	// Resolver is the address of the name server that it asks; "": this machine's.
	Resolver string
	// Settings are lines of TOML by table ("" for the top), added to its
	// configuration at the next Start.
	Settings map[string]string
	// Socketed is the listening unix socket at Socket() that the daemon is started
	// with, as systemd would; nil: it makes its own.
	Socketed *os.File

	env        *Env
	on         *Machine // nil: this one
	clocked    string   // the program, if its clock can be set; "": env's
	name       string
	content    string // containerd's content directory
	containerd string // containerd's socket
	certs      string // containerd's registry configuration
	key        string
	accepted   []string // keys beside it
	join       []string
	proc       *Process
	logStart   int64 // where in the log the running process's lines begin
}

// NewClusterKey has imagewolf make a cluster key.
func NewClusterKey(ctx context.Context, e *Env) (string, error) {
	out, err := run(ctx, nil, nil, e.Bin.ImageWolf, "cluster-key", "generate")
	if err != nil {
		return "", fmt.Errorf("cluster key: %w", err)
	}
	return strings.TrimSpace(out), nil
}

// newImageWolf prepares a daemon for the containerd of a node.
func newImageWolf(e *Env, name, dir, key string, c *Containerd) (*ImageWolf, error) {
	settings := map[string]string{}
	var gossip, data, metrics string
	if m := c.on; m != nil {
		gossip, data, metrics = net.JoinHostPort(m.IP, "7946"), net.JoinHostPort(m.IP, "7947"), net.JoinHostPort(m.IP, "7948")
		if m.Zone != "" {
			settings["cluster"] = fmt.Sprintf("labels = { zone = %q }\n", m.Zone)
		}
	} else {
		var err error
		if gossip, data, metrics, err = freeAddresses(); err != nil {
			return nil, err
		}
	}
	return &ImageWolf{
		Dir: dir, Gossip: gossip, Data: data, Metrics: metrics, Settings: settings,
		env: e, on: c.on, name: name, content: c.ContentDir(), containerd: c.Socket(), certs: c.hostsDir(), key: key,
	}, nil
}

// freeAddresses returns three addresses for a daemon, the first free for TCP and
// UDP, the others for TCP. The others must know them before the daemon listens,
// so that port 0 is no help, and on 127.0.0.1 a port that was free a moment ago
// may by then be some connection's own. So every daemon gets a loopback address
// of its own, from which nothing connects.
func freeAddresses() (gossip, data, metrics string, err error) {
	for range 20 {
		host := fmt.Sprintf("127.%d.%d.%d", 16+rand.N(200), rand.N(256), 1+rand.N(254))
		if gossip, data, metrics, err = freeOn(host); err == nil {
			return gossip, data, metrics, nil
		}
	}
	return "", "", "", fmt.Errorf("free ports: %w", err)
}

func freeOn(host string) (gossip, data, metrics string, err error) {
	var lc net.ListenConfig
	g, err := lc.Listen(context.Background(), "tcp", net.JoinHostPort(host, "0"))
	if err != nil {
		return "", "", "", err
	}
	defer func() { err = errors.Join(err, g.Close()) }()
	u, err := lc.ListenPacket(context.Background(), "udp", g.Addr().String())
	if err != nil {
		return "", "", "", err
	}
	defer func() { err = errors.Join(err, u.Close()) }()
	d, err := lc.Listen(context.Background(), "tcp", net.JoinHostPort(host, "0"))
	if err != nil {
		return "", "", "", err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	m, err := lc.Listen(context.Background(), "tcp", net.JoinHostPort(host, "0"))
	if err != nil {
		return "", "", "", err
	}
	return g.Addr().String(), d.Addr().String(), m.Addr().String(), m.Close()
}

// Socket is the path of the socket that containerd connects to.
func (w *ImageWolf) Socket() string { return filepath.Join(w.Dir, "w.sock") }

// NodeSocket is the path of the socket of its Node API.
func (w *ImageWolf) NodeSocket() string { return filepath.Join(w.Dir, "n.sock") }

// Log is the path of its log.
func (w *ImageWolf) Log() string { return filepath.Join(w.Dir, "imagewolf.log") }

// Config is the path of its configuration.
func (w *ImageWolf) Config() string { return filepath.Join(w.Dir, "imagewolf.toml") }

// Process returns the process; nil before Start.
func (w *ImageWolf) Process() *Process { return w.proc }

// UseKeys gives the daemon a cluster key, and others that it accepts beside it,
// from the next Start on.
func (w *ImageWolf) UseKeys(own string, accepted ...string) { w.key, w.accepted = own, accepted }

// quoted writes a list as TOML has it.
func quoted(list []string) string {
	out := make([]string, len(list))
	for i, s := range list {
		out[i] = strconv.Quote(s)
	}
	return "[" + strings.Join(out, ", ") + "]"
}

func (w *ImageWolf) writeConfig() error {
	host, _, err := net.SplitHostPort(w.Data)
	if err != nil {
		return fmt.Errorf("imagewolf's configuration: %w", err)
	}
	text := fmt.Sprintf(`root = %q
socket = %q
containerd_socket = %q
log_level = %q
%s
[cluster]
name = %q
gossip_address = %q
data_address = %q
advertise_address = %q
join = %s
cluster_key = %q
accepted_cluster_keys = %s
%s
`, w.content, w.Socket(), w.containerd, firstOf(os.Getenv("IMAGEWOLF_TEST_LOG_LEVEL"), "info"), w.Settings[""], w.name, w.Gossip, w.Data, host, quoted(w.join), w.key, quoted(w.accepted), w.Settings["cluster"])
	text += fmt.Sprintf("[metrics]\naddress = %q\n[node_api]\nsocket = %q\n%s\n", w.Metrics, w.NodeSocket(), w.Settings["node_api"])
	text += fmt.Sprintf("[prefetch]\ncerts_dir = %q\n%s\n", w.certs, w.Settings["prefetch"])
	for _, table := range []string{"swarm", "tracker"} {
		if s := w.Settings[table]; s != "" {
			text += fmt.Sprintf("[%s]\n%s\n", table, s)
		}
	}
	if err := os.WriteFile(w.Config(), []byte(text), 0o600); err != nil {
		return fmt.Errorf("imagewolf's configuration: %w", err)
	}
	return nil
}

// Start starts the daemon and waits until its socket takes connections.
func (w *ImageWolf) Start(ctx context.Context) error {
	if w.proc.Running() {
		return errors.New("imagewolf runs already")
	}
	if err := w.writeConfig(); err != nil {
		return err
	}
	w.logStart = 0
	if info, err := os.Stat(w.Log()); err == nil {
		w.logStart = info.Size()
	}
	argv := []string{firstOf(w.clocked, w.env.Bin.ImageWolf), "daemon", "--config", w.Config()}
	var files []*os.File
	var vars []string
	if w.clocked != "" {
		vars = []string{clockEnv + "=" + w.clock()}
	}
	if w.Socketed != nil {
		// The process id that systemd sets is known to the process alone.
		files, argv = []*os.File{w.Socketed}, append([]string{"/bin/sh", "-c", `LISTEN_FDS=1 LISTEN_PID=$$ exec "$@"`, "systemd"}, argv...)
	}
	if w.Resolver != "" {
		file := filepath.Join(w.Dir, "resolv.conf")
		if err := os.WriteFile(file, []byte("nameserver "+w.Resolver+"\n"), 0o644); err != nil {
			return fmt.Errorf("imagewolf's name server: %w", err)
		}
		// What is mounted here is seen by the daemon alone, which sees all else.
		argv = append([]string{"unshare", "--mount", "--propagation", "slave", "/bin/sh", "-c",
			`mount --bind "$0" /etc/resolv.conf && exec "$@"`, file}, argv...)
	}
	p, err := w.env.startOn(w.on, "imagewolf of "+w.name, w.Log(), vars, files, argv...)
	if err != nil {
		return err
	}
	w.proc = p
	return w.serving(ctx)
}

// serving waits until both of the daemon's ports take connections.
func (w *ImageWolf) serving(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	dial := func(network, addr string) error {
		conn, err := w.on.dial(ctx, network, addr)
		if err != nil {
			return err
		}
		return conn.Close()
	}
	err := Poll(ctx, 20*time.Millisecond, func() error {
		if !w.proc.Running() {
			cancel()
			return fmt.Errorf("it has ended: %s", w.proc.cmd.ProcessState)
		}
		return errors.Join(dial("unix", w.Socket()), dial("tcp", w.Data))
	})
	if err != nil {
		return fmt.Errorf("imagewolf of %s does not serve: %w\n%s", w.name, err, Tail(w.Log(), 3000))
	}
	return nil
}

// membership matches what the daemon logs about the nodes it sees.
var membership = regexp.MustCompile(`msg="node (joined|changed|gone)" name=(\S+)`)

// knows fails unless the daemon sees every other of the nodes that runs.
func (w *ImageWolf) knows(nodes []*Node) error {
	data, err := os.ReadFile(w.Log())
	if err != nil {
		return fmt.Errorf("log of imagewolf: %w", err)
	}
	seen := map[string]bool{}
	for _, m := range membership.FindAllStringSubmatch(string(data[w.logStart:]), -1) {
		seen[m[2]] = m[1] != "gone"
	}
	for _, n := range nodes {
		if n.Wolf != w && n.Wolf.proc.Running() && !seen[n.Name] {
			return fmt.Errorf("%s does not see %s", w.name, n.Name)
		}
	}
	return nil
}

// Stop ends the daemon as systemd would.
func (w *ImageWolf) Stop() error { return w.proc.Stop(15 * time.Second) }

// Kill ends the daemon with SIGKILL.
func (w *ImageWolf) Kill() { w.proc.Kill() }
