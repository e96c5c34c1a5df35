package fanout

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"slices"
	"sync"

	"github.com/distribution/reference"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"k8s.io/apimachinery/pkg/labels"

	imagewolfv1 "github.com/imagewolf/imagewolf/api/v1"
)

// choose returns the names, sorted, of the members that a request means. Those
// that have to be asked and do not answer in time are not among them.
func (f *Fanout) choose(ctx context.Context, r *imagewolfv1.PrefetchRequest) ([]string, error) {
	selector, err := parseSelector(r.Nodes.GetLabels())
	if err != nil {
		return nil, err
	}
	members, err := f.o.Cluster.Members(ctx)
	if err != nil {
		return nil, status.Errorf(codes.Unavailable, "the members of the cluster are not known: %v", err)
	}
	var names []string
	for _, m := range members {
		if selector.Matches(labels.Set(m.Labels)) {
			names = append(names, m.Name)
		}
	}
	if r.Nodes.GetRunningRepository() {
		names = f.offered(ctx, r, names)
	}
	names, err = portion(names, r)
	if err != nil {
		return nil, err
	}
	if len(names) > maxNodes {
		return nil, invalid("nodes: %d are selected, at most %d: select fewer by labels or count", len(names), maxNodes)
	}
	slices.Sort(names)
	return slices.Compact(names), nil
}

// offered returns those of the nodes that have an image of the repository.
func (f *Fanout) offered(ctx context.Context, r *imagewolfv1.PrefetchRequest, names []string) []string {
	var mu sync.Mutex
	var out []string
	in := &imagewolfv1.OfferRequest{Image: r.Image, Namespace: r.Namespace}
	f.askFor(ctx, offerTimeout, names, func(ctx context.Context, name string, p imagewolfv1.PrefetcherClient) {
		answer, err := p.Offer(ctx, in)
		if err != nil {
			f.o.Log.Warn("node does not say whether it has the repository, and is not selected", "node", name, "image", r.Image, "err", err)
			return
		}
		if answer.HasRepository {
			mu.Lock()
			defer mu.Unlock()
			out = append(out, name)
		}
	})
	return out
}

// portion returns the part of the nodes that count and percent leave: the same
// ones for every image of a repository, and as few others as can be when nodes
// come and go (rendezvous hashing).
func portion(names []string, r *imagewolfv1.PrefetchRequest) ([]string, error) {
	n := len(names)
	if p := int(r.Nodes.GetPercent()); p > 0 {
		n = (n*p + 99) / 100
	}
	if c := int64(r.Nodes.GetCount()); c > 0 {
		n = int(min(int64(n), c))
	}
	if n == len(names) {
		return names, nil
	}
	named, err := parseImage(r.Image)
	if err != nil {
		return nil, err
	}
	repository := reference.TrimNamed(named).Name()
	weight := func(name string) uint64 {
		// A name has no zero byte, so no other pair is hashed the same.
		sum := sha256.Sum256([]byte(name + "\x00" + repository))
		return binary.BigEndian.Uint64(sum[:])
	}
	ranked := slices.SortedFunc(slices.Values(names), func(a, b string) int {
		return cmp.Or(cmp.Compare(weight(b), weight(a)), cmp.Compare(a, b))
	})
	return ranked[:n], nil
}

// position is where a node is in a sorted list; -1 if it is not.
func position(nodes []string, name string) int {
	if i, ok := slices.BinarySearch(nodes, name); ok {
		return i
	}
	return -1
}
