package harness

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

// ImageWolf is one imagewolf daemon. Its methods must not be called
// concurrently.
type ImageWolf struct {
	// Dir holds its configuration, socket and log.
	Dir string
	// Gossip and Data are its addresses, host:port.
	Gossip, Data string
	// Settings are lines of TOML by table ("" for the top), added to its
	// configuration at the next Start.
	Settings map[string]string

	env        *Env
	name       string
	content    string // containerd's content directory
	containerd string // containerd's socket
	key        string
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
	gossip, err := freeAddress(true)
	if err != nil {
		return nil, err
	}
	data, err := freeAddress(false)
	if err != nil {
		return nil, err
	}
	return &ImageWolf{
		Dir: dir, Gossip: gossip, Data: data, Settings: map[string]string{},
		env: e, name: name, content: c.ContentDir(), containerd: c.Socket(), key: key,
	}, nil
}

// freeAddress returns a loopback address that was free a moment ago, for TCP
// and, if asked, for UDP as well. The others must know it before the daemon
// listens, so that port 0 is no help.
func freeAddress(udp bool) (string, error) {
	var err error
	for range 20 {
		var l net.Listener
		if l, err = (&net.ListenConfig{}).Listen(context.Background(), "tcp", "127.0.0.1:0"); err != nil {
			break
		}
		addr := l.Addr().String()
		if udp {
			var p net.PacketConn
			if p, err = (&net.ListenConfig{}).ListenPacket(context.Background(), "udp", addr); err == nil {
				err = p.Close()
			}
		}
		if err = errors.Join(err, l.Close()); err == nil {
			return addr, nil
		}
	}
	return "", fmt.Errorf("free port: %w", err)
}

// Socket is the path of the socket that containerd connects to.
func (w *ImageWolf) Socket() string { return filepath.Join(w.Dir, "w.sock") }

// Log is the path of its log.
func (w *ImageWolf) Log() string { return filepath.Join(w.Dir, "imagewolf.log") }

// Config is the path of its configuration.
func (w *ImageWolf) Config() string { return filepath.Join(w.Dir, "imagewolf.toml") }

// Process returns the process; nil before Start.
func (w *ImageWolf) Process() *Process { return w.proc }

func (w *ImageWolf) writeConfig() error {
	host, _, err := net.SplitHostPort(w.Data)
	if err != nil {
		return fmt.Errorf("imagewolf's configuration: %w", err)
	}
	join := make([]string, len(w.join))
	for i, j := range w.join {
		join[i] = fmt.Sprintf("%q", j)
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
join = [%s]
cluster_key = %q
%s
`, w.content, w.Socket(), w.containerd, firstOf(os.Getenv("IMAGEWOLF_TEST_LOG_LEVEL"), "info"), w.Settings[""], w.name, w.Gossip, w.Data, host, strings.Join(join, ", "), w.key, w.Settings["cluster"])
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
	p, err := w.env.start("imagewolf of "+w.name, w.Log(), nil, w.env.Bin.ImageWolf, "daemon", "--config", w.Config())
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
		conn, err := (&net.Dialer{}).DialContext(ctx, network, addr)
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
