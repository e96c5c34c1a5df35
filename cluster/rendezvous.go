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
// choice is first; the next one stands in for it. Slow members come after all others,
// unless they are more than a third: the others are not to track for too many, nor is
// the order to change all the time where all lines are slow.
func rank(key string, members []Member) []Member {
	type weighed struct {
		weight uint64
		member Member
	}
	all := make([]weighed, len(members))
	heed := heedSlow(members)
	for i, m := range members {
		m.Slow = m.Slow && heed
		// A name has no zero byte, so no other pair is hashed the same.
		sum := sha256.Sum256([]byte(m.Name + "\x00" + key))
		all[i] = weighed{binary.BigEndian.Uint64(sum[:]), m}
	}
	slices.SortFunc(all, func(a, b weighed) int {
		return cmp.Or(compareTrue(a.member.Slow, b.member.Slow), cmp.Compare(b.weight, a.weight), cmp.Compare(a.member.Name, b.member.Name))
	})
	out := make([]Member, len(all))
	for i, w := range all {
		out[i] = w.member
	}
	return out
}

// heedSlow says whether few enough members are slow for that to count.
func heedSlow(members []Member) bool {
	slow := 0
	for _, m := range members {
		if m.Slow {
			slow++
		}
	}
	return slow <= max(1, len(members)/3)
}

// compareTrue orders those of which something is true after the others.
func compareTrue(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return 1
	}
	return -1
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
