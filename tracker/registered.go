package tracker

import (
	"context"
	"errors"
	"time"

	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	api "github.com/imagewolf/imagewolf/api/v1"
)

// errFull says that all nodes together have registered as much as a tracker holds.
var errFull = errors.New("too many registrations")

// registrant is one node of those that register blobs here, by its name.
type registrant struct {
	live *registerStream // its newest stream, the only one that registers; nil once that has ended
	held int             // the blobs that it is a seeder of, by whichever stream
}

// registerStream is one node's stream of what it holds.
type registerStream struct {
	ender
	name, zone string
	out        *outbox[*api.RegisterCommand]
	held       map[digest.Digest]*blob // only the receiving goroutine's
}

// registration is one node's word that it holds the blob.
type registration struct {
	stream *registerStream
	size   int64 // bytes
}

// seeders are the nodes that have registered one blob, by name. Many blobs have one
// only, which takes no map: that is half of what a registration costs.
type seeders struct {
	name  string // of first
	first registration
	more  map[string]registration // nil if empty
}

// get is a node's registration; without stream if it has none.
func (s *seeders) get(name string) registration {
	if s.first.stream != nil && s.name == name {
		return s.first
	}
	return s.more[name]
}

func (s *seeders) set(name string, r registration) {
	switch _, more := s.more[name]; {
	case !more && (s.first.stream == nil || s.name == name):
		s.name, s.first = name, r
	case s.more == nil:
		s.more = map[string]registration{name: r}
	default:
		s.more[name] = r
	}
}

func (s *seeders) remove(name string) {
	if s.first.stream != nil && s.name == name {
		s.name, s.first = "", registration{}
		return
	}
	if delete(s.more, name); len(s.more) == 0 {
		s.more = nil
	}
}

func (s *seeders) len() int {
	if s.first.stream != nil {
		return 1 + len(s.more)
	}
	return len(s.more)
}

// all passes each once.
func (s *seeders) all(yield func(name string, r registration) bool) {
	if s.first.stream != nil && !yield(s.name, s.first) {
		return
	}
	for name, r := range s.more {
		if !yield(name, r) {
			return
		}
	}
}

// Register keeps what one node holds for as long as its stream lives, or until the
// node has a newer one.
func (v service) Register(stream api.Tracker_RegisterServer) error {
	st := &registerStream{
		ender: ender{done: make(chan struct{})},
		out:   newOutbox[*api.RegisterCommand](queueSlack),
		held:  map[digest.Digest]*blob{},
	}
	late := time.AfterFunc(helloTimeout, func() { st.end(status.Error(codes.DeadlineExceeded, "no first message")) })
	defer late.Stop()
	ctx := stream.Context()
	return v.s.serve(ctx, &st.ender,
		func() error { return st.out.drain(ctx, stream.Send) },
		func() error {
			who, spoken, err := v.s.greet(ctx)
			if err != nil {
				return err
			}
			defer spoken()
			defer v.s.retire(st)
			defer func() {
				for d := range st.held {
					st.remove(d)
				}
			}()
			for {
				msg, err := stream.Recv()
				if err != nil {
					return err
				}
				spoken()
				late.Stop()
				if err := v.s.register(ctx, who, st, msg); err != nil {
					return err
				}
			}
		})
}

// register takes one message. What does not fit because of others is left out, and
// the node told how much that was.
func (s *Server) register(ctx context.Context, who caller, st *registerStream, msg *api.RegisterMessage) error {
	if st.name == "" {
		if err := s.introduce(ctx, who, st, msg); err != nil {
			return err
		}
	}
	for _, r := range msg.GetRemoved() { // first: it makes room
		st.remove(digest.Digest(r))
	}
	refused := uint32(0)
	for _, h := range msg.GetAdded() {
		d, err := digest.Parse(h.GetDigest())
		if err != nil || h.GetSize() <= 0 || h.GetSize() > maxSize {
			continue // one odd blob must not cost the node all others
		}
		switch err := s.hold(st, d, h.GetSize()); {
		case errors.Is(err, errFull):
			refused++
		case err != nil:
			return err
		}
	}
	if refused == 0 {
		return nil
	}
	s.full(st.name, "registrations")
	if !st.out.put(&api.RegisterCommand{Refused: refused}) {
		return status.Errorf(codes.ResourceExhausted, "%s does not read", st.name)
	}
	return nil
}

