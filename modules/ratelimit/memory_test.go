// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"testing"
	"time"

	"go.uber.org/zap"
)

const start = 1_800_000_000_000_000 // microseconds

func testCounters(t testing.TB, bytes int64, pass bool, levels ...Limit) *memoryCounters {
	t.Helper()
	return openMemory(Spec{Zone: "test", Levels: levels, Reserves: true, Logger: zap.NewNop()}, bytes, pass)
}

func ask(hash uint64, cost int) *Ask {
	return &Ask{Keys: []Key{{Hash: mix(hash + 1)}}, Cost: cost}
}

// admitted checks that no window has more than most of the events. Each event
// is its time; they are in order.
func admitted(t testing.TB, events []int64, window time.Duration, most int) {
	t.Helper()
	for i := range events {
		if j := i + most; j < len(events) && events[j]-events[i] < window.Microseconds() {
			t.Fatalf("%d events in %v, want at most %d in %v (from %d)", most+1,
				time.Duration(events[j]-events[i])*time.Microsecond, most, window, events[i])
		}
	}
}

// most is how many events any window may have.
func most(l Limit) int {
	if l.Algorithm == TokenBucket {
		return l.Capacity() + l.Events
	}
	return l.Capacity()
}

func randomLimit(r *rand.Rand) Limit {
	l := Limit{
		Algorithm: Algorithm(r.IntN(2)),
		Events:    1 + r.IntN([]int{3, 20, 150, 700}[r.IntN(4)]),
		Window:    time.Duration(1+r.IntN(100_000)) * time.Millisecond,
	}
	if r.IntN(2) == 0 {
		l.Burst = r.IntN(30)
	}
	return l
}

// TestNoWindowAdmitsMore sends random timelines of several keys, with memory
// for all of them and with so little that records are evicted all the time.
func TestNoWindowAdmitsMore(t *testing.T) {
	for _, bytes := range []int64{64 << 10, 1 << 20} {
		for seed := range uint64(150) {
			r := rand.New(rand.NewPCG(seed, uint64(bytes)))
			l := randomLimit(r)
			m := testCounters(t, bytes, false, l)
			events := make(map[uint64][]int64)
			now := int64(start + r.IntN(1e9))
			for range 4000 {
				now += int64(r.ExpFloat64() * float64(l.Window.Microseconds()) / float64(l.Events) / 4)
				key := uint64(r.IntN(4))
				if r.IntN(3) == 0 {
					key = r.Uint64() // a crowd that comes once
				}
				cost := 1
				if r.IntN(8) == 0 {
					cost = r.IntN(4)
				}
				if v := m.take(ask(key, cost), now); v.Allowed {
					for range cost {
						events[key] = append(events[key], now)
					}
				} else if v.Wait <= 0 && cost <= l.Capacity() {
					t.Fatalf("seed %d: refused without a time to wait: %+v", seed, v)
				}
			}
			for _, e := range events {
				admitted(t, e, l.Window, most(l))
			}
		}
	}
}

// TestFreshBurst: a client that was not seen before has its whole limit at
// once, under either algorithm, at any phase.
func TestFreshBurst(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 300 {
		l := randomLimit(r)
		m := testCounters(t, 1<<20, false, l)
		now := start + r.Int64N(1e12)
		for i := range l.Capacity() {
			if v := m.take(ask(7, 1), now+int64(i)); !v.Allowed || v.Remaining != l.Capacity()-i-1 {
				t.Fatalf("%+v: event %d: %+v", l, i, v)
			}
		}
		// what a bucket refills meanwhile is no refusal
		if v := m.take(ask(7, 1), now+int64(l.Capacity())); v.Allowed && l.Algorithm == SlidingWindow {
			t.Fatalf("%+v: event %d was admitted", l, l.Capacity())
		}
	}
}

// TestWaitIsTrue: after the wait the same request passes, and for a key with a
// record not before it either.
func TestWaitIsTrue(t *testing.T) {
	for seed := range uint64(400) {
		r := rand.New(rand.NewPCG(seed, 3))
		l := randomLimit(r)
		m := testCounters(t, 1<<20, false, l)
		now := start + r.Int64N(1e12)
		var v Verdict
		cost := 1 + r.IntN(min(l.Capacity(), 3))
		for v = m.take(ask(1, cost), now); v.Allowed; v = m.take(ask(1, cost), now) {
			now += r.Int64N(l.Window.Microseconds()/int64(max(l.Capacity(), l.Events))/4 + 2)
		}
		wait := v.Wait.Microseconds()
		if v := m.take(ask(1, cost), now+wait-2); v.Allowed && wait > 2 && l.Algorithm == SlidingWindow {
			t.Fatalf("seed %d: %+v: admitted before the wait of %d µs was over", seed, l, wait)
		}
		if v := m.take(ask(1, cost), now+wait); !v.Allowed {
			t.Fatalf("seed %d: %+v: refused after the wait of %d µs: %+v", seed, l, wait, v)
		}
	}
}

