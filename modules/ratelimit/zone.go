// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-gatehouse/gatehouse/internal/option"
)

// The words of the options.
const (
	modeOff     = "off"
	modeShadow  = "shadow"
	modeEnforce = "enforce"

	scopeZone  = "zone"
	scopeRoute = "route"

	algorithmSliding = "sliding_window"
	algorithmBucket  = "token_bucket"

	emptySkip   = "skip"
	emptyRefuse = "refuse"
	emptyShared = "shared"
)

const (
	defaultMaxWaiting = 1000

	maxNumber  = 1 << 30 // of events, requests and what they cost
	maxWindow  = 365 * 24 * time.Hour
	leastTime  = time.Millisecond
	nameWanted = "must be 1 to 64 letters, digits, dots, dashes or underscores"
)

var zoneName = regexp.MustCompile(`^[A-Za-z0-9_.-]{1,64}$`)

// Zone is one limit: what tells requests apart, and what each key may do.
//
// Zones of the same name count together, in all routes and servers of a
// configuration, unless `scope route`. They must then agree in everything that
// decides how they count: all but match, mode, cost, delay, log_keys and the
// conditions of count_when.
type Zone struct {
	// Name of the zone, 1 to 64 letters, digits, dots, dashes or underscores.
	Name string `json:"name"`

	// Requests that the zone sees; default: all.
	MatcherSetsRaw caddyhttp.RawMatcherSets `json:"match,omitempty" caddy:"namespace=http.matchers"`

	// What tells requests apart, 1 to 4 levels, finest first. A request counts
	// on all of them, or, if one of them refuses, on none.
	Keys []*KeyLevel `json:"keys,omitempty"`

	// How events are limited: `sliding_window` (the default) admits at most
	// events + burst in any window; `token_bucket` holds burst tokens (events,
	// if there is no burst) and refills events per window, so that any window
	// has at most that capacity + events. Up to 64 events, a window forgets
	// each at most 1/1024 of its length late; above, at most 1/63.
	Algorithm string `json:"algorithm,omitempty"`

	// Events per window and key. 0, the default: events are not limited.
	Events int `json:"events,omitempty"`

	// Length of the window, from 1ms to 365 days.
	Window caddy.Duration `json:"window,omitempty"`

	// Events that a key may have on top, see algorithm. Default: 0.
	Burst int `json:"burst,omitempty"`

	// Requests of a key that may be under way at a time, upgraded connections
	// until they are closed. 0, the default: they are not limited.
	Inflight int `json:"inflight,omitempty"`

	// Lets requests over `inflight` wait in the order of their arrival.
	Queue *Queue `json:"queue,omitempty"`

	// How long a request over `events` may be held until it is within the limit
	// instead of being refused. It is refused at once if that would take
	// longer. Default: 0.
	Delay caddy.Duration `json:"delay,omitempty"`

	// How many requests of the zone may wait at a time, in all. Default: 1000.
	MaxWaiting int `json:"max_waiting,omitempty"`

	// How many events a request is: a whole number or a text with placeholders,
	// whose fractions are rounded up. 0 is no event. A text that is no such number
	// counts as 1, and that is logged. Default: 1.
	Cost string `json:"cost,omitempty"`

	// Which responses count. The cost is reserved while the request is under
	// way and charged when it ends, if any condition holds. Default: all count,
	// when they arrive.
	CountWhen *CountWhen `json:"count_when,omitempty"`

	// How long a key that goes over `events` is blocked; each request in
	// that time lets the block begin anew. Default: 0, it is not blocked. What
	// is only reserved blocks nobody in memory; on Redis it counts like the rest.
	Penalty caddy.Duration `json:"penalty,omitempty"`

	// The longest that a block may grow to. Default: 0, without end.
	MaxPenalty caddy.Duration `json:"max_penalty,omitempty"`

	// `enforce` (the default), `shadow` to decide and record without refusing,
	// or `off`.
	Mode string `json:"mode,omitempty"`

	// Whether routes that use this zone's name share its counts: `zone` (the
	// default) or `route`. A route is known by its server and its place among
	// the ratelimit handlers there; in named routes that may change at a reload.
	Scope string `json:"scope,omitempty"`

	// What happens to requests whose key is empty or has a placeholder that
	// does not exist: `skip` (the default) does not count them, `refuse` does
	// not serve them, `shared` counts them together. It is logged at most once a
	// minute.
	OnEmptyKey string `json:"on_empty_key,omitempty"`

	// Shows all keys in clear, in logs, placeholders, events and the admin API.
	LogKeys bool `json:"log_keys,omitempty"`

	// Where the zone counts. Default: `memory`.
	StoreRaw json.RawMessage `json:"store,omitempty" caddy:"namespace=http.ratelimit.stores inline_key=store"`

	settings string // the fingerprint
	matchers caddyhttp.MatcherSets
	cost     int // -1: from the text
	counts   conditions
	state    *state
	fields   policyFields
	refusal  refusal
}

