// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"errors"
	"math"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// visit is one request's way through a handler.
type visit struct {
	h     *Handler
	w     http.ResponseWriter
	r     *http.Request
	repl  *caddy.Replacer
	facts *facts

	asks     []asked // only those that hold something stay
	counting bool    // whether one of them waits for the response
	inflight bool    // whether one of them is counted as under way
	writer   *writer // nil if nobody needs to know

	err      error // of the handlers behind
	returned bool  // by a return, not by a panic

	// what must end before anything is given back: the handlers, and the
	// connection, if one of them took it over
	open atomic.Int32
}

// asked is what a request asked of a zone.
type asked struct {
	zone *Zone
	ask  Ask
	keys [maxLevels]Key
}

var visits = sync.Pool{New: func() any { return &visit{asks: make([]asked, 0, 2)} }}

func (h *Handler) enter(w http.ResponseWriter, r *http.Request) *visit {
	v := visits.Get().(*visit)
	v.h, v.w, v.r = h, w, r
	v.repl, _ = r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
	v.facts = factsOf(r, v.repl, h.logs)
	v.open.Store(1)
	return v
}

// admit asks the zones. Its error is the refusal.
func (v *visit) admit() error {
	var least Verdict // of the zones that have told something
	for _, z := range v.h.zones {
		if len(z.matchers) > 0 {
			matched, err := z.matchers.AnyMatchWithError(v.r)
			if err != nil {
				return err
			}
			if !matched {
				continue
			}
		}
		verdict, refused, err := v.ask(z)
		if err != nil {
			return err
		}
		if verdict.Limit > 0 && z.Mode == modeEnforce {
			if v.h.Headers == headersDraft {
				z.fields.draft(v.w.Header(), &verdict)
			}
			if least.Limit == 0 || refused || verdict.Remaining < least.Remaining {
				least = verdict
			}
		}
		if refused {
			v.tell(&least)
			return z.refusal.of(v.w.Header(), &verdict)
		}
	}
	v.tell(&least)
	return nil
}

// tell shows the zone with the least remaining, where all are not shown.
func (v *visit) tell(least *Verdict) {
	if v.h.Headers == headersLegacy && least.Limit > 0 {
		legacyFields(v.w.Header(), least)
	}
}

// ask asks one zone, and tells whether that is the end of the request.
func (v *visit) ask(z *Zone) (verdict Verdict, refused bool, err error) {
	v.asks = append(v.asks, asked{zone: z})
	a := &v.asks[len(v.asks)-1]
	keep := false
	defer func() {
		if !keep {
			v.asks = v.asks[:len(v.asks)-1]
		}
	}()
	if err := a.identify(v.r, v.repl); err != nil {
		z.state.lines.emptyKey(err)
		switch z.OnEmptyKey {
		case emptySkip:
			z.state.series.decisions[skipped].Inc()
			v.facts.tell(z, a, skipped, &verdict, 0)
			return verdict, false, nil
		case emptyRefuse:
			verdict = Verdict{Reason: NoKey}
			return verdict, v.record(z, a, &verdict, 0), nil
		}
		for i := range z.Keys {
			a.keys[i] = sharedKey
		}
	}
	a.ask.Keys = a.keys[:len(z.Keys)]
	a.ask.Cost = z.costOf(v.repl)
	a.ask.Reserve = z.CountWhen != nil
	verdict, waited, err := z.decide(v.r.Context(), &a.ask)
	if err != nil {
		return verdict, false, caddyhttp.HandlerError{StatusCode: statusClientClosed, Err: err}
	}
	refused = v.record(z, a, &verdict, waited)
	if keep = a.ask.Holds; keep {
		v.counting = v.counting || z.CountWhen != nil
		if z.Inflight > 0 {
			v.inflight = true
			z.state.series.inflight.Inc()
		}
	}
	return verdict, refused, nil
}

// statusClientClosed is what a client gets that is not there anymore.
const statusClientClosed = 499

// identify finds the keys of a request.
func (a *asked) identify(r *http.Request, repl *caddy.Replacer) (err error) {
	for i, k := range a.zone.Keys {
		if a.keys[i], err = k.of(r, repl); err != nil {
			return err
		}
	}
	return nil
}

// costOf is how many events a request is.
func (z *Zone) costOf(repl *caddy.Replacer) int {
	if z.cost >= 0 {
		return z.cost
	}
	text := repl.ReplaceAll(z.Cost, "")
	n, err := strconv.ParseFloat(text, 64)
	if err != nil || math.IsNaN(n) || n < 0 {
		z.state.lines.badCost(text)
		return 1
	}
	return int(min(math.Ceil(n), maxNumber))
}

// watch returns the writer for the handlers behind: where a zone needs to know
// how the request ends, or when, one that sees it.
func (v *visit) watch() http.ResponseWriter {
	if !v.counting && !v.inflight {
		return v.w
	}
	v.writer = &writer{v: v}
	v.writer.ResponseWriter = v.w
	return v.writer
}

// leave ends the request's part of the visit.
func (v *visit) leave() {
	if len(v.asks) > 0 {
		v.end()
		return
	}
	v.recycle()
}

// end gives back what the request holds when all that had to end has.
func (v *visit) end() {
	if v.open.Add(-1) > 0 {
		return
	}
	for i := range v.asks {
		a := &v.asks[i]
		s := a.zone.state
		charge := a.zone.CountWhen != nil && v.answered() && a.zone.counts.hold(v)
		s.counters.Done(&a.ask, charge)
		if a.zone.Inflight > 0 {
			s.series.inflight.Dec()
		}
		s.line.ended(a.keys[0].Hash)
	}
	v.recycle()
}

func (v *visit) recycle() {
	if v.writer != nil && v.writer.hijacked {
		return // the tunnel knows it
	}
	clear(v.asks)
	*v = visit{asks: v.asks[:0]}
	visits.Put(v)
}

// answered tells whether there is a response to judge. The client may have
// seen the beginning of one that ended in a panic, and must not get it free of
// charge by leaving then.
func (v *visit) answered() bool {
	return v.returned || v.writer != nil && v.writer.status != 0
}

// status is what the client got, as far as the handlers behind know: that of
// their error, else that of the response.
func (v *visit) status() int {
	if v.err != nil {
		if he, ok := errors.AsType[caddyhttp.HandlerError](v.err); ok && he.StatusCode != 0 {
			return he.StatusCode
		}
		return http.StatusInternalServerError
	}
	if v.writer == nil || v.writer.status == 0 {
		return http.StatusOK
	}
	return v.writer.status
}
