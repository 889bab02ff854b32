// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// queued is a zone of one request at a time.
func queued(name string, size int, maxWait time.Duration) *Zone {
	z := textZone(name)
	z.Inflight, z.Queue = 1, &Queue{Size: size, MaxWait: caddy.Duration(maxWait)}
	return z
}

// crowd is clients of a handler whose requests end when the test wants it.
type crowd struct {
	h     *Handler
	start time.Time

	mu     sync.Mutex
	served []string
	ended  map[string]ending
	doors  map[string]chan struct{}
	leave  map[string]context.CancelFunc
}

// ending is how a request ended, and when.
type ending struct {
	status int
	after  time.Duration
}

func newCrowd(h *Handler) *crowd {
	return &crowd{
		h: h, start: time.Now(), ended: make(map[string]ending),
		doors: make(map[string]chan struct{}), leave: make(map[string]context.CancelFunc),
	}
}

// arrive sends a request and returns when it waits, is served or has ended.
func (c *crowd) arrive(name, key string) {
	c.send(name, key)
	synctest.Wait()
}

func (c *crowd) send(name, key string) {
	ctx, cancel := context.WithCancel(context.Background())
	door := make(chan struct{})
	c.mu.Lock()
	c.doors[name], c.leave[name] = door, cancel
	c.mu.Unlock()
	go func() {
		defer cancel()
		status, _ := serve(c.h, request(ctx, key), func(http.ResponseWriter, *http.Request) error {
			c.mu.Lock()
			c.served = append(c.served, name)
			c.mu.Unlock()
			<-door
			return nil
		})
		c.mu.Lock()
		defer c.mu.Unlock()
		c.ended[name] = ending{status, time.Since(c.start)}
	}()
}

func (c *crowd) finish(name string) { close(c.doors[name]); synctest.Wait() }
func (c *crowd) abort(name string)  { c.leave[name](); synctest.Wait() }

func (c *crowd) expectServed(t *testing.T, names ...string) {
	t.Helper()
	synctest.Wait()
	c.mu.Lock()
	defer c.mu.Unlock()
	if !slices.Equal(c.served, names) {
		t.Fatalf("served %v, want %v", c.served, names)
	}
}

func (c *crowd) expectEnd(t *testing.T, name string, want ending) {
	t.Helper()
	synctest.Wait()
	c.mu.Lock()
	defer c.mu.Unlock()
	if e := c.ended[name]; e != want {
		t.Errorf("%s ended with %+v, want %+v", name, e, want)
	}
}

// quiet checks that nothing is held anymore.
func quiet(t *testing.T, z *Zone, keys ...string) {
	t.Helper()
	l := &z.state.line
	if n := l.waiting.Load(); n != 0 || len(l.keys) != 0 {
		t.Errorf("%d wait, of %d keys", n, len(l.keys))
	}
	for _, key := range keys {
		if st, _ := z.state.counters.Inspect(context.Background(), 0, keyOfText(key)); st.Inflight != 0 || st.Reserved != 0 {
			t.Errorf("key %s: %+v", key, st)
		}
	}
}

func TestQueueOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		z := queued("wait-order", 10, time.Minute)
		c := newCrowd(newHandler(t, z))
		for _, name := range []string{"a", "b", "c", "d"} {
			c.arrive(name, "k")
		}
		c.arrive("other", "another key")
		c.expectServed(t, "a", "other")
		c.finish("a")
		c.expectServed(t, "a", "other", "b")
		// who comes while others wait, comes behind them
		c.arrive("e", "k")
		for _, name := range []string{"b", "c", "d", "e", "other"} {
			c.finish(name)
		}
		c.expectServed(t, "a", "other", "b", "c", "d", "e")
		quiet(t, z, "k", "another key")
	})
}

// TestWaitLeave: those that leave lose neither their place nor that of others.
func TestWaitLeave(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		z := queued("wait-leave", 10, time.Minute)
		c := newCrowd(newHandler(t, z))
		for _, name := range []string{"a", "b", "c", "d", "e"} {
			c.arrive(name, "k")
		}
		c.abort("d") // in the middle
		c.abort("b") // the first
		c.expectEnd(t, "d", ending{statusClientClosed, 0})
		c.expectEnd(t, "b", ending{statusClientClosed, 0})
		c.finish("a")
		c.expectServed(t, "a", "c")
		c.finish("c")
		c.expectServed(t, "a", "c", "e")
		c.finish("e")
		quiet(t, z, "k")
	})
}

