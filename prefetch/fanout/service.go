package fanout

import (
	"context"
	"crypto/rand"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	imagewolfv1 "github.com/imagewolf/imagewolf/api/v1"
)

// Node returns the Node API, which whoever may ask this node is served.
func (f *Fanout) Node() imagewolfv1.NodeServer { return nodeServer{f: f} }

// Prefetcher returns what members are served.
func (f *Fanout) Prefetcher() imagewolfv1.PrefetcherServer { return prefetcherServer{f: f} }

type nodeServer struct {
	imagewolfv1.UnimplementedNodeServer
	f *Fanout
}

// Prefetch implements imagewolfv1.NodeServer.
func (s nodeServer) Prefetch(ctx context.Context, in *imagewolfv1.PrefetchRequest) (*imagewolfv1.PrefetchStatus, error) {
	return s.f.prefetch(ctx, in)
}

// GetPrefetch implements imagewolfv1.NodeServer.
func (s nodeServer) GetPrefetch(ctx context.Context, in *imagewolfv1.GetPrefetchRequest) (*imagewolfv1.PrefetchStatus, error) {
	k, err := s.f.find(ctx, in.GetId())
	if err != nil {
		return nil, err
	}
	return s.f.status(ctx, &k, map[string]*imagewolfv1.NodePrefetch{}), nil
}

// WatchPrefetch implements imagewolfv1.NodeServer.
func (s nodeServer) WatchPrefetch(in *imagewolfv1.GetPrefetchRequest, stream grpc.ServerStreamingServer[imagewolfv1.PrefetchStatus]) error {
	return s.f.watch(stream.Context(), in.GetId(), stream.Send)
}

// ListPrefetches implements imagewolfv1.NodeServer.
func (s nodeServer) ListPrefetches(ctx context.Context, in *imagewolfv1.ListPrefetchesRequest) (*imagewolfv1.ListPrefetchesResponse, error) {
	all, err := s.f.list(ctx, in.GetLimit())
	if err != nil {
		return nil, err
	}
	return &imagewolfv1.ListPrefetchesResponse{Prefetches: all}, nil
}

// CancelPrefetch implements imagewolfv1.NodeServer.
func (s nodeServer) CancelPrefetch(ctx context.Context, in *imagewolfv1.CancelPrefetchRequest) (*imagewolfv1.PrefetchStatus, error) {
	return s.f.cancelAll(ctx, in.GetId())
}

type prefetcherServer struct {
	imagewolfv1.UnimplementedPrefetcherServer
	f *Fanout
}

// Offer implements imagewolfv1.PrefetcherServer.
func (s prefetcherServer) Offer(ctx context.Context, in *imagewolfv1.OfferRequest) (*imagewolfv1.OfferResponse, error) {
	return s.f.Offer(ctx, in)
}

// Start implements imagewolfv1.PrefetcherServer.
func (s prefetcherServer) Start(ctx context.Context, in *imagewolfv1.StartRequest) (*imagewolfv1.NodePrefetch, error) {
	return s.f.Start(ctx, in)
}

// Report implements imagewolfv1.PrefetcherServer.
func (s prefetcherServer) Report(ctx context.Context, in *imagewolfv1.ReportRequest) (*imagewolfv1.ReportResponse, error) {
	return s.f.Report(ctx, in)
}

// Cancel implements imagewolfv1.PrefetcherServer.
func (s prefetcherServer) Cancel(ctx context.Context, in *imagewolfv1.CancelPrefetchRequest) (*imagewolfv1.NodePrefetch, error) {
	return s.f.Cancel(ctx, in)
}

// prefetch takes a request, and tells those nodes of it that answer.
func (f *Fanout) prefetch(ctx context.Context, in *imagewolfv1.PrefetchRequest) (*imagewolfv1.PrefetchStatus, error) {
	if err := check(in); err != nil {
		return nil, err
	}
	in = proto.CloneOf(in)
	if in.Id == "" {
		in.Id = strings.ToLower(rand.Text())
	} else if k, err := f.find(ctx, in.Id); err == nil {
		return f.status(ctx, &k, map[string]*imagewolfv1.NodePrefetch{}), nil
	} else if status.Code(err) != codes.NotFound {
		return nil, err
	}
	nodes, err := f.choose(ctx, in)
	if err != nil {
		return nil, err
	}
	start := &imagewolfv1.StartRequest{Request: in, Created: time.Now().UnixMilli(), Nodes: nodes, Coordinator: f.o.Self}
	others := slices.DeleteFunc(slices.Clone(nodes), func(n string) bool { return n == f.o.Self })
	r, isNew, err := f.add(start, others...)
	if err != nil {
		return nil, err
	}
	var silent []string
	if isNew {
		f.o.Counter.Requested()
		f.o.Log.Info("prefetch requested", "id", in.Id, "image", in.Image, "digest", in.Digest, "nodes", len(nodes))
		if len(others) > 0 {
			if silent = f.tell(ctx, r, others); len(silent) > 0 {
				f.o.Log.Warn("nodes do not answer: they are told of the prefetch when they do", "id", in.Id, "nodes", len(silent))
			}
		}
		poke(f.news)
	}
	k, ok := f.own(in.Id)
	if !ok { // it was stopped this very moment
		return nil, errNotRunning
	}
	return f.status(ctx, &k, map[string]*imagewolfv1.NodePrefetch{}, silent...), nil
}

