// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"errors"
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-gatehouse/gatehouse/modules/hooks"
)

// The hooks of these tests. Each is named in the Caddyfile with a word; what
// it does is in the map behind that word.
func init() {
	caddy.RegisterModule(new(allPhases))
	caddy.RegisterModule(new(onConnected))
	caddy.RegisterModule(new(onUpstreamRequest))
	caddy.RegisterModule(new(onUpstreamResponse))
	caddy.RegisterModule(new(onResponse))
	caddy.RegisterModule(new(onRequest))
	caddy.RegisterModule(new(onFailed))
	caddy.RegisterModule(new(onBody))
}

// script holds the functions of the single-phase hooks by word.
var script struct {
	sync.Mutex
	fail func(*hooks.Failure)
	err  map[string]error
}

// refuse makes the hook with that word refuse with err until the test ends.
func refuse(t *testing.T, word string, err error) {
	t.Helper()
	setError(word, err)
	t.Cleanup(func() { setError(word, nil) })
}

func setError(word string, err error) {
	script.Lock()
	defer script.Unlock()
	if script.err == nil {
		script.err = make(map[string]error)
	}
	script.err[word] = err
}

func scripted(word string) error {
	script.Lock()
	defer script.Unlock()
	return script.err[word]
}

// named is a hook with a word as its only argument.
type named struct {
	Name string `json:"name,omitempty"`
}

func (n *named) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next()
	if !d.AllArgs(&n.Name) {
		return d.ArgErr()
	}
	return nil
}

type (
	onConnected        struct{ named }
	onUpstreamRequest  struct{ named }
	onUpstreamResponse struct{ named }
	onResponse         struct{ named }
	onRequest          struct{ named }
	onFailed           struct{ named }
	onBody             struct{ named }
)

func module(id string, create func() caddy.Module) caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: caddy.ModuleID("http.hooks." + id), New: create}
}

func (*onConnected) CaddyModule() caddy.ModuleInfo {
	return module("on_connected", func() caddy.Module { return new(onConnected) })
}

func (*onUpstreamRequest) CaddyModule() caddy.ModuleInfo {
	return module("on_upstream_request", func() caddy.Module { return new(onUpstreamRequest) })
}

func (*onUpstreamResponse) CaddyModule() caddy.ModuleInfo {
	return module("on_upstream_response", func() caddy.Module { return new(onUpstreamResponse) })
}

func (*onResponse) CaddyModule() caddy.ModuleInfo {
	return module("on_response", func() caddy.Module { return new(onResponse) })
}

func (*onRequest) CaddyModule() caddy.ModuleInfo {
	return module("on_request", func() caddy.Module { return new(onRequest) })
}

func (*onFailed) CaddyModule() caddy.ModuleInfo {
	return module("on_failed", func() caddy.Module { return new(onFailed) })
}

func (*onBody) CaddyModule() caddy.ModuleInfo {
	return module("on_body", func() caddy.Module { return new(onBody) })
}

func (h *onConnected) Connected(*hooks.Exchange, *hooks.Attempt) error { return scripted(h.Name) }

func (h *onUpstreamRequest) UpstreamRequest(*hooks.Exchange, *hooks.Attempt, *http.Request) error {
	return scripted(h.Name)
}

func (h *onUpstreamResponse) UpstreamResponse(*hooks.Exchange, *hooks.Attempt, *http.Response) error {
	return scripted(h.Name)
}

func (h *onResponse) Response(*hooks.Exchange, *hooks.Response) error { return scripted(h.Name) }

func (h *onRequest) Request(*hooks.Exchange, http.ResponseWriter, *http.Request) (bool, error) {
	return false, scripted(h.Name)
}

func (h *onFailed) fail(f *hooks.Failure) {
	script.Lock()
	defer script.Unlock()
	if script.fail != nil {
		script.fail(f)
	}
}

func (h *onFailed) ConnectFailed(_ *hooks.Exchange, _ *hooks.Attempt, f *hooks.Failure) { h.fail(f) }

