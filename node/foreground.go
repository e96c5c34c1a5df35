package node

import (
	"github.com/opencontainers/go-digest"

	"github.com/imagewolf/imagewolf/plugin/store"
	"github.com/imagewolf/imagewolf/prefetch"
)

// foreground tells prefetches what is being pulled here because somebody asked
// for it: every open stream of the store that is not one of their own.
type foreground struct{ store *store.Store }

var _ prefetch.Foreground = foreground{}

// Busy implements prefetch.Foreground.
func (f foreground) Busy() bool { return f.store.Streaming("", asked) }

// Wants implements prefetch.Foreground.
func (f foreground) Wants(d digest.Digest) bool { return f.store.Streaming(d, asked) }

func asked(ref string) bool { return !prefetch.IsRef(ref) }