// TestLateness: an event is forgotten no later than documented.
func TestLateness(t *testing.T) {
	for _, l := range []Limit{{Events: 5, Window: time.Minute}, {Events: 1000, Window: time.Hour}} {
		late := time.Duration(newGrid(l).quantum) * time.Microsecond
		m := testCounters(t, 1<<20, false, l)
		now := int64(start + 12345)
		for range l.Events {
			m.take(ask(1, 1), now)
		}
		v := m.take(ask(1, 1), now)
		if v.Allowed || v.Wait < l.Window || v.Wait > l.Window+late {
			t.Errorf("%+v: wait %v, want %v and at most %v more", l, v.Wait, l.Window, late)
		}
		resolution := time.Duration(fineResolution)
		if l.Capacity() > smallCapacity {
			resolution = largeResolution
		}
		if late > l.Window/resolution+time.Microsecond {
			t.Errorf("%+v: quantum %v", l, late)
		}
	}
}

// TestFullRecord: an event for which a record has no run of its own is counted
// with the newest one, and nothing is forgotten early.
func TestFullRecord(t *testing.T) {
	l := Limit{Events: 3, Window: time.Minute}
	for quantum, want := range map[int64]int{0: 4, 1: 3, 2: 2, 3: 2, 4: 0} {
		c := newRuns[uint8](1<<12, 1, l, newGrid(l))
		for q := range int64(4) {
			c.add(0, 1000+q, 1)
		}
		if got := c.expire(0, 1000+c.grid.span+quantum); got != want {
			t.Errorf("%d quanta after the window: %d events, want %d", quantum, got, want)
		}
	}
}

// TestHeavyHitterStaysRefused: whatever other keys do, a key over its limit has
// no more than its limit.
func TestHeavyHitterStaysRefused(t *testing.T) {
	for _, algorithm := range []Algorithm{SlidingWindow, TokenBucket} {
		l := Limit{Algorithm: algorithm, Events: 20, Window: time.Minute}
		m := testCounters(t, 64<<10, false, l)
		var events []int64
		now := int64(start)
		for i := range 200_000 {
			now += 1000
			if i%50 == 0 && m.take(ask(0, 1), now).Allowed {
				events = append(events, now)
			}
			m.take(ask(uint64(i+1)*7919, 1), now)
		}
		if len(events) == 0 {
			t.Fatal("the key was never admitted")
		}
		admitted(t, events, l.Window, most(l))
	}
}

// TestLevels: a request counts on all levels or on none.
func TestLevels(t *testing.T) {
	m := testCounters(t, 1<<20, false, Limit{Events: 2, Window: time.Minute}, Limit{Events: 3, Window: time.Minute})
	take := func(fine uint64) Verdict {
		return m.take(&Ask{Keys: []Key{{Hash: mix(fine)}, {Hash: mix(99)}}, Cost: 1}, start)
	}
	for i, want := range []struct {
		key     uint64
		allowed bool
		level   int
		left    int
	}{{1, true, 0, 1}, {1, true, 0, 0}, {1, false, 0, 0}, {2, true, 1, 0}, {2, false, 1, 0}, {3, false, 1, 0}} {
		v := take(want.key)
		if v.Allowed != want.allowed || v.Level != want.level || v.Remaining != want.left {
			t.Errorf("%d: %+v, want %+v", i, v, want)
		}
	}
	if used := m.inspect(0, Key{Hash: mix(3)}, start).Used; used != 0 {
		t.Errorf("a request that the coarse level refused counts %d on the fine one", used)
	}
}

// TestReserved: what is reserved is taken from the limit until it is charged or not.
func TestReserved(t *testing.T) {
	l := Limit{Events: 2, Window: time.Minute}
	m := testCounters(t, 1<<20, false, l)
	reserve := func() *Ask {
		a := ask(1, 1)
		a.Reserve = true
		if v := m.take(a, start); v.Allowed != a.Holds {
			t.Fatalf("%+v %+v", a, v)
		}
		return a
	}
	a, b := reserve(), reserve()
	if c := reserve(); c.Holds {
		t.Fatal("three of two were reserved")
	}
	m.done(a, false, start)
	m.done(b, true, start)
	if st := m.inspect(0, a.Keys[0], start); st.Used != 1 || st.Reserved != 0 {
		t.Fatalf("%+v", st)
	}
	d := reserve()
	m.done(d, true, start)
	if e := reserve(); e.Holds {
		t.Fatal("more than the limit was charged")
	}
}

