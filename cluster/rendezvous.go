package cluster

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"slices"

	"github.com/opencontainers/go-digest"
)

// maxTrackers bounds the nodes that track, and with them the control
// connections that every node keeps.
const maxTrackers = 32

// rank puts the members into the key's own order (rendezvous hashing): every
// node that knows the same members computes the same order, and a member that
// comes or goes moves no other two relative to each other. The key's first
// choice is first; the next one stands in for it.
func rank(key string, members []Member) []Member {
	type weighed struct {
		weight uint64
		member Member
	}
	all := make([]weighed, len(members))
	for i, m := range members {
		// A name has no zero byte, so no other pair is hashed the same.
		sum := sha256.Sum256([]byte(m.Name + "\x00" + key))
		all[i] = weighed{binary.BigEndian.Uint64(sum[:]), m}
	}
	slices.SortFunc(all, func(a, b weighed) int {
		return cmp.Or(cmp.Compare(b.weight, a.weight), cmp.Compare(a.member.Name, b.member.Name))
	})
	out := make([]Member, len(all))
	for i, w := range all {
		out[i] = w.member
	}
	return out
}

// trackersOf chooses the nodes that track from all members.
func trackersOf(members []Member) []Member {
	ranked := rank("imagewolf tracker nodes", members)
	return slices.Clip(ranked[:min(len(ranked), maxTrackers)])
}

// TrackerOf returns which of the given tracker nodes tracks a blob, and false if
// there is none.
func TrackerOf(d digest.Digest, trackers []Member) (Member, bool) {
	ranked := rank(d.String(), trackers)
	if len(ranked) == 0 {
		return Member{}, false
	}
	return ranked[0], true
}
