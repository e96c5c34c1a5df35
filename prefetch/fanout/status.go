package fanout

import (
	"context"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	imagewolfv1 "github.com/imagewolf/imagewolf/api/v1"
)

const (
	watchEvery = 250 * time.Millisecond // least between two looks of one who watches
	watchEach  = 4 * time.Millisecond   // and more by so much for every node that is asked
)

// known is a request as somebody knows it. Nothing in it is changed.
type known struct {
	start    *imagewolfv1.StartRequest
	deadline time.Time // by this node's clock
}

// knownFrom checks what a member says of a request.
func knownFrom(start *imagewolfv1.StartRequest, now time.Time) (known, bool) {
	if check(start.GetRequest()) != nil || checkNodes(start) != nil {
		return known{}, false
	}
	born := now.Add(-time.Duration(start.Age) * time.Millisecond)
	return known{start: start, deadline: born.Add(timeout(start.Request))}, true
}

// own returns what this node itself knows of a request.
func (f *Fanout) own(id string) (known, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	r := f.records[id]
	if r == nil {
		return known{}, false
	}
	return known{start: r.told(time.Now(), true), deadline: r.deadline()}, true
}

// find returns a request from whoever knows it: this node, or the first member
// that says so. Its error is NotFound, or Unavailable.
func (f *Fanout) find(ctx context.Context, id string) (known, error) {
	if err := checkID(id); err != nil {
		return known{}, err
	}
	if err := f.running(); err != nil {
		return known{}, err
	}
	if k, ok := f.own(id); ok {
		return k, nil
	}
	members, err := f.o.Cluster.Members(ctx)
	if err != nil {
		return known{}, status.Errorf(codes.Unavailable, "the members of the cluster are not known: %v", err)
	}
	var mu sync.Mutex
	var found known
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	f.ask(ctx, without(members, f.o.Self), func(ctx context.Context, _ string, p imagewolfv1.PrefetcherClient) {
		answer, err := p.Report(ctx, &imagewolfv1.ReportRequest{Id: id})
		if err != nil || len(answer.Requests) != 1 || answer.Requests[0].GetRequest().GetId() != id {
			return
		}
		if k, ok := knownFrom(answer.Requests[0], time.Now()); ok {
			mu.Lock()
			defer mu.Unlock()
			found = k
			stop() // one suffices
		}
	})
	if found.start == nil {
		return known{}, status.Errorf(codes.NotFound, "request %s: no node that answers knows it", id)
	}
	return found, nil
}

// running fails between two runs.
func (f *Fanout) running() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.db == nil {
		return errNotRunning
	}
	return nil
}

// without returns the members' names but for one.
func without(members []Member, name string) []string {
	var out []string
	for _, m := range members {
		if m.Name != name {
			out = append(out, m.Name)
		}
	}
	return out
}

// stateIn returns the state in what a node answered about one request; nil if
// there is none. Everything in it is the node's word, shortened and put right.
func stateIn(answer *imagewolfv1.ReportResponse, node, id string) *imagewolfv1.NodePrefetch {
	for i, r := range answer.GetRequests() {
		if r.GetRequest().GetId() == id && i < len(answer.States) {
			return stateFrom(answer.States[i], node)
		}
	}
	return nil
}

// stateFrom returns what a node says of its part; nil if it has none.
func stateFrom(s *imagewolfv1.NodePrefetch, node string) *imagewolfv1.NodePrefetch {
	switch {
	case ended(s.GetState()), s.GetState() == imagewolfv1.PrefetchState_PREFETCH_STATE_QUEUED, s.GetState() == imagewolfv1.PrefetchState_PREFETCH_STATE_PULLING:
	default:
		return nil
	}
	return &imagewolfv1.NodePrefetch{
		Node: node, State: s.State, Bytes: max(0, s.Bytes), Total: max(0, s.Total),
		Reason: cut(strings.ToValidUTF8(s.Reason, "?")), Digest: cut(s.Digest), Ended: max(0, s.Ended), TimedOut: s.TimedOut,
	}
}

