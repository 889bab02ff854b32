// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"context"
	"errors"
	"maps"
	"net/http"
	"net/http/httptrace"
	"runtime"
	"strings"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-gatehouse/gatehouse/internal/phase"
)

// visit is one request's way through a handler.
type visit struct {
	h *Handler
	x *phase.Exchange
	r *http.Request
	w http.ResponseWriter // what the handlers behind get

	exchange phase.Exchange // x, unless it is an outer handler's
	writer   responseWriter
	observer *observer

	nested   bool
	outer    *phase.Table
	err      error // of the handlers behind
	returned bool  // by a return, not by a panic
}

// enter starts the exchange of a request, or joins the one of an outer handler.
func (h *Handler) enter(w http.ResponseWriter, r *http.Request) *visit {
	v := &visit{h: h, w: w}
	if x := phase.FromContext(r.Context()); x != nil {
		v.x, v.r, v.nested = x, r, true
		v.outer = x.SwapUpstream(h.join(x.Upstream()))
	} else {
		v.x = &v.exchange
		v.x.Begins(r.Context(), &h.table, time.Now())
		ctx := context.Context(v.x)
		if h.observes {
			v.observer = &observer{x: v.x}
			ctx = httptrace.WithClientTrace(ctx, v.observer.trace())
		}
		v.r = r.WithContext(ctx)
		v.x.SetRequest(v.r)
		if repl, ok := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer); ok {
			repl.Map(placeholders(v.x))
		}
	}
	if h.phases.writer {
		v.writer = responseWriter{x: v.x, table: &h.table, origin: h.origin}
		v.writer.ResponseWriter = w
		if h.phases.snapshot {
			v.writer.before = maps.Clone(w.Header())
		}
		v.w = &v.writer
	}
	return v
}

// join returns the upstream phases of outer followed by those of h.
func (h *Handler) join(outer *phase.Table) *phase.Table {
	if n := h.nested.Load(); n != nil && n.outer == outer {
		return n.joined
	}
	n := &nesting{outer: outer, joined: phase.Upstream(outer, &h.table)}
	h.nested.Store(n)
	return n.joined
}

// admit runs the phases before the next handler.
func (v *visit) admit() (answered bool, err error) {
	for _, h := range v.h.table.EarlyRequest {
		if answered, err = h.EarlyRequest(v.x, v.w, v.r); answered || err != nil {
			return answered, v.refusedBy(err)
		}
	}
	for _, h := range v.h.table.Request {
		if answered, err = h.Request(v.x, v.w, v.r); answered || err != nil {
			return answered, v.refusedBy(err)
		}
	}
	return false, nil
}

// refusedBy marks a hook's error as a refusal.
func (v *visit) refusedBy(err error) error {
	if err == nil {
		return nil
	}
	return newRefusal(err, http.StatusInternalServerError)
}

// proceed calls the next handler. If the response is held back, the handler
// behind may give up with http.ErrAbortHandler; that is ours to end.
func (v *visit) proceed(next caddyhttp.Handler) error {
	defer func() {
		if !v.writer.held {
			return
		}
		if p := recover(); p != nil && p != http.ErrAbortHandler { //nolint:errorlint // net/http compares it too
			panic(p)
		}
	}()
	return next.ServeHTTP(v.w, v.r)
}

// settle decides what becomes of the outcome: the error to return, nil if
// there is none or it was answered.
func (v *visit) settle(err error) error {
	switch {
	case v.writer.refused != nil:
		err = newRefusal(v.writer.refused, http.StatusInternalServerError)
	case v.x.Refusal() != nil && !v.writer.wroteHeader && (v.writer.held || err != nil):
		err = v.x.Refusal()
	case v.writer.page != nil:
		return v.replaceOrigin()
	}
	if err == nil {
		v.noteCancel()
		return nil
	}

	v.err = err
	if v.observer != nil {
		v.observer.ended(err)
	}
	f := v.failure(err)
	v.x.SetFailure(f)
	if v.writer.wroteHeader {
		v.logError("aborting the response: failed after the header was sent", f)
		panic(http.ErrAbortHandler)
	}
	v.writer.release()
	return v.answer(err, f)
}

