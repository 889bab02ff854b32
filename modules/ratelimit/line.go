// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"slices"
	"sync"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"
)

// line is where the requests of a zone wait, those of a key in the order of
// their arrival. Only the first of a key may ask for a place.
type line struct {
	most  int
	gauge prometheus.Gauge    // of those that wait
	wait  prometheus.Observer // of how long

	waiting atomic.Int64 // the number of waiters, to look without the lock
	mu      sync.Mutex
	keys    map[uint64][]*waiter
}

// waiter is a request in the line.
type waiter struct {
	key  uint64
	cost int
	look chan struct{} // it has become the first, or something has changed
}

func (l *line) init(zone string, most int) {
	l.most, l.keys = most, make(map[uint64][]*waiter)
	l.gauge, l.wait = metrics.waiting.WithLabelValues(zone), metrics.wait.WithLabelValues(zone)
}

// occupied tells whether requests of a key are waiting.
func (l *line) occupied(key uint64) bool {
	if l.waiting.Load() == 0 {
		return false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.keys[key]) > 0
}

// ahead is what the requests of a key cost that are waiting.
func (l *line) ahead(key uint64) (cost int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, w := range l.keys[key] {
		cost += w.cost
	}
	return cost
}

// join adds a request at the end, if there is room for it: in the whole line,
// and, unless that is 0, among the given number of its key.
func (l *line) join(key uint64, cost, most int) *waiter {
	l.mu.Lock()
	defer l.mu.Unlock()
	if int(l.waiting.Load()) >= l.most || most > 0 && len(l.keys[key]) >= most {
		return nil
	}
	w := &waiter{key: key, cost: cost, look: make(chan struct{}, 1)}
	l.keys[key] = append(l.keys[key], w)
	l.waiting.Add(1)
	l.gauge.Inc()
	return w
}

// first tells whether it is the request's turn.
func (l *line) first(w *waiter) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.keys[w.key][0] == w
}

func (l *line) leave(w *waiter) {
	l.mu.Lock()
	defer l.mu.Unlock()
	list := l.keys[w.key]
	i := slices.Index(list, w)
	list = slices.Delete(list, i, i+1)
	l.waiting.Add(-1)
	l.gauge.Dec()
	if len(list) == 0 {
		delete(l.keys, w.key)
		return
	}
	l.keys[w.key] = list
	if i == 0 {
		list[0].wake()
	}
}

// ended tells the first of a key that a request of that key is done.
func (l *line) ended(key uint64) {
	if l.waiting.Load() == 0 {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if list := l.keys[key]; len(list) > 0 {
		list[0].wake()
	}
}

func (w *waiter) wake() {
	select {
	case w.look <- struct{}{}:
	default:
	}
}
