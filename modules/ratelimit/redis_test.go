// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-gatehouse/gatehouse/internal/redistest"
)

// redisPromise is a deadline that no healthy Redis exceeds, however busy the machine is.
const redisPromise = 10 * time.Second

// openRedis opens counters with settings that a test has filled in.
func openRedis(t testing.TB, s *RedisStore, spec Spec) *redisCounters {
	t.Helper()
	ctx, cancel := caddy.NewContext(caddy.Context{Context: t.Context()})
	t.Cleanup(cancel)
	if s.MaxMemory == 0 {
		s.MaxMemory = 1 << 20
	}
	if s.Deadline == 0 {
		s.Deadline = caddy.Duration(redisPromise)
	}
	if err := s.Provision(ctx); err != nil {
		t.Fatal(err)
	}
	if spec.Zone == "" {
		spec.Zone = "test"
	}
	if spec.Logger == nil {
		spec.Logger = zap.NewNop()
	}
	c, err := s.Open(spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c.(*redisCounters)
}

// plainRedis opens counters in a server of its own.
func plainRedis(t testing.TB, spec Spec) (*redistest.Server, *redisCounters) {
	t.Helper()
	server := redistest.Start(t)
	return server, openRedis(t, &RedisStore{Address: []string{server.Addr}}, spec)
}

// until waits for a condition.
func until(t testing.TB, what string, condition func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !condition(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited too long until %s", what)
		}
	}
}

// textKey is a key that both stores know.
func textKey(n int) Key {
	return Key{Hash: mix(uint64(n) + 1), Text: "key " + strconv.Itoa(n)}
}

func textAsk(cost int, numbers ...int) *Ask {
	a := &Ask{Cost: cost}
	for _, n := range numbers {
		a.Keys = append(a.Keys, textKey(n))
	}
	return a
}

// take asks Redis, and fails the test if it was not Redis that decided.
func take(t testing.TB, c *redisCounters, a *Ask) Verdict {
	t.Helper()
	v, err := c.Take(context.Background(), a)
	if err != nil || !a.ticket.mirrored {
		t.Fatalf("Redis has not decided: %v, %+v, away: %v", err, v, c.client.away())
	}
	return v
}

// settle is Done without the queue.
func settle(t testing.TB, c *redisCounters, a *Ask, charge bool) {
	t.Helper()
	lease := a.ticket.lease
	if lease == nil {
		t.Fatal("the ask holds nothing")
	}
	if !c.client.runAll([]redisCall{c.leases.done(redisRelease{lease, charge})}) {
		t.Fatal("Redis has not given back")
	}
	c.local.Done(a, charge)
	a.ticket.lease = nil
	lease.released.Store(true)
	c.leases.held.Add(-1)
	c.leases.mu.Lock()
	delete(c.leases.leases, lease)
	c.leases.mu.Unlock()
}

// timeline sends the same requests to both stores.
type timeline struct {
	t      *testing.T
	r      *rand.Rand
	memory *memoryCounters
	redis  *redisCounters
	now    int64
	held   [][2]*Ask
}

func newTimeline(t *testing.T, server *redistest.Server, seed uint64, levels ...Limit) *timeline {
	t.Helper()
	zone := fmt.Sprintf("%s %d", t.Name(), seed)
	l := &timeline{t: t, r: rand.New(rand.NewPCG(seed, 7)), now: start + int64(seed)*777}
	l.memory = openMemory(Spec{Zone: zone, Levels: levels, Reserves: true, Logger: zap.NewNop()}, 1<<21, false)
	l.redis = openRedis(t, &RedisStore{Address: []string{server.Addr}, Lease: caddy.Duration(mostLease)},
		Spec{Zone: zone, Levels: levels, Reserves: true})
	return l
}

