// SPDX-License-Identifier: Apache-2.0

package ratelimit

import "time"

// Algorithm says how a limit spreads its events over time.
type Algorithm uint8

// The algorithms.
const (
	// SlidingWindow admits at most events + burst in any window of that length.
	SlidingWindow Algorithm = iota

	// TokenBucket holds burst tokens (events, where no burst is given) and
	// refills events per window.
	TokenBucket
)

// Limit is what one key may do. The zero value allows everything.
type Limit struct {
	Algorithm Algorithm
	Events    int           // 0: requests are not counted
	Burst     int           // on top of Events, or the size of the bucket
	Window    time.Duration // in which Events may happen
	Inflight  int           // requests at the same time; 0: not counted

	Penalty    time.Duration // how long a key that went over its limit is blocked; 0: not at all
	MaxPenalty time.Duration // how long a block may grow; 0: without end
}

// Capacity is how many events a key that was not seen before may have at once.
func (l Limit) Capacity() int {
	switch {
	case l.Events == 0:
		return 0
	case l.Algorithm == SlidingWindow:
		return l.Events + l.Burst
	case l.Burst > 0:
		return l.Burst
	default:
		return l.Events
	}
}

// The resolution of a sliding window: up to smallCapacity every event has a
// place of its own in the record of a key, and is forgotten at most 1/1024 of
// the window late; above, events share maxRuns places, and it is 1/63. An event
// is never forgotten early.
const (
	smallCapacity   = 64
	maxRuns         = 64
	fineResolution  = 1024
	largeResolution = maxRuns - 1
)

// grid divides time into quanta. An event counts in the quantum that it falls
// in and in span more. Times are in microseconds since 1970, quanta are
// counted from there too, so that all stores agree on them.
type grid struct {
	quantum int64 // microseconds
	span    int64 // quanta
}

// newGrid returns the grid of a sliding window, the same for every store.
func newGrid(l Limit) grid {
	resolution := int64(fineResolution)
	if l.Capacity() > smallCapacity {
		resolution = largeResolution
	}
	window := l.Window.Microseconds()
	q := max((window+resolution-1)/resolution, 1)
	return grid{quantum: q, span: (window + q - 1) / q}
}

func (g grid) at(micros int64) int64 { return micros / g.quantum }

// forgotten is when an event of a quantum does not count anymore.
func (g grid) forgotten(quantum int64) int64 { return (quantum + g.span + 1) * g.quantum }

// clock gives microseconds since 1970 that never go back.
type clock struct{ base time.Time }

func newClock() clock { return clock{time.Now()} }

func (c clock) now() int64 { return c.base.UnixMicro() + time.Since(c.base).Microseconds() }
