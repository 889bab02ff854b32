// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"context"
	"net/netip"
	"time"

	"go.uber.org/zap"
)

// Store is where zones count. A Caddy module in the namespace
// http.ratelimit.stores that implements it is one; it is provisioned before
// Open is called.
type Store interface {
	// Open returns the counters of a zone. The module may be cleaned up while
	// they are in use; they must go on working until they are closed.
	Open(Spec) (Counters, error)
}

// Spec describes the zone that counters are for.
type Spec struct {
	// The zone and, with `scope route`, its route: what shares counts.
	Zone, Route string

	// What a key of each level may do, finest level first.
	Levels []Limit

	// Whether requests are reserved before they are charged.
	Reserves bool

	// Whether the levels are prefixes of one address.
	Nested bool

	// Valid as long as the process.
	Logger *zap.Logger
}

// Counters decide on the requests of one zone. They are safe for concurrent use.
type Counters interface {
	// Take decides whether a request may pass, and counts it if it may: on all
	// levels or on none. An error means that no decision could be made; what
	// happens then is for the counters to say, so it is returned only where
	// requests shall be refused.
	Take(ctx context.Context, a *Ask) (Verdict, error)

	// Done gives back what an allowed request holds. Where it was reserved, it
	// is charged or not. It must be called once for each ask with Holds.
	Done(a *Ask, charge bool)

	// Inspect says what is known of a key of a level.
	Inspect(ctx context.Context, level int, k Key) (State, error)

	// Forgive forgets what is counted for a key of a level. What is in flight stays.
	Forgive(ctx context.Context, level int, k Key) error

	// Top returns keys of a level with the most requests in about the last
	// window, as this node has seen them, heaviest first.
	Top(level int) []Heavy

	// Close gives up the counters. Requests may still be under way.
	Close() error
}

// Reporter is implemented by counters that have more to tell of themselves.
type Reporter interface{ Report() Report }

// Report is how counters are.
type Report struct {
	Saturated bool   // too many keys for the memory
	Away      bool   // the store does not answer
	Failures  uint64 // decisions that could not be made
}

// Foreteller is implemented by counters that can tell at no cost how long it
// takes at least until a number of events have room.
type Foreteller interface {
	Wait(a *Ask, events int) time.Duration
}

// maxLevels bounds the keys of a zone.
const maxLevels = 4

// Key tells clients apart. It is an address or a text.
type Key struct {
	Hash   uint64       // of this process; never 0
	Prefix netip.Prefix // valid for client addresses
	Text   string       // else; at most 1 KiB
}

// Ask is the question whether a request may pass.
type Ask struct {
	Keys    []Key // one per level
	Cost    int   // what it counts for; 0: nothing, but the key must not be blocked
	Reserve bool  // whether Done says if it is charged
	Holds   bool  // set by Take: Done must be called

	ticket ticket
}

// ticket is what a store remembers of an allowed request until Done.
type ticket struct {
	overflow [maxLevels]bool // memory: counted in the sketch of requests in flight
	lease    *redisLease     // redis: what is held there
	local    bool            // redis: decided by the node's own counters
	mirrored bool            // redis: counted by them, too
}

// Reason says why a request was refused.
type Reason uint8

// The reasons.
const (
	NoReason Reason = iota
	OverRate
	OverInflight
	Blocked // by a penalty
	NoKey
	StoreFailed
)

var reasons = [...]string{"", "rate", "inflight", "penalty", "key", "store"}

func (r Reason) String() string { return reasons[r] }

// Verdict is the answer to an [Ask].
type Verdict struct {
	Allowed bool
	Reason  Reason
	Level   int // that refused; else the one with the least remaining

	// Of that level, for the rate if there is one, else for requests in flight.
	// An allowed request is counted among what is not remaining.
	Limit, Remaining int

	Wait  time.Duration // until the same request may pass; 0 if that is unknown
	Reset time.Duration // until the whole limit is there again
}

// State is what is known of a key.
type State struct {
	Exact    bool          `json:"exact"` // false: an estimate, never too low
	Used     int           `json:"used"`
	Limit    int           `json:"limit"`
	Inflight int           `json:"inflight"`
	Reserved int           `json:"reserved"`
	Blocked  time.Duration `json:"-"`
	Reset    time.Duration `json:"-"`
}

// Heavy is a key and how often it came.
type Heavy struct {
	Key   Key
	Count uint64 // at most this
	Error uint64 // by how much that may be too high
}
