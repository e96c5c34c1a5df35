package harness

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// TestClock: a clock that is set goes on from there, in a program that runs as in
// one that starts, and the monotonic one does not notice.
func TestClock(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	e, _ := testEnv(t)
	prog, err := buildClocked(ctx, e, ".", "./testdata/clock")
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "clock")
	set := func(ahead time.Duration) {
		t.Helper()
		if err := setClock(file, ahead); err != nil {
			t.Fatal(err)
		}
	}
	const year = 365 * 24 * time.Hour
	set(-10 * year)
	cmd := exec.CommandContext(ctx, prog)
	cmd.Env = append(os.Environ(), clockEnv+"="+file)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	began, lines := time.Now(), bufio.NewScanner(out)
	for _, ahead := range []time.Duration{-10 * year, 10 * year, time.Hour, -time.Hour, 0} {
		set(ahead)
		if _, err := in.Write([]byte("\n")); err != nil {
			t.Fatal(err)
		}
		if !lines.Scan() {
			t.Fatal(lines.Err())
		}
		var wall, sub, since int64
		if _, err := fmt.Sscan(lines.Text(), &wall, &sub, &since); err != nil {
			t.Fatal(err)
		}
		if off := time.Until(time.Unix(wall, 0)) - ahead; off.Abs() > time.Minute {
			t.Errorf("set by %s the clock is %s wrong", ahead, off)
		}
		for _, ran := range []int64{sub, since} {
			if most := time.Since(began).Milliseconds(); ran < 0 || ran > most+60_000 {
				t.Errorf("set by %s the program says after at most %d ms that it has run for %d", ahead, most, ran)
			}
		}
	}
	if err := in.Close(); err != nil {
		t.Error(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
}

// TestClockOfAnotherGo: where time.Now is not what it was, that is said.
func TestClockOfAnotherGo(t *testing.T) {
	pkg := t.TempDir()
	if err := os.WriteFile(filepath.Join(pkg, "time.go"), []byte("package time\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if overlay, err := writeOverlay(t.TempDir(), pkg); err == nil {
		t.Errorf("%s replaces nothing", overlay)
	}
}