// Queue is how requests wait for others of their key to end.
type Queue struct {
	// How many requests of a key may wait. Where the zone has delay too, this
	// is for those that come when nobody waits; behind others, only max_waiting
	// is the bound.
	Size int `json:"size"`

	// How long each may wait before it is refused.
	MaxWait caddy.Duration `json:"max_wait"`
}

func (z *Zone) provision(ctx caddy.Context, l *load, route string) error {
	z.setDefaults()
	if err := z.check(); err != nil {
		return fmt.Errorf("zone %q: %w", z.Name, err)
	}
	z.settings = z.fingerprint() // while the store is still there to be seen
	if err := l.agree(z, route); err != nil {
		return err
	}
	if len(z.MatcherSetsRaw) > 0 {
		sets, err := ctx.LoadModule(z, "MatcherSetsRaw")
		if err != nil {
			return fmt.Errorf("zone %q: loading matchers: %w", z.Name, err)
		}
		if err := z.matchers.FromInterface(sets); err != nil {
			return fmt.Errorf("zone %q: loading matchers: %w", z.Name, err)
		}
	}
	if z.Mode == modeOff {
		return nil
	}
	mod, err := ctx.LoadModule(z, "StoreRaw")
	if err != nil {
		return fmt.Errorf("zone %q: loading its store: %w", z.Name, err)
	}
	if z.state, err = acquireState(z, route, mod.(Store)); err != nil {
		return fmt.Errorf("zone %q: opening its store: %w", z.Name, err)
	}
	z.fields = newPolicyFields(z)
	z.refusal = newRefusal(z.Name)
	return nil
}

func (z *Zone) cleanup() {
	if z.state != nil {
		releaseState(z)
	}
}

func (z *Zone) setDefaults() {
	z.Mode = or(z.Mode, modeEnforce)
	z.Scope = or(z.Scope, scopeZone)
	z.Algorithm = or(z.Algorithm, algorithmSliding)
	z.OnEmptyKey = or(z.OnEmptyKey, emptySkip)
	if z.MaxWaiting == 0 && z.waits() {
		z.MaxWaiting = defaultMaxWaiting
	}
	for _, k := range z.Keys {
		k.setDefaults()
	}
	if len(z.StoreRaw) == 0 {
		z.StoreRaw = caddyconfig.JSONModuleObject(new(MemoryStore), "store", "memory", nil)
	}
}

// check finds what is wrong with the zone. The Caddyfile asks it, too.
func (z *Zone) check() error {
	if !zoneName.MatchString(z.Name) {
		return errors.New("the name " + nameWanted)
	}
	for _, c := range []func() error{z.checkWords, z.checkRate, z.checkKeys, z.checkWaiting, z.parseCost, z.parseConditions} {
		if err := c(); err != nil {
			return err
		}
	}
	return nil
}

func (z *Zone) checkKeys() error {
	switch n := len(z.Keys); {
	case n == 0:
		return errors.New("it has no key; write `key all` for one limit of all requests")
	case n > maxLevels:
		return fmt.Errorf("it has %d keys, and at most %d levels are possible", n, maxLevels)
	}
	for _, k := range z.Keys {
		if err := k.check(); err != nil {
			return err
		}
		if int64(k.Times)*int64(max(z.Events+z.Burst, z.Inflight)) > maxNumber {
			return fmt.Errorf("times %d: the limit would be more than %d", k.Times, maxNumber)
		}
	}
	return nil
}

func (z *Zone) checkWords() error {
	return errors.Join(
		checkWord("mode", z.Mode, modeOff, modeShadow, modeEnforce),
		checkWord("scope", z.Scope, scopeRoute, scopeZone),
		checkWord("algorithm", z.Algorithm, algorithmSliding, algorithmBucket),
		checkWord("on_empty_key", z.OnEmptyKey, emptySkip, emptyRefuse, emptyShared),
	)
}

