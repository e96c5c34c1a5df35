// Package metrics holds what a node counts, and serves it to Prometheus. Beside
// notifier/metrics it is the only importer of Prometheus' library: the packages
// that count declare the few methods that they call, and package node hands them
// what is here.
//
// No label has a value for each blob or peer: there is no bound on them.
package metrics

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/imagewolf/imagewolf/internal/serve"
)

const (
	// retry is how long to wait before an address is listened on again.
	retry = 5 * time.Second
	// maxScrapes are answered at a time; more are refused.
	maxScrapes = 4
)

// Why a peer was shut out of a blob.
const (
	BadPiece  = "bad piece"  // it sent a piece that did not have its hash
	BadHashes = "bad hashes" // the bytes by its piece hashes were not the blob
)

// Why a client was sent to the registry though nobody had decided that its node
// is the one to fetch.
const (
	NoCluster  = "no cluster"  // the node's own side of the cluster is down
	NoTracker  = "no tracker"  // none was reached in time
	NoProgress = "no progress" // not a byte came for max_wait
	WrongBytes = "wrong bytes" // what came from peers was wrong twice
)

// Now is asked at every scrape. The functions are required; they are called from
// any goroutine and return what is so at that moment.
type Now struct {
	Members        func() int // live nodes that this one knows, itself included
	TrackerBlobs   func() int // blobs that this node tracks
	TrackerMembers func() int // their members, one for each blob that it joined

	PrefetchQueued  func() int // requests to prefetch that wait on this node
	PrefetchPulling func() int // those that it pulls
}

// Metrics is what one node counts, from New on. Safe for concurrent use.
type Metrics struct {
	registry  *prometheus.Registry
	panics    *prometheus.CounterVec
	fallbacks *prometheus.CounterVec
	swarm     Swarm
	tracker   Tracker
	store     Store
	prefetch  Prefetch
}

// New returns metrics that are all zero, those of each part that is named, of
// which a panic may be contained, too.
func New(now Now, parts ...string) *Metrics {
	m := &Metrics{registry: prometheus.NewRegistry()}
	m.registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	m.panics = m.counters("panics_total", "part",
		"Panics that were contained: the part of the node named by the label was ended or begun anew, the rest went on.", parts...)
	m.fallbacks = m.counters("registry_fallbacks_total", "reason",
		"Times that a blob was pulled from the registry because no peer could be had for it or none delivered.",
		NoCluster, NoTracker, NoProgress, WrongBytes)
	out := m.counters("peers_shut_out_total", "reason",
		"Peers that were shut out of a blob because they were wrong about it: for a bad piece by this node, for bad hashes by this node as the blob's tracker.",
		BadPiece, BadHashes)
	received := m.counter("peer_received_bytes_total", "Bytes of blobs that peers have sent to this node and that it wanted, right or wrong.")
	m.swarm = Swarm{
		received: received, shutOut: out.WithLabelValues(BadPiece),
		sent: m.counter("peer_sent_bytes_total", "Bytes of blobs that this node has sent to peers."),
	}
	m.tracker = Tracker{
		shutOut:    out.WithLabelValues(BadHashes),
		broke:      m.counter("promises_broken_total", "Members of blobs that this node tracks that did not do as they had said, such as to send what they had announced, or were found wrong by one other member, and times that one was refused because it asked for more than a node may; the log has their names, and says whether they were shut out of the blob."),
		full:       m.counter("tracker_full_total", "Times that this node as tracker refused a node's blobs because all nodes together have as many here as it can hold."),
		mismatched: m.counter("tracker_mismatches_total", "Reports to this node as tracker that the bytes of a blob did not have its digest."),
	}
	m.store = Store{
		fetched:    m.counter("registry_received_bytes_total", "Bytes of blobs that containerd has written to this node: what came from registries, and imports."),
		completed:  m.counter("blobs_completed_total", "Blobs that became whole and right on this node, wherever they came from."),
		failed:     m.counter("blobs_failed_total", "Times that the bytes of an unfinished blob could not be kept, as on a full disk, or were wrong and their client's pull failed."),
		mismatched: m.counter("digest_mismatches_total", "Times that all bytes of a blob were here and did not have its digest; they were thrown away."),
	}
	m.prefetch = Prefetch{
		requested: m.counter("prefetch_requests_total", "Requests to prefetch an image that this node has taken, for whichever nodes."),
		retried:   m.counter("prefetch_retries_total", "Pulls for a request on this node that failed and are tried again."),
		bytes:     m.counter("prefetch_bytes_total", "Bytes of the images that this node has prefetched, wherever they came from and whether they were here before or not."),
		refused:   m.counter("node_api_refused_total", "Calls of the Node API on the network that did not have its token."),
		ended: m.counters("prefetch_ended_total", "result", "Requests that have ended on this node.",
			"done", "failed", "canceled", "superseded"),
	}
	m.gauge("prefetch_queued", "Requests to prefetch an image that wait on this node.", now.PrefetchQueued)
	m.gauge("prefetch_pulling", "Requests to prefetch an image that this node is pulling for.", now.PrefetchPulling)
	m.gauge("members", "Live nodes of the cluster that this node knows, itself included.", now.Members)
	m.gauge("tracker_blobs", "Blobs that have members or seeders and that this node tracks.", now.TrackerBlobs)
	m.gauge("tracker_members", "Members of the blobs that this node tracks; a node counts once for every blob.", now.TrackerMembers)
	return m
}

