// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"context"
	"fmt"
	"math"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/redis/rueidis"
	"golang.org/x/time/rate"
)

// redisCounters counts in Redis what all nodes that share it admit. What Redis
// has decided is counted by the node's own counters, too, so that they know it
// when they have to decide alone.
type redisCounters struct {
	spec   Spec
	client *redisClient
	local  *memoryCounters
	names  redisNames
	levels []redisLevel
	leases *redisLeases

	onFailure string
	deadline  time.Duration

	failures atomic.Uint64
	now      string // for tests: the time in microseconds instead of the server's
}

// redisLevel is a limit as the script wants it.
type redisLevel struct {
	limit  Limit
	args   []string
	record string // end of the name of a record
	grid   grid
	bucket *buckets // to measure tokens with; nil for a sliding window
}

func newRedisLevel(l Limit) redisLevel {
	level := redisLevel{limit: l, grid: grid{quantum: 1, span: 1}}
	algorithm, perSecond := "0", 0.0
	switch {
	case l.Events == 0:
	case l.Algorithm == TokenBucket:
		algorithm = "2"
		level.bucket = &buckets{
			capacity: l.Capacity(),
			rate:     rate.Limit(float64(l.Events) / l.Window.Seconds()),
			interval: float64(l.Window.Microseconds()) / float64(l.Events),
		}
		perSecond = float64(level.bucket.rate)
		level.record = ":bucket"
	default:
		algorithm = "1"
		level.grid = newGrid(l)
		level.record = ":window" + strconv.FormatInt(level.grid.quantum, 10)
	}
	level.args = []string{
		algorithm,
		strconv.Itoa(l.Capacity()),
		strconv.FormatInt(level.grid.quantum, 10),
		strconv.FormatInt(level.grid.span, 10),
		strconv.FormatFloat(perSecond, 'g', 17, 64),
		strconv.Itoa(l.Inflight),
		strconv.FormatInt(l.Penalty.Microseconds(), 10),
		strconv.FormatInt(l.MaxPenalty.Microseconds(), 10),
	}
	return level
}

// redisSituation is what the script is told beside the levels.
type redisSituation struct {
	cost        int
	lease       *redisLease
	reservation string // empty, refund or charge
}

// call builds one run of the script.
func (c *redisCounters) call(op string, s redisSituation, keys []string, levels []redisLevel) redisCall {
	member, at := "", "0"
	if s.lease != nil {
		member, at = s.lease.member, strconv.FormatInt(s.lease.at, 10)
	}
	args := make([]string, 0, 7+8*len(levels))
	args = append(args, op, c.now, strconv.Itoa(s.cost), member, c.leases.micros, at, s.reservation)
	for i := range levels {
		args = append(args, levels[i].args...)
	}
	return redisCall{keys: keys, args: args}
}

// Take implements [Counters].
func (c *redisCounters) Take(_ context.Context, a *Ask) (Verdict, error) {
	if c.client.away() {
		return c.fail(a)
	}
	// not the context of the request: when the client leaves, what was sent counts
	ctx, cancel := context.WithTimeout(context.Background(), c.deadline)
	defer cancel()
	lease := c.leases.lease(c, a)
	call := c.call("take", redisSituation{cost: a.Cost, lease: lease}, c.names.keys(a.Keys, c.levels), c.levels)
	values, err := c.client.run(ctx, call.keys, call.args)
	if err != nil {
		return c.fail(a)
	}
	v, found, err := c.verdict(values, a.Cost)
	if err != nil {
		return c.fail(a)
	}
	a.ticket = ticket{mirrored: true}
	c.local.follow(a, v.Allowed, &found, c.local.clock.now())
	if v.Allowed && lease != nil {
		a.Holds = true
		lease.at, _ = values[1].AsInt64()
		lease.keys, lease.cost, lease.reserved = call.keys, a.Cost, a.Reserve
		a.ticket.lease = lease
		c.leases.add(lease)
	}
	return v, nil
}

// fail decides without Redis.
func (c *redisCounters) fail(a *Ask) (Verdict, error) {
	c.failures.Add(1)
	switch {
	case c.onFailure == failureLocal, c.client.isStopped(): // stopped: a request of an old configuration
		a.ticket = ticket{local: true}
		return c.local.Take(context.Background(), a)
	case c.onFailure == failureOpen:
		c.local.follow(a, false, &[maxLevels]finding{}, c.local.clock.now())
		return Verdict{Allowed: true}, nil
	default:
		c.local.follow(a, false, &[maxLevels]finding{}, c.local.clock.now())
		return Verdict{Reason: StoreFailed}, nil
	}
}

// verdict reads the answer of the script.
func (c *redisCounters) verdict(values []rueidis.RedisMessage, cost int) (v Verdict, found [maxLevels]finding, err error) {
	const head, fields = 2, 7
	if len(values) != head+fields*len(c.levels) {
		return v, found, fmt.Errorf("the script has answered with %d values", len(values))
	}
	now, err := values[1].AsInt64()
	if err != nil {
		return v, found, fmt.Errorf("reading the answer of the script: %w", err)
	}
	v.Allowed = true
	for i := range c.levels {
		if err := c.levels[i].read(&found[i], values[head+fields*i:][:fields], now, cost); err != nil {
			return v, found, err
		}
		v.add(c.levels[i].limit, &found[i], i, cost)
	}
	if v.Reason == Blocked || v.Reason == OverRate {
		v.Wait = max(v.Wait, time.Duration(found[v.Level].penalized)*time.Microsecond)
	}
	return v, found, nil
}

