package verify_test

import (
	"io"
	"log"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	memory "github.com/google/go-containerregistry/pkg/registry"

	"github.com/imagewolf/imagewolf/config"
	"github.com/imagewolf/imagewolf/notifier/verify"
	"github.com/imagewolf/imagewolf/notifier/verify/verifytest"
)

func TestSignatures(t *testing.T) {
	for name, referrers := range map[string]bool{"with the referrers API": true, "without": false} {
		t.Run(name, func(t *testing.T) {
			s := httptest.NewServer(memory.New(memory.WithReferrersSupport(referrers), memory.Logger(log.New(io.Discard, "", 0))))
			defer s.Close()
			verifytest.Suite(t, s.Listener.Addr().String())
		})
	}
}

func TestFilesThatAreWrongAreNamed(t *testing.T) {
	file := func(text string) string {
		path := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for want, c := range map[string]config.Verify{
		"keys: there is none":      {Type: "cosign"},
		"keys: open":               {Type: "cosign", Keys: []string{"/nonexistent"}},
		"holds no public key":      {Type: "cosign", Keys: []string{file("x")}},
		"trust_policy: open":       {Type: "notation", TrustPolicy: "/nonexistent"},
		"trust_policy: /":          {Type: "notation", TrustPolicy: file("x")},
		"trust policy document":    {Type: "notation", TrustPolicy: file("{}")},
		`type: "gpg" is none of`:   {Type: "gpg"},
		`trust_store: ca:x, which`: {Type: "notation", TrustStore: t.TempDir(), TrustPolicy: file(strings.Replace(somePolicy, "LEVEL", "strict", 1))},
		`signatureVerification`:    {Type: "notation", TrustStore: t.TempDir(), TrustPolicy: file(strings.Replace(somePolicy, "LEVEL", "none", 1))},
	} {
		if _, err := verify.New(c, nil); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: got %v, want %s", c, err, want)
		}
	}
}

const somePolicy = `{"version":"1.0","trustPolicies":[{"name":"p","registryScopes":["*"],"signatureVerification":{"level":"LEVEL"},"trustStores":["ca:x"],"trustedIdentities":["*"]}]}`
