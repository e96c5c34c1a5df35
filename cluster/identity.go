package cluster

import (
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
)

// insecureSecret is known to everyone: it only makes an insecure node take
// the same path through the code as a secure one.
const insecureSecret = "imagewolf insecure: anyone may join"

// IdentityOptions says how a node proves that it belongs to the cluster.
// Exactly one of ClusterKey, the files, and Insecure is given.
type IdentityOptions struct {
	ClusterKey string // as GenerateKey prints it

	// Certificates of the user's own, PEM. The CA must be the cluster's
	// alone: every certificate it signed, with both client and server
	// authentication among its uses, is let in. The three are read again when
	// they change.
	CertFile, KeyFile, CAFile string
	// GossipKeyFile holds the 32 bytes, in base64 or hex, that gossip is
	// encrypted with. It belongs to the files above, because their private
	// keys differ from node to node. Read once.
	GossipKeyFile string

	// Insecure lets in anyone who can reach the ports: traffic is encrypted,
	// but with a key that everybody knows.
	Insecure bool

	// NodeName becomes the common name of the certificate that a node issues
	// itself. With CertFile the name in that file stands.
	NodeName string

	Log *slog.Logger // nil: slog.Default()
}

// Identity is what a node shows to others and knows others by. Safe for
// concurrent use; its methods start nothing.
type Identity struct {
	creds  credentialSource
	gossip []byte
	id     string
	knock  string
}

// credentialSource gives the certificate to show and the CA to check others
// against, as they are now: either may change from call to call.
type credentialSource interface {
	current() (*tls.Certificate, *x509.CertPool)
}

// LoadIdentity makes the node's identity. Every error is a mistake in the
// options or in the files they name; a certificate that has expired is none,
// because a new one may come at any time and the node must start.
func LoadIdentity(o IdentityOptions) (*Identity, error) {
	if o.Log == nil {
		o.Log = slog.Default()
	}
	if err := checkName(o.NodeName); err != nil {
		return nil, err
	}
	fromFiles := o.CertFile != "" || o.KeyFile != "" || o.CAFile != "" || o.GossipKeyFile != ""
	switch {
	case o.ClusterKey != "" && fromFiles:
		return nil, errors.New("give either cluster_key or cert_file, key_file, ca_file and gossip_key_file, not both: each alone is an identity")
	case o.Insecure && (o.ClusterKey != "" || fromFiles):
		return nil, errors.New("insecure = true together with a cluster key or certificates: remove one, so that it is clear whether strangers may join")
	case o.ClusterKey != "":
		secret, err := ParseKey(o.ClusterKey)
		if err != nil {
			return nil, err
		}
		return derivedIdentity(secret, o)
	case fromFiles:
		return fileIdentity(o)
	case o.Insecure:
		o.Log.Warn("insecure: anyone who can reach this node's ports can join its cluster and read its images")
		return derivedIdentity([]byte(insecureSecret), o)
	}
	return nil, errors.New("the node has no identity, so it cannot tell friend from stranger. Ways out: " +
		"make a key with `imagewolf cluster-key generate` and give all nodes the same cluster_key_file; " +
		"or give certificates with cert_file, key_file, ca_file and gossip_key_file; " +
		"or set insecure = true and let anyone in")
}

// derivedIdentity makes everything from one shared secret.
func derivedIdentity(secret []byte, o IdentityOptions) (*Identity, error) {
	gossip, err := derive(secret, "gossip", 32)
	if err != nil {
		return nil, err
	}
	seed, err := derive(secret, "ca", 32)
	if err != nil {
		return nil, err
	}
	issuer, err := newIssuer(seed, o.NodeName)
	if err != nil {
		return nil, err
	}
	return newIdentity(issuer, gossip)
}

func fileIdentity(o IdentityOptions) (*Identity, error) {
	for _, f := range []struct{ option, value string }{
		{"cert_file", o.CertFile}, {"key_file", o.KeyFile}, {"ca_file", o.CAFile},
		{"gossip_key_file", o.GossipKeyFile},
	} {
		if f.value == "" {
			return nil, fmt.Errorf("%s is missing: an identity of files needs cert_file, key_file, ca_file and gossip_key_file", f.option)
		}
	}
	gossip, err := readGossipKey(o.GossipKeyFile)
	if err != nil {
		return nil, err
	}
	creds, err := loadFiles(o.CertFile, o.KeyFile, o.CAFile, o.NodeName, o.Log)
	if err != nil {
		return nil, err
	}
	return newIdentity(creds, gossip)
}

// newIdentity derives from the gossip key what all nodes of the cluster have
// in common, whichever way they got it.
func newIdentity(creds credentialSource, gossip []byte) (*Identity, error) {
	id, err := derive(gossip, "cluster id", 16)
	if err != nil {
		return nil, err
	}
	knock, err := derive(gossip, "knock", 16)
	if err != nil {
		return nil, err
	}
	return &Identity{creds: creds, gossip: gossip, id: hex.EncodeToString(id), knock: hex.EncodeToString(knock)}, nil
}

// ClusterID is the same on every node of the cluster, and cannot be guessed
// from outside: 32 hexadecimal digits.
func (id *Identity) ClusterID() string { return id.id }

// GossipKey is the AES-256 key of gossip: 32 bytes, the caller's to keep.
func (id *Identity) GossipKey() []byte { return append([]byte(nil), id.gossip...) }

// derive makes one secret out of another; different purposes give results
// that say nothing about each other.
func derive(secret []byte, purpose string, size int) ([]byte, error) {
	out, err := hkdf.Key(sha256.New, secret, nil, "imagewolf v1 "+purpose, size)
	if err != nil {
		return nil, fmt.Errorf("derive %s: %w", purpose, err)
	}
	return out, nil
}

func readGossipKey(path string) ([]byte, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("gossip_key_file: %w", err)
	}
	key, err := parseGossipKey(string(text))
	if err != nil {
		return nil, fmt.Errorf("gossip_key_file %s: %w", path, err)
	}
	return key, nil
}

// parseGossipKey accepts 32 bytes in hex or in any of the usual base64s.
func parseGossipKey(text string) ([]byte, error) {
	text = strings.TrimSpace(text)
	for _, decode := range []func(string) ([]byte, error){
		hex.DecodeString,
		base64.StdEncoding.DecodeString, base64.RawStdEncoding.DecodeString,
		base64.URLEncoding.DecodeString, base64.RawURLEncoding.DecodeString,
	} {
		if key, err := decode(text); err == nil && len(key) == 32 {
			return key, nil
		}
	}
	return nil, errors.New("not 32 bytes in base64 or hex (make one with `openssl rand -base64 32`)")
}

// checkName accepts what can be a host's name. Names travel in gossip,
// certificates and logs.
func checkName(name string) error {
	if name == "" || len(name) > 253 {
		return fmt.Errorf("node name has %d characters, and may have 1 to 253", len(name))
	}
	if i := strings.IndexFunc(name, func(r rune) bool { return !nameRune(r) }); i >= 0 {
		return fmt.Errorf("node name %q: only letters, digits, '.', '_' and '-' are allowed", name)
	}
	return nil
}

func nameRune(r rune) bool {
	return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '.' || r == '_' || r == '-'
}
