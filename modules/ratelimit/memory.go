// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"cmp"
	"context"
	"math/bits"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
)

// counters in memory. Each level of a zone has shards, and each shard a lock,
// the exact records of some keys, a sketch for all others, the requests in
// flight and the names of its heaviest keys. The size of all that is fixed when
// it is made.
type memoryCounters struct {
	levels []*memoryLevel
	clock  clock
	spec   Spec
	pass   bool
}

// memoryLevel is the counters of one level.
type memoryLevel struct {
	limit  Limit
	window int64
	shards []shard
	mask   uint64

	report func(saturated bool)

	noise     atomic.Uint64 // share of unknown keys that would be refused, in 2^-32
	saturated atomic.Bool
}

// shard is a part of the keys of a level.
type shard struct {
	mu      sync.Mutex
	now     int64 // never goes back
	asked   uint32
	tier    tier // nil without a rate
	flights flights
	top     top
}

const (
	// shardMemory is the size of a shard where there is more than one.
	shardMemory = 256 << 10

	// probing is how often the error of a sketch is measured: once in that
	// many decisions of a shard.
	probing = 64

	saturation    = 1 << 32 / 100 // expected error at which a sketch is saturated: 1 %
	noiseSmoothed = 9             // the measure is smoothed over 2^9 probes
)

// openMemory makes the counters of a zone in at most that many bytes.
func openMemory(spec Spec, bytes int64, pass bool) *memoryCounters {
	m := &memoryCounters{clock: newClock(), spec: spec, pass: pass}
	per := int(bytes) / len(spec.Levels)
	for i, limit := range spec.Levels {
		l := newMemoryLevel(limit, per, spec.Reserves, pass)
		l.report = func(saturated bool) { m.report(i, saturated) }
		m.levels = append(m.levels, l)
	}
	return m
}

// report logs that a sketch has become saturated, or is not anymore.
func (m *memoryCounters) report(level int, saturated bool) {
	zone, at := zap.String("zone", m.spec.Zone), zap.Int("level", level)
	switch {
	case !saturated:
		m.spec.Logger.Info("the counters tell keys apart again", zone, at)
	case m.pass:
		m.spec.Logger.Warn("too many keys for max_memory: keys without a record of their own are not limited (on_saturation pass)", zone, at)
	default:
		m.spec.Logger.Warn("too many keys for max_memory: more than 1 % of the keys that use half of their limit may be refused (on_saturation refuse)", zone, at)
	}
}

func newMemoryLevel(l Limit, bytes int, reserves, pass bool) *memoryLevel {
	n := 1
	if bytes > shardMemory {
		n = 1 << (bits.Len(uint(bytes/shardMemory)) - 1)
	}
	m := &memoryLevel{limit: l, window: l.Window.Microseconds(), shards: make([]shard, n), mask: uint64(n - 1)}
	if m.window == 0 {
		m.window = time.Minute.Microseconds()
	}
	for i := range m.shards {
		room := bytes/n - topSize - 512
		s := &m.shards[i]
		if l.Inflight > 0 || reserves {
			part := room / 8
			if l.Events == 0 {
				part = room
			}
			s.flights = newFlights(part)
			room -= part
		}
		if l.Events > 0 {
			s.tier = newTier(l, room, pass)
		}
	}
	return m
}

func newTier(l Limit, bytes int, pass bool) tier {
	switch c := l.Capacity(); {
	case l.Algorithm == TokenBucket:
		return newBuckets(l, bytes, pass)
	case c < 1<<8:
		return newSliding[uint8](l, bytes, 1, pass)
	case c < 1<<16:
		return newSliding[uint16](l, bytes, 2, pass)
	default:
		return newSliding[uint32](l, bytes, 4, pass)
	}
}

func (l *memoryLevel) shard(hash uint64) *shard { return &l.shards[hash&l.mask] }

// Take implements [Counters].
func (m *memoryCounters) Take(_ context.Context, a *Ask) (Verdict, error) {
	return m.take(a, m.clock.now()), nil
}