const namespace = "imagewolf"

func (m *Metrics) counter(name, help string) prometheus.Counter {
	c := prometheus.NewCounter(prometheus.CounterOpts{Namespace: namespace, Name: name, Help: help})
	m.registry.MustRegister(c)
	return c
}

// counters are one for every value of a label. Those that are known begin at
// zero, so that a first event is seen as a rise.
func (m *Metrics) counters(name, label, help string, values ...string) *prometheus.CounterVec {
	c := prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: namespace, Name: name, Help: help}, []string{label})
	m.registry.MustRegister(c)
	for _, v := range values {
		c.WithLabelValues(v)
	}
	return c
}

func (m *Metrics) gauge(name, help string, now func() int) {
	m.registry.MustRegister(prometheus.NewGaugeFunc(
		prometheus.GaugeOpts{Namespace: namespace, Name: name, Help: help}, func() float64 { return float64(now()) }))
}

// Panicked counts a panic that was contained. The part is one of those that New
// was given.
func (m *Metrics) Panicked(part string) { m.panics.WithLabelValues(part).Inc() }

// FellBack counts a client that was sent to the registry for one of the reasons
// above.
func (m *Metrics) FellBack(reason string) { m.fallbacks.WithLabelValues(reason).Inc() }

// Swarm returns what package swarm counts with.
func (m *Metrics) Swarm() Swarm { return m.swarm }

// Tracker returns what package tracker counts with.
func (m *Metrics) Tracker() Tracker { return m.tracker }

// Store returns what package plugin/store counts with.
func (m *Metrics) Store() Store { return m.store }

// Prefetch returns what package prefetch/fanout counts with, and the Node API.
func (m *Metrics) Prefetch() Prefetch { return m.prefetch }

// Prefetch counts what becomes of requests to prefetch.
type Prefetch struct {
	requested, retried, bytes, refused prometheus.Counter
	ended                              *prometheus.CounterVec
}

// Requested counts a request that this node has taken.
func (p Prefetch) Requested() { p.requested.Inc() }

// Retried counts a pull that failed and is tried again.
func (p Prefetch) Retried() { p.retried.Inc() }

// Ended counts the end of a request on this node: done, failed or canceled.
func (p Prefetch) Ended(result string) { p.ended.WithLabelValues(result).Inc() }

// Pulled counts the bytes of an image that was prefetched.
func (p Prefetch) Pulled(n int64) { p.bytes.Add(float64(n)) }

// Refused counts a call without the token.
func (p Prefetch) Refused() { p.refused.Inc() }

// Swarm counts the exchange with peers.
type Swarm struct{ received, sent, shutOut prometheus.Counter }

// Received counts bytes of a blob that a peer has sent.
func (s Swarm) Received(n int) { s.received.Add(float64(n)) }

// Sent counts bytes of a blob that a peer was sent.
func (s Swarm) Sent(n int) { s.sent.Add(float64(n)) }

// ShutOut counts a peer that was shut out of a blob.
func (s Swarm) ShutOut() { s.shutOut.Inc() }

// Tracker counts what members make known to be wrong.
type Tracker struct{ shutOut, broke, full, mismatched prometheus.Counter }

// ShutOut counts a member that was shut out of a blob for its piece hashes.
func (t Tracker) ShutOut() { t.shutOut.Inc() }

// Broke counts a member that did not do as it had said, or asked for more than it may.
func (t Tracker) Broke() { t.broke.Inc() }

// Full counts what was refused because the tracker is full.
func (t Tracker) Full() { t.full.Inc() }

// Mismatched counts a report that a blob's bytes were wrong.
func (t Tracker) Mismatched() { t.mismatched.Inc() }

// Store counts what becomes of blobs.
type Store struct{ fetched, completed, failed, mismatched prometheus.Counter }

// Fetched counts bytes that containerd has written.
func (s Store) Fetched(n int) { s.fetched.Add(float64(n)) }

// Completed counts a blob that is whole.
func (s Store) Completed() { s.completed.Inc() }

// Failed counts bytes that could not be kept.
func (s Store) Failed() { s.failed.Inc() }

// Mismatched counts a blob that did not have its digest.
func (s Store) Mismatched() { s.mismatched.Inc() }

// Serve answers GET /metrics on the address, host:port, until ctx ends. An
// address that cannot be listened on is logged and tried again and again: no
// pull depends on it.
func (m *Metrics) Serve(ctx context.Context, address string, log *slog.Logger) {
	for ctx.Err() == nil {
		l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", address)
		if err == nil {
			log.Info("serving metrics", "address", l.Addr().String())
			err = m.serve(ctx, l)
		}
		if ctx.Err() != nil {
			return
		}
		log.Error("metrics are not served: see metrics.address", "err", err, "retry", retry)
		select {
		case <-ctx.Done():
		case <-time.After(retry):
		}
	}
}

// Handler answers every request with all metrics.
func (m *Metrics) Handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{MaxRequestsInFlight: maxScrapes})
}

// serve answers on l until ctx ends, and closes it.
func (m *Metrics) serve(ctx context.Context, l net.Listener) error {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", m.Handler())
	return serve.HTTP(ctx, l, mux)
}
