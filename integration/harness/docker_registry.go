package harness

import (
	"context"
	"fmt"
	"net"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// NewDockerRegistry starts the registry of version 2, as Debian's package
// docker-registry has it, which sends notifications to the webhooks; the Env's
// Close stops it. It is a process of its own; what is in front of it counts.
func NewDockerRegistry(ctx context.Context, e *Env, hooks ...Webhook) (*Registry, error) {
	dir, err := e.Dir("docker-registry")
	if err != nil {
		return nil, err
	}
	address, _, _, err := freeAddresses()
	if err != nil {
		return nil, err
	}
	var text strings.Builder
	fmt.Fprintf(&text, `version: 0.1
log: {level: error, accesslog: {disabled: true}}
storage:
  filesystem: {rootdirectory: %q}
http: {addr: %q, secret: "not one: nobody else can reach it"}
notifications:
  endpoints:
`, filepath.Join(dir, "images"), address)
	for i, h := range hooks {
		// As docs/registries/distribution.md has it.
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
		return nil, fmt.Errorf("the registry's configuration: %w", err)
	}
	log := filepath.Join(dir, "registry.log")
	if _, err := e.start("docker-registry", log, nil, "docker-registry", "serve", config); err != nil {
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
		return nil, fmt.Errorf("docker-registry does not serve: %w\n%s", err, Tail(log, 3000))
	}
	// The host that the client asked for is handed on: it is the one of the events.
	c := NewCounter(httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: address}))
	host, stop, err := c.serve()
	if err != nil {
		return nil, err
	}
	e.OnClose(func() {
		if err := stop(); err != nil {
			fmt.Println("registry:", err)
		}
	})
	return &Registry{Counter: c, Host: host}, nil
}
