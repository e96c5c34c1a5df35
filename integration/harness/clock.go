package harness

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// clockEnv names the file that holds by how much a program's wall clock is ahead.
const clockEnv = "IMAGEWOLF_TEST_CLOCK"

const (
	// nowAsIs is where the standard library's time.Now has read the clocks, and
	// nowAhead what it becomes: the monotonic clock is left alone, as by settimeofday.
	nowAsIs  = "\tsec, nsec, mono := runtimeNow()\n\tif mono == 0 {\n"
	nowAhead = "\tsec, nsec, mono := runtimeNow()\n\tsec += wallAhead.Load()\n\tif mono == 0 {\n"
	// ahead is added to package time. Who sets the clock writes to the file that is
	// mapped, and the next look at the clock sees it. It is there before anything
	// that uses package time has begun, and fails as nothing else of that package can.
	ahead = `package time

import (
	"sync/atomic"
	"syscall"
	"unsafe"
)

var wallAhead = func() *atomic.Int64 { // seconds
	file, ok := syscall.Getenv("` + clockEnv + `")
	if !ok {
		return new(atomic.Int64)
	}
	fd, err := syscall.Open(file, syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		panic("clock of the test: " + file + ": " + err.Error())
	}
	page, err := syscall.Mmap(fd, 0, 8, syscall.PROT_READ, syscall.MAP_SHARED)
	if err != nil {
		panic("clock of the test: " + file + ": " + err.Error())
	}
	syscall.Close(fd)
	return (*atomic.Int64)(unsafe.Pointer(&page[0]))
}()
`
)

// BuildClocked builds an imagewolf from the module in src whose wall clock can be
// set (ImageWolf.SetClock), which no machine or namespace has for itself, and
// returns the program's path. But for what time.Now says of the wall clock it is
// the product; the times of its files are the kernel's. All of it is compiled anew,
// standard library and all, unless the build cache has that.
func BuildClocked(ctx context.Context, e *Env, src string) (string, error) {
	return buildClocked(ctx, e, src, "./cmd/imagewolf")
}

// buildClocked builds a program of the module in src, as BuildClocked does.
func buildClocked(ctx context.Context, e *Env, src, program string) (string, error) {
	dir, err := e.Dir("clocked")
	if err != nil {
		return "", err
	}
	goroot, err := run(ctx, nil, nil, "go", "-C", src, "env", "GOROOT")
	if err != nil {
		return "", fmt.Errorf("program with a clock: %w", err)
	}
	overlay, err := writeOverlay(dir, filepath.Join(strings.TrimSpace(goroot), "src", "time"))
	if err != nil {
		return "", fmt.Errorf("program with a clock: %w", err)
	}
	out := filepath.Join(dir, filepath.Base(program))
	if _, err := run(ctx, nil, []string{"CGO_ENABLED=0"}, "go", "-C", src, "build", "-trimpath", "-buildvcs=false",
		"-overlay", overlay, "-ldflags", "-s -w", "-o", out, program); err != nil {
		return "", fmt.Errorf("program with a clock: %w", err)
	}
	return out, nil
}

// writeOverlay writes to dir what replaces package time, whose source is in pkg, and
// returns the path of the file that `go build -overlay` takes.
func writeOverlay(dir, pkg string) (string, error) {
	original := filepath.Join(pkg, "time.go")
	source, err := os.ReadFile(original)
	if err != nil {
		return "", err
	}
	if n := strings.Count(string(source), nowAsIs); n != 1 {
		return "", fmt.Errorf("%s: time.Now is not as expected, another release of Go has changed it: %d times %q", original, n, nowAsIs)
	}
	now, added, overlay := filepath.Join(dir, "time.go"), filepath.Join(dir, "ahead.go"), filepath.Join(dir, "overlay.json")
	list, err := json.Marshal(map[string]map[string]string{
		"Replace": {original: now, filepath.Join(pkg, "ahead.go"): added},
	})
	if err != nil {
		return "", err
	}
	for path, text := range map[string]string{
		now: strings.Replace(string(source), nowAsIs, nowAhead, 1), added: ahead, overlay: string(list),
	} {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			return "", err
		}
	}
	return overlay, nil
}

// setClock writes how far the clock of the program that has this file is ahead.
func setClock(file string, ahead time.Duration) error {
	f, err := os.OpenFile(file, os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		return fmt.Errorf("clock: %w", err)
	}
	var b [8]byte
	binary.NativeEndian.PutUint64(b[:], uint64(ahead/time.Second))
	_, err = f.WriteAt(b[:], 0)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("clock: %w", err)
	}
	return nil
}

// SetClock sets how far the daemon's wall clock is ahead of the machine's, in whole
// seconds, less than 100 years; less than 0 for behind. It takes effect at once, or at the next Start. The daemon must be
// one of ClusterOptions.Clocked.
func (w *ImageWolf) SetClock(ahead time.Duration) error { return setClock(w.clock(), ahead) }

// clock is the file that says what the daemon's clock says.
func (w *ImageWolf) clock() string { return filepath.Join(w.Dir, "clock") }
