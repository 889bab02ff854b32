// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"context"
	"net"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-gatehouse/gatehouse/internal/redistest"
)

// failing opens counters of three events with the default deadline and a log.
func failing(t *testing.T, addr, onFailure string) (*redisCounters, *observer.ObservedLogs) {
	t.Helper()
	logger, logs := observed()
	s := &RedisStore{Address: []string{addr}, OnFailure: onFailure, Deadline: caddy.Duration(defaultRedisDeadline)}
	return openRedis(t, s, Spec{Levels: []Limit{{Events: 3, Window: time.Hour}}, Logger: logger}), logs
}

// prompt asks, and fails the test if the answer takes much longer than the deadline.
func prompt(t *testing.T, c *redisCounters, a *Ask) Verdict {
	t.Helper()
	before := time.Now()
	v, err := c.Take(context.Background(), a)
	if took := time.Since(before); err != nil || took > c.deadline+time.Second {
		t.Fatalf("answer after %v: %v", took, err)
	}
	return v
}

// byRedis asks until Redis decides.
func byRedis(t *testing.T, c *redisCounters) Verdict {
	t.Helper()
	var v Verdict
	until(t, "Redis decides", func() bool {
		a := textAsk(0, 99)
		v = prompt(t, c, a)
		return a.ticket.mirrored
	})
	return v
}

// withoutRedis asks until Redis does not decide anymore.
func withoutRedis(t *testing.T, c *redisCounters) {
	t.Helper()
	n := 1000
	until(t, "Redis is away", func() bool {
		n++
		prompt(t, c, textAsk(1, n))
		return c.client.away()
	})
}

func messages(logs *observer.ObservedLogs, level string) (reasons []string) {
	for _, e := range logs.All() {
		if e.Level.String() == level {
			reason, _ := e.ContextMap()["reason"].(string)
			reasons = append(reasons, reason)
		}
	}
	return reasons
}

// TestRedisOutages takes Redis away and brings it back, in every way.
func TestRedisOutages(t *testing.T) {
	outages := map[string]struct {
		stop, start func(s *redistest.Server)
		reason      string
	}{
		"stopped": {(*redistest.Server).Pause, (*redistest.Server).Resume, "no answer in time"},
		"paused": {
			func(s *redistest.Server) { s.CLI("client", "pause", "5000", "ALL") },
			func(*redistest.Server) {}, "no answer in time", // nobody can end it
		},
		"paused writes": {
			func(s *redistest.Server) { s.CLI("client", "pause", "600000", "WRITE") },
			func(s *redistest.Server) { s.CLI("client", "unpause") }, "no answer in time",
		},
		"killed": {(*redistest.Server).Kill, (*redistest.Server).Restart, "connection"},
		"read-only": {
			func(s *redistest.Server) { s.CLI("replicaof", "127.0.0.1", "1") },
			func(s *redistest.Server) { s.CLI("replicaof", "no", "one") }, "read-only",
		},
	}
	for name, outage := range outages {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := redistest.Start(t)
			c, logs := failing(t, server.Addr, failureLocal)
			byRedis(t, c)
			for range 2 {
				if v := prompt(t, c, textAsk(1, 1)); !v.Allowed {
					t.Fatalf("%+v", v)
				}
			}
			outage.stop(server)
			withoutRedis(t, c)
			// the node's own counters know of two events
			if first, second := prompt(t, c, textAsk(1, 1)), prompt(t, c, textAsk(1, 1)); !first.Allowed || second.Allowed {
				t.Fatalf("without Redis: %+v, %+v", first, second)
			}
			if r := c.Report(); r.Failures < 3 || !r.Away {
				t.Fatalf("%+v", r)
			}
			if w := messages(logs, "warn"); len(w) != 1 || !strings.Contains(w[0], outage.reason) {
				t.Fatalf("warnings: %q", w)
			}
			outage.start(server)
			byRedis(t, c)
			if w, i := messages(logs, "warn"), messages(logs, "info"); len(w) != 1 || len(i) != 1 {
				t.Fatalf("warnings: %q, infos: %q", w, i)
			}
		})
	}
}

