package event

import (
	"encoding/json"
	"net/http"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"slices"
	"strings"
	"testing"
)

// peak returns how many bytes the heap grew by at most while do ran.
func peak(do func()) uint64 {
	defer debug.SetGCPercent(debug.SetGCPercent(20))
	heap := func() uint64 {
		s := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}}
		metrics.Read(s)
		return s[0].Value.Uint64()
	}
	runtime.GC()
	before, done, most := heap(), make(chan struct{}), make(chan uint64)
	go func() {
		m := before
		for {
			m = max(m, heap())
			select {
			case <-done:
				most <- m
				return
			default:
				runtime.Gosched()
			}
		}
	}()
	do()
	close(done)
	return <-most - before
}

// An array is read element by element, so that what a body may have decoded takes no
// more than a few times its size, however small its elements are.
func TestLargeArraysTakeLittleMemory(t *testing.T) {
	const size = 1 << 20
	array := func(element string) string {
		return "[" + strings.Repeat(element+",", size/(len(element)+1)) + element + "]"
	}
	for name, c := range map[string]struct {
		webhook, body string
		pushes        int
	}{
		"distribution": {"distribution", `{"events":` + array("{}") + `}`, 0},
		"event grid":   {"acr", array("{}"), 0},
		"harbor": {"harbor", `{"type":"PUSH_ARTIFACT","event_data":{"repository":{"repo_full_name":"a/b"},"resources":[` +
			strings.Repeat(`{"tag":"a"},`, 1000) + array("{}")[1:] + `}}`, 1000},
		"quay": {"quay", `{"docker_url":"quay.io/a/b","updated_tags":` + array(`"a"`) + `}`, 1000},
	} {
		var r Result
		var err error
		grown := peak(func() {
			r, err = Decode(c.webhook, Delivery{Header: http.Header{}, Body: []byte(c.body), Registry: "registry.example.com", MaxEvents: 1000})
		})
		if err != nil || len(r.Events) != c.pushes || len(r.Ignored) == 0 {
			t.Errorf("%s: %d events, %d ignored, %v", name, len(r.Events), len(r.Ignored), err)
		}
		if grown > 8*size {
			t.Errorf("%s: the heap grew by %d KiB over a body of %d", name, grown>>10, len(c.body)>>10)
		}
	}
}

func TestElements(t *testing.T) {
	for array, want := range map[string]string{
		"": "", "null": "", "[]": "", " [ ] ": "", `["a"]`: "a", `["a", null ,"b"]`: "a||b", // as in a slice, null leaves the zero value
		`{}`: "error", `"a"`: "error", `["a",1,"b"]`: "a|error", `[1]`: "error",
	} {
		var got []string
		for s, err := range elements[string](json.RawMessage(array)) {
			if err != nil {
				s = "error"
			}
			got = append(got, s)
		}
		if strings.Join(got, "|") != want {
			t.Errorf("%s: got %q, want %q", array, got, want)
		}
	}
	var first []string
	for s := range elements[string](json.RawMessage(`["a","b"]`)) {
		first = append(first, s)
		break
	}
	if !slices.Equal(first, []string{"a"}) {
		t.Errorf("stopped after the first: %q", first)
	}
}
