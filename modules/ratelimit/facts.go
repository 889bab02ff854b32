// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"net/http"
	"strings"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// facts is what is told of a request in placeholders and in the access log: of
// the zone that refused it, else of the one with the least remaining. All
// handlers of a request share it.
type facts struct {
	zone     *Zone
	key      Key
	decision decision
	verdict  Verdict
	waited   time.Duration

	extra *caddyhttp.ExtraLogFields // where they go when there are some
}

// decision is what became of a request in a zone, a metric label.
type decision uint8

const (
	skipped decision = iota // there was no key
	allowed
	shadow // would have been refused
	refused
)

var decisions = [...]string{"skipped", "allowed", "shadow", "refused"}

// factsVar is where the request keeps its facts.
const factsVar = "gatehouse.ratelimit"

func factsOf(r *http.Request, repl *caddy.Replacer, logs bool) *facts {
	if f, ok := caddyhttp.GetVar(r.Context(), factsVar).(*facts); ok {
		return f
	}
	f := new(facts)
	caddyhttp.SetVar(r.Context(), factsVar, f)
	if repl != nil {
		repl.Map(f.placeholder)
	}
	if logs {
		f.extra, _ = r.Context().Value(caddyhttp.ExtraLogFieldsCtxKey).(*caddyhttp.ExtraLogFields)
	}
	return f
}

// tell takes the facts of a decision if they matter more than those before:
// the worst one, and of those the one with the least remaining.
func (f *facts) tell(z *Zone, a *asked, d decision, v *Verdict, waited time.Duration) {
	f.waited += waited
	if f.zone == nil && f.extra != nil {
		f.extra.Add(zap.Object("ratelimit", f))
	}
	if f.zone != nil && (d < f.decision || d == f.decision && v.Remaining >= f.verdict.Remaining) {
		return
	}
	f.zone, f.key, f.decision, f.verdict = z, a.keys[v.Level], d, *v
}

func (f *facts) shownKey() string {
	return f.zone.Keys[f.verdict.Level].show(&f.key, f.zone.LogKeys)
}

func (f *facts) placeholder(name string) (any, bool) {
	field, ok := strings.CutPrefix(name, "http.ratelimit.")
	if !ok || !placeholders[field] {
		return nil, false
	}
	if f.zone == nil {
		return "", true
	}
	switch field {
	case "zone":
		return f.zone.Name, true
	case "decision":
		return decisions[f.decision], true
	case "reason":
		return f.verdict.Reason.String(), true
	case "key":
		return f.shownKey(), true
	case "limit":
		return f.verdict.Limit, true
	case "remaining":
		return f.verdict.Remaining, true
	case "retry_after":
		return seconds(f.verdict.Wait), true
	case "reset":
		return seconds(f.verdict.Reset), true
	default:
		return f.waited.Milliseconds(), true
	}
}

var placeholders = map[string]bool{
	"zone": true, "decision": true, "reason": true, "key": true, "limit": true,
	"remaining": true, "retry_after": true, "reset": true, "waited_ms": true,
}

// MarshalLogObject implements [zapcore.ObjectMarshaler].
func (f *facts) MarshalLogObject(enc zapcore.ObjectEncoder) error {
	enc.AddString("zone", f.zone.Name)
	enc.AddString("decision", decisions[f.decision])
	if f.verdict.Limit > 0 {
		enc.AddInt("limit", f.verdict.Limit)
		enc.AddInt("remaining", f.verdict.Remaining)
	}
	if f.decision > allowed {
		enc.AddString("reason", f.verdict.Reason.String())
		enc.AddString("key", f.shownKey())
		enc.AddInt64("retry_after", seconds(f.verdict.Wait))
	}
	if f.waited > 0 {
		enc.AddInt64("waited_ms", f.waited.Milliseconds())
	}
	return nil
}

// record tells metrics, logs and events of a decision, and whether it refuses
// the request.
func (v *visit) record(z *Zone, a *asked, verdict *Verdict, waited time.Duration) bool {
	d := allowed
	switch {
	case verdict.Allowed:
	case z.Mode == modeShadow:
		d = shadow
	default:
		d = refused
	}
	s := z.state
	s.series.decisions[d].Inc()
	v.facts.tell(z, a, d, verdict, waited)
	if d == allowed {
		return false
	}
	s.series.refusals[verdict.Reason].Inc()
	key := &a.keys[verdict.Level]
	s.lines.refused(z, d, verdict, key)
	if v.h.events.ShouldEmit(eventName) {
		v.h.events.Emit(v.h.ctx, eventName, map[string]any{
			"zone":        z.Name,
			"decision":    decisions[d],
			"reason":      verdict.Reason.String(),
			"key":         z.Keys[verdict.Level].show(key, z.LogKeys),
			"limit":       verdict.Limit,
			"retry_after": seconds(verdict.Wait),
		})
	}
	return d == refused
}

// eventName is the event of every request that a zone refuses, or would refuse
// in shadow mode.
const eventName = "ratelimit_exceeded"

// Interface guards
var _ zapcore.ObjectMarshaler = (*facts)(nil)
