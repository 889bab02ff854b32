// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"encoding/json"
	"fmt"
	"hash/maphash"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	peer "github.com/mholt/caddy-ratelimit"
	"go.uber.org/zap"
	"golang.org/x/time/rate"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-gatehouse/gatehouse/modules/ratelimit"
)

const (
	manyKeys  = 1_000_000
	maxMemory = 16 << 20
)

// keyTexts are the keys of all benchmarks.
var keyTexts = sync.OnceValue(func() []string {
	texts := make([]string, manyKeys)
	for i := range texts {
		texts[i] = fmt.Sprintf("key-%07d", i)
	}
	return texts
})

// limiter decides on a request of a key.
type limiter func(key string) bool

var limiters = []struct {
	name string
	make func(tb testing.TB, events int) limiter
}{
	{"gatehouse", gatehouseLimiter},
	{"x-time-rate", timeRateLimiter},
	{"none", func(testing.TB, int) limiter { // what choosing the key takes of the others
		seed := maphash.MakeSeed()
		return func(key string) bool { return maphash.String(seed, key) != 0 }
	}},
}

func gatehouseLimiter(tb testing.TB, events int) limiter {
	tb.Helper()
	store := &ratelimit.MemoryStore{MaxMemory: maxMemory}
	counters, err := store.Open(ratelimit.Spec{
		Zone: "bench", Levels: []ratelimit.Limit{{Events: events, Window: time.Hour}}, Logger: zap.NewNop(),
	})
	if err != nil {
		tb.Fatal(err)
	}
	seed := maphash.MakeSeed()
	asks := sync.Pool{New: func() any { return &ratelimit.Ask{Keys: make([]ratelimit.Key, 1), Cost: 1} }}
	return func(key string) bool {
		a := asks.Get().(*ratelimit.Ask)
		a.Keys[0] = ratelimit.Key{Hash: maphash.String(seed, key) | 1, Text: key}
		v, _ := counters.Take(context.Background(), a)
		asks.Put(a)
		return v.Allowed
	}
}

// timeRateLimiter is the least that uses golang.org/x/time/rate per key: it
// forgets nothing.
func timeRateLimiter(_ testing.TB, events int) limiter {
	var keys sync.Map
	every := rate.Every(time.Hour / time.Duration(events))
	return func(key string) bool {
		l, ok := keys.Load(key)
		if !ok {
			l, _ = keys.LoadOrStore(key, rate.NewLimiter(every, events))
		}
		return l.(*rate.Limiter).Allow()
	}
}

// BenchmarkDecision measures a decision without a request around it. All keys
// have come before.
func BenchmarkDecision(b *testing.B) {
	for _, l := range limiters {
		for _, events := range []int{10, 100} {
			for _, keys := range []int{1, manyKeys} {
				name := fmt.Sprintf("limiter=%s/events=%d/keys=%d", l.name, events, keys)
				texts := keyTexts()[:keys]
				b.Run(name+"/serial", func(b *testing.B) {
					allow := warm(l.make(b, events), texts)
					b.ReportAllocs()
					b.ResetTimer()
					for i := range b.N {
						allow(texts[scatter(i, keys)])
					}
				})
				b.Run(name+"/parallel", func(b *testing.B) {
					allow := warm(l.make(b, events), texts)
					b.ReportAllocs()
					b.ResetTimer()
					b.RunParallel(func(pb *testing.PB) {
						for i := rand.Int(); pb.Next(); i++ {
							allow(texts[scatter(i, keys)])
						}
					})
				})
			}
		}
	}
}

// scatter spreads i over the keys, so that no cache foresees what comes next.
func scatter(i, keys int) int {
	return int(uint64(i) * 0x9e3779b97f4a7c15 >> 20 % uint64(keys))
}

func warm(allow limiter, texts []string) limiter {
	for _, text := range texts {
		allow(text)
	}
	runtime.GC()
	return allow
}

// handlers are both handlers with the same limit per X-Key.
var handlers = []struct {
	name string
	make func(tb testing.TB, events int, window time.Duration) caddyhttp.MiddlewareHandler
}{
	{"gatehouse", func(tb testing.TB, events int, window time.Duration) caddyhttp.MiddlewareHandler {
		tb.Helper()
		return provisioned(tb, &ratelimit.Handler{Zones: []*ratelimit.Zone{{
			Name: "bench", Keys: []*ratelimit.KeyLevel{{Text: "{http.request.header.X-Key}"}},
			Events: events, Window: caddy.Duration(window),
		}}})
	}},
	{"caddy-ratelimit", func(tb testing.TB, events int, window time.Duration) caddyhttp.MiddlewareHandler {
		tb.Helper()
		h := &peer.Handler{RateLimits: map[string]*peer.RateLimit{"bench": {
			Key: "{http.request.header.X-Key}", MaxEvents: events, Window: caddy.Duration(window),
		}}}
		if window < time.Minute {
			h.SweepInterval = caddy.Duration(window) // default: a minute
		}
		return provisioned(tb, h)
	}},
}

