package store

import (
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/opencontainers/go-digest"
)

const (
	digestMark = "-sha256:"
	hexLen     = 64
)

// refDigest returns the digest that a ref of the form
// "<namespace>/<sequence>/<kind>-sha256:<hex>" names, with or without the
// parts before the kind.
func refDigest(ref string) (digest.Digest, bool) {
	at := len(ref) - hexLen - len(digestMark)
	if at < 0 || ref[at:at+len(digestMark)] != digestMark {
		return "", false
	}
	kind := ref[strings.LastIndexByte(ref[:at], '/')+1 : at]
	// containerd's image converters name what they write after the digest that
	// they convert FROM, as "convert-…-from-sha256:<hex>".
	if kind == "" || kind == "from" || strings.HasSuffix(kind, "-from") {
		return "", false
	}
	d := digest.Digest(ref[at+1:])
	if d.Validate() != nil {
		return "", false
	}
	return d, true
}

// known returns the digest of what a writer with these options will write, if
// digest and size are known, which is what sharing an ingest needs.
func known(o content.WriterOpts) (digest.Digest, bool) {
	if o.Desc.Size <= 0 {
		return "", false
	}
	if d := o.Desc.Digest; d != "" {
		return d, d.Validate() == nil && d.Algorithm() == digest.SHA256
	}
	return refDigest(o.Ref)
}

// ref is what the store knows about a ref that was opened as a stream of an
// ingest and neither committed nor aborted since. Guarded by Store.mu.
type ref struct {
	name             string
	digest           digest.Digest
	size             int64
	started, updated time.Time
	present          int64 // bytes of the ingest when it was last in memory
	whole            bool  // the blob was complete when its ingest was dropped
	stream           *stream
	since            time.Time // when stream was opened
}

// status describes the ref. Store.mu must be held.
func (r *ref) status(in *Ingest) content.Status {
	st := content.Status{
		Ref: r.name, Offset: r.present, Total: r.size, Expected: r.digest,
		StartedAt: r.started, UpdatedAt: r.updated,
	}
	whole := r.whole
	if in != nil {
		in.mu.Lock()
		st.Offset, whole = in.present.total, in.whole
		if r.stream != nil && r.stream.updated.After(st.UpdatedAt) {
			st.UpdatedAt = r.stream.updated
		}
		if in.progress.After(st.UpdatedAt) {
			st.UpdatedAt = in.progress
		}
		in.mu.Unlock()
	}
	if whole {
		st.Offset = r.size
	} else {
		// Who sees offset and total agree commits, and that would fail.
		st.Offset = min(st.Offset, r.size-1)
	}
	return st
}