// read reads what the script has found of a level's key.
func (l *redisLevel) read(f *finding, values []rueidis.RedisMessage, now int64, cost int) error {
	var numbers [7]int64
	tokens := 0.0
	for i := range values {
		var err error
		if i == 2 && l.bucket != nil {
			tokens, err = values[i].AsFloat64()
		} else {
			numbers[i], err = values[i].AsInt64()
		}
		if err != nil {
			return fmt.Errorf("reading the answer of the script: %w", err)
		}
	}
	if l.bucket != nil {
		l.bucket.measure(&f.spot, tokens, cost)
	} else {
		f.used, f.wait, f.reset = int(numbers[2]), numbers[3], numbers[4]
		if l.limit.Events > 0 {
			f.after = l.grid.forgotten(l.grid.at(now)) - now
		}
	}
	f.reason, f.blocked = Reason(numbers[0]), numbers[1] //nolint:gosec // the script knows four
	if f.reason == Blocked {
		f.wait = numbers[3]
	}
	f.flight.inflight = int32(min(numbers[5], math.MaxInt32)) //nolint:gosec // bounded
	f.penalized = numbers[6]
	return nil
}

// Done implements [Counters].
func (c *redisCounters) Done(a *Ask, charge bool) {
	if a.ticket.local || a.ticket.mirrored {
		c.local.Done(a, charge)
	}
	a.Holds = false
	if l := a.ticket.lease; l != nil {
		a.ticket.lease = nil
		c.leases.release(l, charge)
	}
}

// Inspect implements [Counters]. While Redis is away the node's own counters
// tell what they know, if it is they who decide.
func (c *redisCounters) Inspect(ctx context.Context, level int, k Key) (State, error) {
	if c.client.away() && c.onFailure == failureLocal {
		return c.local.Inspect(ctx, level, k)
	}
	values, err := c.about(ctx, "look", level, k)
	if err != nil {
		return State{}, err
	}
	l := &c.levels[level]
	var f finding
	if len(values) != 9 {
		return State{}, fmt.Errorf("the script has answered with %d values", len(values))
	}
	if err := l.read(&f, values[2:], 0, 0); err != nil {
		return State{}, err
	}
	st := State{
		Exact: true, Used: f.used, Limit: l.limit.Capacity(), Inflight: int(f.flight.inflight),
		Reset: time.Duration(f.reset) * time.Microsecond,
	}
	if l.limit.Events == 0 {
		st.Limit = l.limit.Inflight
	}
	if f.reason == Blocked {
		st.Blocked = time.Duration(f.wait) * time.Microsecond
	}
	return st, nil
}

// Forgive implements [Counters]. The node's own counters forgive in any case;
// those of other nodes only matter while Redis is away.
func (c *redisCounters) Forgive(ctx context.Context, level int, k Key) error {
	if err := c.local.Forgive(ctx, level, k); err != nil {
		return err
	}
	_, err := c.about(ctx, "forgive", level, k)
	return err
}

// about runs the script for one key of one level.
func (c *redisCounters) about(ctx context.Context, op string, level int, k Key) ([]rueidis.RedisMessage, error) {
	levels := c.levels[level : level+1]
	keys, err := c.names.keysOf(level, k, &levels[0])
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, redisPatience)
	defer cancel()
	call := c.call(op, redisSituation{}, keys, levels)
	return c.client.run(ctx, call.keys, call.args)
}

// Top implements [Counters].
func (c *redisCounters) Top(level int) []Heavy { return c.local.Top(level) }

// Report implements [Reporter].
func (c *redisCounters) Report() Report {
	r := c.local.Report()
	r.Away, r.Failures = c.client.away(), c.failures.Load()
	return r
}

// Close implements [Counters]. What requests hold is still given back; the
// connection is kept until that is done.
func (c *redisCounters) Close() error {
	c.leases.close()
	return nil
}

// follow counts what another store has decided: an admitted request whatever
// the limit, and how long a refused one has blocked its key.
func (m *memoryCounters) follow(a *Ask, allowed bool, found *[maxLevels]finding, now int64) {
	for i, l := range m.levels {
		s := l.shard(a.Keys[i].Hash)
		s.mu.Lock()
		s.now = max(s.now, now)
		f := l.look(s, &a.Keys[i], a.Cost)
		if allowed {
			if n := l.held(a); n != (flight{}) {
				a.ticket.overflow[i] = s.flights.add(a.Keys[i].Hash, n)
			}
			if s.tier != nil && !a.Reserve {
				s.tier.charge(f.spot, s.now, a.Cost)
			}
		} else if p := found[i].penalized; p > 0 && s.tier != nil {
			since := s.now
			if f.blocked > 0 {
				since = f.since
			}
			s.tier.block(f.spot, s.now, max(s.now+p, f.blocked), since)
		}
		s.mu.Unlock()
	}
}

var (
	_ Counters = (*redisCounters)(nil)
	_ Reporter = (*redisCounters)(nil)
)