// TestPenalty: a key that stays over its limit stays blocked, at most as long
// as the penalty may grow.
func TestPenalty(t *testing.T) {
	for _, algorithm := range []Algorithm{SlidingWindow, TokenBucket} {
		l := Limit{Algorithm: algorithm, Events: 1, Window: time.Second, Penalty: time.Minute, MaxPenalty: 3 * time.Minute}
		m := testCounters(t, 1<<20, false, l)
		at := func(d time.Duration) Verdict { return m.take(ask(1, 1), start+d.Microseconds()) }
		if !at(0).Allowed || at(0).Allowed {
			t.Fatal("the limit is not 1")
		}
		for _, tt := range []struct{ at, wait time.Duration }{
			{30 * time.Second, time.Minute},
			{80 * time.Second, time.Minute},
			{130 * time.Second, 50 * time.Second}, // 180 s in all
		} {
			if v := at(tt.at); v.Allowed || v.Reason != Blocked || v.Wait != tt.wait {
				t.Errorf("at %v: %+v, want a wait of %v", tt.at, v, tt.wait)
			}
		}
		if v := at(180*time.Second + 1); !v.Allowed {
			t.Errorf("still blocked after the longest penalty: %+v", v)
		}
	}
}

// TestPenaltyNotForReservations: a key that is refused because of what may never
// count is not blocked, and nobody knows how long it has to wait.
func TestPenaltyNotForReservations(t *testing.T) {
	m := testCounters(t, 1<<20, false, Limit{Events: 2, Window: time.Minute, Penalty: time.Hour})
	var held []*Ask
	for range 2 {
		a := ask(1, 1)
		a.Reserve = true
		m.take(a, start)
		held = append(held, a)
	}
	if v := m.take(ask(1, 1), start); v.Allowed || v.Reason != OverRate || v.Wait != 0 {
		t.Errorf("%+v, want a refusal for an unknown time", v)
	}
	for _, a := range held {
		m.done(a, false, start)
	}
	if v := m.take(ask(1, 2), start); !v.Allowed {
		t.Errorf("blocked by what did not count: %+v", v)
	}
	if v := m.take(ask(1, 1), start); v.Wait != time.Hour {
		t.Errorf("%+v, want a block", v)
	}
}

// TestCostAboveCapacity: no wait makes room for a request that never fits.
func TestCostAboveCapacity(t *testing.T) {
	for _, algorithm := range []Algorithm{SlidingWindow, TokenBucket} {
		m := testCounters(t, 1<<20, false, Limit{Algorithm: algorithm, Events: 2, Window: time.Minute})
		if v := m.take(ask(1, 3), start); v.Allowed || v.Wait != 0 {
			t.Errorf("%+v", v)
		}
	}
}

// TestPenaltyOutlivesEviction: a block that has no record stays in the sketch.
func TestPenaltyOutlivesEviction(t *testing.T) {
	l := Limit{Events: 1, Window: time.Second, Penalty: time.Hour}
	m := testCounters(t, 64<<10, false, l)
	for i := range uint64(20_000) { // more than there are records
		m.take(ask(i, 1), start)
		m.take(ask(i, 1), start)
	}
	for i := range uint64(20_000) {
		if v := m.take(ask(i, 1), start+time.Minute.Microseconds()); v.Allowed {
			t.Fatalf("key %d is not blocked anymore", i)
		}
	}
}

func TestForgive(t *testing.T) {
	for _, algorithm := range []Algorithm{SlidingWindow, TokenBucket} {
		l := Limit{Algorithm: algorithm, Events: 3, Window: time.Minute, Penalty: time.Hour}
		for _, crowd := range []uint64{0, 20_000} {
			m := testCounters(t, 64<<10, false, l)
			for i := range crowd {
				m.take(ask(i+1000, 1), start)
				m.take(ask(i+1000, 1), start)
			}
			for range 4 {
				m.take(ask(1, 1), start)
			}
			if m.take(ask(1, 1), start).Allowed {
				t.Fatal("not blocked")
			}
			m.forgive(0, ask(1, 1).Keys[0], start)
			for i := range 3 {
				if v := m.take(ask(1, 1), start); !v.Allowed {
					t.Errorf("crowd %d: request %d after forgiving: %+v", crowd, i, v)
				}
			}
			if m.take(ask(1, 1), start).Allowed {
				t.Error("a forgiven key has no limit")
			}
		}
	}
}

