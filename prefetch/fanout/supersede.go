package fanout

import (
	"cmp"
	"fmt"
	"time"

	imagewolfv1 "github.com/imagewolf/imagewolf/api/v1"
)

// maxSkew is how far a request's time, as the node that took it stamped it, is
// believed beyond this node's own. It is more than telling takes (callTimeout) and
// than clocks that are set right differ, so that all nodes have the same order.
const maxSkew = 2 * time.Second

// rivals are those of the requests that move one image record on this node which
// decide about the others. Each may be nil.
type rivals struct {
	moved *record // the youngest that has moved it, whatever became of it then
	open  *record // the youngest that has not ended
	busy  *record // that is being pulled
}

// younger says whether a is younger than b. All nodes say the same of two requests that
// name digests; one that wants what the tag says is as young as its answer. Fanout.mu must
// be held.
func younger(a, b *record) bool {
	return a != nil && (b == nil || cmp.Or(cmp.Compare(a.asOf(), b.asOf()), cmp.Compare(a.id(), b.id())) > 0)
}

// asOf is since when a request's digest is wanted, in milliseconds since 1970.
func (r *record) asOf() int64 { return max(r.made, r.asked) }

// supersede sees to it that an image record is not moved back. Of one record's
// requests only one is pulled at a time. One that names a digest waits for a
// younger one that wants another, and ends when such a one has moved the record.
// One that wants what the tag says is as new as the moment that its pull begins. It
// returns those that it has ended. f.mu must be held.
func (f *Fanout) supersede(now time.Time) (ended []*record) {
	of := f.rivals()
	for _, r := range f.records {
		v := of[r.name]
		if v == nil || r.endPull != nil || r.state == nil || r.state.State != imagewolfv1.PrefetchState_PREFETCH_STATE_QUEUED {
			continue
		}
		want, behind := r.start.Request.Digest, ""
		switch {
		case want != "" && younger(v.moved, r) && v.moved.state.Digest != want:
			f.o.Log.Info("a prefetch is superseded", "id", r.id(), "image", r.start.Request.Image, "digest", want, "by", v.moved.id())
			r.state.Superseded = true
			f.endAs("superseded", r, imagewolfv1.PrefetchState_PREFETCH_STATE_CANCELED, fmt.Sprintf(
				"superseded: request %s, which is younger, has pulled %s for the same tag", v.moved.id(), v.moved.state.Digest), now)
			ended = append(ended, r)
			continue
		case v.busy != nil:
			behind = fmt.Sprintf("waits for request %s, which is being pulled for the same tag", v.busy.id())
		case want != "" && younger(v.open, r) && v.open.start.Request.Digest != want:
			behind = fmt.Sprintf("waits for request %s, which is younger and for the same tag", v.open.id())
		}
		if r.behind != behind {
			r.behind = behind
			r.explain()
		}
	}
	return ended
}

// rivals returns them by the name of the image record. f.mu must be held.
func (f *Fanout) rivals() map[string]*rivals {
	of := map[string]*rivals{}
	for _, r := range f.records {
		if r.name == "" || r.state == nil {
			continue
		}
		v := of[r.name]
		if v == nil {
			v = &rivals{}
			of[r.name] = v
		}
		if r.state.Digest != "" && younger(r, v.moved) {
			v.moved = r
		}
		if !ended(r.state.State) && younger(r, v.open) {
			v.open = r
		}
		if r.endPull != nil {
			v.busy = r
		}
	}
	return of
}
