// Package metrics holds what the notifier counts, and shows it to Prometheus.
// It and node/metrics are the only importers of Prometheus' library: the
// packages that count declare the few methods that they call.
//
// Labels have only values from the settings and from the code: nothing that
// comes from outside makes another one.
package metrics

import (
	"net/http"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/imagewolf/imagewolf/notifier/queue"
)

const (
	namespace  = "imagewolf_notifier"
	maxScrapes = 4 // answered at a time; more are refused
)

// Metrics is what one notifier counts, from New on. It is safe for concurrent
// use.
type Metrics struct {
	registry  *prometheus.Registry
	stats     func() queue.Stats
	requested *prometheus.CounterVec
	failed    prometheus.Counter
	polls     *prometheus.CounterVec
	missed    *prometheus.CounterVec
	polled    *prometheus.GaugeVec
	answers   *prometheus.CounterVec
	took      *prometheus.HistogramVec

	waiting, taken, done, panics, nothing *prometheus.Desc
}

// New returns metrics that are all zero, those of each feed that is polled. The
// function is called at every scrape, and returns what is so at that moment.
func New(stats func() queue.Stats, polls ...string) *Metrics {
	counter := func(name, help string) prometheus.CounterOpts {
		return prometheus.CounterOpts{Namespace: namespace, Name: name, Help: help}
	}
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc(prometheus.BuildFQName(namespace, "", name), help, labels, nil)
	}
	m := &Metrics{
		registry: prometheus.NewRegistry(), stats: stats,
		requested: prometheus.NewCounterVec(counter("prefetches_total", "Prefetches that the nodes were asked for and took, by the rule that decided."), []string{"rule"}),
		failed:    prometheus.NewCounter(counter("tries_failed_total", "Times that an event could not be worked off and will be tried again: a registry or the nodes did not answer.")),
		polls:     prometheus.NewCounterVec(counter("polls_total", "Times that a feed was read to its end (outcome ok), or could not be (failed)."), []string{"poll", "outcome"}),
		missed:    prometheus.NewCounterVec(counter("poll_missed_events_total", "Events that a feed no longer had when it was read."), []string{"poll"}),
		polled: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Namespace: namespace, Name: "poll_last_success_timestamp_seconds", Help: "When a feed was last read to its end, in seconds since 1970; 0 if it was not yet.",
		}, []string{"poll"}),
		answers: prometheus.NewCounterVec(counter("http_requests_total", "Requests that were answered, by the part that did (webhook, feed, api, other) and the status."), []string{"part", "code"}),
		took: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Namespace: namespace, Name: "http_request_duration_seconds", Help: "How long requests took until they were answered; those of the API may be told to wait.",
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 5, 30},
		}, []string{"part"}),
		waiting: desc("events_waiting", "Events in the queue."),
		taken:   desc("events_taken_total", "Events that were put into the queue."),
		done:    desc("events_done_total", "Events that were worked off, whether a prefetch came of them or not."),
		panics:  desc("panics_total", "Panics over events and over polled feeds that were contained: it is tried again, the rest went on."),
		nothing: desc("events_nothing_total", "Events and requests that led to nothing, by the reason.", "kind"),
	}
	m.registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		m.requested, m.failed, m.polls, m.missed, m.polled, m.answers, m.took, m)
	for _, name := range polls {
		m.polls.WithLabelValues(name, "ok")
		m.polls.WithLabelValues(name, "failed")
		m.missed.WithLabelValues(name)
		m.polled.WithLabelValues(name)
	}
	return m
}

// Describe implements prometheus.Collector, for what the queue counts itself.
func (m *Metrics) Describe(out chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{m.waiting, m.taken, m.done, m.panics, m.nothing} {
		out <- d
	}
}

// Collect implements prometheus.Collector.
func (m *Metrics) Collect(out chan<- prometheus.Metric) {
	s := m.stats()
	out <- prometheus.MustNewConstMetric(m.waiting, prometheus.GaugeValue, float64(s.Waiting))
	out <- prometheus.MustNewConstMetric(m.taken, prometheus.CounterValue, float64(s.Taken))
	out <- prometheus.MustNewConstMetric(m.done, prometheus.CounterValue, float64(s.Done))
	out <- prometheus.MustNewConstMetric(m.panics, prometheus.CounterValue, float64(s.Panics))
	for kind, n := range s.Nothing {
		out <- prometheus.MustNewConstMetric(m.nothing, prometheus.CounterValue, float64(n), string(kind))
	}
}

// Requested counts a prefetch that the nodes took.
func (m *Metrics) Requested(rule string) { m.requested.WithLabelValues(rule).Inc() }

// Failed counts a try that will be repeated.
func (m *Metrics) Failed() { m.failed.Inc() }

// Polled counts a reading of a feed.
func (m *Metrics) Polled(name string, ok bool) {
	if !ok {
		m.polls.WithLabelValues(name, "failed").Inc()
		return
	}
	m.polls.WithLabelValues(name, "ok").Inc()
	m.polled.WithLabelValues(name).SetToCurrentTime()
}

// Missed counts events that a feed no longer had.
func (m *Metrics) Missed(name string, n uint64) { m.missed.WithLabelValues(name).Add(float64(n)) }

// Answered counts a request that a part of the notifier answered.
func (m *Metrics) Answered(part string, status int, took time.Duration) {
	m.answers.WithLabelValues(part, strconv.Itoa(status)).Inc()
	m.took.WithLabelValues(part).Observe(took.Seconds())
}

// Handler answers every request with all metrics.
func (m *Metrics) Handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{MaxRequestsInFlight: maxScrapes})
}
