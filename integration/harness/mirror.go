package harness

import (
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
)

// Mirror stands before a registry elsewhere and counts what it sends. It keeps
// nothing: every request goes to the registry, credentials included.
type Mirror struct {
	*Counter
	// URL is where nodes are to look for the registry.
	URL string
}

// NewMirror starts a mirror of the registry at upstream (scheme and host); the
// Env's Close stops it.
func NewMirror(e *Env, upstream string) (*Mirror, error) {
	base, err := url.Parse(upstream)
	if err != nil {
		return nil, fmt.Errorf("registry's address: %w", err)
	}
	transport := http.DefaultTransport.(*http.Transport).Clone() //nolint:errcheck // its type is the standard library's promise
	transport.DisableCompression = true                          // the bytes are to be the registry's
	client := &http.Client{Transport: transport}
	c := NewCounter(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		relay(client, base, w, r)
	}))
	host, stop, err := c.serve()
	if err != nil {
		return nil, err
	}
	e.OnClose(func() {
		if err := stop(); err != nil {
			fmt.Println("mirror:", err)
		}
		transport.CloseIdleConnections()
	})
	return &Mirror{Counter: c, URL: "http://" + host}, nil
}

// relay answers a request with what the registry answers. It follows redirects
// itself: a client that followed them would get a blob from the registry's
// storage, past the counter.
func relay(client *http.Client, base *url.URL, w http.ResponseWriter, r *http.Request) {
	target := *r.URL
	target.Scheme, target.Host = base.Scheme, base.Host
	q := target.Query()
	q.Del("ns") // containerd's, for mirrors of many registries
	target.RawQuery = q.Encode()
	req, err := http.NewRequestWithContext(r.Context(), r.Method, target.String(), nil)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	for _, k := range []string{"Accept", "Authorization", "Range", "User-Agent"} {
		for _, v := range r.Header.Values(k) {
			req.Header.Add(k, v)
		}
	}
	resp, err := client.Do(req)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	defer resp.Body.Close() //nolint:errcheck // only read from
	for k, vs := range resp.Header {
		if strings.EqualFold(k, "Connection") || strings.EqualFold(k, "Transfer-Encoding") {
			continue
		}
		for _, v := range vs {
			w.Header().Add(k, v)
		}
	}
	w.WriteHeader(resp.StatusCode)
	_, _ = io.Copy(w, resp.Body) //nolint:errcheck // the client sees a short body, and asks again
}