// step lets some time pass and sends one request, or ends one.
func (l *timeline) step(mean float64, reserve bool) (memory, redis Verdict, a *Ask) {
	l.now += int64(l.r.ExpFloat64() * mean)
	l.redis.now = strconv.FormatInt(l.now, 10)
	if len(l.held) > 0 && l.r.IntN(2) == 0 {
		i := l.r.IntN(len(l.held))
		charge := l.r.IntN(2) == 0
		l.memory.done(l.held[i][0], charge, l.now)
		settle(l.t, l.redis, l.held[i][1], charge)
		l.held = slices.Delete(l.held, i, i+1)
	}
	var numbers []int
	for i := range l.memory.levels {
		numbers = append(numbers, 10*i+l.r.IntN(3-min(i, 2)))
	}
	cost := 1
	if l.r.IntN(6) == 0 {
		cost = l.r.IntN(4)
	}
	one, other := textAsk(cost, numbers...), textAsk(cost, numbers...)
	one.Reserve, other.Reserve = reserve, reserve
	memory = l.memory.take(one, l.now)
	redis = take(l.t, l.redis, other)
	if one.Holds != other.Holds {
		l.t.Fatalf("memory holds: %v, Redis: %v", one.Holds, other.Holds)
	}
	if one.Holds {
		l.held = append(l.held, [2]*Ask{one, other})
	}
	return memory, redis, other
}

// TestRedisEqualsMemory sends random timelines to both stores.
func TestRedisEqualsMemory(t *testing.T) {
	server := redistest.Start(t)
	kinds := map[string]func(r *rand.Rand, l *Limit){
		"rate": func(*rand.Rand, *Limit) {},
		"penalty": func(r *rand.Rand, l *Limit) {
			l.Penalty = l.Window / time.Duration(1+r.IntN(20))
			l.MaxPenalty = 3 * l.Penalty
		},
		"endless": func(_ *rand.Rand, l *Limit) { l.Penalty = l.Window / 9 },
		"flights": func(r *rand.Rand, l *Limit) { l.Inflight = 1 + r.IntN(4) },
		"only": func(r *rand.Rand, l *Limit) {
			*l = Limit{Inflight: 1 + r.IntN(4)}
		},
	}
	for name, change := range kinds {
		t.Run(name, func(t *testing.T) {
			refused := 0
			for seed := range uint64(24) {
				r := rand.New(rand.NewPCG(seed, 3))
				var levels []Limit
				for range 1 + r.IntN(3) {
					l := randomLimit(r)
					change(r, &l)
					levels = append(levels, l)
				}
				line := newTimeline(t, server, seed, levels...)
				mean := float64(max(levels[0].Window, time.Second).Microseconds()) / float64(max(levels[0].Events, 4)) / 3
				for n := range 120 {
					memory, redis, _ := line.step(mean, false)
					if memory != redis {
						t.Fatalf("seed %d, request %d, %+v:\nmemory %+v\nredis  %+v", seed, n, levels, memory, redis)
					}
					if !memory.Allowed {
						refused++
					}
				}
			}
			if refused < 100 {
				t.Fatalf("only %d requests were refused", refused)
			}
		})
	}
}

// TestRedisReservation compares who is allowed where requests are charged or
// given back later. In a sliding window both stores charge at the same times.
func TestRedisReservation(t *testing.T) {
	server := redistest.Start(t)
	for seed := range uint64(30) {
		r := rand.New(rand.NewPCG(seed, 5))
		l := randomLimit(r)
		l.Window = max(l.Window, time.Second)
		line := newTimeline(t, server, seed, l)
		// reservations are done within a fraction of the window: one that outlives it is
		// forgotten by Redis and not by memory
		mean := float64(l.Window.Microseconds()) / float64(l.Events) / 500
		for n := range 120 {
			memory, redis, _ := line.step(mean, true)
			if memory.Allowed != redis.Allowed {
				t.Fatalf("seed %d, request %d, %+v:\nmemory %+v\nredis  %+v", seed, n, l, memory, redis)
			}
		}
	}
}

// TestRedisRefund gives back what was reserved, but never more.
func TestRedisRefund(t *testing.T) {
	for _, algorithm := range []Algorithm{SlidingWindow, TokenBucket} {
		t.Run(strconv.Itoa(int(algorithm)), func(t *testing.T) {
			l := Limit{Algorithm: algorithm, Events: 3, Window: time.Hour}
			_, c := plainRedis(t, Spec{Levels: []Limit{l}, Reserves: true})
			reserve := func() *Ask {
				a := textAsk(1, 1)
				a.Reserve = true
				if !take(t, c, a).Allowed {
					return nil
				}
				return a
			}
			used := func() int {
				st, err := c.Inspect(t.Context(), 0, textKey(1))
				if err != nil {
					t.Fatal(err)
				}
				return st.Used
			}
			for range 5 { // all of it, as often as it is given back
				asks := []*Ask{reserve(), reserve(), reserve()}
				if reserve() != nil {
					t.Fatal("a fourth reservation was allowed")
				}
				for _, a := range asks {
					c.Done(a, false)
				}
				until(t, "everything is given back", func() bool { return used() == 0 })
			}
			c.Done(reserve(), true)
			until(t, "the release is sent", func() bool { return c.leases.held.Load() == 0 && len(c.leases.releases) == 0 })
			if n := used(); n != 1 {
				t.Fatalf("a charged reservation counts %d", n)
			}
		})
	}
}

