// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"fmt"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-gatehouse/gatehouse/internal/promreg"
)

// collectors are the module's metrics. They belong to the process, so that
// counters go on over a reload; each configuration registers them again. All
// labels are zones of the configuration and words of this package.
type collectors struct {
	decisions *prometheus.CounterVec
	refusals  *prometheus.CounterVec
	inflight  *prometheus.GaugeVec
	waiting   *prometheus.GaugeVec
	wait      *prometheus.HistogramVec
	stores    storeCollector
}

var metrics = newCollectors()

const metricsNamespace, metricsSubsystem = "caddy", "gatehouse_ratelimit"

func newCollectors() *collectors {
	const ns, sub = metricsNamespace, metricsSubsystem
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: ns, Subsystem: sub, Name: name, Help: help,
		}, labels)
	}
	gauge := func(name, help string) *prometheus.GaugeVec {
		return prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Namespace: ns, Subsystem: sub, Name: name, Help: help,
		}, []string{"zone"})
	}
	return &collectors{
		decisions: counter("decisions_total",
			"Decisions of a zone: allowed, refused, shadow (would have been refused), skipped (no key).", "zone", "decision"),
		refusals: counter("refusals_total",
			"Requests that a zone refused, or would have in shadow mode, by reason.", "zone", "reason"),
		inflight: gauge("inflight_requests",
			"Requests under way that a zone counts, on this server."),
		waiting: gauge("waiting_requests",
			"Requests that wait in a zone for delay or queue."),
		wait: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Namespace: ns, Subsystem: sub, Name: "wait_duration_seconds",
			Help:    "How long requests waited for delay or queue, whatever became of them.",
			Buckets: []float64{.001, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60},
		}, []string{"zone"}),
		stores: newStoreCollector(),
	}
}

// register makes the metrics part of the registry of a configuration.
func (c *collectors) register(reg *prometheus.Registry) error {
	if err := promreg.Register(reg, c.decisions, c.refusals, c.inflight, c.waiting, c.wait, c.stores); err != nil {
		return fmt.Errorf("registering metrics: %w", err)
	}
	return nil
}

// storeCollector asks the counters of all zones when it is asked itself.
type storeCollector struct{ saturated, away, failures *prometheus.Desc }

func newStoreCollector() storeCollector {
	desc := func(name, help string) *prometheus.Desc {
		return prometheus.NewDesc(prometheus.BuildFQName(metricsNamespace, metricsSubsystem, name), help, []string{"zone"}, nil)
	}
	return storeCollector{
		saturated: desc("saturated", "Whether a zone has too many keys for its memory to tell them apart (1) or not (0)."),
		away:      desc("store_away", "Whether the store of a zone does not answer (1) or does (0)."),
		failures:  desc("store_failures_total", "Decisions that the store of a zone could not make."),
	}
}

// Describe implements [prometheus.Collector].
func (c storeCollector) Describe(ch chan<- *prometheus.Desc) {
	ch <- c.saturated
	ch <- c.away
	ch <- c.failures
}

// Collect implements [prometheus.Collector].
func (c storeCollector) Collect(ch chan<- prometheus.Metric) {
	reports := make(map[string]Report)
	zonesMu.RLock()
	for name, list := range zones {
		var sum Report
		for _, s := range list {
			if r, ok := s.counters.(Reporter); ok {
				own := r.Report()
				sum.Saturated = sum.Saturated || own.Saturated
				sum.Away = sum.Away || own.Away
				sum.Failures += own.Failures
			}
		}
		reports[name] = sum
	}
	zonesMu.RUnlock()
	for name, r := range reports {
		ch <- prometheus.MustNewConstMetric(c.saturated, prometheus.GaugeValue, oneIf(r.Saturated), name)
		ch <- prometheus.MustNewConstMetric(c.away, prometheus.GaugeValue, oneIf(r.Away), name)
		ch <- prometheus.MustNewConstMetric(c.failures, prometheus.CounterValue, float64(r.Failures), name)
	}
}

func oneIf(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// series are those of one zone, looked up once.
type series struct {
	zone string

	decisions [len(decisions)]prometheus.Counter
	refusals  [len(reasons)]prometheus.Counter
	inflight  prometheus.Gauge
}

// zoneSeries are the series of the zones of all loaded configurations.
var zoneSeries = caddy.NewUsagePool()

func acquireSeries(zone string) *series {
	v, _, _ := zoneSeries.LoadOrNew(zone, func() (caddy.Destructor, error) {
		s := &series{
			zone:     zone,
			inflight: metrics.inflight.WithLabelValues(zone),
		}
		for i, word := range decisions {
			s.decisions[i] = metrics.decisions.WithLabelValues(zone, word)
		}
		for i, word := range reasons {
			if Reason(i) != NoReason {
				s.refusals[i] = metrics.refusals.WithLabelValues(zone, word)
			}
		}
		return s, nil
	})
	return v.(*series)
}

func releaseSeries(zone string) { _, _ = zoneSeries.Delete(zone) }

// Destruct drops the series of a zone that no configuration has anymore.
func (s *series) Destruct() error {
	by := prometheus.Labels{"zone": s.zone}
	metrics.decisions.DeletePartialMatch(by)
	metrics.refusals.DeletePartialMatch(by)
	metrics.inflight.DeletePartialMatch(by)
	metrics.waiting.DeletePartialMatch(by)
	metrics.wait.DeletePartialMatch(by)
	return nil
}

// Interface guards
var _ prometheus.Collector = storeCollector{}