// TestWaitLeaveAndEnd: the first leaves and a place becomes free at once.
func TestWaitLeaveAndEnd(t *testing.T) {
	for range 200 {
		synctest.Test(t, func(t *testing.T) {
			z := queued("wait-leave-end", 10, time.Minute)
			c := newCrowd(newHandler(t, z))
			for _, name := range []string{"a", "b", "c"} {
				c.arrive(name, "k")
			}
			go c.leave["b"]()
			close(c.doors["a"])
			synctest.Wait()
			if slices.Contains(c.served, "b") {
				c.finish("b")
			}
			if !slices.Contains(c.served, "c") {
				t.Fatalf("served %v: c was forgotten", c.served)
			}
			c.finish("c")
			quiet(t, z, "k")
		})
	}
}

func TestMaxWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		z := queued("wait-max", 10, time.Minute)
		c := newCrowd(newHandler(t, z))
		c.arrive("a", "k")
		c.arrive("b", "k")
		time.Sleep(10 * time.Second)
		c.arrive("c", "k")
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		c.expectEnd(t, "b", ending{http.StatusTooManyRequests, time.Minute})
		c.expectEnd(t, "c", ending{http.StatusTooManyRequests, 70 * time.Second})
		c.finish("a")
		c.expectServed(t, "a")
		quiet(t, z, "k")
	})
}

func TestQueueSize(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		z := queued("wait-size", 2, time.Minute)
		z.MaxWaiting = 3
		c := newCrowd(newHandler(t, z))
		for _, name := range []string{"a", "b", "c", "d"} {
			c.arrive(name, "k")
		}
		c.expectEnd(t, "d", ending{http.StatusTooManyRequests, 0})
		for _, name := range []string{"e", "f", "g"} {
			c.arrive(name, "l")
		}
		// the queue of l has room, the zone has not
		c.expectEnd(t, "g", ending{http.StatusTooManyRequests, 0})
		c.expectServed(t, "a", "e")
		c.abort("b")
		c.arrive("h", "l")
		for _, name := range []string{"a", "c", "e", "f", "h"} {
			c.finish(name)
		}
		c.expectServed(t, "a", "e", "c", "f", "h")
		quiet(t, z, "k", "l")
	})
}

// meddled are counters in whose refusals something happens before the request
// that was refused can join the line.
type meddled struct {
	Counters
	meanwhile func()
}

func (m *meddled) Take(ctx context.Context, a *Ask) (Verdict, error) {
	v, err := m.Counters.Take(ctx, a)
	if f := m.meanwhile; f != nil && !v.Allowed {
		m.meanwhile = nil
		f()
	}
	return v, err
}

// TestEndBeforeJoin: the request that is in the way ends after another one was
// refused, and before that one is in the line, where it could be told.
func TestEndBeforeJoin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		z := queued("wait-end-before-join", 10, time.Minute)
		c := newCrowd(newHandler(t, z))
		c.arrive("a", "k")
		z.state.counters = &meddled{z.state.counters, func() {
			close(c.doors["a"])
			for done := false; !done; { // until it has given everything back
				c.mu.Lock()
				_, done = c.ended["a"]
				c.mu.Unlock()
				time.Sleep(time.Nanosecond)
			}
		}}
		c.arrive("b", "k")
		time.Sleep(time.Millisecond)
		c.expectServed(t, "a", "b")
		c.finish("b")
		quiet(t, z, "k")
	})
}

// TestStaleRefusal: who was refused before others were in front of it must ask
// again when it is the first, and not trust what it was told then.
func TestStaleRefusal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		z := textZone("wait-stale")
		z.Algorithm, z.Events, z.Burst, z.Window = algorithmBucket, 10, 1, caddy.Duration(10*time.Second)
		z.Delay = caddy.Duration(2500 * time.Millisecond)
		c := newCrowd(newHandler(t, z))
		c.arrive("a", "k")
		z.state.counters = &meddled{z.state.counters, func() {
			for c.send("b", "k"); z.state.line.waiting.Load() == 0; {
				time.Sleep(time.Nanosecond)
			}
		}}
		c.arrive("c", "k")
		time.Sleep(500 * time.Millisecond)
		c.expectServed(t, "a")
		c.abort("b")
		time.Sleep(501 * time.Millisecond)
		c.expectServed(t, "a", "c")
		c.finish("a")
		c.finish("c")
		quiet(t, z)
	})
}