// take decides at a time. The locks of several levels are taken in their order.
func (m *memoryCounters) take(a *Ask, now int64) Verdict {
	var found [maxLevels]finding
	v := Verdict{Allowed: true}
	for i, l := range m.levels {
		s := l.shard(a.Keys[i].Hash)
		s.mu.Lock()
		s.now = max(s.now, now)
		f := &found[i]
		*f = l.look(s, &a.Keys[i], a.Cost)
		v.add(l.limit, f, i, a.Cost)
	}
	for i, l := range m.levels {
		s := l.shard(a.Keys[i].Hash)
		if v.Allowed {
			if n := l.held(a); n != (flight{}) {
				a.Holds = true
				a.ticket.overflow[i] = s.flights.add(a.Keys[i].Hash, n)
			}
			if s.tier != nil && !a.Reserve {
				s.tier.charge(found[i].spot, s.now, a.Cost)
			}
		} else if l.limit.Penalty > 0 && found[i].punishable(l.limit, a.Cost) {
			found[i].punish(l.limit, s)
		}
		s.mu.Unlock()
	}
	if v.Reason == Blocked || v.Reason == OverRate {
		v.Wait = max(v.Wait, time.Duration(found[v.Level].penalized)*time.Microsecond)
	}
	return v
}

// finding is what was found of one level's key.
type finding struct {
	spot
	flight    flight
	reason    Reason
	penalized int64 // how long the key is blocked now
}

// punishable tells whether the key is over its limit or blocked. What is only
// reserved may never count.
func (f *finding) punishable(l Limit, cost int) bool {
	return f.reason == Blocked || f.reason == OverRate && f.used+cost > l.Capacity()
}

// look finds what is known of a key, and whether a request of that cost may pass.
func (l *memoryLevel) look(s *shard, k *Key, cost int) (f finding) {
	if s.flights.keys != nil {
		f.flight = s.flights.get(k.Hash)
	}
	s.top.add(k, max(cost, 1), s.now, l.window)
	if s.tier != nil {
		if s.asked++; s.asked%probing == 0 {
			l.probe(s)
		}
		f.spot = s.tier.check(k.Hash, s.now, cost+int(f.flight.reserved), l.saturated.Load())
	}
	switch {
	case f.blocked > 0:
		f.reason = Blocked
		f.wait = f.blocked - s.now
	case f.wait > 0:
		f.reason = OverRate
	case l.limit.Inflight > 0 && int(f.flight.inflight) >= l.limit.Inflight:
		f.reason = OverInflight
	}
	return f
}

// held is what a request holds until it is done.
func (l *memoryLevel) held(a *Ask) (n flight) {
	if l.limit.Inflight > 0 {
		n.inflight = 1
	}
	if a.Reserve && l.limit.Events > 0 {
		n.reserved = int32(a.Cost)
	}
	return n
}

// punish blocks a key that is over its limit, or extends its block.
func (f *finding) punish(l Limit, s *shard) {
	since := s.now
	if f.blocked > 0 {
		since = f.since
	}
	until := s.now + l.Penalty.Microseconds()
	if l.MaxPenalty > 0 {
		until = min(until, since+l.MaxPenalty.Microseconds())
	}
	until = max(until, f.blocked)
	if until > f.blocked {
		s.tier.block(f.spot, s.now, until, since)
	}
	f.penalized = until - s.now
}

// add lets a level into the verdict on a request of that cost.
func (v *Verdict) add(l Limit, f *finding, level, cost int) {
	limit, used, reset := l.Capacity(), f.used+int(f.flight.reserved), f.reset
	if l.Events == 0 {
		limit, used, cost = l.Inflight, int(f.flight.inflight), 1
	}
	refused := f.reason != NoReason
	if !refused && cost > 0 {
		used, reset = used+cost, f.after
	}
	remaining := max(limit-used, 0)
	wait := time.Duration(f.wait) * time.Microsecond
	if f.reason == OverRate && (cost > limit || f.flight.reserved > 0) {
		wait = 0 // never, or nobody knows when what is reserved will count
	}
	switch {
	case level > 0 && refused && !v.Allowed && wait <= v.Wait:
		return
	case level > 0 && !refused && (!v.Allowed || remaining >= v.Remaining):
		return
	}
	v.Allowed, v.Reason, v.Level = !refused, f.reason, level
	v.Limit, v.Remaining = limit, remaining
	v.Wait, v.Reset = wait, time.Duration(reset)*time.Microsecond
}

// Wait implements [Foreteller].
func (m *memoryCounters) Wait(a *Ask, n int) time.Duration { return m.wait(a, n, m.clock.now()) }

