package tracker

import (
	"encoding/binary"
	"iter"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	api "github.com/imagewolf/imagewolf/api/v1"
)

// wire is messages as they come, each behind its length and who sends it.
func wire(messages ...proto.Message) []byte {
	var data []byte
	for i, m := range messages {
		b, err := proto.Marshal(m)
		if err != nil {
			panic(err)
		}
		data = append(data, byte('a'+i%3))
		data = append(binary.AppendUvarint(data, uint64(len(b))), b...)
	}
	return data
}

// FuzzMessages feeds a machine with what members send: of each the first message is a
// Hello, the rest are of a member. Neither may panic, nor make it lose count.
func FuzzMessages(f *testing.F) {
	hello := func(name string) *api.Hello {
		return &api.Hello{
			Size: testSize, Self: &api.Peer{Name: name, Address: "127.0.0.1:1"}, Status: &api.Status{CanFetch: true},
			Announced: []*api.Announce{segmentOf(0, 1)},
		}
	}
	f.Add(wire(hello("a"), hello("b"), hello("c"),
		&api.MemberMessage{Message: &api.MemberMessage_Announce{Announce: segmentOf(1, 2)}},
		&api.MemberMessage{Message: &api.MemberMessage_Bad{Bad: &api.Bad{}}},
		&api.MemberMessage{Message: &api.MemberMessage_Ask{Ask: &api.Ask{Silent: []string{"a"}}}},
		&api.MemberMessage{Message: &api.MemberMessage_Status{Status: &api.Status{Whole: true, Prefix: testSize}}},
		&api.MemberMessage{Message: &api.MemberMessage_BadPieces{BadPieces: &api.BadPieces{Pieces: segmentOf(0, 1).GetPieces(), Peers: []string{"a"}}}},
		&api.MemberMessage{Message: &api.MemberMessage_Bad{Bad: &api.Bad{Own: true}}},
	))
	f.Fuzz(func(t *testing.T, data []byte) {
		m := NewMachine(testDigest, testSize, MachineOptions{StallTimeout: testStall, Layout: testLayout})
		joined := map[byte]string{}
		now := epoch
		for from, one := range messages(data) {
			now = now.Add(100 * time.Millisecond)
			if name, ok := joined[from]; !ok {
				var h api.Hello
				if proto.Unmarshal(one, &h) != nil || checkHello(&h) != nil {
					continue
				}
				if _, err := m.Join(now, &h); err == nil {
					joined[from] = h.GetSelf().GetName()
				}
			} else if msg := (&api.MemberMessage{}); proto.Unmarshal(one, msg) == nil {
				m.Message(now, name, msg)
			}
			m.Tick(now)
			counts(t, m)
		}
	})
}

// messages are what a fuzz target is given: a byte that says who sends a message, its
// length and its bytes, of which the last ones may be missing.
func messages(data []byte) iter.Seq2[byte, []byte] {
	return func(yield func(byte, []byte) bool) {
		for len(data) > 1 {
			n, used := binary.Uvarint(data[1:])
			if used <= 0 {
				return
			}
			from, rest := data[0], data[1+used:]
			end := min(n, uint64(len(rest)))
			if data = rest[end:]; !yield(from, rest[:end]) {
				return
			}
		}
	}
}

// counts fails the test if what a machine counts cannot be.
func counts(t *testing.T, m *Machine) {
	t.Helper()
	if m.starving < 0 || m.covered < 0 || m.covered > len(m.segs) || len(m.pool) > len(m.list) {
		t.Fatalf("starving %d covered %d pool %d", m.starving, m.covered, len(m.pool))
	}
	covered := 0
	for i := range m.segs {
		if m.segs[i].holders() > 0 {
			covered++
		}
	}
	if covered != m.covered {
		t.Fatalf("%d segments are held, %d counted", covered, m.covered)
	}
	for _, x := range m.list {
		held := 0
		for i, has := range x.has {
			if has {
				held++
			}
			if has && m.segs[i].pieces == nil {
				t.Fatalf("%s holds segment %d, of which no hashes are known", x.name, i)
			}
		}
		if held != x.held {
			t.Fatalf("%s holds %d segments, %d counted", x.name, held, x.held)
		}
	}
}
