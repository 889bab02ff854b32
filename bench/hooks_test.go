// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"net/http"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-gatehouse/gatehouse/modules/hooks"
)

// onErrorBlock and the others are what stands in the block of `hooks`.
const (
	connectionBlock = "connection"
	onErrorBlock    = "on_error {\npage status 5xx {\nhtml\n}\n}"
	upstreamBlock   = "upstream_request {\nheader_up X-Edge gatehouse\n}"
)

var hooksVariants = []variant{
	{name: "bare", transport: "http"},
	{name: "bare-again", transport: "http"}, // what it differs from bare by is noise
	{name: "next", handlers: "bench_next", transport: "http"},
	{name: "hooks-empty", handlers: "hooks", transport: "hooks"},
	{name: "connection", handlers: "hooks {\n" + connectionBlock + "\n}", transport: "hooks"},
	{name: "connection-stock", handlers: "hooks {\n" + connectionBlock + "\n}", transport: "http"},
	{name: "on_error", handlers: "hooks {\n" + onErrorBlock + "\n}", transport: "hooks"},
	{name: "upstream_request", handlers: "hooks {\n" + upstreamBlock + "\n}", transport: "hooks"},
}

// BenchmarkProxy measures each variant for itself. The variant "upstream" has
// no proxy: it is what client and upstream take of the figures of the others.
func BenchmarkProxy(b *testing.B) {
	for _, s := range serve(b, hooksVariants) {
		b.Run("variant="+s.name, func(b *testing.B) {
			s.load(b, *sliceLength/4)
			b.ReportAllocs()
			b.ResetTimer()
			cpu := cpuTime()
			b.RunParallel(func(pb *testing.PB) {
				c, err := s.take()
				if err != nil {
					b.Error(err)
					return
				}
				for pb.Next() {
					if err := c.get(); err != nil {
						b.Error(err)
						return
					}
				}
				s.give(c)
			})
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "req/s")
			if cpu != 0 {
				b.ReportMetric(float64(cpuTime()-cpu)/float64(b.N), "cpu-ns/op")
			}
		})
	}
}

// BenchmarkProxyPaired compares each variant with bare.
func BenchmarkProxyPaired(b *testing.B) {
	sites := serve(b, hooksVariants)
	base := sites[1]
	for _, s := range sites[2:] {
		b.Run("variant="+s.name, func(b *testing.B) { paired(b, base, s) })
	}
}

// TestVariants checks that every variant gets through to the upstream.
func TestVariants(t *testing.T) {
	for _, s := range serve(t, hooksVariants) {
		c, err := s.take()
		if err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := c.get(); err != nil {
				t.Errorf("%s: %v", s.name, err)
			}
		}
		s.give(c)
	}
}

// BenchmarkHandler measures the handler without a server and a proxy: what it
// adds to a call of the next handler.
func BenchmarkHandler(b *testing.B) {
	for _, bc := range []struct{ name, block string }{
		{"empty", ""},
		{"connection", connectionBlock},
		{"on_error", onErrorBlock},
		{"upstream_request", upstreamBlock},
	} {
		b.Run("hooks="+bc.name, func(b *testing.B) {
			h, call := handlerCall(b, bc.block)
			b.ReportAllocs()
			b.ResetTimer()
			for range b.N {
				if err := call(h); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// TestEmptyHandler holds `hooks` without a hook to its promise.
func TestEmptyHandler(t *testing.T) {
	h, call := handlerCall(t, "")
	if n := testing.AllocsPerRun(100, func() { _ = call(h) }); n != 0 {
		t.Errorf("got %v allocations per request, want none", n)
	}
}

// handlerCall returns a handler with the hooks of block, and a function that
// has it serve one request.
func handlerCall(tb testing.TB, block string) (*hooks.Handler, func(*hooks.Handler) error) {
	tb.Helper()
	h := new(hooks.Handler)
	if err := h.UnmarshalCaddyfile(caddyfile.NewTestDispenser("hooks {\n" + block + "\n}")); err != nil {
		tb.Fatal(err)
	}
	ctx, cancel := caddy.NewContext(caddy.Context{Context: context.Background()})
	tb.Cleanup(cancel)
	if err := h.Provision(ctx); err != nil {
		tb.Fatal(err)
	}

	r, err := http.NewRequestWithContext(context.Background(), http.MethodGet, "http://bench.test/path?query=1", http.NoBody)
	if err != nil {
		tb.Fatal(err)
	}
	w := &nullWriter{header: make(http.Header)}
	repl := caddy.NewReplacer()
	r = caddyhttp.PrepareRequest(r, repl, w, new(caddyhttp.Server))
	fresh := *repl
	body := make([]byte, bodySize)
	var behind caddyhttp.Handler = caddyhttp.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) error {
		w.WriteHeader(http.StatusOK)
		_, err := w.Write(body)
		return err
	})
	return h, func(h *hooks.Handler) error {
		*repl = fresh // each request has a replacer of its own
		return h.ServeHTTP(w, r, behind)
	}
}

// nullWriter drops the response.
type nullWriter struct{ header http.Header }

func (w *nullWriter) Header() http.Header         { return w.header }
func (w *nullWriter) Write(p []byte) (int, error) { return len(p), nil }
func (w *nullWriter) WriteHeader(int)             {}
