// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"fmt"
	"sync"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-gatehouse/gatehouse/internal/phase"
	"github.com/caddy-gatehouse/gatehouse/internal/promreg"
)

// dynamicLabel stands in metrics for every upstream whose address is not
// written literally in the configuration.
const dynamicLabel = "dynamic"

// collectors are the module's metrics. They belong to the process, so that
// counters go on over a reload; each configuration registers them again.
type collectors struct {
	requests        *prometheus.CounterVec
	requestDuration *prometheus.HistogramVec
	connections     *prometheus.CounterVec
	connect         *prometheus.HistogramVec
	tls             *prometheus.HistogramVec
	firstByte       *prometheus.HistogramVec
	idleAge         *prometheus.HistogramVec
	errors          *prometheus.CounterVec
	suppressed      *prometheus.CounterVec
}

var metrics = newCollectors()

func newCollectors() *collectors {
	const ns, sub = "caddy", "gatehouse_hooks"
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: ns, Subsystem: sub, Name: name, Help: help,
		}, labels)
	}
	histogram := func(name, help string, buckets []float64, labels ...string) *prometheus.HistogramVec {
		return prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Namespace: ns, Subsystem: sub, Name: name, Help: help, Buckets: buckets,
		}, labels)
	}
	short := []float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10}
	long := []float64{.1, .5, 1, 2, 5, 10, 15, 30, 60, 90, 120, 300}
	return &collectors{
		requests: counter("requests_total",
			"Attempts to get a response from an upstream.", "upstream", "code_class"),
		requestDuration: histogram("request_duration_seconds",
			"Time from the start of an attempt to the end of the response or to the failure.", short, "upstream", "code_class"),
		connections: counter("connections_total",
			"Connections that attempts got, new and reused.", "upstream", "reused"),
		connect: histogram("connect_duration_seconds",
			"Time to connect to an upstream.", short, "upstream"),
		tls: histogram("tls_handshake_duration_seconds",
			"Time of the TLS handshake with an upstream.", short, "upstream"),
		firstByte: histogram("first_byte_duration_seconds",
			"Time from the start of an attempt to the first byte of the response.", short, "upstream"),
		idleAge: histogram("idle_age_seconds",
			"How long reused connections had been idle.", long, "upstream"),
		errors: counter("errors_total",
			"Attempts that failed, by class.", "upstream", "class"),
		suppressed: counter("suppressed_errors_total",
			"Errors whose log line was suppressed, by class.", "class"),
	}
}

// register makes the metrics part of the registry of a configuration.
func (c *collectors) register(reg *prometheus.Registry) error {
	if err := promreg.Register(reg,
		c.requests, c.requestDuration, c.connections, c.connect, c.tls, c.firstByte, c.idleAge, c.errors, c.suppressed,
	); err != nil {
		return fmt.Errorf("registering metrics: %w", err)
	}
	return nil
}

// forget drops all series of an upstream.
func (c *collectors) forget(upstream string) {
	by := prometheus.Labels{"upstream": upstream}
	c.requests.DeletePartialMatch(by)
	c.requestDuration.DeletePartialMatch(by)
	c.connections.DeletePartialMatch(by)
	c.connect.DeletePartialMatch(by)
	c.tls.DeletePartialMatch(by)
	c.firstByte.DeletePartialMatch(by)
	c.idleAge.DeletePartialMatch(by)
	c.errors.DeletePartialMatch(by)
}

// codeClasses are the values of the label code_class; the index is the status
// divided by 100.
var codeClasses = [...]string{"none", "1xx", "2xx", "3xx", "4xx", "5xx"}

// upstreamMetrics are the series of one upstream, looked up once.
type upstreamMetrics struct {
	label string

	requests    [len(codeClasses)]prometheus.Counter
	durations   [len(codeClasses)]prometheus.Observer
	connections [2]prometheus.Counter // new, reused
	connect     prometheus.Observer
	tls         prometheus.Observer
	firstByte   prometheus.Observer
	idleAge     prometheus.Observer
}

func newUpstreamMetrics(label string) *upstreamMetrics {
	m := &upstreamMetrics{
		label:     label,
		connect:   metrics.connect.WithLabelValues(label),
		tls:       metrics.tls.WithLabelValues(label),
		firstByte: metrics.firstByte.WithLabelValues(label),
		idleAge:   metrics.idleAge.WithLabelValues(label),
	}
	for i, class := range codeClasses {
		m.requests[i] = metrics.requests.WithLabelValues(label, class)
		m.durations[i] = metrics.requestDuration.WithLabelValues(label, class)
	}
	for i, reused := range []string{"false", "true"} {
		m.connections[i] = metrics.connections.WithLabelValues(label, reused)
	}
	return m
}

// Destruct drops the series of an upstream that no configuration names anymore.
func (m *upstreamMetrics) Destruct() error {
	byLabel.Delete(m.label)
	metrics.forget(m.label)
	return nil
}

// attempt counts one attempt. seconds is its duration.
func (m *upstreamMetrics) attempt(f *phase.Facts, seconds float64) {
	class := f.Status / 100
	if class < 0 || class >= len(codeClasses) {
		class = 0
	}
	m.requests[class].Inc()
	m.durations[class].Observe(seconds)
	if f.FirstByte > 0 {
		m.firstByte.Observe(f.FirstByte.Seconds())
	}
	if f.Class != "" {
		metrics.errors.WithLabelValues(m.label, string(f.Class)).Inc()
	}
	if !f.Conn.Known {
		return
	}
	if f.Conn.Reused {
		m.connections[1].Inc()
		m.idleAge.Observe(f.Conn.Idle.Seconds())
		return
	}
	m.connections[0].Inc()
	m.connect.Observe(f.Conn.Connect.Seconds())
	if f.Conn.TLS > 0 {
		m.tls.Observe(f.Conn.TLS.Seconds())
	}
}

// The labels are those of the upstreams that some loaded configuration names.
// They are counted, so that a reload keeps the series of what stays and a
// configuration that goes takes its own with it.
var (
	labels  = caddy.NewUsagePool() // label -> *upstreamMetrics
	byLabel sync.Map               // the same, to read without a lock

	dynamicMetrics = newUpstreamMetrics(dynamicLabel)
)

func acquireUpstream(label string) *upstreamMetrics {
	v, _, _ := labels.LoadOrNew(label, func() (caddy.Destructor, error) {
		m := newUpstreamMetrics(label)
		byLabel.Store(label, m)
		return m, nil
	})
	return v.(*upstreamMetrics)
}

func releaseUpstream(label string) { _, _ = labels.Delete(label) }

// metricsOf returns the series of a label, those of "dynamic" for one that no
// configuration names anymore.
func metricsOf(label string) *upstreamMetrics {
	if m, ok := byLabel.Load(label); ok {
		return m.(*upstreamMetrics)
	}
	return dynamicMetrics
}
