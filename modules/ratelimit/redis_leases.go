// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"crypto/rand"
	"encoding/hex"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// redisReleases bounds what waits for being given back to Redis. What finds
	// no place is dropped: a lease runs out, a reservation stays charged.
	redisReleases = 4096

	// redisBatch is how much is given back or renewed in one round trip.
	redisBatch = 64

	// redisRenewals is how often a lease is renewed before it could run out.
	redisRenewals = 4
)

// redisLease is what an allowed request holds in Redis.
type redisLease struct {
	member   string
	at       int64 // when it was admitted, in the server's microseconds
	keys     []string
	cost     int
	reserved bool
	inflight bool

	renewed  time.Time
	released atomic.Bool
}

// redisLeases gives back what requests held and renews what they hold. One
// goroutine does both, so that nothing is renewed after it was given back.
type redisLeases struct {
	counters *redisCounters
	duration time.Duration
	micros   string
	node     string
	count    atomic.Uint64

	held     atomic.Int64
	releases chan redisRelease
	closing  chan struct{}
	once     sync.Once
	finish   func() // called when the counters are closed and nothing is held

	mu     sync.Mutex
	leases map[*redisLease]struct{} // of requests in flight
}

type redisRelease struct {
	lease  *redisLease
	charge bool
}

func newRedisLeases(c *redisCounters, duration time.Duration, finish func()) *redisLeases {
	var id [8]byte
	_, _ = rand.Read(id[:]) // never fails
	l := &redisLeases{
		counters: c,
		duration: duration,
		micros:   strconv.FormatInt(duration.Microseconds(), 10),
		node:     hex.EncodeToString(id[:]) + ":",
		releases: make(chan redisRelease, redisReleases),
		closing:  make(chan struct{}),
		finish:   finish,
		leases:   make(map[*redisLease]struct{}),
	}
	return l
}

// lease returns a new lease if the request will hold anything.
func (l *redisLeases) lease(c *redisCounters, a *Ask) *redisLease {
	inflight, holds := false, false
	for i := range c.levels {
		limit := &c.levels[i].limit
		inflight = inflight || limit.Inflight > 0
		holds = holds || a.Reserve && limit.Events > 0 && a.Cost > 0
	}
	if !inflight && !holds {
		return nil
	}
	return &redisLease{
		member:   l.node + strconv.FormatUint(l.count.Add(1), 36),
		inflight: inflight,
		renewed:  time.Now(),
	}
}

// add notes a lease that Redis has granted.
func (l *redisLeases) add(lease *redisLease) {
	l.held.Add(1)
	if lease.inflight {
		l.mu.Lock()
		l.leases[lease] = struct{}{}
		l.mu.Unlock()
	}
}

// release gives back a lease, later.
func (l *redisLeases) release(lease *redisLease, charge bool) {
	lease.released.Store(true)
	if lease.inflight {
		l.mu.Lock()
		delete(l.leases, lease)
		l.mu.Unlock()
	}
	select {
	case l.releases <- redisRelease{lease, charge}:
	default:
	}
	l.held.Add(-1)
}

func (l *redisLeases) close() { l.once.Do(func() { close(l.closing) }) }

// work runs until the counters are closed and nothing is held anymore.
func (l *redisLeases) work() {
	defer l.finish()
	tick := time.NewTicker(l.duration / redisRenewals)
	defer tick.Stop()
	closing, closed := l.closing, false
	for !closed || l.held.Load() > 0 || len(l.releases) > 0 {
		select {
		case r := <-l.releases:
			l.giveBack(r)
		case <-tick.C:
			l.renew()
		case <-closing:
			closing, closed = nil, true
		}
	}
}

// giveBack sends a release and those that wait behind it.
func (l *redisLeases) giveBack(r redisRelease) {
	calls := []redisCall{l.done(r)}
	for len(calls) < redisBatch {
		select {
		case r := <-l.releases:
			calls = append(calls, l.done(r))
			continue
		default:
		}
		break
	}
	l.counters.client.runAll(calls)
}

func (l *redisLeases) done(r redisRelease) redisCall {
	s := redisSituation{cost: r.lease.cost, lease: r.lease}
	switch {
	case r.lease.reserved && r.charge:
		s.reservation = "charge"
	case r.lease.reserved:
		s.reservation = "refund"
	}
	return l.counters.call("done", s, r.lease.keys, l.counters.levels)
}

// renew renews the leases that are old enough.
func (l *redisLeases) renew() {
	now := time.Now()
	var due []*redisLease
	l.mu.Lock()
	for lease := range l.leases {
		if now.Sub(lease.renewed) >= l.duration/redisRenewals {
			due = append(due, lease)
		}
	}
	l.mu.Unlock()
	for len(due) > 0 {
		n := min(len(due), redisBatch)
		var calls []redisCall
		for _, lease := range due[:n] {
			if !lease.released.Load() {
				calls = append(calls, l.counters.call("renew", redisSituation{lease: lease}, lease.keys, l.counters.levels))
			}
		}
		if len(calls) > 0 && !l.counters.client.runAll(calls) {
			return
		}
		for _, lease := range due[:n] {
			lease.renewed = now // only read here once it is held
		}
		due = due[n:]
		select {
		case r := <-l.releases:
			l.giveBack(r)
		default:
		}
	}
}
