package harness

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/distribution/distribution/v3/configuration"
	"github.com/distribution/distribution/v3/registry/handlers"
	_ "github.com/distribution/distribution/v3/registry/storage/driver/filesystem" // the storage in use
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/sirupsen/logrus" //nolint:depguard // the registry's own, to be silenced
)

// Registry is a distribution registry in this process, in plain HTTP on the
// loopback interface, that keeps its images below an Env. Its counters are the
// source of every registry figure that tests and the demo report.
type Registry struct {
	*Counter
	// Host is its host:port, as image names have it.
	Host string

	login authn.Authenticator // who pushes; nil: who RequireAuth lets in
	stop  func() error
}

// Stop ends the registry: nobody listens at Host any more.
func (r *Registry) Stop() error { return r.stop() }

// ServeAlso has the registry answer on a further listener, such as one on a
// Machine, until stop is called, which closes it.
func (r *Registry) ServeAlso(l net.Listener) (stop func() error) { return r.serveOn(l) }

// Webhook is where a registry sends its notifications, and the token that it sends.
type Webhook struct{ URL, Token string }

// NewRegistry starts a registry, which sends notifications to the webhooks; the
// Env's Close stops it.
func NewRegistry(e *Env, hooks ...Webhook) (*Registry, error) {
	dir, err := e.Dir("registry")
	if err != nil {
		return nil, err
	}
	// It logs every request to the process's standard logger; the counter keeps
	// them in a form that can be asked.
	logrus.SetOutput(io.Discard)
	log.SetOutput(io.Discard)
	cfg := &configuration.Configuration{
		Version: configuration.MajorMinorVersion(0, 1),
		Storage: configuration.Storage{
			"filesystem":  {"rootdirectory": dir, "maxthreads": 100},
			"maintenance": {"uploadpurging": map[any]any{"enabled": false}},
		},
	}
	cfg.Log.AccessLog.Disabled = true
	cfg.Log.Level = "error"
	cfg.HTTP.Secret = "not one: nobody else can reach it"
	for i, h := range hooks {
		// As docs/registries/distribution.md has it.
		cfg.Notifications.Endpoints = append(cfg.Notifications.Endpoints, configuration.Endpoint{
			Name: fmt.Sprint("hook", i), URL: h.URL, Headers: http.Header{"Authorization": {"Bearer " + h.Token}},
			Timeout: 5 * time.Second, Threshold: 5, Backoff: time.Second,
			Ignore: configuration.Ignore{Actions: []string{"pull"}, MediaTypes: []string{"application/octet-stream"}},
		})
	}
	app := handlers.NewApp(context.Background(), cfg)
	return newRegistry(e, app, app.Shutdown)
}

// newRegistry puts a counter in front of a registry that end ends.
func newRegistry(e *Env, next http.Handler, end func() error) (*Registry, error) {
	c := NewCounter(next)
	host, stop, err := c.serve()
	if err != nil {
		return nil, errors.Join(err, end())
	}
	r := &Registry{Counter: c, Host: host, stop: sync.OnceValue(func() error { return errors.Join(stop(), end()) })}
	e.OnClose(func() {
		if err := r.Stop(); err != nil {
			fmt.Println("registry:", err)
		}
	})
	return r, nil
}
