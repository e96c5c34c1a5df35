package registry

import (
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/imagewolf/imagewolf/config"
)

// What an operator can put right is named with its setting.
func TestErrorsNameTheSetting(t *testing.T) {
	refuse := func(status int, challenge string) func(http.ResponseWriter, *http.Request) {
		return func(w http.ResponseWriter, _ *http.Request) {
			if challenge != "" {
				w.Header().Set("WWW-Authenticate", challenge)
			}
			w.WriteHeader(status)
		}
	}
	plain, secure := newServer(t, true), newServer(t, false)
	plainAuthority, secureAuthority := plain.client(t, config.NotifierRegistry{}), secure.client(t, config.NotifierRegistry{})
	stranger := (&server{Server: plain.Server, host: "other.example", ca: secure.ca}).client(t, config.NotifierRegistry{})
	unknown := (&server{Server: plain.Server, host: "other.example"}).client(t, config.NotifierRegistry{})
	files := config.NotifierRegistry{CredentialFiles: []string{write(t, login("joe", "wrong", plain.host))}}
	realm := `Bearer realm="http://` + plain.host + `/token",service="s"`
	for _, c := range []struct {
		name   string
		asks   *Registry
		of     *server
		answer func(http.ResponseWriter, *http.Request)
		token  int // status of the token server
		want   string
	}{
		{"HTTP where HTTPS is asked", stranger, plain, refuse(200, ""), 200, "registry.plain_http"},
		{"an unknown authority", unknown, secure, refuse(200, ""), 200, "registry.ca_file"},
		{"no credentials", plainAuthority, plain, refuse(401, `Basic realm="r"`), 200, "registry.credential_files"},
		{"wrong credentials", plain.client(t, files), plain, refuse(401, `Basic realm="r"`), 200, "registry.credential_files"},
		{"no token", plainAuthority, plain, refuse(401, realm), 401, "registry.credential_files"},
		{"a token that does not suffice", plainAuthority, plain, refuse(401, realm), 200, "registry.credential_files"},
		{"forbidden", secureAuthority, secure, refuse(403, ""), 200, "registry.credential_files"},
		{"broken", secureAuthority, secure, refuse(500, ""), 200, ""},
	} {
		c.of.on("/v2/apps/web/manifests/1", c.answer)
		c.of.on("/token", func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(c.token)
			say(w, `{"token":"abc"}`)
		})
		c.asks.mu.Lock()
		c.asks.away, c.asks.client = map[string]time.Time{}, nil
		c.asks.mu.Unlock()
		_, err := c.asks.Resolve(t.Context(), c.of.repo(), "1")
		if err == nil {
			t.Errorf("%s: no error", c.name)
			continue
		}
		text := err.Error()
		if n := strings.Count(text, "registry."); c.want == "" && n != 0 || c.want != "" && (n != 1 || !strings.HasPrefix(text, "registry "+c.of.host+" ") || !strings.Contains(text, c.want)) {
			t.Errorf("%s: %v, want one that names %q", c.name, err, c.want)
		}
	}
}
