package work

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	imagewolfv1 "github.com/imagewolf/imagewolf/api/v1"
	"github.com/imagewolf/imagewolf/notifier/event"
)

type fakeRules func(event.Event) (Decision, error)

func (f fakeRules) Decide(_ context.Context, e event.Event) (Decision, error) { return f(e) }

type fakeNodes func(context.Context, *imagewolfv1.PrefetchRequest) (*imagewolfv1.PrefetchStatus, error)

func (f fakeNodes) Prefetch(ctx context.Context, r *imagewolfv1.PrefetchRequest, _ ...grpc.CallOption) (*imagewolfv1.PrefetchStatus, error) {
	return f(ctx, r)
}

type counted struct {
	nothing   []event.Kind
	requested []string
	failed    int
}

func (c *counted) Nothing(k event.Kind)  { c.nothing = append(c.nothing, k) }
func (c *counted) Requested(rule string) { c.requested = append(c.requested, rule) }
func (c *counted) Failed()               { c.failed++ }

var pushed = event.Event{Kind: event.Pushed, Registry: "r.example", Repository: "a", Tag: "1", Digest: digest.FromString("a"), DeliveryID: "d", Source: "hub"}

func web(event.Event) (Decision, error) {
	return Decision{Rule: "web", Request: &imagewolfv1.PrefetchRequest{Image: "r.example/a:1"}, Reason: "it matches"}, nil
}

func oneNode(_ context.Context, r *imagewolfv1.PrefetchRequest) (*imagewolfv1.PrefetchStatus, error) {
	return &imagewolfv1.PrefetchStatus{Request: r, Nodes: []*imagewolfv1.NodePrefetch{{Node: "n"}}}, nil
}

func refuses(c codes.Code) fakeNodes {
	return func(context.Context, *imagewolfv1.PrefetchRequest) (*imagewolfv1.PrefetchStatus, error) {
		return nil, status.Error(c, "the node says no")
	}
}

func TestWhatBecomesOfEvents(t *testing.T) {
	for _, c := range []struct {
		name    string
		rules   fakeRules
		nodes   fakeNodes
		again   bool
		nothing event.Kind
		said    string
	}{
		{"prefetched", web, oneNode, false, "", "an image is prefetched"},
		{"no rule", func(event.Event) (Decision, error) {
			return Decision{Kind: "no_match", Reason: "no rule matches"}, nil
		}, nil, false, "no_match", "no rule matches"},
		{"registry away", func(event.Event) (Decision, error) { return Decision{}, errors.New("registry away") }, nil, true, "", ""},
		{"nodes away", web, refuses(codes.Unavailable), true, "", ""},
		{"token wrong", web, refuses(codes.Unauthenticated), true, "", ""},
		{"node too full", web, refuses(codes.ResourceExhausted), true, "", ""},
		{"node confused", web, refuses(codes.Internal), true, "", ""},
		{"no such request", web, refuses(codes.InvalidArgument), false, Rejected, "the node says no"},
		{"no node", web, func(context.Context, *imagewolfv1.PrefetchRequest) (*imagewolfv1.PrefetchStatus, error) {
			return &imagewolfv1.PrefetchStatus{}, nil
		}, false, NoNode, "no node is selected"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var log bytes.Buffer
			count := &counted{}
			err := New(c.rules, c.nodes, count, slog.New(slog.NewTextHandler(&log, nil))).Work(t.Context(), pushed)
			if errors.Is(err, event.ErrNothing) != (c.nothing != "") {
				t.Errorf("the queue is told %v", err)
			}
			if (err != nil) != (c.again || c.nothing != "") || (count.failed == 1) != c.again {
				t.Errorf("%v, %+v", err, count)
			}
			if (len(count.nothing) == 1) != (c.nothing != "") || c.nothing != "" && count.nothing[0] != c.nothing {
				t.Errorf("%+v", count)
			}
			if (len(count.requested) == 1) != (c.name == "prefetched") {
				t.Errorf("%+v", count)
			}
			if c.said != "" && (!strings.Contains(log.String(), c.said) || !strings.Contains(log.String(), "image=r.example/a:1@sha256:")) || c.said == "" && log.Len() > 0 {
				t.Errorf("log: %s", &log)
			}
		})
	}
}

// A node that says nothing is asked again, later.
func TestANodeThatDoesNotAnswerIsWaitedForSoLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		hangs := func(ctx context.Context, _ *imagewolfv1.PrefetchRequest) (*imagewolfv1.PrefetchStatus, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		err := New(fakeRules(web), fakeNodes(hangs), &counted{}, nil).Work(t.Context(), pushed)
		if err == nil || time.Since(start) != askTime {
			t.Errorf("%v after %s", err, time.Since(start))
		}
	})
}

func TestTheSameEventIsTheSameRequest(t *testing.T) {
	id := RequestID(pushed)
	if !regexp.MustCompile(`^[A-Za-z0-9_-]{1,64}$`).MatchString(id) {
		t.Errorf("id %q", id)
	}
	seen := map[string]bool{id: true}
	for i, change := range []func(*event.Event){
		func(e *event.Event) { e.DeliveryID = "e" },
		func(e *event.Event) { e.Registry = "s.example" },
		func(e *event.Event) { e.Repository = "b" },
		func(e *event.Event) { e.Tag = "2" },
		func(e *event.Event) { e.Digest = "" },
		func(e *event.Event) { e.Repository, e.Tag = "a1", "" },
	} {
		e := pushed
		change(&e)
		if other := RequestID(e); seen[other] {
			t.Errorf("change %d: %s again", i, other)
		}
		seen[RequestID(e)] = true
	}
	e := pushed
	e.Source, e.Time = "other", time.Now()
	var asked []string
	nodes := func(ctx context.Context, r *imagewolfv1.PrefetchRequest) (*imagewolfv1.PrefetchStatus, error) {
		asked = append(asked, r.Id)
		return oneNode(ctx, r)
	}
	w := New(fakeRules(web), fakeNodes(nodes), &counted{}, nil)
	if err := errors.Join(w.Work(t.Context(), pushed), w.Work(t.Context(), e)); err != nil || len(asked) != 2 || asked[0] != id || asked[1] != id {
		t.Errorf("%v, asked %q", err, asked)
	}
}