// TestRedisPolicies takes Redis away under each policy.
func TestRedisPolicies(t *testing.T) {
	for policy, want := range map[string][]Verdict{
		failureLocal:  {{Allowed: true}, {Allowed: true}, {Allowed: true}, {Reason: OverRate}},
		failureOpen:   {{Allowed: true}, {Allowed: true}, {Allowed: true}, {Allowed: true}},
		failureClosed: {{Reason: StoreFailed}, {Reason: StoreFailed}, {Reason: StoreFailed}, {Reason: StoreFailed}},
	} {
		t.Run(policy, func(t *testing.T) {
			c, _ := failing(t, redistest.Free(t), policy) // where nothing listens
			for i, w := range want {
				a := textAsk(1, 1)
				if v := prompt(t, c, a); v.Allowed != w.Allowed || v.Reason != w.Reason || a.Holds {
					t.Fatalf("request %d: %+v", i, v)
				}
			}
			if top := c.Top(0); len(top) != 1 || top[0].Count != 4 {
				t.Fatalf("top: %+v", top)
			}
		})
	}
}

// TestRedisAppears starts Redis after the counters.
func TestRedisAppears(t *testing.T) {
	addr := redistest.Free(t)
	c, logs := failing(t, addr, failureClosed)
	until(t, "it is away", c.client.away)
	redistest.StartAt(t, addr)
	byRedis(t, c)
	if w := messages(logs, "warn"); len(w) != 1 || w[0] != "connection refused" {
		t.Fatalf("warnings: %q", w)
	}
}

// silent listens and never answers, as an address behind a firewall does not.
func silent(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ln.Close() })
	return ln.Addr().String()
}

// TestRedisBlackHole opens counters at an address that takes connections and says nothing.
func TestRedisBlackHole(t *testing.T) {
	for name, s := range map[string]*RedisStore{
		"single":   {},
		"cluster":  {Cluster: true},
		"sentinel": {Sentinel: &RedisSentinel{Master: "m"}},
	} {
		t.Run(name, func(t *testing.T) {
			s.Address, s.Deadline = []string{silent(t)}, caddy.Duration(defaultRedisDeadline)
			before := time.Now()
			c := openRedis(t, s, Spec{Levels: []Limit{{Events: 3, Window: time.Hour}}})
			for range 20 {
				prompt(t, c, textAsk(1, 1))
			}
			if took := time.Since(before); took > 20*c.deadline+time.Second {
				t.Fatalf("20 requests took %v", took)
			}
			until(t, "it is away", c.client.away)
		})
	}
}

// TestRedisStalledBounded sends 10,000 requests at once to a Redis that stands still.
func TestRedisStalledBounded(t *testing.T) {
	server := redistest.Start(t)
	c, _ := failing(t, server.Addr, failureLocal)
	byRedis(t, c)
	server.Pause()
	before := runtime.NumGoroutine()
	var slow atomic.Int64
	for range 5 {
		c.client.up.Store(true) // as if each burst were the first
		var wg sync.WaitGroup
		for n := range 2000 {
			wg.Go(func() {
				begun := time.Now()
				_, _ = c.Take(context.Background(), textAsk(1, n))
				if time.Since(begun) > c.deadline+5*time.Second {
					slow.Add(1)
				}
			})
		}
		wg.Wait()
		select { // what trip has said
		case <-c.client.wake:
		default:
		}
	}
	if n := slow.Load(); n > 0 {
		t.Fatalf("%d requests waited for longer than the deadline", n)
	}
	if n := runtime.NumGoroutine() - before; n > 5*redisOutstanding {
		t.Fatalf("%d goroutines are left", n)
	}
	server.Resume()
	byRedis(t, c)
	until(t, "all goroutines are gone", func() bool { return runtime.NumGoroutine() <= before+20 })
}

// TestRedisScriptFlush makes Redis forget the script.
func TestRedisScriptFlush(t *testing.T) {
	server, c := plainRedis(t, Spec{Levels: []Limit{{Events: 9, Window: time.Hour, Inflight: 9}}})
	for range 3 {
		a := textAsk(1, 1)
		take(t, c, a)
		server.CLI("script", "flush")
		settle(t, c, a, false)
		server.CLI("script", "flush")
	}
	if st, err := c.Inspect(t.Context(), 0, textKey(1)); err != nil || st.Used != 3 || st.Inflight != 0 {
		t.Fatalf("%+v, %v", st, err)
	}
}

// TestRedisBrokenRecord finds something else in the place of a record.
func TestRedisBrokenRecord(t *testing.T) {
	server, c := plainRedis(t, Spec{Levels: []Limit{{Events: 9, Window: time.Hour}}})
	a := textAsk(1, 1)
	take(t, c, a)
	server.CLI("set", c.names.keys(a.Keys, c.levels)[0], "\xff\xff nonsense")
	a = textAsk(1, 1)
	if v, err := c.Take(t.Context(), a); err != nil || !v.Allowed || !a.ticket.local {
		t.Fatalf("%+v, %v", v, err)
	}
}

