package database

import (
	"bytes"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"go.etcd.io/bbolt"
)

var bucket = []byte("things")

// load makes the bucket and reads what is in it.
func load(into *string) func(tx *bbolt.Tx) error {
	return func(tx *bbolt.Tx) error {
		b, err := tx.CreateBucketIfNotExists(bucket)
		if err == nil {
			*into = string(b.Get([]byte("key")))
		}
		return err
	}
}

// made makes a file with something in it.
func made(t *testing.T) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "x.db")
	var was string
	db, err := Open(path, "1", slog.New(slog.DiscardHandler), load(&was))
	if err != nil || was != "" {
		t.Fatalf("%q, %v", was, err)
	}
	err = db.Update(func(tx *bbolt.Tx) error { return tx.Bucket(bucket).Put([]byte("key"), []byte("kept")) })
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestWhatCannotBeReadIsSetAside(t *testing.T) {
	for name, spoil := range map[string]func(t *testing.T, path string) (version string, load func(*bbolt.Tx) error){
		"not a database": func(t *testing.T, path string) (string, func(*bbolt.Tx) error) {
			if err := os.WriteFile(path, bytes.Repeat([]byte("junk"), 10_000), 0o600); err != nil {
				t.Fatal(err)
			}
			return "1", nil
		},
		"of another version": func(*testing.T, string) (string, func(*bbolt.Tx) error) { return "2", nil },
		"not understood": func(*testing.T, string) (string, func(*bbolt.Tx) error) {
			return "1", func(tx *bbolt.Tx) error {
				if tx.Bucket(bucket) != nil {
					return errors.New("what is this?")
				}
				return nil
			}
		},
		"panics": func(*testing.T, string) (string, func(*bbolt.Tx) error) {
			return "1", func(tx *bbolt.Tx) error {
				if tx.Bucket(bucket) != nil {
					panic("invalid page")
				}
				return nil
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			path := made(t)
			var was string
			version, read := spoil(t, path)
			if read == nil {
				read = load(&was)
			}
			var log bytes.Buffer
			db, err := Open(path, version, slog.New(slog.NewTextHandler(&log, nil)), read)
			if err != nil || was != "" {
				t.Fatalf("%q, %v", was, err)
			}
			if err := db.Close(); err != nil {
				t.Error(err)
			}
			if _, err := os.Stat(path + ".bad"); err != nil || !strings.Contains(log.String(), path) {
				t.Errorf("%v, logged %s", err, &log)
			}
		})
	}
}

// What is none of the file's fault leaves it as it is.
func TestWhatIsNotTheFilesFault(t *testing.T) {
	path := made(t)
	for name, fault := range map[string]error{
		"full": syscall.ENOSPC, "quota": syscall.EDQUOT, "read-only": syscall.EROFS, "files": syscall.EMFILE, "memory": syscall.ENOMEM,
	} {
		for _, said := range []error{&os.PathError{Op: "write", Path: path, Err: fault}, errors.New("file resize error: " + fault.Error())} {
			_, err := Open(path, "1", slog.New(slog.DiscardHandler), func(*bbolt.Tx) error { return said })
			if !errors.Is(err, said) {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
	var was string
	db, err := Open(path, "1", slog.New(slog.DiscardHandler), load(&was))
	if err != nil || was != "kept" {
		t.Fatalf("%q, %v", was, err)
	}
	if _, err := Open(path, "1", slog.New(slog.DiscardHandler), load(&was)); err == nil || !strings.Contains(err.Error(), "another process has "+path+" open") {
		t.Errorf("opened twice: %v", err)
	}
	if err := db.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(path + ".bad"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("set aside: %v", err)
	}
}
