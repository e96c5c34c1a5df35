package fanout

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

// That the disk is full says nothing against the requests that are in the file.
func TestAFullDiskLosesNoRequests(t *testing.T) {
	path := filepath.Join(t.TempDir(), "prefetch.db")
	if err := os.Symlink("/dev/full", path); err != nil {
		t.Fatal(err)
	}
	if _, _, err := openDB(path, "a", slog.New(slog.DiscardHandler)); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("got %v", err)
	}
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("it was set aside: %v", err)
	}
}