// TestRedisNoWindowAdmitsMore sends random timelines and looks at all windows.
func TestRedisNoWindowAdmitsMore(t *testing.T) {
	server := redistest.Start(t)
	for seed := range uint64(16) {
		r := rand.New(rand.NewPCG(seed, 9))
		l := randomLimit(r)
		line := newTimeline(t, server, seed, l)
		events := map[string][]int64{}
		for range 300 {
			_, v, a := line.step(float64(l.Window.Microseconds())/float64(l.Events)/4, false)
			for range a.Cost {
				if v.Allowed {
					events[a.Keys[0].Text] = append(events[a.Keys[0].Text], line.now)
				}
			}
		}
		for _, list := range events {
			admitted(t, list, l.Window, most(l))
		}
	}
}

// TestRedisSameMillisecond sends requests of one and the same instant.
func TestRedisSameMillisecond(t *testing.T) {
	for _, algorithm := range []Algorithm{SlidingWindow, TokenBucket} {
		_, c := plainRedis(t, Spec{Levels: []Limit{{Algorithm: algorithm, Events: 5, Window: time.Minute}}})
		c.now = strconv.Itoa(start)
		allowed := 0
		for range 9 {
			if take(t, c, textAsk(1, 1)).Allowed {
				allowed++
			}
		}
		if allowed != 5 {
			t.Fatalf("%d of 9 requests in one instant were allowed, want 5", allowed)
		}
	}
}

// TestRedisShared lets three clients of one Redis use up a limit together.
func TestRedisShared(t *testing.T) {
	server := redistest.Start(t)
	const limit, workers, each = 300, 4, 60
	for _, algorithm := range []Algorithm{SlidingWindow, TokenBucket} {
		spec := Spec{Zone: "z" + strconv.Itoa(int(algorithm)), Levels: []Limit{{Algorithm: algorithm, Events: limit, Window: 24 * time.Hour}}}
		var allowed atomic.Int64
		var wg sync.WaitGroup
		for node := range 3 {
			s := &RedisStore{Address: []string{server.Addr}}
			c := openRedis(t, s, spec)
			if node > 0 { // a connection of its own
				c.client = newRedisClient(s.option, c.names.probe(), zap.NewNop())
				t.Cleanup(func() { _ = c.client.Destruct() })
			}
			for range workers {
				wg.Go(func() {
					for range each {
						a := textAsk(1, 1)
						if v, _ := c.Take(context.Background(), a); v.Allowed && a.ticket.mirrored {
							allowed.Add(1)
						}
					}
				})
			}
		}
		wg.Wait()
		if n := allowed.Load(); n != limit {
			t.Fatalf("three clients were allowed %d of %d", n, limit)
		}
	}
}

// TestRedisExpiry looks for keys without an end after all that can be done.
func TestRedisExpiry(t *testing.T) {
	server := redistest.Start(t)
	for seed := range uint64(12) {
		r := rand.New(rand.NewPCG(seed, 4))
		l := randomLimit(r)
		l.Inflight, l.Penalty = 1+r.IntN(3), time.Duration(r.IntN(2))*time.Minute
		c := openRedis(t, &RedisStore{Address: []string{server.Addr}}, Spec{Zone: strconv.FormatUint(seed, 10), Levels: []Limit{l, l}, Reserves: true})
		for range 60 {
			a := textAsk(r.IntN(3), r.IntN(4), 10+r.IntN(2))
			a.Reserve = r.IntN(2) == 0
			if take(t, c, a); a.Holds && r.IntN(3) > 0 {
				c.Done(a, r.IntN(2) == 0)
			}
			if r.IntN(20) == 0 {
				_ = c.Forgive(t.Context(), 1, textKey(10))
			}
		}
		until(t, "all is given back", func() bool { return len(c.leases.releases) == 0 })
		longest := max(l.Window*2, l.Penalty, defaultLease) + time.Second
		keys := strings.Fields(server.CLI("keys", "*"))
		if len(keys) < 2 {
			t.Fatalf("keys: %q", keys)
		}
		for _, key := range keys {
			ttl, _ := strconv.Atoi(server.CLI("pttl", key))
			if ttl == -1 || time.Duration(ttl)*time.Millisecond > longest {
				t.Fatalf("%s lives for %d ms, want at most %v", key, ttl, longest)
			}
		}
		server.CLI("flushall")
	}
}