// status asks the selected nodes where they are, but for those in past, of which
// that is known, and those that have just been found silent. It adds to past those
// that have ended.
func (f *Fanout) status(ctx context.Context, k *known, past map[string]*imagewolfv1.NodePrefetch, silent ...string) *imagewolfv1.PrefetchStatus {
	id := k.start.Request.Id
	var mu sync.Mutex
	canceled := k.start.Canceled
	now, answered := map[string]*imagewolfv1.NodePrefetch{}, map[string]bool{}
	var open []string
	for _, n := range k.start.Nodes {
		if past[n] == nil && !slices.Contains(silent, n) {
			open = append(open, n)
		}
	}
	f.ask(ctx, open, func(ctx context.Context, name string, p imagewolfv1.PrefetcherClient) {
		answer, err := p.Report(ctx, &imagewolfv1.ReportRequest{Id: id})
		if err != nil {
			return
		}
		s := stateIn(answer, name, id)
		mu.Lock()
		defer mu.Unlock()
		now[name] = s
		answered[name] = true
		canceled = canceled || s != nil && answer.Requests[0].GetCanceled()
	})
	if own, ok := f.own(id); ok {
		canceled = canceled || own.start.Canceled
	}
	k.start = proto.CloneOf(k.start)
	k.start.Canceled = canceled
	out := &imagewolfv1.PrefetchStatus{Request: k.start.Request, Created: k.start.Created, Canceled: canceled}
	for _, n := range k.start.Nodes {
		s := past[n]
		if s == nil {
			if s = now[n]; s == nil {
				s = k.missing(n, answered[n])
			}
			if ended(s.State) {
				past[n] = s
			}
		}
		out.Nodes = append(out.Nodes, s)
	}
	return out
}

// missing says where a node is of which no state is known: it did not answer, or
// has not been told, and will not be when the request is over.
func (k *known) missing(node string, answered bool) *imagewolfv1.NodePrefetch {
	s := &imagewolfv1.NodePrefetch{Node: node, State: imagewolfv1.PrefetchState_PREFETCH_STATE_UNREACHABLE}
	switch {
	case k.start.Canceled && answered:
		s.State = imagewolfv1.PrefetchState_PREFETCH_STATE_CANCELED
	case k.over() && answered:
		s.TimedOut = true
		s.State, s.Reason = imagewolfv1.PrefetchState_PREFETCH_STATE_FAILED, outOfTime(k.start.Request, "the node did not hear of it")
	case answered:
		s.State, s.Reason = imagewolfv1.PrefetchState_PREFETCH_STATE_QUEUED, "not told yet"
	}
	return s
}

// over says that the request's time is up.
func (k *known) over() bool { return !time.Now().Before(k.deadline) }

// settled says that no node has anything left to do: one that does not answer
// has not, once the request's time is up.
func (k *known) settled(st *imagewolfv1.PrefetchStatus) bool {
	for _, n := range st.Nodes {
		silent := n.State == imagewolfv1.PrefetchState_PREFETCH_STATE_UNREACHABLE
		if !ended(n.State) && (!silent || !k.over()) {
			return false
		}
	}
	return true
}

// watch sends the status as it changes, until no node has anything left to do or
// ctx ends.
func (f *Fanout) watch(ctx context.Context, id string, send func(*imagewolfv1.PrefetchStatus) error) error {
	k, err := f.find(ctx, id)
	if err != nil {
		return err
	}
	f.mu.Lock()
	f.watches++
	full := f.watches > maxWatches
	f.mu.Unlock()
	defer func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.watches--
	}()
	if full {
		return status.Errorf(codes.ResourceExhausted, "%d requests are being watched on node %s: watch on another, or ask from time to time", maxWatches, f.o.Self)
	}
	past := map[string]*imagewolfv1.NodePrefetch{}
	var last *imagewolfv1.PrefetchStatus
	for {
		st := f.status(ctx, &k, past)
		if err := ctx.Err(); err != nil {
			return status.FromContextError(err).Err()
		}
		if !proto.Equal(st, last) {
			if err := send(st); err != nil {
				return err
			}
			last = st
		}
		if k.settled(st) {
			return nil
		}
		if err := f.running(); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		case <-time.After(max(watchEvery, time.Duration(len(k.start.Nodes)-len(past))*watchEach)):
		}
	}
}

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
	found, answered := map[string]*listed{}, map[string]bool{}
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
			l := found[r.Request.Id]
			if l == nil {
				l = &listed{known: k, states: map[string]*imagewolfv1.NodePrefetch{}}
				found[r.Request.Id] = l
			}
			l.from = append(l.from, name)
			l.canceled = l.canceled || r.Canceled
			if i < len(answer.States) {
				if s := stateFrom(answer.States[i], name); s != nil {
					l.states[name] = s
				}
			}
		}
	})
	all := slices.SortedFunc(maps.Values(found), func(a, b *listed) int { return newer(a.known.start, b.known.start) })
	all = all[:min(len(all), int(limitOf(limit)))]
	f.nameNodes(ctx, all)
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

// listed is one request as several members tell of it.
type listed struct {
	known    known
	canceled bool
	from     []string // who told
	states   map[string]*imagewolfv1.NodePrefetch
}

// nameNodes finds the selected nodes of requests, each from one that told of it.
func (f *Fanout) nameNodes(ctx context.Context, all []*listed) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	var wg sync.WaitGroup
	room := make(chan struct{}, followAtOnce)
	for _, l := range all {
		id := l.known.start.Request.Id
		if k, ok := f.own(id); ok {
			l.known = k
			continue
		}
		room <- struct{}{}
		wg.Go(func() {
			defer func() { <-room }()
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
		})
	}
	wg.Wait()
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