func (z *Zone) checkRate() error {
	if err := errors.Join(
		checkRange("events", z.Events, maxNumber), checkRange("burst", z.Burst, maxNumber),
		checkRange("inflight", z.Inflight, maxNumber),
	); err != nil {
		return err
	}
	window := time.Duration(z.Window)
	switch {
	case z.Events == 0 && z.Inflight == 0:
		return errors.New("it limits nothing: it has neither rate nor inflight")
	case z.Events > 0 && (window < leastTime || window > maxWindow):
		return fmt.Errorf("the window %v must be from %v to %v", window, leastTime, maxWindow)
	case z.Events > 0:
	case z.Burst > 0:
		return errors.New("burst needs a rate")
	case z.Algorithm == algorithmBucket:
		return errors.New("algorithm needs a rate")
	case z.Window != 0:
		return errors.New("a window needs events")
	case z.Penalty != 0:
		return errors.New("penalty needs a rate")
	case z.Delay != 0:
		return errors.New("delay needs a rate")
	case z.CountWhen != nil:
		return errors.New("count_when needs a rate")
	case z.Cost != "":
		return errors.New("cost needs a rate")
	}
	return nil
}

func (z *Zone) checkWaiting() error {
	switch {
	case z.Penalty < 0 || z.MaxPenalty < 0 || z.Delay < 0:
		return errors.New("penalty, max_penalty and delay must not be negative")
	case z.MaxPenalty > 0 && z.MaxPenalty < z.Penalty:
		return fmt.Errorf("the longest penalty %v is shorter than the penalty %v", time.Duration(z.MaxPenalty), time.Duration(z.Penalty))
	case z.Delay > 0 && z.Penalty > 0:
		return errors.New("delay and penalty exclude each other: a key that waits is not over its limit")
	case z.MaxWaiting < 0 || z.MaxWaiting > maxNumber:
		return fmt.Errorf("max_waiting %d: must be from 1 to %d", z.MaxWaiting, maxNumber)
	case z.MaxWaiting > 0 && !z.waits():
		return errors.New("max_waiting needs delay or queue")
	case z.Queue == nil:
		return nil
	case z.Inflight == 0:
		return errors.New("queue needs inflight")
	case z.Queue.Size < 1 || z.Queue.Size > maxNumber || z.Queue.MaxWait <= 0:
		return errors.New("queue: its size and max_wait must be greater than zero")
	}
	return nil
}

// parseCost reads a fixed cost.
func (z *Zone) parseCost() error {
	if z.cost = 1; z.Cost == "" {
		return nil
	}
	if strings.Contains(z.Cost, "{") {
		z.cost = -1
		return nil
	}
	n, err := strconv.Atoi(z.Cost)
	if err != nil || n < 0 || n > maxNumber {
		return fmt.Errorf("cost %q: must be a whole number from 0 to %d or have a placeholder", z.Cost, maxNumber)
	}
	z.cost = n
	return nil
}

// limit is what a key of the finest level may do.
func (z *Zone) limit() Limit {
	l := Limit{
		Events: z.Events, Burst: z.Burst, Window: time.Duration(z.Window), Inflight: z.Inflight,
		Penalty: time.Duration(z.Penalty), MaxPenalty: time.Duration(z.MaxPenalty),
	}
	if z.Algorithm == algorithmBucket {
		l.Algorithm = TokenBucket
	}
	return l
}

// spec is what a store needs to know.
func (z *Zone) spec(route string) Spec {
	s := Spec{Zone: z.Name, Reserves: z.CountWhen != nil, Nested: nested(z.Keys), Logger: processLogger}
	if z.Scope == scopeRoute {
		s.Route = route
	}
	for _, k := range z.Keys {
		l := z.limit()
		l.Events, l.Burst, l.Inflight = l.Events*k.Times, l.Burst*k.Times, l.Inflight*k.Times
		s.Levels = append(s.Levels, l)
	}
	return s
}

// fingerprint stands for all that zones of one name must agree in.
func (z *Zone) fingerprint() string {
	text, _ := json.Marshal([]any{
		z.Keys, z.Algorithm, z.Events, z.Window, z.Burst, z.Inflight, z.Queue, z.MaxWaiting,
		z.Penalty, z.MaxPenalty, z.Scope, z.OnEmptyKey, z.CountWhen != nil, z.waits(), z.StoreRaw,
	})
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:])
}

func or(value, otherwise string) string {
	if value == "" {
		return otherwise
	}
	return value
}

func checkWord(name, value string, words ...string) error {
	if value == "" || slices.Contains(words, value) {
		return nil
	}
	return fmt.Errorf("%s %q: must be %s", name, value, option.Choice(words))
}

func checkRange(name string, value, most int) error {
	if value < 0 || value > most {
		return fmt.Errorf("%s %d: must be from 0 to %d", name, value, most)
	}
	return nil
}
