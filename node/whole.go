package node

import (
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/imagewolf/imagewolf/plugin/store"
	"github.com/imagewolf/imagewolf/swarm"
)

// wholeBlob is a blob that this node has and only seeds: it never changes,
// and no client waits for it.
type wholeBlob struct{ store.Blob }

// Watch returns a state that does not change.
func (b wholeBlob) Watch() (store.State, <-chan struct{}) {
	return store.State{Prefix: b.Size(), Present: b.Size(), Whole: true}, nil
}

func (b wholeBlob) exchange() swarm.Data { return b }

// Fetch has no client to send.
func (wholeBlob) Fetch() bool { return false }

// Forget has nothing that is not known to be right.
func (wholeBlob) Forget() {}

// WriteAt refuses: the blob is whole.
func (wholeBlob) WriteAt([]byte, int64) (int, error) {
	return 0, fmt.Errorf("blob is whole: %w", errdefs.ErrFailedPrecondition)
}

// MarkPresent has nothing to mark.
func (wholeBlob) MarkPresent(int64, int64) error { return nil }

// Present is true of every range.
func (wholeBlob) Present(int64, int64) bool { return true }

// recallPieces takes the piece hashes that were kept when the blob was first
// shared, so that it can be offered without being read. Without them every
// segment is hashed as it is offered.
func (s *session) recallPieces() {
	all, err := s.node.store.Pieces(s.digest)
	if err != nil {
		return
	}
	for i := range s.layout.Segments() {
		n := 20 * s.layout.Pieces(i)
		if n > len(all) {
			clear(s.recalled)
			return
		}
		s.recalled[i], all = all[:n], all[n:]
	}
}
