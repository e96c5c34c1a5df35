// Package work makes prefetches of events: it has each of them decided, and
// hands what was decided to a node. What leads to nothing is logged and counted
// with its reason; what could not be decided or handed over is tried again.
package work

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/base32"
	"encoding/binary"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	imagewolfv1 "github.com/imagewolf/imagewolf/api/v1"
	"github.com/imagewolf/imagewolf/notifier/event"
)

// Why events lead to nothing here, beside what rules say.
const (
	NoNode   event.Kind = "no_node"  // the rule selects nodes, and there are none such
	Rejected event.Kind = "rejected" // the nodes do not take the request, and never will
)

// askTime is how long a node may take to take a request.
const askTime = 30 * time.Second

// Decision is what is to be done about an event.
type Decision struct {
	Rule    string                       // that decided; "" if none did
	Request *imagewolfv1.PrefetchRequest // nil: nothing is to be done
	Reason  string                       // why nothing, or what was decided, in words
	Kind    event.Kind                   // of the reason why nothing
}

// Rules decide what becomes of an event. Its errors are those that may pass.
type Rules interface {
	Decide(ctx context.Context, e event.Event) (Decision, error)
}

// Nodes take requests.
type Nodes interface {
	Prefetch(ctx context.Context, in *imagewolfv1.PrefetchRequest, opts ...grpc.CallOption) (*imagewolfv1.PrefetchStatus, error)
}

// Counts are told what became of events. The methods do not block.
type Counts interface {
	// Nothing counts an event that leads to nothing.
	Nothing(why event.Kind)
	// Requested counts a request that the nodes took.
	Requested(rule string)
	// Failed counts a try that will be repeated.
	Failed()
}

// Worker works events off. It is safe for concurrent use.
type Worker struct {
	rules  Rules
	nodes  Nodes
	counts Counts
	log    *slog.Logger
}

// New returns a worker. A nil log logs nothing.
func New(r Rules, n Nodes, c Counts, log *slog.Logger) *Worker {
	return &Worker{rules: r, nodes: n, counts: c, log: cmp.Or(log, slog.New(slog.DiscardHandler))}
}

// Work works one event off. An error is event.ErrNothing, or one that may pass: the
// event is to be tried again later.
func (w *Worker) Work(ctx context.Context, e event.Event) error {
	d, err := w.rules.Decide(ctx, e)
	if err != nil {
		w.counts.Failed()
		return err
	}
	log := w.log.With("image", e.Image(), "from", e.Source, "rule", d.Rule)
	if d.Request == nil {
		log.Info("an event leads to nothing", "kind", string(d.Kind), "reason", d.Reason)
		w.counts.Nothing(d.Kind)
		return event.ErrNothing
	}
	d.Request.Id = RequestID(e)
	s, err := Ask(ctx, w.nodes, d.Request)
	switch {
	case err != nil && Final(err):
		log.Warn("an event leads to nothing: the nodes do not take the request", "kind", string(Rejected), "reason", status.Convert(err).Message())
		w.counts.Nothing(Rejected)
		return event.ErrNothing
	case err != nil:
		w.counts.Failed()
		return err
	case len(s.GetNodes()) == 0:
		log.Warn("an event leads to nothing: no node is selected", "kind", string(NoNode), "nodes", d.Request.GetNodes().GetLabels())
		w.counts.Nothing(NoNode)
		return event.ErrNothing
	default:
		log.Info("an image is prefetched", "request", d.Request.Id, "digest", d.Request.Digest, "nodes", len(s.GetNodes()), "reason", d.Reason)
		w.counts.Requested(d.Rule)
	}
	return nil
}

// Ask hands a request to a node, with a bound on time.
func Ask(ctx context.Context, n Nodes, r *imagewolfv1.PrefetchRequest) (*imagewolfv1.PrefetchStatus, error) {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	s, err := n.Prefetch(ctx, r)
	if err != nil {
		return nil, fmt.Errorf("ask the nodes to prefetch: %w", err)
	}
	return s, nil
}

// Final tells whether a node's answer would always be the same. What an
// operator can put right, such as a token, is not final: events wait meanwhile.
func Final(err error) bool {
	switch status.Code(err) {
	case codes.InvalidArgument, codes.AlreadyExists, codes.OutOfRange:
		return true
	default:
		return false
	}
}

// RequestID returns the id of the request that an event leads to, the same one
// however often the event comes and through however many notifiers: the nodes
// know a request that comes again.
func RequestID(e event.Event) string {
	h := sha256.New()
	for _, part := range []string{e.DeliveryID, e.Registry, e.Repository, e.Tag, e.Digest.String()} {
		var n [8]byte
		binary.BigEndian.PutUint64(n[:], uint64(len(part)))
		h.Write(n[:])
		h.Write([]byte(part))
	}
	return "event-" + strings.ToLower(base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(h.Sum(nil)[:16]))
}
