package cluster

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base32"
	"errors"
	"fmt"
	"strings"
)

// The printed form of a cluster key is the prefix and then 56 characters of
// base32: 32 bytes of secret and 3 bytes of checksum, which is a whole number
// of characters, so that no two spellings mean the same key.
const (
	keyPrefix   = "iwk1-"
	keySize     = 32
	keyCheck    = 3
	keyTextSize = (keySize + keyCheck) * 8 / 5
)

var keyEncoding = base32.NewEncoding("abcdefghijklmnopqrstuvwxyz234567").WithPadding(base32.NoPadding)

// errKeyHint ends every complaint about a key: what to do next.
const errKeyHint = "compare it with the other nodes', or make a new one for all of them with `imagewolf cluster-key generate`"

// GenerateKey returns a new cluster key in its printed form. Every node of
// one cluster is given the same key; whoever has it is a member.
func GenerateKey() string {
	secret := make([]byte, keySize)
	// Never fails: crypto/rand ends the program rather than return weak bytes.
	_, _ = rand.Read(secret)
	return formatKey(secret)
}

func formatKey(secret []byte) string {
	sum := keySum(secret)
	return keyPrefix + keyEncoding.EncodeToString(append(bytes.Clone(secret), sum[:]...))
}

// ParseKey returns the 32 secret bytes of a printed cluster key. White space
// around it and upper case are forgiven; anything else that differs from what
// GenerateKey prints is an error. The error never repeats the key.
func ParseKey(text string) ([]byte, error) {
	text = strings.ToLower(strings.TrimSpace(text))
	body, ok := strings.CutPrefix(text, keyPrefix)
	switch {
	case text == "":
		return nil, errors.New("cluster key is empty")
	case !ok:
		return nil, fmt.Errorf("cluster key does not start with %q: %s", keyPrefix, errKeyHint)
	case len(body) != keyTextSize:
		return nil, fmt.Errorf("cluster key has %d characters after %q and should have %d: %s",
			len(body), keyPrefix, keyTextSize, errKeyHint)
	}
	raw, err := keyEncoding.DecodeString(body)
	var at base32.CorruptInputError
	if errors.As(err, &at) {
		return nil, fmt.Errorf("cluster key has a character at position %d that no key has: %s",
			int64(at)+int64(len(keyPrefix))+1, errKeyHint)
	}
	// DecodeString skips line breaks, so the length is not yet certain.
	if err != nil || len(raw) != keySize+keyCheck {
		return nil, fmt.Errorf("cluster key is broken by white space: %s", errKeyHint)
	}
	secret, check := raw[:keySize], raw[keySize:]
	if sum := keySum(secret); !bytes.Equal(sum[:], check) {
		return nil, fmt.Errorf("cluster key has a typing error (its checksum is wrong): %s", errKeyHint)
	}
	return secret, nil
}

func keySum(secret []byte) [keyCheck]byte {
	sum := sha256.Sum256(append([]byte("imagewolf cluster key"), secret...))
	return [keyCheck]byte(sum[:keyCheck])
}
