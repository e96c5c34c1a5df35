package feed

import (
	"bytes"
	"encoding/base64"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/imagewolf/imagewolf/config"
)

func TestPollerTrustsItsCAOnly(t *testing.T) {
	origin := newNotifier(t, 100)
	origin.put(push("a"))
	server := httptest.NewTLSServer(origin.server)
	defer server.Close()
	ca := filepath.Join(t.TempDir(), "ca.pem")
	pem := "-----BEGIN CERTIFICATE-----\n" + base64Lines(server.Certificate().Raw) + "-----END CERTIFICATE-----\n"
	if err := os.WriteFile(ca, []byte(pem), 0o600); err != nil {
		t.Fatal(err)
	}
	c := config.Poll{URL: server.URL + "/feed/atom", Token: token, CAFile: ca}
	p, err := NewPoller("x", c, nil, PollerOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer p.client.CloseIdleConnections()
	if doc, _, err := p.ask(t.Context(), nil); err != nil || !bytes.Contains(doc, []byte("r.example:5000/a:1.4")) {
		t.Errorf("%s, %v", doc, err)
	}
	c.CAFile = ""
	q, err := NewPoller("x", c, nil, PollerOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer q.client.CloseIdleConnections()
	if _, _, err := q.ask(t.Context(), nil); err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("got %v", err)
	}
	c.CAFile = filepath.Join(t.TempDir(), "none")
	if _, err := NewPoller("x", c, nil, PollerOptions{}); err == nil || !strings.HasPrefix(err.Error(), ".ca_file: ") {
		t.Errorf("got %v", err)
	}
}

func base64Lines(der []byte) string { return base64.StdEncoding.EncodeToString(der) + "\n" }
