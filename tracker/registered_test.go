package tracker

import (
	"log/slog"
	"testing"

	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	api "github.com/imagewolf/imagewolf/api/v1"
)

// FuzzRegister has nodes register anything, over three streams at a time: what is
// counted is what is held, within the bounds, and nothing is left when they have gone.
func FuzzRegister(f *testing.F) {
	held := func(size int64, text ...string) (out []*api.Held) {
		for _, d := range text {
			out = append(out, &api.Held{Digest: digest.FromString(d).String(), Size: size})
		}
		return out
	}
	a := &api.Peer{Name: "a", Address: "127.0.0.1:1"}
	f.Add(wire(
		&api.RegisterMessage{Self: a, Zone: "z", Added: held(testSize, "a layer", "x", "y")},
		&api.RegisterMessage{Self: &api.Peer{Name: "b"}, Added: append(held(5, "a layer"), &api.Held{Digest: "none", Size: 1}, &api.Held{})},
		&api.RegisterMessage{Self: a, Added: held(1, "1", "2", "3", "4", "5", "6")},
		&api.RegisterMessage{Removed: []string{digest.FromString("x").String(), "none"}},
	))
	f.Add(wire(&api.RegisterMessage{}, &api.RegisterMessage{Self: a, Added: held(-1, "x")}))
	f.Fuzz(func(t *testing.T, data []byte) {
		s := NewServer(ServerOptions{Layout: testLayout, Log: slog.New(slog.DiscardHandler)})
		s.limits.held, s.limits.registered, s.limits.registrants = 4, 6, 2
		member := &joinStream{ender: ender{done: make(chan struct{})}, out: newOutbox[*api.TrackerMessage](queueSlack)}
		if err := s.join(t.Context(), caller{}, member, &api.Hello{
			Digest: testDigest.String(), Size: testSize, Self: &api.Peer{Name: "m", Address: "x"}, Status: &api.Status{CanFetch: true},
		}); err != nil {
			t.Fatal(err)
		}
		streams := map[byte]*registerStream{}
		end := func(from byte, st *registerStream) {
			for d := range st.held {
				st.remove(d)
			}
			s.retire(st)
			delete(streams, from)
		}
		for from, one := range messages(data) {
			from %= 3
			msg := &api.RegisterMessage{}
			if proto.Unmarshal(one, msg) != nil {
				continue
			}
			st := streams[from]
			if st == nil {
				st = &registerStream{ender: ender{done: make(chan struct{})}, out: newOutbox[*api.RegisterCommand](queueSlack), held: map[digest.Digest]*blob{}}
				streams[from] = st
			}
			err := s.register(t.Context(), caller{}, st, msg)
			registrations(t, s)
			if err != nil {
				if status.Code(err) == codes.Unknown {
					t.Errorf("ended with %v", err)
				}
				end(from, st)
				registrations(t, s)
			}
		}
		for from, st := range streams {
			end(from, st)
		}
		member.leave()
		s.uncount(member)
		if blobs, members := s.Load(); blobs+members+s.registered+len(s.registrants)+s.units > 0 {
			t.Errorf("%d blobs, %d members, %d registrations of %d nodes and %d units are left", blobs, members, s.registered, len(s.registrants), s.units)
		}
	})
}

// registrations fails the test if a server does not have what it counts, or has too much.
func registrations(t *testing.T, s *Server) {
	t.Helper()
	seeders, held := 0, 0
	for d, b := range s.blobs {
		if d.Validate() != nil {
			t.Fatalf("%q is registered", d)
		}
		for name, r := range b.seeders.all {
			if seeders++; name == "" || r.size <= 0 || r.size > maxSize || r.stream.held[d] != b {
				t.Fatalf("%q has %d bytes of %s", name, r.size, d)
			}
		}
	}
	for name, r := range s.registrants {
		if held += r.held; r.held > s.limits.held || r.live == nil && r.held == 0 {
			t.Fatalf("%q holds %d", name, r.held)
		}
	}
	if seeders != s.registered || held != s.registered || s.registered > s.limits.registered || len(s.registrants) > s.limits.registrants {
		t.Fatalf("%d seeders, %d held, %d counted, of %d nodes", seeders, held, s.registered, len(s.registrants))
	}
}
