// Package database opens the files (bbolt) in which a node keeps what it could do
// without: one that is damaged is set aside, and its node starts.
package database

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
)

// lockWait bounds the wait for another process that has the file.
const lockWait = 3 * time.Second

var (
	metaBucket = []byte("meta")
	versionKey = []byte("version")
)

// Open opens the file at path, which is made if it is not there, and calls load in a
// transaction that may write. A file that is damaged, of another version, or that load
// fails for, is logged, renamed to <path>.bad, and begun anew: load is then called
// again, and has to forget what it read before. What says nothing about the file, such
// as that the disk is full or that another process has it, is an error, and leaves it as
// it is.
func Open(path, version string, log *slog.Logger, load func(tx *bbolt.Tx) error) (*bbolt.DB, error) {
	db, err := try(path, version, load)
	switch {
	case errors.Is(err, berrors.ErrTimeout):
		return nil, fmt.Errorf("another process has %s open; is there a second daemon of the same root? (%w)", path, err)
	case err == nil || innocent(err):
		return db, err
	}
	log.Error("a file cannot be read: starting without it", "path", path, "kept_as", path+".bad", "err", err)
	if err := os.Rename(path, path+".bad"); err != nil {
		return nil, fmt.Errorf("set aside %s: %w", path, err)
	}
	return try(path, version, load)
}

// innocent reports whether an error is none of the file's content.
func innocent(err error) bool {
	return slices.ContainsFunc([]error{
		os.ErrPermission, os.ErrNotExist,
		syscall.ENOSPC, syscall.EDQUOT, syscall.EROFS, syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM,
	}, func(target error) bool {
		// bbolt tells some of them as text alone.
		return errors.Is(err, target) || strings.HasSuffix(err.Error(), ": "+target.Error())
	})
}

func try(path, version string, load func(tx *bbolt.Tx) error) (db *bbolt.DB, err error) {
	// bbolt panics on some kinds of damage.
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%s: %v", path, p)
		}
		if err != nil && db != nil {
			err = errors.Join(err, db.Close())
			db = nil
		}
	}()
	db, err = bbolt.Open(path, 0o600, &bbolt.Options{Timeout: lockWait, FreelistType: bbolt.FreelistMapType})
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		meta, err := tx.CreateBucketIfNotExists(metaBucket)
		if err != nil {
			return err
		}
		if v := meta.Get(versionKey); v != nil && string(v) != version {
			return fmt.Errorf("version %q is not known", v)
		}
		if err := meta.Put(versionKey, []byte(version)); err != nil {
			return err
		}
		return load(tx)
	})
	if err != nil {
		err = fmt.Errorf("read %s: %w", path, err)
	}
	return db, err
}