// failure describes the error of the handlers behind.
func (v *visit) failure(err error) *phase.Failure {
	f := &phase.Failure{Err: err, Class: classOfResult(err, v.x), Status: http.StatusInternalServerError}
	if he, ok := errors.AsType[caddyhttp.HandlerError](err); ok {
		f.ID = he.ID
		if he.StatusCode != 0 {
			f.Status = he.StatusCode
		}
	}
	return f
}

// noteCancel records the failure of a request that reverse_proxy ended without
// an error because the client went away.
func (v *visit) noteCancel() {
	canceled := v.writer.status == statusClientClosed
	if a := v.x.Last(); a != nil && a.Facts().Class == phase.Canceled {
		canceled = true
	}
	if canceled && v.x.Failure() == nil && v.r.Context().Err() != nil {
		v.x.SetFailure(&phase.Failure{Err: context.Canceled, Class: phase.Canceled, Status: statusClientClosed})
		if v.observer != nil {
			v.observer.ended(context.Canceled)
		}
	}
}

// answer runs Fail and ErrorLog. An error that nobody answers goes on, unless
// its log line is unwanted.
func (v *visit) answer(err error, f *phase.Failure) error {
	var answered bool
	for _, h := range v.h.table.Fail {
		var failErr error
		if answered, failErr = h.Fail(v.x, v.w, v.r, f); failErr != nil {
			v.h.logger.Error("answering an error", zap.Error(failErr), zap.String("class", string(f.Class)))
			answered = false
		}
		if answered {
			break
		}
	}
	if v.writer.refused != nil {
		// a Response hook did not want the page either
		return v.bare(newRefusal(v.writer.refused, http.StatusInternalServerError))
	}
	if v.writer.wroteHeader {
		answered = true
	}
	var silent bool
	for _, h := range v.h.table.ErrorLog {
		silent = h.ErrorLog(v.x, f) || silent
	}
	switch {
	case answered && !silent:
		v.logError("", f)
	case !answered && silent:
		v.w.WriteHeader(f.Status)
	case !answered:
		return v.bare(err)
	}
	return nil
}

// bare returns err for Caddy's error routes, with the summary for its log line.
func (v *visit) bare(err error) error {
	if r, ok := errors.AsType[*refusal](err); ok {
		err = r.HandlerError
	}
	summary := v.summary()
	if summary == "" {
		return err
	}
	if he, ok := err.(caddyhttp.HandlerError); ok { //nolint:errorlint // Caddy does not unwrap either
		he.Err = &summarized{err: he.Err, status: he.StatusCode, summary: summary}
		return he
	}
	return &summarized{err: err, summary: summary}
}

// replaceOrigin answers with the page that takes the place of the origin's answer.
func (v *visit) replaceOrigin() error {
	f := &phase.Failure{Status: v.writer.origStat}
	page := v.writer.page
	v.writer.release()
	return page.write(v.w, v.r, v.x, f)
}

// leave ends the visit, also when a panic passes through.
func (v *visit) leave() {
	if !v.returned {
		p := recover()
		if v.x.Failure() == nil {
			v.x.SetFailure(v.broken(p))
		}
		if p != nil {
			defer panic(p)
		}
	}
	if v.nested {
		v.x.SwapUpstream(v.outer)
	}
	if v.observer != nil {
		v.observer.answered(v.writer.status)
	}
	if v.writer.ResponseWriter != nil {
		v.x.SetOutcome(phase.Outcome{
			Status: v.writer.status, Bytes: v.writer.bytes, Duration: time.Since(v.x.Start()),
			Err: v.err, Aborted: !v.returned,
		})
	}
	for _, h := range v.h.table.Log {
		h.Log(v.x, v.r)
	}
	if v.h.logs && (v.x.Failure() != nil || v.x.LogsAttempts()) {
		if extra, ok := v.r.Context().Value(caddyhttp.ExtraLogFieldsCtxKey).(*caddyhttp.ExtraLogFields); ok {
			extra.Set(zap.Object("hooks", record{v.x}))
		}
	}
}

