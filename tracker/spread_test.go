package tracker

import (
	"fmt"
	"testing"
	"time"

	api "github.com/imagewolf/imagewolf/api/v1"
)

// Each segment leaves the fetcher once, everyone hears of it with few peers,
// and every leecher is connected, over whatever many others, to the first hop.
func TestSpread(t *testing.T) {
	for _, zones := range []int{1, 2, 3, 24} {
		m := NewMachine(testDigest, 64*mib, MachineOptions{Layout: testLayout})
		const leechers = 24
		join := func(name, zone string, st *api.Status) {
			if _, err := m.Join(epoch, &api.Hello{Size: 64 * mib, Self: &api.Peer{Name: name, Address: name}, Zone: zone, Status: st}); err != nil {
				t.Fatal(err)
			}
		}
		join("f", "z0", &api.Status{Fetching: true})
		for i := range leechers {
			join(fmt.Sprintf("n%02d", i), fmt.Sprintf("z%d", i%zones), &api.Status{CanFetch: true})
		}
		hops := map[string]int{}
		for i := range 64 {
			out := m.Message(epoch, "f", &api.MemberMessage{Message: &api.MemberMessage_Announce{Announce: segmentOf(i, 1)}})
			if len(out) != leechers {
				t.Fatalf("%d zones: %d messages", zones, len(out))
			}
			links := map[string][]string{}
			first := ""
			for _, c := range out {
				seg := c.Msg.GetSegment()
				if len(seg.GetPieces()) == 0 || len(seg.GetPeers()) > peersPerSegment+1 {
					t.Errorf("%d zones: %v", zones, c)
				}
				for _, p := range seg.GetPeers() {
					if p.GetName() == "f" {
						if first != "" {
							t.Errorf("%d zones: segment %d has first hops %s and %s", zones, i, first, c.To)
						}
						first = c.To
						continue
					}
					links[c.To] = append(links[c.To], p.GetName())
					links[p.GetName()] = append(links[p.GetName()], c.To)
				}
			}
			hops[first]++
			// The hop may be through before the last hears of the segment.
			if mates := leechers/zones - 1; out[0].To != first || len(links[first]) < min(mates, peersPerSegment) {
				t.Errorf("%d zones: %s is told of segment %d first, its hop %s is known to %v", zones, out[0].To, i, first, links[first])
			}
			seen := map[string]bool{first: true}
			for todo := []string{first}; len(todo) > 0; todo = todo[1:] {
				for _, o := range links[todo[0]] {
					if !seen[o] {
						seen[o] = true
						todo = append(todo, o)
					}
				}
			}
			if len(seen) != leechers {
				t.Errorf("%d zones: segment %d reaches %d of %d", zones, i, len(seen), leechers)
			}
		}
		// They take turns, those of the fetcher's zone.
		turn := 64 / (leechers / zones)
		for name, n := range hops {
			if n < turn-1 || n > turn+1 {
				t.Errorf("%d zones: %s is first hop of %d segments", zones, name, n)
			}
		}
	}
}

// BenchmarkCrowd is a blob of 64 segments that a thousand members pull.
func BenchmarkCrowd(b *testing.B) {
	for b.Loop() {
		m := NewMachine(testDigest, 64*mib, MachineOptions{Layout: testLayout})
		const crowd = 1000
		for i := range crowd {
			name := fmt.Sprint(i)
			if _, err := m.Join(epoch, &api.Hello{Size: 64 * mib, Self: &api.Peer{Name: name, Address: name}, Status: &api.Status{CanFetch: true, Rank: 1}}); err != nil {
				b.Fatal(err)
			}
		}
		m.Tick(epoch.Add(decideGrace))
		for i := range 64 {
			now := epoch.Add(time.Duration(i) * 40 * time.Millisecond)
			m.Message(now, m.fetchers[0].name, &api.MemberMessage{Message: &api.MemberMessage_Announce{Announce: segmentOf(i, 1)}})
			for k := range crowd {
				m.Message(now, fmt.Sprint(k), &api.MemberMessage{Message: &api.MemberMessage_Announce{Announce: segmentOf(i, 1)}})
				m.Message(now, fmt.Sprint(k), &api.MemberMessage{Message: &api.MemberMessage_Status{Status: &api.Status{Present: int64(i+1) * mib, CanFetch: k != 0, Fetching: m.members[fmt.Sprint(k)] == m.fetchers[0]}}})
			}
		}
		for k := range crowd / 2 {
			m.Leave(epoch.Add(time.Minute), fmt.Sprint(k))
		}
	}
}
