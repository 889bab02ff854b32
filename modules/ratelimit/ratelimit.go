// SPDX-License-Identifier: Apache-2.0

// Package ratelimit limits how often and how many at a time clients are served.
//
// A [Handler] holds zones. A [Zone] tells requests apart by a key and decides on
// each with the [Counters] of its [Store]: in memory, where a count-min sketch
// sees every key and the keys that matter have an exact record, or on Redis,
// where several servers count together. The memory of a zone is fixed when it
// is made, however many keys clients think of.
//
// What is counted outlives a reload as long as the settings that decide how
// it is counted stay the same.
package ratelimit

import (
	"errors"
	"fmt"
	"net/http"
	"slices"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

func init() {
	caddy.RegisterModule(new(Handler))
	caddy.RegisterModule(new(MemoryStore))
	caddy.RegisterModule(new(adminAPI))
}

// Handler limits requests by zones, in their order. A request that a zone
// refuses ends with 429 as an error, so that handle_errors runs; what it
// counted in the zones before that one stays counted. A zone whose store
// can't decide and has `on_failure closed` refuses with 503.
//
// The refusal carries Retry-After, in whole seconds, rounded up, when it is
// known when the same request would pass; for requests in flight it is not.
//
// Placeholders, of the zone that refused, else of the one with the least
// remaining; also in handle_errors and in the access log. They are empty where
// no zone has decided:
//
// Placeholder | Description
// ------------|---------------
// `{http.ratelimit.zone}` | Name of the zone
// `{http.ratelimit.decision}` | `allowed`, `refused`, `shadow` for what `mode shadow` would have refused, `skipped` without a key
// `{http.ratelimit.reason}` | `rate`, `inflight`, `penalty`, `key` (empty) or `store` (failed); empty if allowed
// `{http.ratelimit.key}` | The key: a client's address or prefix; any other one as a keyed hash, unless `log_keys`
// `{http.ratelimit.limit}` | Events, or requests in flight, that the key may have
// `{http.ratelimit.remaining}` | How many of them are left
// `{http.ratelimit.retry_after}` | Seconds until the request may pass, rounded up
// `{http.ratelimit.reset}` | Seconds until the whole limit is there again, rounded up
// `{http.ratelimit.waited_ms}` | How long the request was held by `delay` or `queue`
//
// The same facts are the object `ratelimit` in the access log.
type Handler struct {
	// What responses tell of the limits: `off` (the default), `draft` for the
	// fields RateLimit-Policy and RateLimit of draft-ietf-httpapi-ratelimit-headers,
	// one list member per zone, or `legacy` for X-RateLimit-Limit, -Remaining and
	// -Reset (in seconds) of the zone with the least remaining.
	Headers string `json:"headers,omitempty"`

	// The zones, in the order in which they see a request.
	Zones []*Zone `json:"zones,omitempty"`

	ctx    caddy.Context
	load   *load
	zones  []*Zone // that are not off
	events *caddyevents.App
	logs   bool // the server has an access log
}

// CaddyModule returns the Caddy module information.
func (*Handler) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.handlers.ratelimit",
		New: func() caddy.Module { return new(Handler) },
	}
}

// Provision checks the zones and opens their counters.
func (h *Handler) Provision(ctx caddy.Context) error {
	h.ctx = ctx
	if slices.Contains(h.Zones, nil) {
		return errors.New("zones: there is a null")
	}
	if err := checkHeaders(h.Headers); err != nil {
		return err
	}
	if err := metrics.register(ctx.GetMetricsRegistry()); err != nil {
		return err
	}
	app, err := ctx.App("events")
	if err != nil {
		return fmt.Errorf("getting the events app: %w", err)
	}
	h.events = app.(*caddyevents.App)
	srv, _ := ctx.Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server)
	h.logs = srv == nil || srv.Logs != nil
	h.load = enterLoad(ctx)
	route := h.load.route(srv)
	for _, z := range h.Zones {
		if err := z.provision(ctx, h.load, route); err != nil {
			return err
		}
		if z.Mode != modeOff {
			h.zones = append(h.zones, z)
		}
	}
	return nil
}

// Cleanup gives up the counters. Requests that are under way keep theirs.
func (h *Handler) Cleanup() error {
	if h.load == nil {
		return nil
	}
	h.load.leave()
	for _, z := range h.Zones {
		z.cleanup()
	}
	return nil
}

// ServeHTTP asks the zones, calls next, and gives back what the request holds.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	if len(h.zones) == 0 {
		return next.ServeHTTP(w, r)
	}
	v := h.enter(w, r)
	defer v.leave()
	if err := v.admit(); err != nil {
		return err
	}
	v.err = next.ServeHTTP(v.watch(), r)
	v.returned = true
	return v.err
}

// Interface guards
var (
	_ caddy.Provisioner           = (*Handler)(nil)
	_ caddy.CleanerUpper          = (*Handler)(nil)
	_ caddyhttp.MiddlewareHandler = (*Handler)(nil)
)
