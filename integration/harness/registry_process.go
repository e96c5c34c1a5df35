package harness

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/distribution/distribution/v3/configuration"
	_ "github.com/distribution/distribution/v3/registry/auth/htpasswd" // who may read, where RegistryOptions say so
	"github.com/distribution/distribution/v3/registry/handlers"
	"github.com/google/go-containerregistry/pkg/authn"
	"golang.org/x/crypto/bcrypt"
)

// Registries that are processes of their own.
const (
	// Distribution is distribution/distribution, version 3.
	Distribution = "distribution"
	// DockerRegistry is version 2.8 of the same, as Debian's package
	// docker-registry has it.
	DockerRegistry = "docker-registry"
)

// registryConfig names the configuration of the registry that a process is to be,
// and nothing else.
const registryConfig = "IMAGEWOLF_TEST_REGISTRY"

// RegistryOptions say how a registry is set up.
type RegistryOptions struct {
	// Hooks get its notifications.
	Hooks []Webhook
	// User and Password are those of the only one who may read and push; "":
	// everyone may.
	User, Password string
}

// NewRegistryProcess starts a registry that is a process of its own; the Env's
// Close stops it. What is in front of it counts.
func NewRegistryProcess(ctx context.Context, e *Env, program string, o RegistryOptions) (*Registry, error) {
	dir, err := e.Dir(program + strings.ReplaceAll(time.Now().Format(".000000"), ".", "-"))
	if err != nil {
		return nil, err
	}
	address, _, _, err := freeAddresses()
	if err != nil {
		return nil, err
	}
	config, err := writeRegistryConfig(dir, address, o)
	if err != nil {
		return nil, err
	}
	command, environment := []string{program, "serve", config}, []string(nil)
	if program == Distribution { // this program, which is one if it is told to
		self, err := os.Executable()
		if err != nil {
			return nil, fmt.Errorf("the registry's program: %w", err)
		}
		command, environment = []string{self}, []string{registryConfig + "=" + config}
	}
	log := filepath.Join(dir, "registry.log")
	p, err := e.start(program, log, environment, command...)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	err = Poll(ctx, 20*time.Millisecond, func() error {
		conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
		if err != nil {
			return err
		}
		return conn.Close()
	})
	if err != nil {
		return nil, fmt.Errorf("%s does not serve: %w\n%s", program, err, Tail(log, 3000))
	}
	// The host that the client asked for is handed on: it is the one of the events.
	r, err := newRegistry(e, httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: address}), func() error { return p.Stop(5 * time.Second) })
	if err != nil {
		return nil, err
	}
	if o.User != "" {
		r.login = &authn.Basic{Username: o.User, Password: o.Password}
	}
	return r, nil
}

// writeRegistryConfig writes a configuration as docs/registries/distribution.md
// has it; the one format is that of both programs.
func writeRegistryConfig(dir, address string, o RegistryOptions) (string, error) {
	var text strings.Builder
	fmt.Fprintf(&text, `version: 0.1
log: {level: error, accesslog: {disabled: true}}
storage:
  filesystem: {rootdirectory: %q}
http: {addr: %q, secret: "not one: nobody else can reach it"}
`, filepath.Join(dir, "images"), address)
	if o.User != "" {
		hash, err := bcrypt.GenerateFromPassword([]byte(o.Password), bcrypt.MinCost)
		if err != nil {
			return "", fmt.Errorf("the registry's password: %w", err)
		}
		file := filepath.Join(dir, "htpasswd")
		if err := os.WriteFile(file, fmt.Appendf(nil, "%s:%s\n", o.User, hash), 0o600); err != nil {
			return "", fmt.Errorf("the registry's password: %w", err)
		}
		fmt.Fprintf(&text, "auth:\n  htpasswd: {realm: harness, path: %q}\n", file)
	}
	text.WriteString("notifications:\n  endpoints:\n")
	for i, h := range o.Hooks {
		fmt.Fprintf(&text, `    - name: hook%d
      url: %q
      headers: {Authorization: [%q]}
      timeout: 5s
      threshold: 5
      backoff: 1s
      ignore: {actions: [pull], mediatypes: [application/octet-stream]}
`, i, h.URL, "Bearer "+h.Token)
	}
	config := filepath.Join(dir, "config.yml")
	if err := os.WriteFile(config, []byte(text.String()), 0o600); err != nil {
		return "", fmt.Errorf("the registry's configuration: %w", err)
	}
	return config, nil
}

// BeRegistry serves as a registry until the process is ended, if it was started
// by NewRegistryProcess for that, and else returns at once. A program that uses
// NewRegistryProcess calls it first of all.
func BeRegistry() {
	file := os.Getenv(registryConfig)
	if file == "" {
		return
	}
	if err := serveRegistry(file); err != nil {
		fmt.Fprintln(os.Stderr, "registry:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func serveRegistry(file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // only read from
	cfg, err := configuration.Parse(f)
	if err != nil {
		return err
	}
	srv := &http.Server{Addr: cfg.HTTP.Addr, Handler: handlers.NewApp(context.Background(), cfg), ReadHeaderTimeout: 10 * time.Second}
	return srv.ListenAndServe()
}
