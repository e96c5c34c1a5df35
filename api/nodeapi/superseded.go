package nodeapi

import (
	"strings"

	imagewolfv1 "github.com/imagewolf/imagewolf/api/v1"
)

// SupersededReason is what the reason of a node's part begins with that ended as
// canceled because a younger request has pulled another digest for the same tag.
const SupersededReason = "superseded: "

// Superseded says whether a node's part of a request ended in favor of a younger
// request: a repeat of it would move the tag back.
func Superseded(n *imagewolfv1.NodePrefetch) bool {
	return n.GetState() == imagewolfv1.PrefetchState_PREFETCH_STATE_CANCELED && strings.HasPrefix(n.GetReason(), SupersededReason)
}
