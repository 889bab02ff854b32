// SPDX-License-Identifier: Apache-2.0

// Package hooks lets operators and Go developers take part in every phase of a
// proxied request: what happens between Caddy and the upstream becomes visible,
// what goes out can be repaired, and what the client sees of a failure is
// decided here.
//
// The [Handler] runs the phases on the client's side, the [Transport] those on
// the upstream's side, once per attempt; both share one [Exchange] per request.
// A hook is a Caddy module in the namespace http.hooks that implements one or
// more of the interfaces of this package. The hooks that come with it are
// ordinary ones: connection, upstream_request, on_error, request_summary,
// suppress_error_log and log_field.
//
// A phase that no hook takes part in costs nothing. A handler without hooks
// only calls the next one.
package hooks

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"sync/atomic"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-gatehouse/gatehouse/internal/phase"
)

func init() {
	caddy.RegisterModule(new(Handler))
	caddy.RegisterModule(new(Transport))
	caddy.RegisterModule(new(Connection))
	caddy.RegisterModule(new(UpstreamRequest))
	caddy.RegisterModule(new(OnError))
	caddy.RegisterModule(new(RequestSummary))
	caddy.RegisterModule(new(SuppressErrorLog))
	caddy.RegisterModule(new(LogField))
	caddy.RegisterModule(new(adminAPI))
}

// Handler runs hooks around the handlers behind it. It belongs in front of
// reverse_proxy; with `transport hooks` there the hooks also take part in each
// attempt to reach an upstream.
//
// A hook that refuses ends the request with its status; the refusal neither
// counts against an upstream nor is it retried, and handle_errors runs. If the
// header was already sent when a handler behind fails, the response is aborted
// instead of being completed with something else.
//
// Placeholders, from the first attempt on and also in handle_errors and in the
// access log:
//
// Placeholder | Description
// ------------|---------------
// `{http.hooks.conn.upstream}` | Address of the last attempt's upstream
// `{http.hooks.conn.attempts}` | How many attempts there were
// `{http.hooks.conn.reused}` | Whether the connection was a reused one
// `{http.hooks.conn.idle_ms}` | How long a reused connection had been idle
// `{http.hooks.conn.requests}` | Number of this request on the connection (`transport hooks` only)
// `{http.hooks.conn.dns_ms}` | Time for the look-up of the name, on a new connection
// `{http.hooks.conn.connect_ms}` | Time to connect, on a new connection
// `{http.hooks.conn.tls_ms}` | Time for the TLS handshake, on a new connection
// `{http.hooks.conn.ttfb_ms}` | Time from the start of the attempt to the first byte of the response
// `{http.hooks.conn.tls}` | TLS version
// `{http.hooks.conn.alpn}` | Protocol negotiated in the handshake
// `{http.hooks.conn.local}`, `{http.hooks.conn.remote}` | The connection's ends
// `{http.hooks.conn.error}` | Class of the attempt's failure, empty if there was none
// `{http.hooks.error.class}` | Class of the request's failure, empty if there was none
// `{http.hooks.error.status}` | Status that stands for it
// `{http.hooks.error.title}` | Text of that status
// `{http.hooks.error.detail}` | A sentence for the client; without addresses unless `expose_details`
// `{http.hooks.error.id}` | ID of the error as in the log
type Handler struct {
	// The hooks, in the order in which they see a request.
	HooksRaw []json.RawMessage `json:"hooks,omitempty" caddy:"namespace=http.hooks inline_key=hook"`

	logger *zap.Logger
	table  phase.Table
	origin []originPager
	phases handlerPhases

	observes bool // a transport behind may be one that does not run phases
	logs     bool // the server has an access log

	// the transport's phases when this handler is inside another one
	nested atomic.Pointer[nesting]
}

// handlerPhases says what the hooks of a handler make necessary per request.
type handlerPhases struct {
	any      bool // else the next handler is called and nothing else is done
	writer   bool // the response has to be watched
	snapshot bool // a response may be refused after its header fields were set
}

// nesting is the upstream phases of an outer handler followed by one's own.
type nesting struct{ outer, joined *phase.Table }

// CaddyModule returns the Caddy module information.
func (*Handler) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.handlers.hooks",
		New: func() caddy.Module { return new(Handler) },
	}
}

// Provision loads the hooks and enters them in the table of the phases.
func (h *Handler) Provision(ctx caddy.Context) error {
	h.logger = ctx.Logger()
	if len(h.HooksRaw) == 0 {
		return nil
	}
	loaded, err := ctx.LoadModule(h, "HooksRaw")
	if err != nil {
		return fmt.Errorf("loading hooks: %w", err)
	}
	mods, _ := loaded.([]any)
	for _, m := range mods {
		if err := h.add(m); err != nil {
			return err
		}
	}
	if err := checkAnswers(mods); err != nil {
		return err
	}
	srv, _ := ctx.Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server)
	h.observes, h.logs = srv == nil || foreignTransport(srv), srv == nil || srv.Logs != nil
	t := &h.table
	h.phases = handlerPhases{
		any:      true,
		snapshot: len(t.Response) > 0,
		writer: len(t.Response)+len(t.Fail)+len(t.ErrorLog)+len(t.Log)+len(t.UpstreamRequest)+len(t.Connected)+
			len(t.ConnectFailed)+len(t.UpstreamFailed)+len(t.UpstreamResponse)+len(h.origin) > 0,
	}
	return nil
}

// add enters one hook.
func (h *Handler) add(hook any) error {
	id := string(hook.(caddy.Module).CaddyModule().ID)
	unsupported, found := h.table.Add(hook)
	switch {
	case !found:
		return fmt.Errorf("adding hook %q: it implements no phase", id)
	case len(unsupported) > 0:
		return fmt.Errorf("adding hook %q: this version does not run the phase %s", id, strings.Join(unsupported, ", "))
	}
	if o, ok := hook.(originPager); ok {
		h.origin = append(h.origin, o)
	}
	return nil
}

// ServeHTTP runs the phases of the client's side around next.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	if !h.phases.any {
		return next.ServeHTTP(w, r)
	}
	v := h.enter(w, r)
	defer v.leave()
	answered, err := v.admit()
	if !answered && err == nil {
		err = v.proceed(next)
	}
	err = v.settle(err)
	v.returned = true
	return err
}

// Interface guards
var (
	_ caddy.Provisioner           = (*Handler)(nil)
	_ caddyhttp.MiddlewareHandler = (*Handler)(nil)
)
