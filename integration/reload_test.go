// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"context"
	"fmt"
	"math"
	"net/http"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

const reloads = 200

// TestReloadsUnderLoad reloads while clients send requests: no more of them may
// fail than with stock Caddy in the same run, none at all for clients that
// repeat idempotent requests, and nothing may be left behind.
func TestReloadsUnderLoad(t *testing.T) {
	u := serve(t, "h1", hello)
	variants := map[string]string{
		"stock": `reverse_proxy %s {
			transport http
		}`,
		"hooks": `hooks {
			connection
			upstream_request {
				header_up X-Edge yes
			}
			on_error {
				page status 5xx {
					text
				}
			}
			request_summary {http.request.uri}
		}
		reverse_proxy %s {
			transport hooks
		}`,
	}
	failed := make(map[string]share)
	for _, name := range []string{"stock", "hooks"} {
		s := start(t, `http://{addr} {
			respond ok
		}`, "grace_period 5s")
		s.logs = nil // 200 configurations have much to say
		config := func(n int) string {
			return fmt.Sprintf("http://{addr} {\n\theader X-Generation %d\n\t"+variants[name]+"\n}", n, u.addr)
		}
		s.load(config(0))
		settle(s)
		u.closeConns()
		goroutines, heap := usage()

		failed[name] = s.reload(config)

		settle(s)
		// connections that were in use at a reload stay with their old transport
		// until they have been idle for its keepalive; here the upstream ends them
		u.closeConns()
		var more int
		var heapNow uint64
		for deadline := time.Now().Add(patience); ; runtime.Gosched() {
			var now int
			now, heapNow = usage()
			if more = now - goroutines; more <= 5 || time.Now().After(deadline) {
				break
			}
		}
		if more > 5 {
			t.Errorf("%s: %d goroutines more than before", name, more)
		}
		if heapNow > heap+4<<20 {
			t.Errorf("%s: the heap grew from %d to %d bytes", name, heap, heapNow)
		}
	}
	if h, s := failed["hooks"], failed["stock"]; h.exceeds(s) {
		t.Errorf("%d of %d requests failed with hooks, %d of %d with stock Caddy", h.part, h.whole, s.part, s.whole)
	}
}

// share is a part of a whole.
type share struct{ part, whole int64 }

func (s share) value() float64 { return float64(s.part) / float64(s.whole) }

// exceeds tells whether s is larger than other by more than chance explains:
// four standard errors of the difference.
func (s share) exceeds(other share) bool {
	p := share{s.part + other.part, s.whole + other.whole}.value()
	deviation := math.Sqrt(p * (1 - p) * (1/float64(s.whole) + 1/float64(other.whole)))
	return s.value()-other.value() > 4*deviation
}

// reload loads 200 configurations one after the other while clients send
// requests, and returns how many of them failed.
func (s *site) reload(config func(n int) string) share {
	ctx, stop := context.WithCancel(s.t.Context())
	var sent, lost, lostForGood atomic.Int64
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			transport := new(http.Transport)
			defer transport.CloseIdleConnections()
			client := &http.Client{Transport: transport, Timeout: patience}
			for ctx.Err() == nil {
				sent.Add(1)
				if request(client, s.addr) {
					continue
				}
				lost.Add(1)
				ok := false
				for repeat := 0; repeat < 9 && !ok; repeat++ {
					ok = request(client, s.addr)
				}
				if !ok {
					lostForGood.Add(1)
				}
			}
		})
	}
	for n := 1; n <= reloads; n++ {
		s.load(config(n))
	}
	stop()
	wg.Wait()
	s.t.Logf("%d requests, %d failed, %d failed again and again", sent.Load(), lost.Load(), lostForGood.Load())
	if n := lostForGood.Load(); n > 0 {
		s.t.Errorf("%d requests failed even when repeated", n)
	}
	return share{lost.Load(), sent.Load()}
}

// settle makes some requests, so that what is made once is made. Whether they
// succeed does not matter.
func settle(s *site) {
	for range 20 {
		_, _, _ = s.try(http.MethodGet, "/x", nil)
	}
}

func request(client *http.Client, addr string) bool {
	res, err := client.Get("http://" + addr + "/x")
	if err != nil {
		return false
	}
	defer res.Body.Close()
	return res.StatusCode == http.StatusOK
}

func usage() (goroutines int, heap uint64) {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return runtime.NumGoroutine(), m.HeapAlloc
}

// A broken configuration changes nothing.
func TestBrokenReload(t *testing.T) {
	u := serve(t, "h1", hello)
	s := start(t, fmt.Sprintf(`http://{addr} {
		log
		hooks {
			connection
		}
		reverse_proxy %s {
			transport hooks
		}
	}`, u.addr))
	s.get("/x")
	err := s.tryLoad(`http://{addr} {
		hooks {
			connection
			on_error {
				page class refused {
					html file testdata/none.html
				}
			}
		}
	}`)
	if err == nil {
		t.Fatal("the broken configuration was loaded")
	}
	s.get("/x")
	if a := s.access("/x", 2).attempts(); len(a) != 1 || a[0].number("conn_requests") != 2 {
		t.Errorf("attempts = %v", a)
	}
}