// TestRedisKeys looks at what is written: addresses in clear, nothing else.
func TestRedisKeys(t *testing.T) {
	server := redistest.Start(t)
	s := &RedisStore{Address: []string{server.Addr}, KeyPrefix: "mine:", DB: 3}
	c := openRedis(t, s, Spec{Zone: "a{b}:c", Route: "r}1", Levels: []Limit{{Events: 2, Window: time.Hour, Inflight: 2}}})
	all := make([]byte, 256)
	for i := range all {
		all[i] = byte(i)
	}
	take(t, c, &Ask{Cost: 1, Keys: []Key{{Hash: 5, Text: "secret" + string(all)}}})
	take(t, c, &Ask{Cost: 1, Keys: []Key{{Hash: 6, Text: ""}}})
	take(t, c, &Ask{Cost: 1, Keys: []Key{{Hash: 7, Prefix: netip.MustParsePrefix("2001:db8::/64")}}})
	out := server.CLI("-n", "3", "keys", "*")
	keys := strings.Fields(out)
	for _, key := range keys {
		if !strings.HasPrefix(key, "mine:{a%7Bb%7D%3Ac/r%7D1:") || strings.Contains(key, "secret") {
			t.Errorf("key %q", key)
		}
	}
	for _, want := range []string{"mine:{a%7Bb%7D%3Ac/r%7D1:2001:db8::/64}:0:window3515625", "mine:{a%7Bb%7D%3Ac/r%7D1:2001:db8::/64}:0:inflight"} {
		if !slices.Contains(keys, want) {
			t.Errorf("no key %s in %q", want, keys)
		}
	}
	if out := server.CLI("-n", "0", "keys", "*"); out != "" {
		t.Errorf("keys in database 0: %s", out)
	}
}

// TestRedisInspectForgive looks at keys and forgives one.
func TestRedisInspectForgive(t *testing.T) {
	l := Limit{Events: 2, Window: time.Hour, Inflight: 5, Penalty: time.Minute}
	_, c := plainRedis(t, Spec{Levels: []Limit{l}})
	for range 3 {
		take(t, c, textAsk(1, 1))
	}
	st, err := c.Inspect(t.Context(), 0, textKey(1))
	if err != nil || st.Used != 2 || st.Limit != 2 || st.Inflight != 2 || !st.Exact || st.Blocked <= 0 || st.Reset <= 0 {
		t.Fatalf("%+v, %v", st, err)
	}
	if err := c.Forgive(t.Context(), 0, textKey(1)); err != nil {
		t.Fatal(err)
	}
	if st, err = c.Inspect(t.Context(), 0, textKey(1)); err != nil || st.Used != 0 || st.Blocked != 0 || st.Inflight != 2 {
		t.Fatalf("after forgiving: %+v, %v", st, err)
	}
	if v := take(t, c, textAsk(1, 1)); !v.Allowed {
		t.Fatalf("a forgiven key is refused: %+v", v)
	}
	if top := c.Top(0); len(top) != 1 || top[0].Key.Text != "key 1" || top[0].Count != 4 {
		t.Fatalf("top: %+v", top)
	}
}

// observed returns a logger and what it has logged from Info on.
func observed() (*zap.Logger, *observer.ObservedLogs) {
	core, logs := observer.New(zapcore.InfoLevel)
	return zap.New(core), logs
}

// BenchmarkRedisTake is one decision over loopback.
func BenchmarkRedisTake(b *testing.B) {
	_, c := plainRedis(b, Spec{Levels: []Limit{{Events: 1 << 20, Window: time.Hour}}})
	take(b, c, textAsk(1, 1))
	b.Run("serial", func(b *testing.B) {
		b.ReportAllocs()
		a := textAsk(1, 1)
		for b.Loop() {
			take(b, c, a)
		}
	})
	b.Run("parallel", func(b *testing.B) {
		b.ReportAllocs()
		b.SetParallelism(32)
		b.RunParallel(func(pb *testing.PB) {
			a := textAsk(1, 1)
			for pb.Next() {
				take(b, c, a)
			}
		})
	})
}
