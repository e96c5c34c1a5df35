package fanout

import (
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	imagewolfv1 "github.com/imagewolf/imagewolf/api/v1"
)

func TestBadRequestNamesTheThing(t *testing.T) {
	for name, c := range map[string]struct {
		r    *imagewolfv1.PrefetchRequest
		want string
	}{
		"nothing":          {nil, "request"},
		"no image":         {&imagewolfv1.PrefetchRequest{}, "image:"},
		"upper case":       {&imagewolfv1.PrefetchRequest{Image: "Team/App"}, "image:"},
		"long image":       {&imagewolfv1.PrefetchRequest{Image: "a/" + strings.Repeat("b/", 600) + "c"}, "image:"},
		"digest":           {&imagewolfv1.PrefetchRequest{Image: image, Digest: "sha256:12"}, "digest:"},
		"two digests":      {&imagewolfv1.PrefetchRequest{Image: "a@" + testDigest, Digest: "sha256:" + strings.Repeat("1", 64)}, "differs"},
		"platform":         {&imagewolfv1.PrefetchRequest{Image: image, Platforms: []string{"linux/arm64", "lin ux"}}, "platforms: \"lin ux\""},
		"no platform":      {&imagewolfv1.PrefetchRequest{Image: image, Platforms: []string{""}}, "platforms:"},
		"many platforms":   {&imagewolfv1.PrefetchRequest{Image: image, Platforms: make([]string, 17)}, "at most 16"},
		"namespace":        {&imagewolfv1.PrefetchRequest{Image: image, Namespace: "k8s io"}, "namespace:"},
		"selector":         {&imagewolfv1.PrefetchRequest{Image: image, Nodes: &imagewolfv1.NodeSelection{Labels: "zone=="}, Priority: 1}, ""},
		"broken selector":  {&imagewolfv1.PrefetchRequest{Image: image, Nodes: &imagewolfv1.NodeSelection{Labels: "zone in a"}}, "nodes.labels:"},
		"long selector":    {&imagewolfv1.PrefetchRequest{Image: image, Nodes: &imagewolfv1.NodeSelection{Labels: strings.Repeat("a,", 4000)}}, "nodes.labels:"},
		"percent":          {&imagewolfv1.PrefetchRequest{Image: image, Nodes: &imagewolfv1.NodeSelection{Percent: 101}}, "nodes.percent:"},
		"negative timeout": {&imagewolfv1.PrefetchRequest{Image: image, TimeoutSeconds: -1}, "timeout:"},
		"long timeout":     {&imagewolfv1.PrefetchRequest{Image: image, TimeoutSeconds: 86401}, "timeout:"},
		"good":             {&imagewolfv1.PrefetchRequest{Image: "redis", Digest: testDigest, Platforms: []string{"linux/arm/v7"}, Namespace: "k8s.io", Nodes: &imagewolfv1.NodeSelection{Labels: "a,!b,c in (d,e),f!=g"}}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			err := check(c.r)
			if c.want == "" {
				if err != nil {
					t.Error(err)
				}
			} else if code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %s", err, c.want)
			}
		})
	}
	for id, good := range map[string]bool{"": false, "a b": false, strings.Repeat("a", 65): false, "../x": false, "Ab_-9": true} {
		if err := checkID(id); (err == nil) != good {
			t.Errorf("%q: %v", id, err)
		}
	}
}

func TestCutKeepsText(t *testing.T) {
	for _, s := range []string{"", "short", strings.Repeat("a", maxReason), strings.Repeat("é", maxReason), strings.Repeat("a", 10*maxReason)} {
		got := cut(s)
		if len(got) > maxReason || len(s) <= maxReason && got != s || !strings.HasPrefix(s, strings.TrimSuffix(got, "…")) {
			t.Errorf("%d bytes became %d: %q", len(s), len(got), got)
		}
	}
}

// FuzzStart has a member say anything: what is taken can be kept, and read again.
func FuzzStart(f *testing.F) {
	for _, in := range []*imagewolfv1.StartRequest{
		{},
		{Request: &imagewolfv1.PrefetchRequest{Id: "x", Image: image, Nodes: &imagewolfv1.NodeSelection{Labels: "zone in (a,b)"}}, Nodes: []string{"a", "b"}, Coordinator: "b", Age: 5},
		{Request: &imagewolfv1.PrefetchRequest{Id: "x", Image: "redis@" + testDigest, Digest: testDigest, Platforms: []string{"linux/arm64"}, Concurrency: 1, TimeoutSeconds: 3}, Nodes: []string{"a"}, Coordinator: "a", Canceled: true},
	} {
		b, err := proto.Marshal(in)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		in := &imagewolfv1.StartRequest{}
		if proto.Unmarshal(b, in) != nil {
			return
		}
		if err := checkStart(in, "a"); err != nil {
			if code(err) != codes.InvalidArgument {
				t.Errorf("refused with %v", err)
			}
			return
		}
		r := newRecord(in, time.Now(), "a")
		value, err := r.encode()
		if err != nil {
			t.Fatal(err)
		}
		again, err := decode(value, "a")
		if err != nil {
			t.Fatalf("%v is kept and cannot be read: %v", in, err)
		}
		if !proto.Equal(again.start, in) || again.index != r.index || again.waits != r.waits || again.canceled != in.Canceled {
			t.Errorf("kept %v, read %v", in, again.start)
		}
		if n, err := portion([]string{"a", "b", "c"}, in.Request); err != nil || len(n) > 3 {
			t.Errorf("%q, %v", n, err)
		}
	})
}

// FuzzReport has a member answer anything.
func FuzzReport(f *testing.F) {
	b, err := proto.Marshal(&imagewolfv1.ReportResponse{
		Requests: []*imagewolfv1.StartRequest{{Request: &imagewolfv1.PrefetchRequest{Id: "x", Image: image}, Nodes: []string{"a", "b"}, Coordinator: "b"}},
		States:   []*imagewolfv1.NodePrefetch{{Node: "b", State: done, Bytes: 3, Total: 4, Reason: "why"}},
	})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		in := &imagewolfv1.ReportResponse{}
		if proto.Unmarshal(b, in) != nil {
			return
		}
		if s := stateIn(in, "b", "x"); s != nil && (s.Node != "b" || s.Bytes < 0 || s.Total < 0 || len(s.Reason) > maxReason || len(s.Digest) > maxReason) {
			t.Errorf("believed: %v", s)
		}
		for _, r := range in.Requests {
			k, ok := knownFrom(r, time.Now())
			if !ok {
				continue
			}
			for _, n := range k.start.Nodes {
				if s := k.missing(n, true); s.Node != n {
					t.Errorf("%v", s)
				}
			}
		}
	})
}