// TestRedisLeaseDies lets a node die while it serves a request, another one live.
func TestRedisLeaseDies(t *testing.T) {
	server := redistest.Start(t)
	open := func() *redisCounters {
		s := &RedisStore{Address: []string{server.Addr}, Lease: caddy.Duration(leastLease)}
		c := openRedis(t, s, Spec{Levels: []Limit{{Inflight: 2}}})
		c.client = newRedisClient(s.option, c.names.probe(), zap.NewNop()) // a connection of its own
		return c
	}
	dies, lives := open(), open()
	t.Cleanup(func() { _ = lives.client.Destruct() })
	for _, c := range []*redisCounters{dies, lives} {
		if v := take(t, c, textAsk(1, 1)); !v.Allowed {
			t.Fatalf("%+v", v)
		}
	}
	if v := take(t, lives, textAsk(1, 1)); v.Allowed || v.Reason != OverInflight {
		t.Fatalf("a third request is in flight: %+v", v)
	}
	_ = dies.client.Destruct()
	inflight := func() int {
		st, err := lives.Inspect(t.Context(), 0, textKey(1))
		if err != nil {
			t.Fatal(err)
		}
		return st.Inflight
	}
	until(t, "the dead node's lease has run out", func() bool { return inflight() == 1 })
	key := lives.names.keys(textAsk(1, 1).Keys, lives.levels)[0]
	score := func() float64 {
		var latest float64
		for s := range strings.FieldsSeq(server.CLI("zrange", key, "0", "-1", "withscores")) {
			if f, err := strconv.ParseFloat(s, 64); err == nil {
				latest = max(latest, f)
			}
		}
		return latest
	}
	first := score()
	until(t, "the lease was renewed for longer than it lasts", func() bool { return score() > first+1.5e6 })
	if n := inflight(); n != 1 {
		t.Fatalf("%d in flight", n)
	}
}

// TestRedisManyLifecycles brings what is in flight back to zero.
func TestRedisManyLifecycles(t *testing.T) {
	_, c := plainRedis(t, Spec{Levels: []Limit{{Inflight: 4}}})
	var wg sync.WaitGroup
	for worker := range 8 {
		wg.Go(func() {
			for range 150 {
				a := textAsk(1, worker%2)
				if v, _ := c.Take(context.Background(), a); v.Allowed {
					c.Done(a, false)
				}
			}
		})
	}
	wg.Wait()
	for n := range 2 {
		until(t, "nothing is in flight", func() bool {
			st, err := c.Inspect(t.Context(), 0, textKey(n))
			return err == nil && st.Inflight == 0
		})
	}
	if n := c.leases.held.Load(); n != 0 {
		t.Fatalf("%d are held", n)
	}
}

// TestRedisClose closes counters while a request is under way.
func TestRedisClose(t *testing.T) {
	server, c := plainRedis(t, Spec{Levels: []Limit{{Inflight: 4}}})
	a := textAsk(1, 1)
	take(t, c, a)
	client := c.client
	_ = c.Close()
	_ = c.Close()
	take(t, c, textAsk(1, 2)) // never done
	c.Done(a, false)
	key := c.names.keys(a.Keys, c.levels)[0]
	until(t, "the lease is given back", func() bool { return server.CLI("exists", key) == "0" })
	if client.isStopped() {
		t.Fatal("the connection is closed although a request is under way")
	}
	late := textAsk(1, 3)
	take(t, c, late)
	c.Done(late, false)
	c.leases.held.Add(-1) // as if the other one were done
	until(t, "the connection is closed", client.isStopped)
	if v, err := c.Take(t.Context(), textAsk(1, 4)); err != nil || !v.Allowed {
		t.Fatalf("after the end: %+v, %v", v, err)
	}
}

// TestRedisShares opens two zones with one connection, and one with another user.
func TestRedisShares(t *testing.T) {
	server := redistest.Start(t)
	spec := Spec{Levels: []Limit{{Events: 3, Window: time.Hour}}}
	one := openRedis(t, &RedisStore{Address: []string{server.Addr}}, spec)
	two := openRedis(t, &RedisStore{Address: []string{server.Addr}, OnFailure: failureClosed}, spec)
	other := openRedis(t, &RedisStore{Address: []string{server.Addr}, DB: 1}, spec)
	if one.client != two.client || one.client == other.client {
		t.Fatal("connections are shared where they should not, or not where they should")
	}
}
