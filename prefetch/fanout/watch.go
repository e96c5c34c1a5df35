package fanout

import (
	"context"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	imagewolfv1 "github.com/imagewolf/imagewolf/api/v1"
)

const (
	watchEvery = 250 * time.Millisecond // least between two looks at one request that is watched
	watchEach  = 4 * time.Millisecond   // and more by so much for every node that is asked
)

// scene is a request that is watched. All who watch it here share what is seen, so
// that its nodes are asked by one of them at a time, and no more often than for one.
type scene struct {
	id      string
	watches int           // guarded by Fanout.mu
	turn    chan struct{} // of size 1: full while somebody looks, who owns what follows

	known  known
	past   map[string]*imagewolfv1.NodePrefetch
	looked time.Time
	last   *imagewolfv1.PrefetchStatus // never changed; nil before the first look
}

// watch sends the status as it changes, until no node has anything left to do or
// ctx ends.
func (f *Fanout) watch(ctx context.Context, id string, send func(*imagewolfv1.PrefetchStatus) error) error {
	s, leave, err := f.enter(id)
	if err != nil {
		return err
	}
	defer leave()
	var last *imagewolfv1.PrefetchStatus
	for {
		st, wait, settled, err := f.look(ctx, s)
		if err != nil {
			return err
		}
		if !proto.Equal(st, last) {
			if err := send(st); err != nil {
				return err
			}
			last = st
		}
		if settled {
			return nil
		}
		if err := f.running(); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		case <-time.After(wait):
		}
	}
}

// enter returns the scene of a request, unless too many are watching.
func (f *Fanout) enter(id string) (s *scene, leave func(), err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.watches >= maxWatches {
		return nil, nil, status.Errorf(codes.ResourceExhausted, "%d requests are being watched on node %s: watch on another, or ask from time to time", maxWatches, f.o.Self)
	}
	if s = f.scenes[id]; s == nil {
		s = &scene{id: id, turn: make(chan struct{}, 1), past: map[string]*imagewolfv1.NodePrefetch{}}
		f.scenes[id] = s
	}
	f.watches++
	s.watches++
	return s, func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.watches--
		if s.watches--; s.watches == 0 {
			delete(f.scenes, id)
		}
	}, nil
}

// look returns the status as it was seen not long ago, after how long to look again,
// and whether it is the last.
func (f *Fanout) look(ctx context.Context, s *scene) (st *imagewolfv1.PrefetchStatus, wait time.Duration, settled bool, err error) {
	select {
	case s.turn <- struct{}{}:
		defer func() { <-s.turn }()
	case <-ctx.Done():
		return nil, 0, false, status.FromContextError(ctx.Err()).Err()
	}
	if s.last == nil {
		if s.known, err = f.find(ctx, s.id); err != nil {
			return nil, 0, false, err
		}
	}
	every := max(watchEvery, time.Duration(len(s.known.start.Nodes)-len(s.past))*watchEach)
	if s.last == nil || time.Since(s.looked) >= every {
		st := f.status(ctx, &s.known, s.past)
		if err := ctx.Err(); err != nil { // then it saw nothing
			return nil, 0, false, status.FromContextError(err).Err()
		}
		s.last, s.looked = st, time.Now()
	}
	return s.last, max(every-time.Since(s.looked), time.Millisecond), s.known.settled(s.last), nil
}