func TestDelay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		z := textZone("wait-delay")
		z.Algorithm, z.Events, z.Burst, z.Window = algorithmBucket, 10, 1, caddy.Duration(10*time.Second)
		z.Delay = caddy.Duration(4500 * time.Millisecond)
		c := newCrowd(newHandler(t, z))
		for _, name := range []string{"a", "b", "c", "d", "e"} {
			c.arrive(name, "k")
		}
		c.expectServed(t, "a")
		time.Sleep(999 * time.Millisecond)
		c.expectServed(t, "a")
		time.Sleep(2 * time.Millisecond)
		c.expectServed(t, "a", "b")
		// whoever leaves is not counted
		c.abort("c")
		c.expectEnd(t, "c", ending{statusClientClosed, 1001 * time.Millisecond})
		time.Sleep(time.Second)
		c.expectServed(t, "a", "b", "d")
		time.Sleep(time.Second)
		c.expectServed(t, "a", "b", "d", "e")
		for _, name := range c.served {
			close(c.doors[name])
		}
		synctest.Wait()
		quiet(t, z)
	})
}

// TestDelayTooLong: a request that could not pass in time is refused at once.
func TestDelayTooLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		z := textZone("wait-delay-long")
		z.Events, z.Window, z.Delay = 1, caddy.Duration(time.Minute), caddy.Duration(10*time.Second)
		c := newCrowd(newHandler(t, z))
		c.arrive("a", "k")
		c.arrive("b", "k")
		c.expectEnd(t, "b", ending{http.StatusTooManyRequests, 0})
		time.Sleep(51 * time.Second)
		c.arrive("c", "k")
		time.Sleep(10 * time.Second)
		c.expectServed(t, "a", "c")
		c.finish("a")
		c.finish("c")
		quiet(t, z)
	})
}

// TestDelayBehind: a request that could not pass in time behind those that wait
// is refused at once, too.
func TestDelayBehind(t *testing.T) {
	for _, algorithm := range []string{algorithmSliding, algorithmBucket} {
		synctest.Test(t, func(t *testing.T) {
			z := textZone("wait-delay-behind")
			z.Algorithm, z.Events, z.Burst, z.Window = algorithm, 1, 0, caddy.Duration(time.Second)
			z.Delay = caddy.Duration(2500 * time.Millisecond)
			c := newCrowd(newHandler(t, z))
			for _, name := range []string{"a", "b", "c", "d"} {
				c.arrive(name, "k")
			}
			c.expectEnd(t, "d", ending{http.StatusTooManyRequests, 0})
			time.Sleep(2100 * time.Millisecond)
			c.expectServed(t, "a", "b", "c")
			for _, name := range c.served {
				close(c.doors[name])
			}
			synctest.Wait()
			quiet(t, z)
		})
	}
}

// TestDelayBound: whatever happens, nobody is held longer than max_wait.
func TestDelayBound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		z := textZone("wait-delay-bound")
		z.Events, z.Window, z.Delay = 1, caddy.Duration(time.Second), caddy.Duration(2500*time.Millisecond)
		z.MaxWaiting = 20
		h := newHandler(t, z)
		c := newCrowd(h)
		for i := range 30 {
			name := string(rune('A' + i))
			c.arrive(name, "k")
			close(c.doors[name])
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		passed := 0
		for name, e := range c.ended {
			if e.after > time.Duration(z.Delay) {
				t.Errorf("%s was held for %v", name, e.after)
			}
			if e.status == http.StatusOK {
				passed++
			}
		}
		if len(c.ended) != 30 || passed != 3 {
			t.Errorf("%d ended, %d passed, want 30 and 3", len(c.ended), passed)
		}
		quiet(t, z)
	})
}

// TestQueueAndDelay: both kinds of waiting in one zone.
func TestQueueAndDelay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		z := queued("wait-both", 5, time.Minute)
		z.Algorithm, z.Events, z.Burst, z.Window = algorithmBucket, 10, 2, caddy.Duration(10*time.Second)
		z.Delay = caddy.Duration(5 * time.Second)
		c := newCrowd(newHandler(t, z))
		for _, name := range []string{"a", "b", "c"} {
			c.arrive(name, "k")
		}
		c.finish("a")
		c.expectServed(t, "a", "b") // the second token
		c.finish("b")
		c.expectServed(t, "a", "b")
		time.Sleep(time.Second + time.Millisecond)
		c.expectServed(t, "a", "b", "c")
		c.finish("c")
		quiet(t, z, "k")
	})
}