// broken describes a response that ended in the panic p. reverse_proxy aborts
// one that it can't complete: the attempt knows why if the upstream was the
// cause and the transport ours; else it was the client.
func (v *visit) broken(p any) *phase.Failure {
	f := &phase.Failure{Err: http.ErrAbortHandler, Class: phase.Other}
	a := v.x.Last()
	if a == nil || p != http.ErrAbortHandler { //nolint:errorlint // net/http compares it too
		return f
	}
	f.Class = phase.Canceled
	if v.observer != nil && v.observer.sees(a) && v.r.Context().Err() == nil {
		f.Class = phase.Reset
		a.Failed(f.Class, f.Err, time.Now())
	}
	if facts := a.Facts(); facts.Class != "" {
		f.Err, f.Class = facts.Err, facts.Class
	}
	return f
}

// logError writes the error line that the server does not write: for an error
// that was answered or came too late for that. Server errors are logged as
// errors, others at debug level, as Caddy does.
func (v *visit) logError(prefix string, f *phase.Failure) {
	level := zapcore.DebugLevel
	if f.Status >= http.StatusInternalServerError {
		level = zapcore.ErrorLevel
	}
	text := rootText(f.Err)
	if prefix != "" {
		text = prefix + ": " + text
	}
	if s := v.summary(); s != "" {
		text += " [" + s + "]"
	}
	if c := v.h.logger.Check(level, text); c != nil {
		fields := []zap.Field{
			zap.Int("status", f.Status), zap.String("class", string(f.Class)), zap.String("err_id", f.ID),
			zap.Duration("duration", time.Since(v.x.Start())),
			zap.Object("request", caddyhttp.LoggableHTTPRequest{Request: v.r}),
		}
		if a := v.x.Last(); a != nil {
			fields = append(fields, zap.String("upstream", a.Facts().Upstream))
		}
		c.Write(fields...)
	}
}

// summary joins the texts of the Summary hooks.
func (v *visit) summary() string {
	var parts []string
	for _, h := range v.h.table.Summary {
		if s := h.Summary(v.x, v.r); s != "" {
			parts = append(parts, s)
		}
	}
	return strings.Join(parts, " ")
}

// summarized is an error with a summary of its request, for the log line alone.
type summarized struct {
	err     error // nil in a HandlerError that is only a status
	status  int
	summary string
}

func (e *summarized) Unwrap() error { return e.err }

// Error adds the summary if, and only if, it is Caddy's error log that asks:
// Caddy takes {http.error.message} from the same method, and that placeholder
// stays what it would be without us.
func (e *summarized) Error() string {
	text := http.StatusText(e.status)
	if e.err != nil {
		text = e.err.Error()
	}
	if calledFrom("caddyhttp.errLogValues") {
		return text + " [" + e.summary + "]"
	}
	return text
}

// calledFrom tells whether the caller of its caller is the function.
func calledFrom(function string) bool {
	var pcs [4]uintptr
	n := runtime.Callers(3, pcs[:])
	frame, _ := runtime.CallersFrames(pcs[:n]).Next()
	return strings.HasSuffix(frame.Function, function)
}

// rootText is the message of err without the ID and the trace that a HandlerError adds.
func rootText(err error) string {
	if he, ok := errors.AsType[caddyhttp.HandlerError](err); ok {
		if he.Err == nil {
			return http.StatusText(he.StatusCode)
		}
		return he.Err.Error()
	}
	return err.Error()
}
