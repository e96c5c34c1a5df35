package cluster

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"strings"
	"testing"
)

func TestKeyRoundTrip(t *testing.T) {
	a, b := GenerateKey(), GenerateKey()
	if a == b {
		t.Fatal("two keys are the same")
	}
	secret, err := ParseKey(a)
	if err != nil || len(secret) != 32 {
		t.Fatalf("ParseKey: %d bytes, %v", len(secret), err)
	}
	for _, spelling := range []string{a + "\n", "  " + a + "\r\n", strings.ToUpper(a)} {
		if again, err := ParseKey(spelling); err != nil || !bytes.Equal(again, secret) {
			t.Errorf("%q is not the same key: %v", spelling, err)
		}
	}
}

func TestKeyTypos(t *testing.T) {
	good := GenerateKey()
	at := func(i int, c byte) string { return good[:i] + string(c) + good[i+1:] }
	for name, c := range map[string]struct{ text, want string }{
		"empty":          {" \n", "is empty"},
		"no prefix":      {good[len(keyPrefix):], "does not start with"},
		"wrong version":  {"iwk2-" + good[len(keyPrefix):], "does not start with"},
		"cut off":        {good[:len(good)-1], "has 55 characters"},
		"doubled":        {good + good, "characters"},
		"one too many":   {good + "a", "has 57 characters"},
		"bad character":  {at(20, '1'), "at position 21"},
		"broken line":    {at(30, '\n'), "white space"},
		"not its letter": {at(60, map[bool]byte{true: 'b', false: 'a'}[good[60] == 'a']), "typing error"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := ParseKey(c.text)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("err = %v, want one with %q", err, c.want)
			}
			if strings.Contains(err.Error(), good[10:30]) {
				t.Errorf("the error shows the key: %v", err)
			}
		})
	}
	for i := len(keyPrefix); i < len(good); i++ {
		c := byte('a')
		if good[i] == c {
			c = 'b'
		}
		if _, err := ParseKey(at(i, c)); err == nil {
			t.Errorf("a wrong letter at %d is not noticed", i)
		}
	}
}

func FuzzParseKey(f *testing.F) {
	f.Add(formatKey(make([]byte, keySize)))
	f.Add("iwk1-")
	f.Add("iwk1-\n\n")
	f.Fuzz(func(t *testing.T, text string) {
		secret, err := ParseKey(text)
		if err != nil {
			return
		}
		if got, want := formatKey(secret), strings.ToLower(strings.TrimSpace(text)); got != want {
			t.Fatalf("%q parses as the key that prints as %q", want, got)
		}
	})
}

func FuzzParseGossipKey(f *testing.F) {
	f.Add(strings.Repeat("ab", 32))
	f.Add("AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\n")
	f.Fuzz(func(t *testing.T, text string) {
		key, err := parseGossipKey(text)
		if err != nil {
			return
		}
		text = strings.NewReplacer("\r", "", "\n", "", "-", "+", "_", "/").Replace(strings.TrimSpace(text))
		// The last digit of base64 has bits that stand for nothing.
		digits := base64.RawStdEncoding.EncodeToString(key)
		if len(key) != 32 || !strings.EqualFold(text, hex.EncodeToString(key)) && !strings.HasPrefix(text, digits[:len(digits)-1]) {
			t.Fatalf("%q gives a key of %d bytes: %x", text, len(key), key)
		}
	})
}
