package harness

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"
)

// Notifier is one imagewolf-notifier. Its methods must not be called concurrently.
type Notifier struct {
	// Dir holds its configuration, queue and log.
	Dir string
	// Address is where it listens, host:port.
	Address string
	// Settings is TOML that is added to its configuration at the next Start.
	Settings string

	env  *Env
	proc *Process
}

// NewNotifier prepares a notifier that is not running yet.
func NewNotifier(e *Env, name string) (*Notifier, error) {
	dir, err := e.Dir(name)
	if err != nil {
		return nil, err
	}
	address, _, _, err := freeAddresses()
	if err != nil {
		return nil, err
	}
	return &Notifier{Dir: dir, Address: address, env: e}, nil
}

// URL is where a receiver of the notifier is.
func (n *Notifier) URL(receiver string) string { return "http://" + n.Address + "/hooks/" + receiver }

// Log is the file of what it says.
func (n *Notifier) Log() string { return filepath.Join(n.Dir, "notifier.log") }

// Config is the file of its configuration.
func (n *Notifier) Config() string { return filepath.Join(n.Dir, "notifier.toml") }

// Start starts the notifier and waits until it takes connections.
func (n *Notifier) Start(ctx context.Context) error {
	if n.proc.Running() {
		return errors.New("the notifier runs already")
	}
	text := fmt.Sprintf("listen = %q\n%s\n[queue]\nfile = %q\n", n.Address, n.Settings, filepath.Join(n.Dir, "queue.db"))
	if err := os.WriteFile(n.Config(), []byte(text), 0o600); err != nil {
		return fmt.Errorf("the notifier's configuration: %w", err)
	}
	p, err := n.env.start("notifier", n.Log(), nil, n.env.Bin.Notifier, "run", "--config", n.Config())
	if err != nil {
		return err
	}
	n.proc = p
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	err = Poll(ctx, 20*time.Millisecond, func() error {
		if !n.proc.Running() {
			cancel()
			return fmt.Errorf("it has ended: %s", n.proc.cmd.ProcessState)
		}
		conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", n.Address)
		if err != nil {
			return err
		}
		return conn.Close()
	})
	if err != nil {
		return fmt.Errorf("the notifier does not serve: %w\n%s", err, Tail(n.Log(), 3000))
	}
	return nil
}

// Stop has the notifier end as a service manager would.
func (n *Notifier) Stop() error { return n.proc.Stop(10 * time.Second) }