// TestInflightReturnsToZero: a million random lifecycles of more keys than
// there is room for.
func TestInflightReturnsToZero(t *testing.T) {
	n := 1_000_000
	m := testCounters(t, 64<<10, false, Limit{Inflight: 3}, Limit{Inflight: 50, Events: 1 << 30, Window: time.Hour})
	r := rand.New(rand.NewPCG(5, 6))
	var open []*Ask
	exact := make(map[uint64]int)
	for range n {
		if len(open) > 0 && (r.IntN(2) == 0 || len(open) > 3000) {
			i := r.IntN(len(open))
			m.done(open[i], r.IntN(2) == 0, start)
			exact[open[i].Keys[0].Hash]--
			open[i] = open[len(open)-1]
			open = open[:len(open)-1]
			continue
		}
		k := r.Uint64N(3000)
		a := &Ask{Keys: []Key{{Hash: mix(k)}, {Hash: mix(k % 700)}}, Cost: 1, Reserve: r.IntN(2) == 0}
		if m.take(a, start).Allowed {
			open = append(open, a)
			if exact[mix(k)]++; exact[mix(k)] > 3 {
				t.Fatal("more requests in flight than allowed")
			}
		}
	}
	for _, a := range open {
		m.done(a, false, start)
	}
	for _, l := range m.levels {
		for i := range l.shards {
			f := &l.shards[i].flights
			if len(f.keys) != 0 || f.held != 0 || slices.ContainsFunc(f.over, func(c flight) bool { return c != flight{} }) {
				t.Errorf("left over: %d keys, %d in the sketch", len(f.keys), f.held)
			}
			if f.over == nil && i == 0 {
				t.Error("the sketch was never used")
			}
		}
	}
}

// TestTop names the heaviest keys among a hundred thousand.
func TestTop(t *testing.T) {
	m := testCounters(t, 1<<20, false, Limit{Events: 1 << 20, Window: time.Hour})
	for i := range uint64(100_000) {
		m.take(&Ask{Keys: []Key{{Hash: mix(i), Text: strconv.FormatUint(i, 10)}}, Cost: 1}, start)
		if i%10 == 0 {
			heavy := i / 10 % 3
			m.take(&Ask{Keys: []Key{{Hash: mix(1e9 + heavy), Text: fmt.Sprint("heavy", heavy)}}, Cost: 1 + int(heavy)}, start)
		}
	}
	top := m.Top(0)
	for i, want := range []string{"heavy2", "heavy1", "heavy0"} {
		if top[i].Key.Text != want || top[i].Count-top[i].Error > 3334*uint64(3-i) || top[i].Count < 3333*uint64(3-i) {
			t.Errorf("%d: %+v, want %s", i, top[i], want)
		}
	}
}

// TestDecisionsDoNotAllocate also with more keys than records.
func TestDecisionsDoNotAllocate(t *testing.T) {
	for _, l := range []Limit{
		{Events: 5, Window: time.Hour, Penalty: time.Hour},
		{Events: 100_000, Window: time.Hour},
		{Events: 5, Window: time.Hour, Algorithm: TokenBucket},
		{Inflight: 5},
	} {
		m := testCounters(t, 64<<10, false, l)
		a := ask(0, 1)
		var i uint64
		if n := testing.AllocsPerRun(50_000, func() {
			i++
			a.Keys[0].Hash = mix(i % 10_000)
			if m.take(a, start+int64(i)); a.Holds {
				m.done(a, true, start+int64(i))
			}
		}); n > 0 {
			t.Errorf("%+v: %v allocations", l, n)
		}
	}
}

func BenchmarkTake(b *testing.B) {
	for _, l := range []Limit{
		{Events: 10, Window: time.Hour},
		{Events: 100, Window: time.Hour},
		{Events: 10, Window: time.Hour, Algorithm: TokenBucket},
	} {
		for _, keys := range []uint64{1, 1_000_000} {
			b.Run(fmt.Sprintf("limit=%d/algorithm=%d/keys=%d", l.Events, l.Algorithm, keys), func(b *testing.B) {
				m := openMemory(Spec{Levels: []Limit{l}, Logger: zap.NewNop()}, 16<<20, false)
				b.ReportAllocs()
				b.RunParallel(func(pb *testing.PB) {
					a := ask(0, 1)
					i := rand.Uint64()
					for pb.Next() {
						i++
						a.Keys[0].Hash = mix(i%keys + 1)
						m.take(a, m.clock.now())
					}
				})
			})
		}
	}
}
