package harness

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"text/template"
	"time"

	introspection "github.com/containerd/containerd/api/services/introspection/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
)

// ContainerdOptions are what tests vary in containerd's configuration.
type ContainerdOptions struct {
	// ImageWolf is the socket of the imagewolf daemon that is the content store
	// and the differ; "" for containerd's builtin ones.
	ImageWolf string
	// LocalPull is CRI's use_local_image_pull (2.x only).
	LocalPull bool
	// Discard is CRI's discard_unpacked_layers.
	Discard bool
	// Imports are drop-in files, as a glob. With them, ImageWolf above is to be
	// empty: they say it.
	Imports string
}

// Containerd is one containerd daemon with root, state and sockets of its own.
// Its methods must not be called concurrently, but for the ones that pull, list
// and check.
type Containerd struct {
	// Dir holds everything of it.
	Dir string
	// Version is one of V2 and V17.
	Version string

	env  *Env
	on   *Machine // nil: this one
	name string
	opts ContainerdOptions
	proc *Process
	conn *grpc.ClientConn
}

// newContainerd prepares a containerd in dir; Start starts it. hosts are the
// registries (host:port) that it reaches, each in plain HTTP by the URL given. on is the machine that it runs on, nil for this one.
func newContainerd(e *Env, on *Machine, name, dir, version string, hosts map[string]string) (*Containerd, error) {
	c := &Containerd{Dir: dir, Version: version, env: e, on: on, name: name}
	for host, url := range hosts {
		if err := c.AddHost(host, url); err != nil {
			return nil, err
		}
	}
	conn, err := grpc.NewClient("unix://"+c.Socket(), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{
			// It is restarted all the time: look again soon.
			Backoff: backoff.Config{BaseDelay: 20 * time.Millisecond, Multiplier: 1.5, MaxDelay: 200 * time.Millisecond},
		}))
	if err != nil {
		return nil, fmt.Errorf("client of containerd: %w", err)
	}
	c.conn = conn
	e.OnClose(func() {
		_ = conn.Close() // closed once, here
	})
	return c, nil
}

// AddHost has images of a registry pulled from url. Each request will name the
// node.
func (c *Containerd) AddHost(host, url string) error {
	dir := filepath.Join(c.hostsDir(), host)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("registry configuration: %w", err)
	}
	text := fmt.Sprintf("server = %[1]q\n[host.%[1]q]\n  capabilities = [\"pull\", \"resolve\"]\n  [host.%[1]q.header]\n    %[2]s = [%[3]q]\n",
		url, NodeHeader, c.name)
	if err := os.WriteFile(filepath.Join(dir, "hosts.toml"), []byte(text), 0o644); err != nil {
		return fmt.Errorf("registry configuration: %w", err)
	}
	return nil
}

// Socket is the path of its gRPC socket.
func (c *Containerd) Socket() string { return filepath.Join(c.Dir, "c.sock") }

// Root is its root directory.
func (c *Containerd) Root() string { return filepath.Join(c.Dir, "root") }

// ContentDir is the root of its content store, builtin or not.
func (c *Containerd) ContentDir() string {
	return filepath.Join(c.Root(), "io.containerd.content.v1.content")
}

// Log is the path of its log.
func (c *Containerd) Log() string { return filepath.Join(c.Dir, "containerd.log") }

func (c *Containerd) hostsDir() string { return filepath.Join(c.Dir, "certs") }

// Sealed is the media type of a layer that only containerd can open, with a
// stream processor of its own. That one does nothing: to a differ which does not
// know it, it stands for encrypted layers. (Those themselves have a processor
// in containerd's defaults, and which of two is taken is left to chance.)
const Sealed = "application/vnd.oci.image.layer.v1.tar+gzip+sealed"

// configs are what a node's containerd is told, by major version. NRI and the
// opt directory would be at places shared by all nodes of the machine.
var configs = template.Must(template.New("").Parse(`
{{- define "common" -}}
root = "{{.Dir}}/root"
state = "{{.Dir}}/state"
{{- if .Opts.Imports}}
imports = ["{{.Opts.Imports}}"]
{{- end}}
{{- if .Opts.ImageWolf}}
disabled_plugins = ["io.containerd.content.v1.content"]
[proxy_plugins.imagewolf]
  type = "content"
  address = "{{.Opts.ImageWolf}}"
[proxy_plugins.imagewolf-diff]
  type = "diff"
  address = "{{.Opts.ImageWolf}}"
[plugins."io.containerd.service.v1.diff-service"]
  default = ["imagewolf-diff", "walking"]
{{- end}}
[grpc]
  address = "{{.Dir}}/c.sock"
[ttrpc]
  address = "{{.Dir}}/t.sock"
[debug]
  address = "{{.Dir}}/d.sock"
  level = "info"
[plugins."io.containerd.nri.v1.nri"]
  disable = true
[plugins."io.containerd.internal.v1.opt"]
  path = "{{.Dir}}/opt"
[stream_processors.sealed]
  accepts = ["{{.Sealed}}"]
  returns = "application/vnd.oci.image.layer.v1.tar+gzip"
  path = "/bin/cat"
{{end}}
{{- define "2" -}}
version = 3
{{template "common" .}}
{{- if .Opts.ImageWolf}}
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  platform = "linux"
  snapshotter = "overlayfs"
  differ = "imagewolf-diff"
{{- end}}
[plugins."io.containerd.transfer.v1.local"]
  config_path = "{{.Dir}}/certs"
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "overlayfs"
  use_local_image_pull = {{.Opts.LocalPull}}
  discard_unpacked_layers = {{.Opts.Discard}}
  [plugins."io.containerd.cri.v1.images".registry]
    config_path = "{{.Dir}}/certs"
[plugins."io.containerd.cri.v1.runtime".cni]
  conf_dir = "{{.Dir}}/cni"
{{end}}
{{- define "1" -}}
version = 2
{{template "common" .}}
[plugins."io.containerd.grpc.v1.cri"]
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    discard_unpacked_layers = {{.Opts.Discard}}
  [plugins."io.containerd.grpc.v1.cri".registry]
    config_path = "{{.Dir}}/certs"
  [plugins."io.containerd.grpc.v1.cri".cni]
    conf_dir = "{{.Dir}}/cni"
{{end}}`))

