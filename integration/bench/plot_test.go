package bench

import (
	"encoding/xml"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestDraw: the picture is well-formed, and says what is drawn and of what.
func TestDraw(t *testing.T) {
	var results []Result
	for _, n := range plotNodes {
		results = append(results,
			Result{Scenario: cold, Mode: Direct, N: n, Rate: 50, ImageBytes: 64 * mib, LastS: 11 * float64(n), RegistryCopies: float64(n), Commit: "0123456789abcdef"},
			Result{Scenario: cold, Mode: ImageWolf, N: n, Rate: 50, ImageBytes: 64 * mib, LastS: 11 + float64(n)/8, RegistryCopies: 1, Commit: "0123456789abcdef"})
	}
	file := filepath.Join(t.TempDir(), "docs", "bench.svg")
	if err := Draw(results, file); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	d := xml.NewDecoder(strings.NewReader(string(data)))
	for {
		if _, err := d.Token(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	for _, want := range []string{"<svg", "with ImageWolf", "containerd alone", "64 MiB", "50 Mbit/s", "0123456789ab", ">32<"} {
		if !strings.Contains(string(data), want) {
			t.Errorf("%q is not in the picture", want)
		}
	}
	for commit, want := range map[string]string{
		"0123456789abcdef": "0123456789ab", "0123456789abcdef-dirty": "0123456789ab-dirty", "": "unknown", "unknown": "unknown",
	} {
		if got := shortCommit(commit); got != want {
			t.Errorf("commit %q is shown as %q", commit, got)
		}
	}
	if err := Draw(results[:0], file); err == nil {
		t.Error("nothing was drawn without an error")
	}
}
