package store

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"

	"github.com/imagewolf/imagewolf/internal/database"
)

var (
	bucketBlobs  = []byte("blobs")
	bucketPieces = []byte("pieces")
)

const dbVersion = "1"

// blobState is what state.db says about a blob.
type blobState struct {
	Used   time.Time         `json:"used"`
	Labels map[string]string `json:"labels,omitempty"`
}

// openDB opens state.db. One that cannot be read is set aside: nothing in it
// is worth a node without a content store.
func openDB(path string, log *slog.Logger) (*bolt.DB, map[digest.Digest]blobState, error) {
	var states map[digest.Digest]blobState
	db, err := database.Open(path, dbVersion, log, func(tx *bolt.Tx) error {
		states = map[digest.Digest]blobState{}
		if _, err := tx.CreateBucketIfNotExists(bucketPieces); err != nil {
			return err
		}
		blobs, err := tx.CreateBucketIfNotExists(bucketBlobs)
		if err != nil {
			return err
		}
		return blobs.ForEach(func(k, v []byte) error {
			var st blobState
			if err := json.Unmarshal(v, &st); err != nil {
				return fmt.Errorf("record of %s: %w", k, err)
			}
			states[digest.Digest(k)] = st
			return nil
		})
	})
	return db, states, err
}

// flush writes what has changed since the last time to state.db. Losing it
// would cost no more than the order of eviction and labels that containerd
// itself does not use, so nobody waits for it.
func (s *Store) flush() error {
	s.mu.Lock()
	batch := make(map[digest.Digest][]byte, len(s.dirty))
	for d := range s.dirty {
		b := s.blobs[d]
		if b == nil {
			batch[d] = nil
			continue
		}
		v, err := json.Marshal(blobState{Used: b.used, Labels: b.labels})
		if err != nil {
			s.mu.Unlock()
			return fmt.Errorf("record of %s: %w", d, err)
		}
		batch[d] = v
		b.kept = b.used
	}
	clear(s.dirty)
	s.mu.Unlock()
	if len(batch) == 0 {
		return nil
	}
	err := s.db.Update(func(tx *bolt.Tx) error {
		blobs, pieces := tx.Bucket(bucketBlobs), tx.Bucket(bucketPieces)
		for d, v := range batch {
			if v != nil {
				if err := blobs.Put([]byte(d), v); err != nil {
					return err
				}
				continue
			}
			if err := errors.Join(blobs.Delete([]byte(d)), pieces.Delete([]byte(d))); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		s.mu.Lock()
		for d := range batch {
			s.dirty[d] = struct{}{}
		}
		s.mu.Unlock()
		return fmt.Errorf("write state.db: %w", err)
	}
	return nil
}

// SetPieces keeps the SHA-1 piece hashes of a blob until the blob is removed,
// so that seeding it needs no hashing. It waits for the disk; any goroutine
// may call it. The error is ErrNotFound if the blob is not here.
func (s *Store) SetPieces(d digest.Digest, hashes []byte) error {
	err := s.db.Update(func(tx *bolt.Tx) error {
		// Inside the transaction: a removal after this look is written after it.
		s.mu.Lock()
		b := s.blobs[d]
		s.mu.Unlock()
		if b == nil {
			return fmt.Errorf("content: %w", errdefs.ErrNotFound)
		}
		return tx.Bucket(bucketPieces).Put([]byte(d), hashes)
	})
	if err != nil {
		return fmt.Errorf("keep pieces of %s: %w", d, err)
	}
	return nil
}

// Pieces returns what SetPieces was given for the blob, or ErrNotFound. The
// bytes are the caller's. Any goroutine may call it.
func (s *Store) Pieces(d digest.Digest) ([]byte, error) {
	var out []byte
	err := s.db.View(func(tx *bolt.Tx) error {
		v := tx.Bucket(bucketPieces).Get([]byte(d))
		if v == nil {
			return errdefs.ErrNotFound
		}
		out = append(out, v...)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("pieces of %s: %w", d, err)
	}
	return out, nil
}