// Start starts the daemon with these options and waits until it serves.
func (c *Containerd) Start(ctx context.Context, o ContainerdOptions) error {
	if c.proc.Running() {
		return errors.New("containerd runs already")
	}
	c.opts = o
	var text strings.Builder
	err := configs.ExecuteTemplate(&text, c.Version[:1], struct {
		Dir, Sealed string
		Opts        ContainerdOptions
	}{c.Dir, Sealed, o})
	if err != nil {
		return fmt.Errorf("containerd's configuration: %w", err)
	}
	config := filepath.Join(c.Dir, "config.toml")
	for _, d := range []string{c.Dir, filepath.Join(c.Dir, "cni")} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return fmt.Errorf("containerd's directory: %w", err)
		}
	}
	if err := os.WriteFile(config, []byte(text.String()), 0o644); err != nil {
		return fmt.Errorf("containerd's configuration: %w", err)
	}
	bin := c.env.Bin.containerd(c.Version, "containerd")
	// The shim is looked for in PATH, and in containerd's own directory.
	env := []string{"PATH=" + filepath.Dir(bin) + ":" + os.Getenv("PATH")}
	if c.proc, err = c.env.startOn(c.on, "containerd of "+c.name, c.Log(), env, nil, bin, "--config", config); err != nil {
		return err
	}
	return c.ready(ctx)
}

// ready waits until the daemon serves, and fails when one of the plugins that
// matter did not start.
func (c *Containerd) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	client := introspection.NewIntrospectionClient(c.conn)
	var resp *introspection.PluginsResponse
	err := Poll(ctx, 50*time.Millisecond, func() (err error) {
		if !c.proc.Running() {
			cancel()
			return errors.New("it has ended")
		}
		resp, err = client.Plugins(ctx, &introspection.PluginsRequest{})
		return err
	})
	if err != nil {
		return fmt.Errorf("containerd of %s does not serve: %w\n%s", c.name, err, Tail(c.Log(), 3000))
	}
	var errs []error
	stores := 0
	for _, p := range resp.Plugins {
		if p.Type == "io.containerd.content.v1" && p.InitErr == nil {
			stores++
		}
		switch p.Type {
		case "io.containerd.content.v1", "io.containerd.differ.v1", "io.containerd.transfer.v1", "io.containerd.service.v1":
			if p.InitErr != nil && !strings.Contains(p.InitErr.Message, "skip plugin") {
				errs = append(errs, fmt.Errorf("plugin %s.%s of %s: %s", p.Type, p.ID, c.name, p.InitErr.Message))
			}
		}
	}
	if stores != 1 {
		errs = append(errs, fmt.Errorf("%d content stores in containerd of %s, want 1", stores, c.name))
	}
	return errors.Join(errs...)
}

// Plugin returns "ok" or the error of one plugin, "" when there is none of that
// name.
func (c *Containerd) Plugin(ctx context.Context, typ, id string) (string, error) {
	resp, err := introspection.NewIntrospectionClient(c.conn).Plugins(ctx, &introspection.PluginsRequest{})
	if err != nil {
		return "", fmt.Errorf("plugins: %w", err)
	}
	for _, p := range resp.Plugins {
		switch {
		case p.Type != typ || p.ID != id:
		case p.InitErr != nil:
			return p.InitErr.Message, nil
		default:
			return "ok", nil
		}
	}
	return "", nil
}

// Stop ends the daemon as systemd would.
func (c *Containerd) Stop() error { return c.proc.Stop(10 * time.Second) }

// Kill ends the daemon with SIGKILL.
func (c *Containerd) Kill() { c.proc.Kill() }

// Process returns the process; nil before Start.
func (c *Containerd) Process() *Process { return c.proc }

// Restart starts the daemon again with these options, after ending it if it
// runs.
func (c *Containerd) Restart(ctx context.Context, o ContainerdOptions) error {
	if err := c.Stop(); err != nil {
		return err
	}
	return c.Start(ctx, o)
}

// Ctr runs ctr with the arguments, in a namespace, and returns its standard
// output.
func (c *Containerd) Ctr(ctx context.Context, ns string, args ...string) (string, error) {
	bin := c.env.Bin.containerd(c.Version, "ctr")
	env := []string{"PATH=" + filepath.Dir(bin) + ":" + os.Getenv("PATH")}
	return runOn(ctx, c.on, nil, env, append([]string{bin, "-a", c.Socket(), "-n", ns}, args...)...)
}

// CtrIn is Ctr with a file as standard input.
func (c *Containerd) CtrIn(ctx context.Context, ns string, stdin *os.File, args ...string) (string, error) {
	bin := c.env.Bin.containerd(c.Version, "ctr")
	return runOn(ctx, c.on, stdin, nil, append([]string{bin, "-a", c.Socket(), "-n", ns}, args...)...)
}
