package fanout

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	imagewolfv1 "github.com/imagewolf/imagewolf/api/v1"
)

const (
	askedAtOnce  = 1024            // members that are asked at the same time
	offerTimeout = 5 * time.Second // for Offer, which asks containerd
	tellAgain    = 3 * time.Second // after which a node that did not answer is told again
	followEvery  = 500 * time.Millisecond
	followAtOnce = 32 // requests whose turn is asked for at the same time, those first that go first
	// patience is how long a node before this one may be silent until this one
	// begins without it.
	patience = 5 * time.Second
)

// triesFor is how often a pull that fails in such a way is tried again: what is
// wrong as it is, never; an image that is not there, once, for it may just have
// been pushed.
func triesFor(err error) int {
	switch {
	case errdefs.IsInvalidArgument(err):
		return 0
	case errdefs.IsNotFound(err):
		return 1
	}
	return len(pauses)
}

// peer is the way to a node, which may be this one.
func (f *Fanout) peer(name string) (imagewolfv1.PrefetcherClient, error) {
	if name == f.o.Self {
		return local{f}, nil
	}
	return f.o.Cluster.Peer(name)
}

// ask calls do for each of the nodes that are members, all at the same time, and
// returns when all calls have. Their context ends after callTimeout, or with ctx.
func (f *Fanout) ask(ctx context.Context, names []string, do func(ctx context.Context, name string, p imagewolfv1.PrefetcherClient)) {
	f.askFor(ctx, callTimeout, names, do)
}

func (f *Fanout) askFor(ctx context.Context, limit time.Duration, names []string, do func(ctx context.Context, name string, p imagewolfv1.PrefetcherClient)) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	var g errgroup.Group
	g.SetLimit(askedAtOnce)
	for _, name := range names {
		p, err := f.peer(name)
		if err != nil {
			continue
		}
		g.Go(func() error {
			return f.o.Guard(func() error { do(ctx, name, p); return nil })
		})
	}
	if err := g.Wait(); err != nil {
		f.o.Log.Error("panic over what a member answered", "err", err)
	}
}

// tell tells some of the nodes that have not been told of a request, or of its
// being canceled, and returns those that did not answer.
func (f *Fanout) tell(ctx context.Context, r *record, nodes []string) (silent []string) {
	var mu sync.Mutex
	told := map[string]bool{}
	f.ask(ctx, nodes, func(ctx context.Context, name string, p imagewolfv1.PrefetcherClient) {
		f.mu.Lock()
		start := r.told(time.Now(), true)
		f.mu.Unlock()
		var err error
		if start.Canceled {
			_, err = p.Cancel(ctx, &imagewolfv1.CancelPrefetchRequest{Id: r.id()})
			if status.Code(err) == codes.NotFound { // it was never told
				err = nil
				if position(r.start.Nodes, name) >= 0 {
					// The node that took the request may not know yet, and tell it to start.
					_, err = p.Start(ctx, start)
				}
			}
		} else {
			_, err = p.Start(ctx, start)
		}
		if status.Code(err) == codes.InvalidArgument {
			f.o.Log.Warn("node refuses a prefetch", "id", r.id(), "node", name, "err", err)
			err = nil
		}
		if err != nil {
			return
		}
		f.mu.Lock()
		// Canceled meanwhile: then it is to be told of that, too.
		if r.canceled == start.Canceled {
			delete(r.untold, name)
		}
		f.mu.Unlock()
		mu.Lock()
		defer mu.Unlock()
		told[name] = true
	})
	for _, n := range nodes {
		if !told[n] {
			silent = append(silent, n)
		}
	}
	f.mu.Lock()
	all := len(r.untold) == 0
	if all {
		r.changed = time.Now()
	}
	f.mu.Unlock()
	if all {
		if err := f.save(r); err != nil && ctx.Err() == nil {
			f.o.Log.Warn("that all nodes know of a prefetch is not kept over a restart", "id", r.id(), "err", err)
		}
		f.signal()
	}
	return silent
}

// tellAll tells nodes that were not reached at first, again and again, until ctx
// ends.
func (f *Fanout) tellAll(ctx context.Context) {
	again := map[string]time.Time{} // by node that did not answer: when it is told next
	for {
		now := time.Now()
		for n, t := range again {
			if !t.After(now) {
				delete(again, n)
			}
		}
		jobs, over, left := f.untold(now, again)
		if len(over) > 0 {
			if err := f.save(over...); err != nil && ctx.Err() == nil {
				f.o.Log.Warn("that nobody is told of old prefetches any more is not kept over a restart", "requests", len(over), "err", err)
			}
			f.signal()
		}
		var mu sync.Mutex
		var g errgroup.Group
		g.SetLimit(followAtOnce)
		for r, nodes := range jobs {
			g.Go(func() error {
				return f.o.Guard(func() error {
					silent := f.tell(ctx, r, nodes)
					mu.Lock()
					defer mu.Unlock()
					for _, n := range silent {
						again[n] = time.Now().Add(tellAgain)
					}
					return nil
				})
			})
		}
		if err := g.Wait(); err != nil {
			f.o.Log.Error("panic while nodes were told of prefetches", "err", err)
			left = true
		}
		var wait <-chan time.Time
		if left {
			wait = time.After(tellAgain / 3)
		}
		select {
		case <-ctx.Done():
			return
		case <-f.news:
		case <-wait:
		}
	}
}

