package harness

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"
)

// Metric returns what the running daemon tells Prometheus under a name, with its
// label if that is given as well, else the sum over all labels.
func (w *ImageWolf) Metric(ctx context.Context, name string) (float64, error) {
	resp, err := w.getMetrics(ctx)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close() //nolint:errcheck // only read from
	sum, found := 0.0, false
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		rest, ok := strings.CutPrefix(lines.Text(), name)
		if !ok || rest == "" || rest[0] != ' ' && rest[0] != '{' {
			continue
		}
		v, err := strconv.ParseFloat(rest[strings.LastIndexByte(rest, ' ')+1:], 64)
		if err != nil {
			return 0, fmt.Errorf("metrics of %s: %q: %w", w.name, lines.Text(), err)
		}
		sum, found = sum+v, true
	}
	if !found {
		return 0, errors.Join(fmt.Errorf("metrics of %s: no %s: %w", w.name, name, os.ErrNotExist), lines.Err())
	}
	return sum, lines.Err()
}

// getMetrics asks the running daemon for its metrics. The caller closes the body.
func (w *ImageWolf) getMetrics(ctx context.Context) (*http.Response, error) {
	client := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			return w.on.dial(ctx, network, addr)
		},
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+w.Metrics+"/metrics", nil)
	if err != nil {
		return nil, fmt.Errorf("metrics of %s: %w", w.name, err)
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("metrics of %s: %w", w.name, err)
	}
	return resp, nil
}

// Clock returns what the running daemon says that the time is, to a second.
func (w *ImageWolf) Clock(ctx context.Context) (time.Time, error) {
	resp, err := w.getMetrics(ctx)
	if err != nil {
		return time.Time{}, err
	}
	at, err := http.ParseTime(resp.Header.Get("Date"))
	if err = errors.Join(err, resp.Body.Close()); err != nil {
		return time.Time{}, fmt.Errorf("clock of %s: %w", w.name, err)
	}
	return at, nil
}

// Metric returns the sum of a metric over the nodes' daemons, all of which run.
func (c *Cluster) Metric(ctx context.Context, name string) (float64, error) {
	sum := 0.0
	for _, n := range c.Nodes {
		v, err := n.Wolf.Metric(ctx, name)
		if err != nil {
			return 0, err
		}
		sum += v
	}
	return sum, nil
}
