package store

import "github.com/opencontainers/go-digest"

// Streaming reports whether an unfinished blob has an open stream whose ref (as
// containerd names it, "<namespace>/<sequence>/<kind>-sha256:<hex>") satisfies
// is; with a digest, whether that blob has. is is called with locks held and must
// return at once.
func (s *Store) Streaming(d digest.Digest, is func(ref string) bool) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if d != "" {
		in := s.ingests[d]
		return in != nil && in.streaming(is)
	}
	for _, in := range s.ingests {
		if in.streaming(is) {
			return true
		}
	}
	return false
}

// streaming is Streaming for one ingest. Store.mu must be held.
func (in *Ingest) streaming(is func(ref string) bool) bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.whole {
		return false
	}
	for w := range in.streams {
		if is(w.ref) {
			return true
		}
	}
	return false
}