// untold returns whom to tell of what now, and whether there will be somebody
// later. Requests that are out of time are nobody's news any more: it returns those
// of which that is new.
func (f *Fanout) untold(now time.Time, again map[string]time.Time) (jobs map[*record][]string, over []*record, left bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	jobs = map[*record][]string{}
	n := 0
	for _, r := range f.records {
		if !r.deadline().After(now) && len(r.untold) > 0 {
			clear(r.untold)
			r.changed = now
			over = append(over, r)
		}
		for node := range r.untold {
			left = true
			if _, later := again[node]; !later && n < askedAtOnce {
				jobs[r] = append(jobs[r], node)
				n++
			}
		}
	}
	return jobs, over, left
}

// followAll finds out, for requests that only some nodes may pull at a time,
// when this node's turn has come, until ctx ends.
func (f *Fanout) followAll(ctx context.Context) {
	for {
		var g errgroup.Group
		waiting := f.waiting()
		for _, r := range waiting {
			g.Go(func() error {
				return f.o.Guard(func() error {
					if f.turn(ctx, r) {
						f.mu.Lock()
						r.waits, r.ahead = false, ""
						r.explain()
						f.mu.Unlock()
						f.signal()
					}
					return nil
				})
			})
		}
		if err := g.Wait(); err != nil {
			f.o.Log.Error("panic while a prefetch's turn was asked for", "err", err)
		}
		var wait <-chan time.Time
		if len(waiting) > 0 {
			wait = time.After(followEvery)
		}
		select {
		case <-ctx.Done():
			return
		case <-f.follow:
		case <-wait:
		}
	}
}

// waiting returns the requests that wait for another node, those first that go
// first, and not more than are asked for at the same time.
func (f *Fanout) waiting() []*record {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []*record
	for _, r := range f.records {
		if r.waits && !ended(r.state.State) {
			out = append(out, r)
		}
	}
	slices.SortFunc(out, before)
	return out[:min(len(out), followAtOnce)]
}

// turn says whether the node that this one follows has ended with the request.
// One that is silent, or was not told of it, is left out after a while, and the
// one that it follows is asked in its place.
func (f *Fanout) turn(ctx context.Context, r *record) bool {
	step := int(r.start.Request.Concurrency) // less than the index, which is below maxNodes
	skipped := false
	for i := r.index - step; i >= 0; i -= step {
		name := r.start.Nodes[i]
		state := f.stateOf(ctx, name, r.id())
		if state == nil {
			skipped = true
			continue
		}
		if !ended(state.State) {
			f.mu.Lock()
			defer f.mu.Unlock()
			r.silent = time.Time{}
			r.ahead = "waits for " + name
			r.explain()
			return false
		}
		break
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	now := time.Now()
	if r.silent.IsZero() {
		r.silent = now
	}
	return !skipped || now.Sub(r.silent) >= patience
}

// stateOf returns where a node is with a request; nil if it does not answer or
// does not know it.
func (f *Fanout) stateOf(ctx context.Context, name, id string) (state *imagewolfv1.NodePrefetch) {
	f.ask(ctx, []string{name}, func(ctx context.Context, _ string, p imagewolfv1.PrefetcherClient) {
		answer, err := p.Report(ctx, &imagewolfv1.ReportRequest{Id: id})
		if err == nil {
			state = stateIn(answer, name, id)
		}
	})
	return state
}

// local is the way to this node itself.
type local struct{ f *Fanout }

var _ imagewolfv1.PrefetcherClient = local{}

// Offer implements imagewolfv1.PrefetcherClient.
func (l local) Offer(ctx context.Context, in *imagewolfv1.OfferRequest, _ ...grpc.CallOption) (*imagewolfv1.OfferResponse, error) {
	return l.f.Offer(ctx, in)
}

// Start implements imagewolfv1.PrefetcherClient.
func (l local) Start(ctx context.Context, in *imagewolfv1.StartRequest, _ ...grpc.CallOption) (*imagewolfv1.NodePrefetch, error) {
	return l.f.Start(ctx, in)
}

// Report implements imagewolfv1.PrefetcherClient.
func (l local) Report(ctx context.Context, in *imagewolfv1.ReportRequest, _ ...grpc.CallOption) (*imagewolfv1.ReportResponse, error) {
	return l.f.Report(ctx, in)
}

// Cancel implements imagewolfv1.PrefetcherClient.
func (l local) Cancel(ctx context.Context, in *imagewolfv1.CancelPrefetchRequest, _ ...grpc.CallOption) (*imagewolfv1.NodePrefetch, error) {
	return l.f.Cancel(ctx, in)
}