func (m *memoryCounters) wait(a *Ask, n int, now int64) time.Duration {
	var longest int64
	for i, l := range m.levels {
		hash := a.Keys[i].Hash
		s := l.shard(hash)
		s.mu.Lock()
		s.now = max(s.now, now)
		if s.tier != nil {
			// more than the capacity comes in turns, a window each
			turns := (n - 1) / l.limit.Capacity()
			if l.limit.Algorithm == TokenBucket {
				turns = 0
			}
			f := s.tier.check(hash, s.now, n-turns*l.limit.Capacity(), l.saturated.Load())
			longest = max(longest, f.wait+int64(turns)*l.window)
		}
		s.mu.Unlock()
	}
	return time.Duration(longest) * time.Microsecond
}

// Done implements [Counters].
func (m *memoryCounters) Done(a *Ask, charge bool) { m.done(a, charge, m.clock.now()) }

func (m *memoryCounters) done(a *Ask, charge bool, now int64) {
	a.Holds = false
	for i, l := range m.levels {
		hash := a.Keys[i].Hash
		s := l.shard(hash)
		s.mu.Lock()
		s.now = max(s.now, now)
		if n := l.held(a); n != (flight{}) {
			s.flights.remove(hash, n, a.ticket.overflow[i])
			if n.reserved > 0 && charge {
				r := s.tier.check(hash, s.now, a.Cost, l.saturated.Load())
				s.tier.charge(r, s.now, a.Cost)
			}
		}
		s.mu.Unlock()
	}
}

// probe asks for a key that nobody has, to measure the error of the sketch.
func (l *memoryLevel) probe(s *shard) {
	noise := l.noise.Load()
	sample := noise - noise>>noiseSmoothed
	if s.tier.noisy(rand.Uint64(), s.now) {
		sample += 1 << (32 - noiseSmoothed)
	}
	l.noise.Store(sample) // what another shard stores meanwhile may be lost
	switch was := l.saturated.Load(); {
	case !was && sample > saturation:
		if !l.saturated.Swap(true) {
			l.report(true)
		}
	case was && sample < saturation/2:
		if l.saturated.Swap(false) {
			l.report(false)
		}
	}
}

// Inspect implements [Counters].
func (m *memoryCounters) Inspect(_ context.Context, level int, k Key) (State, error) {
	return m.inspect(level, k, m.clock.now()), nil
}

func (m *memoryCounters) inspect(level int, k Key, now int64) State {
	l := m.levels[level]
	s := l.shard(k.Hash)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.now = max(s.now, now)
	st := State{Exact: true, Limit: l.limit.Capacity()}
	if s.flights.keys != nil {
		f := s.flights.get(k.Hash)
		st.Inflight, st.Reserved = int(f.inflight), int(f.reserved)
	}
	if s.tier != nil {
		r := s.tier.check(k.Hash, s.now, 0, l.saturated.Load())
		st.Exact, st.Used = r.place >= 0, r.used
		st.Reset = time.Duration(r.reset) * time.Microsecond
		if r.blocked > 0 {
			st.Blocked = time.Duration(r.blocked-s.now) * time.Microsecond
		}
	} else {
		st.Limit = l.limit.Inflight
	}
	return st
}

// Forgive implements [Counters].
func (m *memoryCounters) Forgive(_ context.Context, level int, k Key) error {
	m.forgive(level, k, m.clock.now())
	return nil
}

func (m *memoryCounters) forgive(level int, k Key, now int64) {
	s := m.levels[level].shard(k.Hash)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.now = max(s.now, now)
	if s.tier != nil {
		s.tier.forgive(k.Hash, s.now)
	}
}

// Top implements [Counters].
func (m *memoryCounters) Top(level int) []Heavy {
	var list []Heavy
	for i := range m.levels[level].shards {
		s := &m.levels[level].shards[i]
		s.mu.Lock()
		list = s.top.appendTo(list)
		s.mu.Unlock()
	}
	slices.SortFunc(list, func(a, b Heavy) int {
		switch {
		case a.Count != b.Count:
			return cmp.Compare(b.Count, a.Count)
		default:
			return cmp.Compare(a.Error, b.Error)
		}
	})
	return list
}

// Report implements [Reporter].
func (m *memoryCounters) Report() Report {
	return Report{Saturated: slices.ContainsFunc(m.levels, func(l *memoryLevel) bool { return l.saturated.Load() })}
}

// Close implements [Counters].
func (*memoryCounters) Close() error { return nil }

var (
	_ Counters = (*memoryCounters)(nil)
	_ Reporter = (*memoryCounters)(nil)

	_ Foreteller = (*memoryCounters)(nil)
)
