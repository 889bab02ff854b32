// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"context"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// inflightShown is what the metric says of a zone.
func inflightShown(t *testing.T, zone string) float64 {
	t.Helper()
	reg := prometheus.NewRegistry()
	reg.MustRegister(metrics.inflight)
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if m.GetLabel()[0].GetValue() == zone {
				return m.GetGauge().GetValue()
			}
		}
	}
	t.Fatalf("no metric of %s", zone)
	return 0
}

// takeOver sends a request whose handler takes over the connection, and
// returns the connection and the visit.
func takeOver(t *testing.T, h *Handler, then func(net.Conn)) (tunnel net.Conn, v *visit) {
	t.Helper()
	ours, theirs := net.Pipe()
	t.Cleanup(func() { _ = theirs.Close() })
	err := h.ServeHTTP(&hijackable{httptest.NewRecorder(), ours}, request(t.Context(), "k"), caddyhttp.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) (err error) {
		v = w.(*writer).v
		if tunnel, _, err = http.NewResponseController(w).Hijack(); err == nil && then != nil {
			then(tunnel)
		}
		return err
	}))
	if err != nil {
		t.Fatal(err)
	}
	return tunnel, v
}

// TestTunnelClosedTwice: closing a connection again gives back nothing, neither
// the part of the handlers that still run nor what others hold.
func TestTunnelClosedTwice(t *testing.T) {
	h, z := oneAtATime(t, "visit-twice")
	check := func(when string, want int) {
		t.Helper()
		if n, shown := inflightOf(z), inflightShown(t, z.Name); n != want || shown != float64(want) {
			t.Errorf("%s: %d in flight, the metric says %v, want %d", when, n, shown, want)
		}
	}
	tunnel, _ := takeOver(t, h, func(c net.Conn) {
		for range 3 {
			_ = c.Close()
			check("closed while the handler runs", 1)
		}
	})
	check("at the end", 0)
	_ = tunnel.Close()
	check("closed again after the end", 0)

	tunnel, _ = takeOver(t, h, nil)
	check("open", 1)
	for range 3 {
		_ = tunnel.Close()
		check("closed after the handler", 0)
	}
	other, _ := takeOver(t, h, nil)
	_ = tunnel.Close()
	check("an old one closed while another is open", 1)
	_ = other.Close()
	check("all closed", 0)
}

// TestHijackedVisit is never handed to another request: the tunnel knows it.
func TestHijackedVisit(t *testing.T) {
	h, z := oneAtATime(t, "visit-hijacked")
	for name, then := range map[string]func(net.Conn){
		"closed in the handler": func(c net.Conn) { _ = c.Close() },
		"closed later":          nil,
	} {
		tunnel, v := takeOver(t, h, then)
		_ = tunnel.Close()
		if n := inflightOf(z); n != 0 {
			t.Errorf("%s: %d in flight", name, n)
		}
		if v.h != h || v.open.Load() != 0 || len(v.asks) != 1 {
			t.Errorf("%s: the visit was made ready for another request: %+v", name, v.asks)
		}
	}
}

// audience is an event handler.
type audience struct{ heard []caddy.Event }

func (a *audience) Handle(_ context.Context, e caddy.Event) error {
	a.heard = append(a.heard, e)
	return nil
}

// TestEventOnlyForListeners: nothing is done for the event where nobody
// listens, so a refusal allocates no more than a request that passes.
func TestEventOnlyForListeners(t *testing.T) {
	z := textZone("visit-event")
	z.Events, z.Window, z.Mode = 1, caddy.Duration(time.Hour), modeShadow
	h := newHandler(t, z)
	if h.events.ShouldEmit(eventName) {
		t.Fatal("somebody listens")
	}
	r := request(t.Context(), "k")
	next := caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error { return nil })
	w := httptest.NewRecorder()
	_ = h.ServeHTTP(w, r, next) // the only one within the limit, and the first line of the log
	_ = h.ServeHTTP(w, r, next)
	unheard := testing.AllocsPerRun(100, func() { _ = h.ServeHTTP(w, r, next) })

	// the baseline: a request that passes
	free := textZone("visit-free")
	free.Events, free.Window = maxNumber, caddy.Duration(time.Hour)
	allowing := newHandler(t, free)
	if base := testing.AllocsPerRun(100, func() { _ = allowing.ServeHTTP(w, r, next) }); unheard > base+3 { // the race detector empties the pool now and then
		t.Errorf("a refusal that nobody hears of: %v allocations, a request that passes: %v", unheard, base)
	}

	a := new(audience)
	if err := h.events.On(eventName, a); err != nil {
		t.Fatal(err)
	}
	_ = h.ServeHTTP(w, r, next)
	if len(a.heard) != 1 || a.heard[0].Name() != eventName || a.heard[0].Data["zone"] != "visit-event" ||
		a.heard[0].Data["decision"] != "shadow" || a.heard[0].Data["reason"] != "rate" || a.heard[0].Data["limit"] != 1 {
		t.Errorf("heard %v", a.heard)
	}
}

var _ caddyevents.Handler = (*audience)(nil)