// provisioned gives a handler the context of a configuration.
func provisioned[H interface {
	caddyhttp.MiddlewareHandler
	caddy.Provisioner
}](tb testing.TB, h H) H {
	tb.Helper()
	discard := json.RawMessage(`{"output": "discard"}`)
	cfg := &caddy.Config{
		Admin:   &caddy.AdminConfig{Disabled: true},
		Logging: &caddy.Logging{Logs: map[string]*caddy.CustomLog{"default": {BaseLog: caddy.BaseLog{WriterRaw: discard, Level: "ERROR"}}}},
	}
	if err := caddy.Run(cfg); err != nil {
		tb.Fatal(err)
	}
	ctx, cancel := caddy.NewContext(caddy.ActiveContext())
	if err := h.Provision(ctx); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if c, ok := any(h).(caddy.CleanerUpper); ok {
			_ = c.Cleanup()
		}
		cancel()
		_ = caddy.Stop()
	})
	return h
}

// caller calls a handler again and again with the same request but for its key.
type caller struct {
	h   caddyhttp.Handler
	w   http.ResponseWriter
	r   *http.Request
	key []string
}

func newCaller(h caddyhttp.MiddlewareHandler) *caller {
	w := httptest.NewRecorder()
	r := httptest.NewRequest(http.MethodGet, "/", http.NoBody)
	c := &caller{w: w, key: []string{""}}
	r.Header["X-Key"] = c.key
	c.r = caddyhttp.PrepareRequest(r, caddy.NewReplacer(), w, nil)
	nothing := caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error { return nil })
	c.h = caddyhttp.HandlerFunc(func(w http.ResponseWriter, r *http.Request) error { return h.ServeHTTP(w, r, nothing) })
	return c
}

func (c *caller) call(key string) {
	c.key[0] = key
	_ = c.h.ServeHTTP(c.w, c.r)
}

// BenchmarkRatelimitHandler measures the handlers, with the reading of the key,
// without a server.
func BenchmarkRatelimitHandler(b *testing.B) {
	for _, hc := range handlers {
		for _, keys := range []int{1, manyKeys} {
			texts := keyTexts()[:keys]
			name := fmt.Sprintf("handler=%s/keys=%d", hc.name, keys)
			const events = 10 // the peer keeps 24 bytes for each of them, a million times
			fill := func(h caddyhttp.MiddlewareHandler) {
				c := newCaller(h)
				for _, text := range texts {
					c.call(text)
				}
				runtime.GC()
			}
			b.Run(name+"/serial", func(b *testing.B) {
				h := hc.make(b, events, time.Hour)
				fill(h)
				c := newCaller(h)
				b.ReportAllocs()
				b.ResetTimer()
				for i := range b.N {
					c.call(texts[scatter(i, keys)])
				}
			})
			b.Run(name+"/parallel", func(b *testing.B) {
				h := hc.make(b, events, time.Hour)
				fill(h)
				b.ReportAllocs()
				b.ResetTimer()
				b.RunParallel(func(pb *testing.PB) {
					c := newCaller(h)
					for i := rand.Int(); pb.Next(); i++ {
						c.call(texts[scatter(i, keys)])
					}
				})
			})
		}
	}
}

// BenchmarkRatelimitMemory measures what a million keys keep on the heap, and by how
// much the process grows with ten million. Run it with -benchtime 1x.
func BenchmarkRatelimitMemory(b *testing.B) {
	for _, hc := range handlers {
		for _, events := range []int{10, 100} {
			b.Run(fmt.Sprintf("handler=%s/events=%d", hc.name, events), func(b *testing.B) {
				before := liveHeap()
				h := hc.make(b, events, time.Hour)
				c := newCaller(h)
				send := func(from, to int) {
					for i := from; i < to; i++ {
						c.call("key-" + strconv.Itoa(i))
					}
				}
				send(0, manyKeys)
				live := liveHeap() - before
				b.ReportMetric(float64(live), "live-B")
				b.ReportMetric(float64(live)/manyKeys, "B/key")
				if hc.name == "gatehouse" {
					send(0, manyKeys) // what the runtime needs for so many calls is not the keys'
					resident := residentSet()
					send(manyKeys, 10*manyKeys)
					b.ReportMetric(float64(residentSet()-resident), "RSS-growth-B")
					b.ReportMetric(float64(liveHeap()-before-live), "live-growth-B")
				}
				runtime.KeepAlive(h)
				b.ReportMetric(0, "ns/op")
			})
		}
	}
}

