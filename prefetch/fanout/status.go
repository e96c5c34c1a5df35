package fanout

import (
	"context"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	imagewolfv1 "github.com/imagewolf/imagewolf/api/v1"
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
	// Every id that nobody knows costs a call to each member.
	select {
	case f.finds <- struct{}{}:
		defer func() { <-f.finds }()
	case <-ctx.Done():
		return known{}, status.FromContextError(ctx.Err()).Err()
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
		Superseded: s.Superseded && s.State == imagewolfv1.PrefetchState_PREFETCH_STATE_CANCELED,
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
