package verify

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/sigstore/sigstore/pkg/cryptoutils"
	"github.com/sigstore/sigstore/pkg/signature"
	"github.com/sigstore/sigstore/pkg/signature/dsse"
)

// signer returns a signer, and a verifier that knows its key.
func signer(tb testing.TB) (signature.SignerVerifier, *cosign) {
	tb.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	s, err := signature.LoadECDSASignerVerifier(private, crypto.SHA256)
	if err != nil {
		tb.Fatal(err)
	}
	public, err := cryptoutils.MarshalPublicKeyToPEM(private.Public())
	if err != nil {
		tb.Fatal(err)
	}
	file := filepath.Join(tb.TempDir(), "key.pub")
	if err := os.WriteFile(file, public, 0o600); err != nil {
		tb.Fatal(err)
	}
	c, err := newCosign([]string{file}, nil)
	if err != nil {
		tb.Fatal(err)
	}
	return s, c
}

// What is signed with the right key counts only for what it says.
func TestWhatWasSigned(t *testing.T) {
	s, c := signer(t)
	d := digest.FromString("image")
	hex, is := d.Encoded(), func(s string) string {
		return `{"critical":{"type":"cosign container image signature","image":` + s + `}}`
	}
	for signed, want := range map[string]string{
		is(`{"docker-manifest-digest":"` + d.String() + `"}`): "",
		is(`{"docker-manifest-digest":"` + hex + `"}`):        "what was signed is",
		is(`{}`): "what was signed is",
		`{"critical":{"type":"something else","image":{"docker-manifest-digest":"` + d.String() + `"}}}`: "no image but",
		`{}`: "no image but", `[]`: "what was signed", ``: "what was signed",
	} {
		sig, err := s.SignMessage(strings.NewReader(signed))
		if err != nil {
			t.Fatal(err)
		}
		check(t, signed, c.simple([]byte(signed), sig, d), want)
		check(t, signed, c.simple([]byte(signed+" "), sig, d), "none of the keys")
	}
	statement := func(kind, predicate, subject string) string {
		return `{"_type":"` + kind + `","predicateType":"` + predicate + `","subject":[` + subject + `]}`
	}
	subject := `{"digest":{"sha256":"` + hex + `"}}`
	for signed, want := range map[string]string{
		statement(statementV1, signedByCosign, subject):                                 "",
		statement(statementV1, signedByCosign, `{"digest":{"sha512":"x"}},`+subject):    "",
		statement(statementV1, signedByCosign, `{"digest":{"sha512":"`+hex+`"}}`):       "another image",
		statement(statementV1, signedByCosign, `{"digest":{"sha256":""}}`):              "another image",
		statement(statementV1, signedByCosign, ``):                                      "another image",
		statement(statementV1, "https://spdx.dev/Document", subject):                    "a claim about the image",
		statement("https://in-toto.io/Statement/v0.1", signedByCosign, subject):         "no statement of in-toto",
		statement(statementV1, signedByCosign, `{"digest":{"sha256":"`+hex+`","x":5}}`): "what was signed",
		`[]`: "what was signed",
	} {
		for payloadType, refused := range map[string]bool{statementType: false, "application/json": true} {
			envelope, err := dsse.WrapSigner(s, payloadType).SignMessage(strings.NewReader(signed))
			if err != nil {
				t.Fatal(err)
			}
			want := want
			if refused {
				want = "none of the keys"
			}
			check(t, signed, c.statement([]byte(`{"dsseEnvelope":`+string(envelope)+`}`), d), want)
		}
	}
	check(t, "no envelope", c.statement([]byte(`{"messageSignature":{}}`), d), "no DSSE envelope")
	check(t, "no bundle", c.statement([]byte(`[`), d), "not the JSON")
	check(t, "unsigned", c.statement([]byte(`{"dsseEnvelope":{"payload":"e30=","payloadType":"`+statementType+`"}}`), d), "none of the keys")
}

func check(t *testing.T, what string, err error, want string) {
	t.Helper()
	if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
		t.Errorf("%s: got %v, want %q", what, err, want)
	}
}

// Without the key nothing that anyone writes is a signature.
func FuzzCosign(f *testing.F) {
	theirs, _ := signer(f)
	_, c := signer(f)
	d := digest.FromString("image")
	statement := `{"_type":"` + statementV1 + `","predicateType":"` + signedByCosign + `","subject":[{"digest":{"sha256":"` + d.Encoded() + `"}}]}`
	envelope, err := dsse.WrapSigner(theirs, statementType).SignMessage(strings.NewReader(statement))
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte(`{"dsseEnvelope":`+string(envelope)+`}`), []byte("x"))
	f.Add([]byte(`{"critical":{"type":"cosign container image signature","image":{"docker-manifest-digest":"`+d.String()+`"}}}`), []byte{0x30, 6, 2, 1, 1, 2, 1, 1})
	f.Add([]byte(statement), []byte(nil))
	f.Fuzz(func(t *testing.T, doc, sig []byte) {
		if c.statement(doc, d) == nil || c.simple(doc, sig, d) == nil {
			t.Errorf("%q is signed", doc)
		}
		// What is inside is read only behind a good signature, and may be anything still.
		if err := checkStatement(doc, d); err == nil {
			var object map[string]any
			if json.Unmarshal(doc, &object) != nil || !bytes.Contains(bytes.ToLower(doc), []byte("subject")) {
				t.Errorf("%q names the image", doc)
			}
		} else if errors.Is(err, ErrUnsigned) {
			t.Errorf("got %v", err)
		}
	})
}