// introduce takes a stream's first message: from here on it is its node's only one.
// One that the node had before ends, and no longer registers anything; what it has
// registered goes when its goroutine gets to it, unless the new one has by then.
func (s *Server) introduce(ctx context.Context, who caller, st *registerStream, msg *api.RegisterMessage) error {
	name := msg.GetSelf().GetName()
	if name == "" || len(name) > MaxText || len(msg.GetZone()) > MaxText {
		return status.Error(codes.InvalidArgument, "first message without a usable name or zone")
	}
	if err := who.check(msg.GetSelf()); err != nil {
		return err
	}
	s.mu.Lock()
	if err := st.over(ctx); err != nil {
		s.mu.Unlock()
		return err
	}
	r := s.registrants[name]
	if r == nil && len(s.registrants) >= s.limits.registrants {
		s.mu.Unlock()
		s.full(name, "nodes that register")
		return status.Error(codes.ResourceExhausted, "too many nodes register here")
	}
	defer s.mu.Unlock()
	if r == nil {
		r = &registrant{}
		s.registrants[name] = r
	}
	st.name, st.zone = name, msg.GetZone()
	if r.live != nil {
		r.live.end(status.Errorf(codes.Aborted, "%s has registered again", name))
	}
	r.live = st
	return nil
}

// retire notes that a stream has ended.
func (s *Server) retire(st *registerStream) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r := s.registrants[st.name]; r != nil && r.live == st {
		r.live = nil
		s.forget(st.name, r)
	}
}

// forget drops a registrant of whom nothing is left. s.mu must be held.
func (s *Server) forget(name string, r *registrant) {
	if r.live == nil && r.held == 0 {
		delete(s.registrants, name)
	}
}

// hold makes a stream's node a seeder of a blob. The error is errFull or a status.
func (s *Server) hold(st *registerStream, d digest.Digest, size int64) error {
	return s.with(d, func(b *blob) error {
		if err := s.admit(st, b.seeders.get(st.name).stream != nil); err != nil {
			return err
		}
		b.seeders.set(st.name, registration{stream: st, size: size})
		st.held[b.digest] = b
		if b.machine == nil || b.machine.Size() != size {
			return nil
		}
		// A panic in there is the members' trouble, not this stream's.
		_ = b.run(func(m *Machine, now time.Time) ([]Command, error) {
			return m.SeederAdded(now, st.name, st.zone), nil
		})
		return nil
	})
}

// admit counts a registration of a stream's node, if it is not one that it had
// already.
func (s *Server) admit(st *registerStream, again bool) error {
	s.mu.Lock()
	r := s.registrants[st.name]
	over := false
	switch {
	case r == nil || r.live != st:
		s.mu.Unlock()
		return status.Errorf(codes.Aborted, "%s has registered again", st.name)
	case again:
	case r.held >= s.limits.held:
		over = true
	case s.registered >= s.limits.registered:
		s.mu.Unlock()
		return errFull
	default:
		r.held++
		s.registered++
	}
	s.mu.Unlock()
	if over {
		return s.refuse(st.name, "", manyBlobs)
	}
	return nil
}

// remove takes back one blob, unless a newer stream of the node holds it.
func (st *registerStream) remove(d digest.Digest) {
	b := st.held[d]
	if b == nil {
		return
	}
	delete(st.held, d)
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.seeders.get(st.name).stream != st {
		return
	}
	b.seeders.remove(st.name)
	b.s.released(st.name)
	if b.machine != nil {
		_ = b.run(func(m *Machine, now time.Time) ([]Command, error) { return m.SeederRemoved(now, st.name), nil })
	}
	b.reap()
}

// released is the reverse of what admit counted.
func (s *Server) released(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.registered--
	r := s.registrants[name]
	r.held--
	s.forget(name, r)
}