// cancelAll ends a request on all nodes. Those that do not answer are told by
// this node when they do, and so is the one that took it, so that it starts no
// further ones.
func (f *Fanout) cancelAll(ctx context.Context, id string) (*imagewolfv1.PrefetchStatus, error) {
	k, err := f.find(ctx, id)
	if err != nil {
		return nil, err
	}
	tell := slices.DeleteFunc(append(slices.Clone(k.start.Nodes), k.start.Coordinator), func(n string) bool { return n == f.o.Self })
	slices.Sort(tell)
	tell = slices.Compact(tell)
	start := proto.CloneOf(k.start)
	start.Canceled = true
	r, isNew, err := f.add(start, tell...)
	if err != nil {
		return nil, err
	}
	if !isNew {
		f.mu.Lock()
		f.cancel(r, time.Now())
		for _, n := range tell {
			r.untold[n] = true
		}
		f.mu.Unlock()
		if err := f.save(r); err != nil {
			return nil, status.Errorf(codes.Internal, "request %s: that it is canceled is not kept: %v", id, err)
		}
		f.signal()
	}
	f.o.Log.Info("prefetch canceled", "id", id, "image", start.Request.Image)
	var silent []string
	if len(tell) > 0 {
		silent = f.tell(ctx, r, tell)
		poke(f.news)
	}
	k.start.Canceled = true
	return f.status(ctx, &k, map[string]*imagewolfv1.NodePrefetch{}, silent...), nil
}

// Offer says whether this node has an image of the repository.
func (f *Fanout) Offer(ctx context.Context, in *imagewolfv1.OfferRequest) (*imagewolfv1.OfferResponse, error) {
	if err := check(&imagewolfv1.PrefetchRequest{Image: in.GetImage(), Namespace: in.GetNamespace()}); err != nil {
		return nil, err
	}
	has, err := f.o.Puller.HasRepository(ctx, in.Namespace, in.Image)
	if err != nil {
		return nil, status.Errorf(codes.Internal, "images of node %s: %v", f.o.Self, err)
	}
	return &imagewolfv1.OfferResponse{HasRepository: has}, nil
}

// Start queues a request on this node.
func (f *Fanout) Start(_ context.Context, in *imagewolfv1.StartRequest) (*imagewolfv1.NodePrefetch, error) {
	if err := checkStart(in, f.o.Self); err != nil {
		return nil, err
	}
	start := &imagewolfv1.StartRequest{
		Request: in.Request, Created: in.Created, Nodes: slices.Clone(in.Nodes), Coordinator: in.Coordinator, Age: in.Age, Canceled: in.Canceled,
	}
	r, _, err := f.add(start)
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if r.state == nil { // it canceled the request before it was told of it
		return &imagewolfv1.NodePrefetch{Node: f.o.Self}, nil
	}
	return proto.CloneOf(r.state), nil
}

// Report returns what this node knows of requests.
func (f *Fanout) Report(_ context.Context, in *imagewolfv1.ReportRequest) (*imagewolfv1.ReportResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.db == nil {
		return nil, errNotRunning
	}
	out := &imagewolfv1.ReportResponse{}
	now := time.Now()
	put := func(r *record, withNodes bool) {
		state := &imagewolfv1.NodePrefetch{}
		if r.state != nil {
			state = proto.CloneOf(r.state)
		}
		out.Requests = append(out.Requests, r.told(now, withNodes))
		out.States = append(out.States, state)
	}
	if id := in.GetId(); id != "" {
		if r := f.records[id]; r != nil {
			put(r, true)
		}
		return out, nil
	}
	all := make([]*record, 0, len(f.records))
	for _, r := range f.records {
		all = append(all, r)
	}
	slices.SortFunc(all, func(a, b *record) int { return newer(a.start, b.start) })
	for _, r := range all[:min(len(all), int(limitOf(in.GetLimit())))] {
		put(r, false)
	}
	return out, nil
}

// Cancel ends a request on this node.
func (f *Fanout) Cancel(_ context.Context, in *imagewolfv1.CancelPrefetchRequest) (*imagewolfv1.NodePrefetch, error) {
	if err := checkID(in.GetId()); err != nil {
		return nil, err
	}
	if err := f.running(); err != nil {
		return nil, err
	}
	f.mu.Lock()
	r := f.records[in.Id]
	if r == nil {
		f.mu.Unlock()
		return nil, status.Errorf(codes.NotFound, "request %s is not known on node %s", in.Id, f.o.Self)
	}
	f.cancel(r, time.Now())
	state := &imagewolfv1.NodePrefetch{Node: f.o.Self}
	if r.state != nil {
		state = proto.CloneOf(r.state)
	}
	f.mu.Unlock()
	f.signal()
	poke(f.news) // who was not told of the request is not told now
	if err := f.save(r); err != nil {
		return nil, status.Errorf(codes.Internal, "request %s: that it is canceled is not kept: %v", in.Id, err)
	}
	return state, nil
}
