// Package prefetch pulls an image on this node before anyone asks for it,
// through the node's own containerd: the blobs go through containerd's content
// service and so through ImageWolf's store and the swarm, the layers are
// unpacked into the snapshotter that CRI uses, and the image's records are those
// that CRI would have made, so that kubelet's next pull finds nothing to do.
//
// It uses the pull of containerd's client and not the transfer service. That one
// is the daemon's own, and so the daemon's are its content store, its limits and
// its errors: there is no place where bytes could be held back, blobs could wait
// for others, or the share of a prefetch could be told from that of a pull. It
// is also not in 1.7 as CRI needs it (no snapshotter of the caller's choice
// unless the daemon is configured for it). The client's pull does the same work
// with the same calls in all versions.
//
// # Foreground pulls go first
//
// A prefetch's ingests have refs of their own ([IsRef]): a pull that somebody
// asked for never waits for a prefetch's ref, both share the blob in the store,
// and whoever looks at the store can tell the ones from the others. With
// [Foreground], a prefetch does not begin another blob while such a pull is
// under way. What it has begun it goes on with: other nodes may be waiting for
// just these bytes, and a fetcher that pauses costs the registry another copy.
//
// The bandwidth limit holds for all prefetches of a Puller together. Bytes from
// the registry come through this process and are held back one by one. Bytes
// from other nodes do not: containerd's content service waits while the swarm
// fills the blob. They are counted when the blob is here, and the next blob
// begins when the limit has caught up. A blob that somebody else here wants, too, is neither
// held back nor counted.
package prefetch