// TestQueueOfLevels: what ends elsewhere below the same coarse level makes room.
func TestQueueOfLevels(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		z := queued("wait-levels", 5, time.Minute)
		z.Inflight = 2
		z.Keys = append([]*KeyLevel{{Text: "{http.request.header.Key}", Times: 1}}, &KeyLevel{Text: "all"})
		c := newCrowd(newHandler(t, z))
		c.arrive("a", "k")
		c.arrive("b", "l")
		c.arrive("c", "m")
		c.expectServed(t, "a", "b")
		c.finish("a")
		time.Sleep(polling + time.Millisecond)
		c.expectServed(t, "a", "b", "c")
		c.finish("b")
		c.finish("c")
		quiet(t, z, "k", "l", "m")
	})
}

// broken are counters that fail from some time on.
type broken struct {
	Counters
	since time.Time
}

func (b broken) Take(ctx context.Context, a *Ask) (Verdict, error) {
	if !time.Now().Before(b.since) {
		return Verdict{}, errors.New("broken")
	}
	return b.Counters.Take(ctx, a)
}

func TestStoreFailsMeanwhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		z := queued("wait-store", 5, time.Minute)
		c := newCrowd(newHandler(t, z))
		z.state.counters = broken{z.state.counters, time.Now().Add(time.Second)}
		c.arrive("a", "k")
		c.arrive("b", "k")
		c.arrive("c", "k")
		time.Sleep(time.Second)
		c.finish("a")
		c.expectEnd(t, "b", ending{http.StatusServiceUnavailable, time.Second})
		c.expectEnd(t, "c", ending{http.StatusServiceUnavailable, time.Second})
		c.arrive("d", "k")
		c.expectEnd(t, "d", ending{http.StatusServiceUnavailable, time.Second})
		quiet(t, z)
	})
}

// TestShadowDoesNotWait: shadow changes nothing, not even how long it takes.
func TestShadowDoesNotWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		z := queued("wait-shadow", 5, time.Minute)
		z.Mode = modeShadow
		c := newCrowd(newHandler(t, z))
		c.arrive("a", "k")
		c.arrive("b", "k")
		c.expectServed(t, "a", "b")
		c.finish("b")
		c.finish("a")
		quiet(t, z, "k")
	})
}

// TestWaitedTime is what placeholders and logs say.
func TestWaitedTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		z := textZone("wait-time")
		z.Algorithm, z.Events, z.Burst, z.Window = algorithmBucket, 10, 1, caddy.Duration(10*time.Second)
		z.Delay = caddy.Duration(5 * time.Second)
		h := newHandler(t, z)
		serve(h, request(t.Context(), "k"), nil)
		r := request(context.Background(), "k")
		serve(h, r, nil)
		repl := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
		if text := repl.ReplaceAll("{http.ratelimit.decision} {http.ratelimit.waited_ms}", "?"); text != "allowed 1000" {
			t.Errorf("facts: %s", text)
		}
	})
}

// TestReservedUnderWay: of two logins at once with a limit of one failure, the
// second waits for what becomes of the first.
func TestReservedUnderWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		z := textZone("wait-reserved")
		z.Events, z.Window, z.CountWhen = 1, caddy.Duration(time.Minute), &CountWhen{Statuses: []string{"401"}}
		h := newHandler(t, z)
		answer := func(status int) caddyhttp.HandlerFunc {
			return func(w http.ResponseWriter, _ *http.Request) error { w.WriteHeader(status); return nil }
		}
		c := newCrowd(h)
		c.arrive("a", "k")
		c.arrive("b", "k")
		c.expectEnd(t, "b", ending{http.StatusTooManyRequests, 0})
		c.finish("a") // a success
		if status, _ := serve(h, request(t.Context(), "k"), answer(401)); status != 401 {
			t.Errorf("after a success: %d", status)
		}
		if status, _ := serve(h, request(t.Context(), "k"), answer(200)); status != 429 {
			t.Errorf("after a failure: %d", status)
		}
		quiet(t, z, "k")
	})
}