// BenchmarkRatelimitStall measures the longest call while a million keys come and
// go: windows of a second, and calls for b.N seconds.
func BenchmarkRatelimitStall(b *testing.B) {
	for _, hc := range handlers {
		b.Run("handler="+hc.name, func(b *testing.B) {
			h := hc.make(b, 10, time.Second)
			c := newCaller(h)
			texts := keyTexts()
			var longest time.Duration
			b.ResetTimer()
			end := time.Now().Add(time.Duration(b.N) * time.Second)
			for i, last := 0, time.Now(); last.Before(end); i++ {
				c.call(texts[scatter(i, manyKeys)])
				now := time.Now()
				longest, last = max(longest, now.Sub(last)), now
			}
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(float64(longest.Microseconds())/1000, "longest-ms")
		})
	}
}

func liveHeap() int64 {
	runtime.GC()
	runtime.GC()
	var s runtime.MemStats
	runtime.ReadMemStats(&s)
	return int64(s.HeapAlloc)
}

// residentSet is the memory of the process; 0 where it is not known.
func residentSet() int64 {
	debug.FreeOSMemory()
	b, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0
	}
	fields := strings.Fields(string(b))
	n, _ := strconv.ParseInt(fields[1], 10, 64)
	return n * int64(os.Getpagesize())
}

func ratelimitBlock(zone, key string, events int) string {
	return fmt.Sprintf("ratelimit {\nzone %s {\nkey %s\nrate %d 1h\n}\n}", zone, key, events)
}

func peerBlock(zone, key string, events int, window string) string {
	return fmt.Sprintf("route {\nrate_limit {\nzone %s {\nkey %s\nevents %d\nwindow %s\n}\n}\n}", zone, key, events, window)
}

const (
	headerKey = "{http.request.header.X-Key}"
	plenty    = 100_000_000
)

var throughputVariants = []variant{
	{name: "bare", transport: "http", keys: true},
	{name: "bare-again", transport: "http", keys: true},
	{name: "client", transport: "http", keys: true, handlers: ratelimitBlock("hot", "client", plenty)},
	{name: "random", transport: "http", keys: true, handlers: ratelimitBlock("random", headerKey, 1000)},
}

// The peer keeps a ring of all events per key, so its limit is small here, and
// it has a process of its own: the heap that it makes slows others down.
var peerVariants = []variant{
	{name: "bare", transport: "http", keys: true},
	{name: "peer-random", transport: "http", keys: true, handlers: peerBlock("peer", headerKey, 10, "1s")},
}

// BenchmarkRatelimitPaired compares a server with limits to one without.
func BenchmarkRatelimitPaired(b *testing.B) {
	sites := serve(b, throughputVariants)
	for _, s := range sites[2:] {
		b.Run("variant="+s.name, func(b *testing.B) { paired(b, sites[1], s) })
	}
}

// BenchmarkPeerPaired is the same for caddy-ratelimit.
func BenchmarkPeerPaired(b *testing.B) {
	sites := serve(b, peerVariants)
	b.Run("variant="+sites[2].name, func(b *testing.B) { paired(b, sites[1], sites[2]) })
}

const answered = `respond "no" 200`

// refusalVariants are a request that is allowed and answered, and the same
// refused, without and with handle_errors; stock-error is Caddy's own `error`,
// with no limit at all.
var refusalVariants = []variant{
	{name: "allowed", handlers: ratelimitBlock("yes", "all", plenty), answer: answered},
	{name: "allowed-again", handlers: ratelimitBlock("yes2", "all", plenty), answer: answered},
	{name: "refused", handlers: ratelimitBlock("no", "all", 1), answer: answered, status: 429},
	{name: "refused-handled", handlers: ratelimitBlock("no2", "all", 1), answer: answered + "\nhandle_errors {\nrespond \"no\" 429\n}", status: 429},
	{name: "stock-error", answer: "error no 429", status: 429},
	{name: "stock-error-handled", answer: "error no 429\nhandle_errors {\nrespond \"no\" 429\n}", status: 429},
	{name: "peer-allowed", handlers: peerBlock("peer-yes", "all", 1_000_000, "1s"), answer: answered},
	{name: "peer-refused", handlers: peerBlock("peer-no", "all", 1, "1h"), answer: answered, status: 429},
	{name: "peer-refused-handled", handlers: peerBlock("peer-no2", "all", 1, "1h"), answer: answered + "\nhandle_errors {\nrespond \"no\" 429\n}", status: 429},
}

// BenchmarkRefusalPaired compares what a refusal costs with the request allowed
// and answered by `respond 200`, with Caddy's default level of the log.
func BenchmarkRefusalPaired(b *testing.B) {
	sites := serveLogging(b, "INFO", refusalVariants)[1:]
	for _, s := range sites {
		if s.status == http.StatusTooManyRequests { // use up the one event
			c, err := s.take()
			if err != nil {
				b.Fatal(err)
			}
			_ = c.get()
			_ = c.Close()
		}
	}
	for i, s := range sites {
		base := sites[0]
		if strings.HasPrefix(s.name, "peer-") {
			base = sites[6]
		}
		if i != 0 && s != base {
			b.Run("variant="+s.name, func(b *testing.B) { paired(b, base, s) })
		}
	}
}
