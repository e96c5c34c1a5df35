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
	// AcceptedKeys are cluster keys that are accepted beside ClusterKey, while
	// one replaces the other: this node is then a member for those that have
	// one of them, and they are for it. At most MaxAccepted.
	AcceptedKeys []string

	// Certificates of the user's own, PEM. The CA must be the cluster's
	// alone: every certificate it signed, with both client and server
	// authentication among its uses, may be a member's. The three are read
	// again when they change.
	CertFile, KeyFile, CAFile string
	// GossipKeyFile holds the 32 bytes, in base64 or hex, that gossip is
	// encrypted with. It belongs to the files above, because their private
	// keys differ from node to node. Read once.
	GossipKeyFile string
	// AcceptedGossipKeyFiles are to GossipKeyFile what AcceptedKeys are to
	// ClusterKey.
	AcceptedGossipKeyFiles []string

	// Insecure lets in anyone who can reach the ports: traffic is encrypted,
	// but with a key that everybody knows.
	Insecure bool

	// NodeName becomes the common name of the certificate that a node issues
	// itself. With CertFile the name in that file stands.
	NodeName string

	Log *slog.Logger // nil: slog.Default()
}

// MaxAccepted is how many keys a node accepts beside its own.
const MaxAccepted = 4

// Identity is what a node shows to others and knows others by. Safe for
// concurrent use; its methods start nothing.
type Identity struct {
	creds credentialSource
	// secrets has what follows from the node's own key, and then from every
	// other that it accepts.
	secrets []secret
}

// secret is what follows from one key of the cluster.
type secret struct {
	gossip []byte // key that encrypts gossip
	knock  string // name that a hello gives, see ServerTLS
}

// credentialSource gives what this node shows and checks others by, as it is
// now: any of it may change from call to call.
type credentialSource interface {
	// current returns the certificate to show to those who speak of the cluster
	// by secret n, and the CAs to check others against.
	current(n int) (*tls.Certificate, *x509.CertPool)
	// keys returns the fingerprints of the keys of the certificates that this
	// node shows or has shown until lately: one or two.
	keys() []string
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
	if n := max(len(o.AcceptedKeys), len(o.AcceptedGossipKeyFiles)); n > MaxAccepted {
		return nil, fmt.Errorf("%d keys are to be accepted beside the node's own, at most %d: take out those that no node has any more", n, MaxAccepted)
	}
	switch {
	case o.ClusterKey != "" && fromFiles:
		return nil, errors.New("give either cluster_key or cert_file, key_file, ca_file and gossip_key_file, not both: each alone is an identity")
	case o.Insecure && (o.ClusterKey != "" || fromFiles):
		return nil, errors.New("insecure = true together with a cluster key or certificates: remove one, so that it is clear whether strangers may join")
	case len(o.AcceptedKeys) > 0 && o.ClusterKey == "":
		return nil, errors.New("accepted_cluster_keys without cluster_key: a key is accepted beside the node's own")
	case len(o.AcceptedGossipKeyFiles) > 0 && !fromFiles:
		return nil, errors.New("accepted_gossip_key_files without gossip_key_file: a key is accepted beside the node's own")
	case o.ClusterKey != "":
		return keyIdentity(o)
	case fromFiles:
		return fileIdentity(o)
	case o.Insecure:
		o.Log.Warn("insecure: anyone who can reach this node's ports can join its cluster and read its images")
		return derivedIdentity([][]byte{[]byte(insecureSecret)}, o)
	}
	return nil, errors.New("the node has no identity, so it cannot tell friend from stranger. Ways out: " +
		"make a key with `imagewolf cluster-key generate` and give all nodes the same cluster_key_file; " +
		"or give certificates with cert_file, key_file, ca_file and gossip_key_file; " +
		"or set insecure = true and let anyone in")
}

// keyIdentity makes everything from the cluster's key and those accepted
// beside it.
func keyIdentity(o IdentityOptions) (*Identity, error) {
	var roots [][]byte
	for i, key := range append([]string{o.ClusterKey}, o.AcceptedKeys...) {
		root, err := ParseKey(key)
		if err != nil && i > 0 {
			return nil, fmt.Errorf("accepted_cluster_keys, number %d: %w", i, err)
		}
		if err != nil {
			return nil, err
		}
		roots = append(roots, root)
	}
	return derivedIdentity(roots, o)
}

// derivedIdentity makes everything from shared secrets, the node's own first.
func derivedIdentity(roots [][]byte, o IdentityOptions) (*Identity, error) {
	var gossip, seeds [][]byte
	for _, root := range roots {
		g, err := derive(root, "gossip", 32)
		if err != nil {
			return nil, err
		}
		seed, err := derive(root, "ca", 32)
		if err != nil {
			return nil, err
		}
		gossip, seeds = append(gossip, g), append(seeds, seed)
	}
	d, err := newDerived(seeds, o.NodeName)
	if err != nil {
		return nil, err
	}
	return newIdentity(d, gossip)
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
	gossip := make([][]byte, 1, 1+len(o.AcceptedGossipKeyFiles))
	var err error
	if gossip[0], err = readGossipKey(o.GossipKeyFile); err != nil {
		return nil, fmt.Errorf("gossip_key_file: %w", err)
	}
	for _, path := range o.AcceptedGossipKeyFiles {
		key, err := readGossipKey(path)
		if err != nil {
			return nil, fmt.Errorf("accepted_gossip_key_files: %w", err)
		}
		gossip = append(gossip, key)
	}
	creds, err := loadFiles(o.CertFile, o.KeyFile, o.CAFile, o.NodeName, o.Log)
	if err != nil {
		return nil, err
	}
	return newIdentity(creds, gossip)
}

// newIdentity derives from the gossip keys what all nodes of the cluster have
// in common, whichever way they got them.
func newIdentity(creds credentialSource, gossip [][]byte) (*Identity, error) {
	id := &Identity{creds: creds}
	for _, key := range gossip {
		knock, err := derive(key, "knock", 16)
		if err != nil {
			return nil, err
		}
		id.secrets = append(id.secrets, secret{gossip: key, knock: hex.EncodeToString(knock)})
	}
	return id, nil
}

// GossipKeys are the AES-256 keys of gossip, 32 bytes each: the one to encrypt
// with, and then those that others may encrypt with. They are the caller's.
func (id *Identity) GossipKeys() [][]byte {
	out := make([][]byte, len(id.secrets))
	for i, s := range id.secrets {
		out[i] = append([]byte(nil), s.gossip...)
	}
	return out
}

// fingerprint is what a certificate's public key is known by in gossip: half
// of its SHA-256, in 22 characters.
func fingerprint(cert *x509.Certificate) string {
	sum := sha256.Sum256(cert.RawSubjectPublicKeyInfo)
	return base64.RawURLEncoding.EncodeToString(sum[:fingerprintSize])
}

// fingerprintSize is in bytes. No one can make a key for a given fingerprint of
// that size, and every byte in gossip counts.
const fingerprintSize = 16

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
		return nil, err
	}
	key, err := parseGossipKey(string(text))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
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
