// SPDX-License-Identifier: Apache-2.0

// Tens of millions of requests, one after the other: the race detector has
// nothing to find here, and takes minutes for it.

//go:build !race

package ratelimit

import (
	"math/rand/v2"
	"runtime"
	"testing"
	"time"
)

// TestMemoryIsBounded sends ten million distinct keys to each kind of counters.
func TestMemoryIsBounded(t *testing.T) {
	const bytes = 4 << 20
	for _, l := range []Limit{
		{Events: 5, Window: time.Hour, Penalty: time.Hour, Inflight: 10},
		{Events: 100, Window: time.Hour, Algorithm: TokenBucket},
	} {
		before := heap()
		m := testCounters(t, bytes, false, l)
		a := ask(0, 1)
		for i := range uint64(10_000_000) {
			a.Keys[0].Hash = mix(i + 1)
			if m.take(a, start+int64(i)*100); a.Holds {
				m.done(a, true, start+int64(i)*100)
			}
		}
		if used := heap() - before; used > bytes {
			t.Errorf("%+v: %d bytes, more than max_memory", l, used)
		}
		runtime.KeepAlive(m)
	}
}

func heap() int64 {
	runtime.GC()
	var s runtime.MemStats
	runtime.ReadMemStats(&s)
	return int64(s.HeapAlloc)
}

// TestError: the published bound of what a sketch adds. A million keys come once
// in the window, and of the clients that send half of their limit at most one
// in a thousand is refused.
func TestError(t *testing.T) {
	refused, saturated := errorAt(t, 1_000_000, false)
	t.Logf("1 million keys: %.3f %% of the clients at half of their limit are refused", refused*100)
	if refused > .001 || saturated {
		t.Errorf("refused %.3f %%, saturated %v", refused*100, saturated)
	}
	refused, saturated = errorAt(t, 10_000_000, false)
	t.Logf("10 million keys, refuse: %.3f %%", refused*100)
	if !saturated {
		t.Error("not saturated")
	}
	refused, saturated = errorAt(t, 10_000_000, true)
	t.Logf("10 million keys, pass: %.3f %%", refused*100)
	if refused > .01 || !saturated {
		t.Errorf("pass: refused %.3f %%, saturated %v", refused*100, saturated)
	}
}

func errorAt(t *testing.T, keys int, pass bool) (share float64, saturated bool) {
	const clients, limit = 10_000, 5
	l := Limit{Events: limit, Window: time.Hour}
	m := testCounters(t, 16<<20, pass, l)
	step := float64(l.Window.Microseconds()) / float64(keys)
	refused := make(map[int]bool)
	a := ask(0, 1)
	r := rand.New(rand.NewPCG(8, 9))
	for i := range 2 * keys { // two windows, the second one counts
		now := start + int64(float64(i)*step)
		a.Keys[0].Hash = r.Uint64()
		m.take(a, now)
		if i >= keys && i%(keys/clients/(limit/2)) == 0 {
			client := i / (keys / clients / (limit / 2)) % clients
			a.Keys[0].Hash = mix(uint64(client) + 77)
			if !m.take(a, now).Allowed {
				refused[client] = true
			}
		}
	}
	return float64(len(refused)) / clients, m.levels[0].saturated.Load()
}
