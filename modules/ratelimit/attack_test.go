// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"bytes"
	"encoding/json"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// TestKeyFlood sends 200,000 random keys through the handler, some of them
// long: neither the heap nor metrics nor the admin API grow with them, and
// nobody gets a fresh limit.
func TestKeyFlood(t *testing.T) {
	const keys, memory = 200_000, 1 << 20
	z := textZone("attack")
	z.StoreRaw = json.RawMessage(`{"store":"memory","max_memory":1048576}`)
	z.Events, z.Window, z.Inflight = 5, caddy.Duration(maxWindow), 3
	z.Penalty, z.CountWhen = caddy.Duration(maxWindow), &CountWhen{Statuses: []string{"4xx"}}
	before := liveHeap()
	h := newHandler(t, z)
	next := caddyhttp.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) error {
		w.WriteHeader(http.StatusUnauthorized)
		return nil
	})
	for range 5 {
		serve(h, request(t.Context(), "heavy"), next)
	}
	if status, _ := serve(h, request(t.Context(), "heavy"), next); status != http.StatusTooManyRequests {
		t.Fatalf("the sixth failure: %d", status)
	}
	series := metricCount(t)
	var wg sync.WaitGroup
	for worker := range uint64(4) {
		wg.Go(func() {
			random := rand.New(rand.NewPCG(worker, 1))
			r := request(t.Context(), "")
			long := strings.Repeat("x", 8<<10)
			for i := range keys / 4 {
				key := strconv.FormatUint(random.Uint64(), 36)
				if i%64 == 0 {
					key += long
				}
				r.Header["Key"][0] = key
				_ = h.ServeHTTP(httptest.NewRecorder(), r, next)
			}
		})
	}
	wg.Wait()
	if status, _ := serve(h, request(t.Context(), "heavy"), next); status != http.StatusTooManyRequests {
		t.Errorf("after the flood: %d", status)
	}
	if used := liveHeap() - before; used > memory+1<<20 {
		t.Errorf("the heap grew by %d bytes", used)
	}
	if now := metricCount(t); now != series {
		t.Errorf("%d series, before %d", now, series)
	}
	w := httptest.NewRecorder()
	if err := new(adminAPI).serve(w, httptest.NewRequest(http.MethodGet, adminPrefix+"attack/top", nil)); err != nil {
		t.Fatal(err)
	}
	var views []keyView
	if err := json.Unmarshal(w.Body.Bytes(), &views); err != nil || len(views) > maxTop || bytes.Contains(w.Body.Bytes(), []byte("heavy")) {
		t.Errorf("top: %d keys, %v", len(views), err)
	}
	if n := z.state.lines.held(); n > loggedKeys {
		t.Errorf("the logbook has %d keys", n)
	}
	runtime.KeepAlive(h)
}

func (b *logbook) held() (n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for i := range b.keys {
		if !b.keys[i].last.IsZero() {
			n++
		}
	}
	return n
}

func liveHeap() int64 {
	runtime.GC()
	runtime.GC()
	var s runtime.MemStats
	runtime.ReadMemStats(&s)
	return int64(s.HeapAlloc)
}

func metricCount(t *testing.T) (n int) {
	t.Helper()
	reg := prometheus.NewPedanticRegistry()
	if err := metrics.register(reg); err != nil {
		t.Fatal(err)
	}
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		n += len(f.GetMetric())
	}
	return n
}
