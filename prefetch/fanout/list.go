package fanout

import (
	"context"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	imagewolfv1 "github.com/imagewolf/imagewolf/api/v1"
)

const (
	// maxListedNodes bounds the selected nodes of all requests in one list, and so its
	// size: some 40 MB. The oldest requests are left out for it.
	maxListedNodes = 250_000
	// maxSources is how many of those that tell of a request are asked for its nodes.
	maxSources = 8
)

// list returns the newest requests that any member knows, the newest first.
func (f *Fanout) list(ctx context.Context, limit uint32) ([]*imagewolfv1.PrefetchStatus, error) {
	if err := f.running(); err != nil {
		return nil, err
	}
	members, err := f.o.Cluster.Members(ctx)
	if err != nil {
		return nil, status.Errorf(codes.Unavailable, "the members of the cluster are not known: %v", err)
	}
	names := append(without(members, f.o.Self), f.o.Self)
	var mu sync.Mutex
	newest, answered := newNewest(int(limitOf(limit)), maxListedNodes), map[string]bool{}
	f.ask(ctx, names, func(ctx context.Context, name string, p imagewolfv1.PrefetcherClient) {
		answer, err := p.Report(ctx, &imagewolfv1.ReportRequest{Limit: limit})
		if err != nil {
			return
		}
		mu.Lock()
		defer mu.Unlock()
		answered[name] = true
		for i, r := range answer.Requests[:min(len(answer.Requests), maxListed)] {
			k, ok := knownFrom(withoutNodes(r), time.Now())
			if !ok || checkID(r.GetRequest().GetId()) != nil {
				continue
			}
			var s *imagewolfv1.NodePrefetch
			if i < len(answer.States) {
				s = stateFrom(answer.States[i], name)
			}
			newest.add(k, name, s)
		}
	})
	all := f.nameNodes(ctx, newest.cut())
	out := make([]*imagewolfv1.PrefetchStatus, len(all))
	for i, l := range all {
		out[i] = l.status(answered)
	}
	return out, nil
}

// withoutNodes is what a member is to answer when it is asked for all requests.
func withoutNodes(r *imagewolfv1.StartRequest) *imagewolfv1.StartRequest {
	if r == nil {
		return nil
	}
	r.Nodes = nil
	return r
}

func limitOf(n uint32) uint32 {
	if n == 0 {
		return usualListed
	}
	return min(n, maxListed)
}

// newest holds the newest requests that members tell of, up to a number of them and
// of their nodes' states, and no more than twice as much meanwhile.
type newest struct {
	limit, most int // requests, states
	found       map[string]*listed
	states      int
}

// listed is one request as several members tell of it.
type listed struct {
	known    known
	canceled bool
	from     []string // who told; some of them
	states   map[string]*imagewolfv1.NodePrefetch
}

func newNewest(limit, most int) *newest {
	return &newest{limit: limit, most: most, found: map[string]*listed{}}
}

// add takes what a member tells of a request, and of its part in it, which may be nil.
func (n *newest) add(k known, from string, s *imagewolfv1.NodePrefetch) {
	l := n.found[k.start.Request.Id]
	if l == nil {
		l = &listed{known: k, states: map[string]*imagewolfv1.NodePrefetch{}}
		n.found[k.start.Request.Id] = l
	}
	l.canceled = l.canceled || k.start.Canceled
	if len(l.from) < maxSources {
		l.from = append(l.from, from)
	}
	if s != nil && l.states[from] == nil {
		l.states[from] = s
		n.states++
	}
	if len(n.found) > 2*n.limit || n.states > 2*n.most {
		n.cut()
	}
}

// cut leaves out the oldest and returns the others, the newest first. One that is left
// out and told of again is left out again: what is newer does not become less.
func (n *newest) cut() []*listed {
	all := slices.SortedFunc(maps.Values(n.found), func(a, b *listed) int { return newer(a.known.start, b.known.start) })
	n.states = 0
	for i, l := range all {
		if i == n.limit || i > 0 && n.states+len(l.states) > n.most {
			for _, old := range all[i:] {
				delete(n.found, old.known.start.Request.Id)
			}
			return all[:i]
		}
		n.states += len(l.states)
	}
	return all
}

// nameNodes finds the selected nodes of requests, each from one that told of it. It
// returns those, the first ones, that have not too many in all.
func (f *Fanout) nameNodes(ctx context.Context, all []*listed) []*listed {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	var wg sync.WaitGroup
	var named atomic.Int64
	room := make(chan struct{}, followAtOnce)
	for i, l := range all {
		if named.Load() > maxListedNodes {
			all = all[:i]
			break
		}
		if k, ok := f.own(l.known.start.Request.Id); ok {
			l.known = k
			named.Add(int64(len(k.start.Nodes)))
			continue
		}
		room <- struct{}{}
		wg.Go(func() {
			defer func() { <-room }()
			if err := f.o.Guard(func() error { f.nameNodesOf(ctx, l); return nil }); err != nil {
				f.o.Log.Error("panic over what a member told of a prefetch", "id", l.known.start.Request.Id, "err", err)
			}
			named.Add(int64(len(l.known.start.Nodes)))
		})
	}
	wg.Wait()
	return fitting(all, maxListedNodes)
}

// fitting returns the first requests, at least one, that together have no more nodes
// than that.
func fitting(all []*listed, most int) []*listed {
	nodes := 0
	for i, l := range all {
		if nodes += len(l.known.start.Nodes); nodes > most && i > 0 {
			return all[:i]
		}
	}
	return all
}

// nameNodesOf asks those that told of a request for its nodes, until one tells.
func (f *Fanout) nameNodesOf(ctx context.Context, l *listed) {
	id := l.known.start.Request.Id
	for _, name := range l.from {
		var named *imagewolfv1.StartRequest
		f.ask(ctx, []string{name}, func(ctx context.Context, _ string, p imagewolfv1.PrefetcherClient) {
			answer, err := p.Report(ctx, &imagewolfv1.ReportRequest{Id: id})
			if err == nil && len(answer.Requests) == 1 && answer.Requests[0].GetRequest().GetId() == id {
				named = answer.Requests[0]
			}
		})
		if k, ok := knownFrom(named, time.Now()); ok {
			l.known = k
			return
		}
	}
}

// status puts together what members told.
func (l *listed) status(answered map[string]bool) *imagewolfv1.PrefetchStatus {
	k := l.known
	k.start = proto.CloneOf(k.start)
	k.start.Canceled = k.start.Canceled || l.canceled
	if len(k.start.Nodes) == 0 { // nobody named them: those that told are known
		k.start.Nodes = slices.Sorted(maps.Keys(l.states))
	}
	out := &imagewolfv1.PrefetchStatus{Request: k.start.Request, Created: k.start.Created, Canceled: k.start.Canceled}
	for _, n := range k.start.Nodes {
		s := l.states[n]
		if s == nil {
			s = k.missing(n, answered[n])
		}
		out.Nodes = append(out.Nodes, s)
	}
	return out
}
