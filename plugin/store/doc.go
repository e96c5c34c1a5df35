// Package store is ImageWolf's content store: containerd's own local store,
// plus blobs that several clients and the swarm assemble together, plus blobs
// that outlive their deletion so that other nodes can still have them.
//
// It is rooted at containerd's content directory and keeps containerd's
// layout, so that switching a node to ImageWolf and back moves nothing:
//
//	<root>/blobs/<algorithm>/<hex>        committed blobs, read-only
//	<root>/ingest/                        the local store's own: refs whose digest or size is not known
//	<root>/imagewolf/state.db             bbolt, see below
//	<root>/imagewolf/staging/<hex>        a blob (sha256) being assembled; sparse
//	<root>/imagewolf/staging/<hex>.json   which ranges of it are there, for which refs
//	<root>/imagewolf/staging/*.tmp        a sidecar being written
//	<root>/imagewolf/staging/*.trash      removed, about to be unlinked
//
//	state.db
//	├──meta
//	│  └──version: 1
//	├──blobs
//	│  └──<digest>: {"used":…,"labels":…} last use and labels
//	└──pieces
//	   └──<digest>: SHA-1 hashes          what SetPieces was given
//
// # Ingests
//
// A writer whose digest (by its descriptor, or by a ref that ends in
// "-sha256:<hex>") and size are known is a stream of the [Ingest] of that
// digest. All streams of a digest, and the [Filler], fill the same staging
// file. A byte that is present is never written again, whoever sends it. When
// the last one is there the sha256 is compared, the file is synced, renamed
// into blobs/ and its directory synced: only then does a stream report the
// whole size as its offset. Commit has nothing left to do but to make the blob
// visible, since containerd calls it inside a database transaction.
//
// All other writers go straight to the local store.
//
// # Visible and hidden
//
// A visible blob may be referred to by containerd; the store never removes it.
// A hidden one is the store's alone: deleted by containerd, or completed
// without a commit. Delete hides, Info and Commit make visible. Hidden blobs
// are evicted, least recently used first, beyond [Options].SeedQuota. Which
// blobs are hidden is not kept on disk: whatever ran on the directory while
// the store did not may have adopted any of them. After a start all are
// visible, and containerd's next garbage collection hides those that it does
// not know.
//
// # What it does not do
//
// It knows no network, no tracker and no registry: that is the Filler's
// business. It does not serve gRPC either.
package store
