// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"math"
	"time"

	"golang.org/x/time/rate"
)

// buckets is a shard of a token bucket. Keys with an exact record have a
// [rate.Limiter]; the others share a sketch of the times at which their bucket
// will be full again, which needs no windows.
type buckets struct {
	table
	limiters []rate.Limiter
	full     *deadlines
	blocks   *deadlines // nil: there are no penalties

	capacity int
	rate     rate.Limit
	interval float64 // microseconds per event
	pass     bool
	luck     luck
	raised   int64 // the latest time in full
}

// limiterSize is the size of a rate.Limiter, rounded up.
const limiterSize = 96

func newBuckets(l Limit, bytes int, pass bool) *buckets {
	b := &buckets{
		capacity: l.Capacity(),
		rate:     rate.Limit(float64(l.Events) / l.Window.Seconds()),
		interval: float64(l.Window.Microseconds()) / float64(l.Events),
		pass:     pass,
	}
	if l.Penalty > 0 {
		b.blocks = newDeadlines(bytes / 16)
		bytes -= bytes / 16
	}
	b.table = newTable(bytes / 2 / (metaSize + limiterSize))
	b.limiters = make([]rate.Limiter, len(b.ids))
	b.full = newDeadlines(bytes - bytes/2)
	return b
}

func (b *buckets) held() int { return b.claimed }

func (b *buckets) check(hash uint64, now int64, n int, saturated bool) spot {
	e := b.find(hash)
	if e < 0 {
		full := b.until(hash)
		if e = b.admit(hash, now, n, full, saturated); e < 0 {
			return b.sketched(hash, now, n, full, saturated)
		}
	}
	m := &b.meta[e]
	r := spot{hash: hash, place: e}
	if m.since > 0 && m.guard > now {
		r.blocked, r.since = m.guard, m.since
	}
	b.measure(&r, b.limiters[e].TokensAt(time.UnixMicro(now)), n)
	return r
}

// until is when the bucket of a key without a record will be full.
func (b *buckets) until(hash uint64) int64 {
	if b.raised == 0 {
		return 0
	}
	return b.full.get(hash)
}

func (b *buckets) sketched(hash uint64, now int64, n int, full int64, saturated bool) spot {
	r := spot{hash: hash, place: -1}
	if b.blocks != nil {
		if until := b.blocks.get(hash); until > now {
			r.blocked, r.since = until, now
		}
	}
	b.measure(&r, b.tokens(full, now), n)
	if saturated && b.pass {
		r.wait = 0
	}
	return r
}

// tokens is what a bucket holds that will be full at a time.
func (b *buckets) tokens(full, now int64) float64 {
	return max(float64(b.capacity)-float64(max(full-now, 0))/b.interval, 0)
}

// measure says what a number of tokens means for n events. As rate.Limiter
// does, it takes less than a nanosecond for nothing.
func (b *buckets) measure(r *spot, tokens float64, n int) {
	r.used = b.used(tokens)
	r.reset = int64(math.Ceil((float64(b.capacity) - tokens) * b.interval))
	r.after = int64(math.Ceil((float64(b.capacity) - tokens + float64(n)) * b.interval))
	lack := float64(n) - tokens
	switch {
	case lack <= 0:
	case time.Duration(lack/float64(b.rate)*float64(time.Second)) > 0:
		r.wait = int64(lack*b.interval) + 1
	}
}

func (b *buckets) used(tokens float64) int {
	return int(math.Ceil(float64(b.capacity) - tokens - 1e-9))
}

// usedAt is what a place counts, and until when that is not 0.
func (b *buckets) usedAt(e int, now int64) (n int, until int64) {
	tokens := b.limiters[e].TokensAt(time.UnixMicro(now))
	return b.used(tokens), now + int64((float64(b.capacity)-tokens)*b.interval)
}

// admit is as for a sliding window.
func (b *buckets) admit(hash uint64, now int64, n int, full int64, saturated bool) int {
	known := b.used(b.tokens(full, now))
	below := 0
	near := 2*(known+n) > b.capacity
	switch {
	case near && saturated && b.pass:
		full = 0
		if b.luck.next() {
			below = 2
		}
	case near && !saturated:
		below = known
	}
	e, victim := b.place(hash, now, below, func(e int) (int, int64) { return b.usedAt(e, now) })
	if e < 0 {
		return -1
	}
	if victim {
		b.spill(e, now)
	}
	b.claim(e, hash, full, now)
	if b.blocks != nil {
		if until := b.blocks.get(hash); until > now {
			b.meta[e] = meta{guard: until, since: now}
		}
	}
	return e
}

// claim makes a place the one of a key whose bucket will be full at a time.
func (b *buckets) claim(e int, hash uint64, full, now int64) {
	b.ids[e], b.meta[e] = hash, meta{}
	// empty, then filling since as long as it takes to have what it has
	l, empty := &b.limiters[e], time.UnixMicro(now)
	l.SetBurstAt(empty, 0)
	l.SetLimitAt(empty, 0)
	l.SetBurstAt(empty, b.capacity)
	since := now - int64(math.Ceil(float64(b.capacity)*b.interval)) - 1
	if full > now {
		since = min(full-int64(float64(b.capacity)*b.interval), now)
	}
	l.SetLimitAt(time.UnixMicro(since), b.rate)
}

// spill writes a record into the sketch.
func (b *buckets) spill(e int, now int64) {
	lack := float64(b.capacity) - b.limiters[e].TokensAt(time.UnixMicro(now))
	b.raise(b.ids[e], now+int64(math.Ceil(lack*b.interval)))
}

func (b *buckets) raise(hash uint64, full int64) {
	b.full.raise(hash, full)
	b.raised = max(b.raised, full)
}

func (b *buckets) charge(r spot, now int64, n int) {
	if n == 0 {
		return
	}
	if r.place < 0 {
		// never more than a whole bucket behind
		full := max(b.full.get(r.hash), now) + int64(math.Ceil(float64(n)*b.interval))
		b.raise(r.hash, min(full, now+int64(math.Ceil(float64(b.capacity)*b.interval))))
		return
	}
	if t := time.UnixMicro(now); !b.limiters[r.place].AllowN(t, n) {
		b.limiters[r.place].ReserveN(t, min(n, b.capacity))
	}
}

func (b *buckets) block(r spot, now, until, since int64) {
	if r.place < 0 {
		e, victim := b.place(r.hash, now, b.capacity+1, func(e int) (int, int64) { return b.usedAt(e, now) })
		if e < 0 {
			b.blocks.raise(r.hash, until)
			return
		}
		if victim {
			b.spill(e, now)
		}
		b.claim(e, r.hash, b.until(r.hash), now)
		r.place = e
	}
	b.meta[r.place] = meta{guard: until, since: since}
}

func (b *buckets) forgive(hash uint64, now int64) {
	e := b.find(hash)
	if e < 0 {
		var victim bool
		if e, victim = b.place(hash, now, b.capacity+1, func(e int) (int, int64) { return b.usedAt(e, now) }); e < 0 {
			e, victim = b.bucket(hash), true
			if m := b.meta[e]; m.since > 0 && b.blocks != nil {
				b.blocks.raise(b.ids[e], m.guard)
			}
		}
		if victim {
			b.spill(e, now)
		}
	}
	b.claim(e, hash, 0, now)
	guard := max(now, b.full.get(hash))
	if b.blocks != nil {
		guard = max(guard, b.blocks.get(hash))
	}
	b.meta[e] = meta{guard: guard}
}

func (b *buckets) noisy(hash uint64, now int64) bool {
	return b.used(b.tokens(b.until(hash), now)) > b.capacity-b.capacity/2
}