func (h *onFailed) UpstreamFailed(_ *hooks.Exchange, _ *hooks.Attempt, f *hooks.Failure) { h.fail(f) }

func (h *onBody) RequestBody(_ *hooks.Exchange, chunk []byte, _ bool) ([]byte, error) {
	return chunk, nil
}

// allPhases writes down the order in which it is called.
type allPhases struct{ named }

type traceKey struct{}

func (*allPhases) CaddyModule() caddy.ModuleInfo {
	return module("all_phases", func() caddy.Module { return new(allPhases) })
}

func (h *allPhases) note(x *hooks.Exchange, phase string) {
	trace, _ := x.Get(traceKey{}).([]string)
	x.Set(traceKey{}, append(trace, phase+":"+h.Name))
}

func (h *allPhases) EarlyRequest(x *hooks.Exchange, _ http.ResponseWriter, _ *http.Request) (bool, error) {
	h.note(x, "early_request")
	return false, nil
}

func (h *allPhases) Request(x *hooks.Exchange, _ http.ResponseWriter, _ *http.Request) (bool, error) {
	h.note(x, "request")
	return false, nil
}

func (h *allPhases) UpstreamRequest(x *hooks.Exchange, _ *hooks.Attempt, r *http.Request) error {
	h.note(x, "upstream_request")
	r.Header.Add("X-Attempt", h.Name)
	return nil
}

func (h *allPhases) Connected(x *hooks.Exchange, _ *hooks.Attempt) error {
	h.note(x, "connected")
	return nil
}

func (h *allPhases) ConnectFailed(x *hooks.Exchange, _ *hooks.Attempt, _ *hooks.Failure) {
	h.note(x, "connect_failed")
}

func (h *allPhases) UpstreamFailed(x *hooks.Exchange, _ *hooks.Attempt, _ *hooks.Failure) {
	h.note(x, "upstream_failed")
}

func (h *allPhases) UpstreamResponse(x *hooks.Exchange, _ *hooks.Attempt, _ *http.Response) error {
	h.note(x, "upstream_response")
	return nil
}

func (h *allPhases) Response(x *hooks.Exchange, res *hooks.Response) error {
	h.note(x, "response")
	trace, _ := x.Get(traceKey{}).([]string)
	res.Header.Set("X-Trace", strings.Join(trace, " "))
	return nil
}

func (h *allPhases) Fail(x *hooks.Exchange, _ http.ResponseWriter, _ *http.Request, _ *hooks.Failure) (bool, error) {
	h.note(x, "fail")
	return false, nil
}

func (h *allPhases) ErrorLog(x *hooks.Exchange, _ *hooks.Failure) bool {
	h.note(x, "error_log")
	return false
}

func (h *allPhases) Summary(*hooks.Exchange, *http.Request) string { return "summary:" + h.Name }

func (h *allPhases) Log(x *hooks.Exchange, _ *http.Request) {
	h.note(x, "log")
	script.Lock()
	defer script.Unlock()
	trace, _ := x.Get(traceKey{}).([]string)
	lastTrace, lastOutcome = strings.Join(trace, " "), x.Outcome()
}

var (
	lastTrace   string
	lastOutcome hooks.Outcome
)

// lastVisit returns what the last all_phases hook saw.
func lastVisit() (string, hooks.Outcome) {
	script.Lock()
	defer script.Unlock()
	return lastTrace, lastOutcome
}

func init() {
	caddy.RegisterModule(lateError{})
	httpcaddyfile.RegisterHandlerDirective("late_error",
		func(httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) { return lateError{}, nil })
}

// lateError is a handler that fails when a part of its response is sent.
type lateError struct{}

func (lateError) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.handlers.late_error", New: func() caddy.Module { return new(lateError) }}
}

func (lateError) ServeHTTP(w http.ResponseWriter, _ *http.Request, _ caddyhttp.Handler) error {
	_, _ = w.Write([]byte("a part"))
	_ = http.NewResponseController(w).Flush()
	return caddyhttp.Error(http.StatusInternalServerError, errors.New("too late"))
}
