package cluster

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/hashicorp/memberlist"
)

// meta is what a member says about itself in gossip: JSON of at most 512
// bytes (memberlist's limit), so that versions which know more or less can
// read each other.
type meta struct {
	Port   uint16            `json:"p"`           // of the data port
	Host   string            `json:"h,omitempty"` // IP of the data port, if it is not that of gossip
	Labels map[string]string `json:"l,omitempty"`
	Keys   []string          `json:"k,omitempty"` // fingerprints of its certificates' keys
	Slow   bool              `json:"s,omitempty"` // Member.Slow
}

// maxKeys is how many keys a node may have at one time. One is usual; two while
// its certificate is exchanged.
const maxKeys = 2

func (m meta) encode() ([]byte, error) {
	if err := m.check(); err != nil {
		return nil, err
	}
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false) // every byte counts
	if err := e.Encode(m); err != nil {
		return nil, fmt.Errorf("labels: %w", err)
	}
	out := bytes.TrimSpace(b.Bytes())
	if len(out) > memberlist.MetaMaxSize {
		return nil, fmt.Errorf("labels are too long to be gossiped: %d bytes in all, and %d is the limit", len(out), memberlist.MetaMaxSize)
	}
	return out, nil
}

// decodeMeta reads what another node says of itself.
func decodeMeta(b []byte) (meta, error) {
	var m meta
	if len(b) > memberlist.MetaMaxSize {
		return m, fmt.Errorf("%d bytes of metadata, at most %d are allowed", len(b), memberlist.MetaMaxSize)
	}
	if err := json.Unmarshal(b, &m); err != nil {
		return meta{}, fmt.Errorf("metadata: %w", err)
	}
	if err := m.check(); err != nil {
		return meta{}, fmt.Errorf("metadata: %w", err)
	}
	return m, nil
}

func (m meta) check() error {
	if m.Port == 0 {
		return errors.New("data port is missing")
	}
	if m.Host != "" {
		if _, err := usableIP(m.Host); err != nil {
			return fmt.Errorf("data address: %w", err)
		}
	}
	for k, v := range m.Labels {
		if k == "" || strings.IndexFunc(k, func(r rune) bool { return r != '/' && !nameRune(r) }) >= 0 {
			return fmt.Errorf("label %q: a label's name has letters, digits, '.', '_', '-' and '/' only", k)
		}
		if !utf8.ValidString(v) || strings.IndexFunc(v, func(r rune) bool { return !unicode.IsPrint(r) }) >= 0 {
			return fmt.Errorf("label %s: its value %q is not printable", k, v)
		}
	}
	return checkKeys(m.Keys)
}

// checkKeys says whether these can be the keys of a node.
func checkKeys(keys []string) error {
	if len(keys) > maxKeys {
		return fmt.Errorf("%d keys, at most %d are allowed", len(keys), maxKeys)
	}
	for _, k := range keys {
		if raw, err := base64.RawURLEncoding.Strict().DecodeString(k); err != nil || len(raw) != fingerprintSize {
			return fmt.Errorf("%q is no key's fingerprint", k)
		}
	}
	return nil
}

// introduction is what a node says to one that it is about to connect to: gossip
// of it may not have come there yet.
type introduction struct {
	Keys []string `json:"k"` // as in meta
}

func (i introduction) encode() ([]byte, error) {
	out, err := json.Marshal(i)
	if err != nil {
		return nil, fmt.Errorf("introduction: %w", err)
	}
	return out, nil
}

// decodeIntroduction reads what another node says to this one.
func decodeIntroduction(b []byte) (introduction, error) {
	var i introduction
	if len(b) > memberlist.MetaMaxSize {
		return i, fmt.Errorf("introduction of %d bytes, at most %d are allowed", len(b), memberlist.MetaMaxSize)
	}
	if err := json.Unmarshal(b, &i); err != nil {
		return introduction{}, fmt.Errorf("introduction: %w", err)
	}
	if err := checkKeys(i.Keys); err != nil {
		return introduction{}, fmt.Errorf("introduction: %w", err)
	}
	return i, nil
}

// usableIP parses an address that other nodes could connect to.
func usableIP(s string) (netip.Addr, error) {
	ip, err := netip.ParseAddr(s)
	switch {
	case err != nil:
		return ip, fmt.Errorf("not an IP address: %w", err)
	case ip.IsUnspecified():
		return ip, fmt.Errorf("%s is every address and none: other nodes need one to connect to", s)
	case ip.Zone() != "":
		return ip, fmt.Errorf("%s has a zone, which means nothing on other nodes", s)
	}
	return ip.Unmap(), nil
}
