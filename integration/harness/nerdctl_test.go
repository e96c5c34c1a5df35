package harness

import (
	"slices"
	"strings"
	"testing"
)

func TestShownOffsets(t *testing.T) {
	one, other := "sha256:"+strings.Repeat("12345678", 8), "sha256:"+strings.Repeat("87654321", 8)
	shown := strings.Join([]string{
		"layer-" + one + ":    waiting        |\x1b[32m\x1b[0m------|",
		"layer-" + one + ":    downloading    |\x1b[32m\x1b[0m------|    0.0 B/24.0 MiB",
		"layer-" + one + ":    downloading    |\x1b[32m+\x1b[0m-----|  512.5 KiB/24.0 MiB",
		"layer-" + other + ":  downloading    |\x1b[32m++\x1b[0m----|    9.0 MiB/24.0 MiB",
		"└──layer-" + one[:28] + "\tdownloading\t|\x1b[32m++\x1b[0m----|\t 4.0 MiB/24.0 MiB",
		"└──layer-" + one[:28] + "\tdownloading\t|\x1b[32m++\x1b[0m----|\t 4.0 MiB/24.0 MiB",
		"└──layer-" + one[:28] + "\tdownloading\t|\x1b[32m++++\x1b[0m--|\t 1.5 GiB/24.0 GiB",
		"└──layer-" + one[:28] + "\tcomplete   \t|\x1b[32m++++++\x1b[0m|",
	}, "\n")
	if got, want := ShownOffsets(shown, one), []int64{0, 512<<10 + 512, 4 << 20, 3 << 29}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}
