// SPDX-License-Identifier: Apache-2.0

// Package phase holds what every module knows of hooks: the phases of a
// proxied request as interfaces, the table of the hooks that are configured,
// and the state of one request that they share.
//
// The handler and the transport of modules/hooks run the phases; modules/hooks
// gives the interfaces to third parties under the same names. Other modules
// find the table with [FromContext] and skip everything when there is none.
//
// # Contract of all phases
//
// A hook is one value for all requests of its handler, so its methods run
// concurrently and keep what belongs to a request in the [Exchange]. Several
// hooks of one phase run in the order of the configuration, those of
// UpstreamResponse, UpstreamResponseBody, UpstreamTrailer, Response,
// ResponseBody and ResponseTrailer in the reverse order, so that the first
// hook sees the request first and the answer last. The first error ends the phase.
//
// An error that refuses should be a caddyhttp.HandlerError with the status to
// answer; any other error becomes a 500 (502 from the upstream phases on). A
// refusal never counts as the upstream's failure and is never retried. A
// method may block: it then delays its own request only, and should return when
// the context of the request ends. A panic ends the request as any panic in a
// Caddy handler does; Log hooks still run.
package phase

import (
	"net/http"
	"slices"
)

// EarlyRequestHook runs first of all, before any Request hook.
type EarlyRequestHook interface {
	// EarlyRequest may edit the request. It may also answer it through w and
	// return true: no later hook and no handler sees the request then, only Log.
	EarlyRequest(x *Exchange, w http.ResponseWriter, r *http.Request) (answered bool, err error)
}

// RequestHook is the main gate in front of the next handler.
type RequestHook interface {
	// Request may edit, answer (and return true) or refuse the request.
	Request(x *Exchange, w http.ResponseWriter, r *http.Request) (answered bool, err error)
}

// RequestBodyHook sees the request body in chunks.
type RequestBodyHook interface {
	// RequestBody gets a chunk as it was read from the client and returns what
	// is passed on; end marks the last call, which may come without bytes.
	RequestBody(x *Exchange, chunk []byte, end bool) ([]byte, error)
}

// ProxyUpstreamHook runs after a cache found nothing and before any work for
// an upstream is done.
type ProxyUpstreamHook interface {
	// ProxyUpstream refuses the request with an error.
	ProxyUpstream(x *Exchange, r *http.Request) error
}

// UpstreamRequestHook runs in the transport, once per attempt, after the
// upstream was chosen.
type UpstreamRequestHook interface {
	// UpstreamRequest edits r, the copy that is sent to this upstream only: its
	// URL, Host and Header belong to this attempt. The fields that frame a
	// message or belong to one connection (see [ConnectionField]) must stay.
	UpstreamRequest(x *Exchange, a *Attempt, r *http.Request) error
}

// ConnectedHook runs in the transport when an attempt has got its connection,
// new or reused, and before anything is written to it. It does not run for
// HTTP/3 upstreams, and may run again within one attempt when a reused
// connection turns out dead and another one takes its place.
type ConnectedHook interface {
	// Connected aborts the attempt with an error; nothing reaches the upstream.
	Connected(x *Exchange, a *Attempt) error
}

// ConnectFailedHook runs when an attempt got no connection.
type ConnectFailedHook interface {
	// ConnectFailed may change the class of the failure and whether it may be retried.
	ConnectFailed(x *Exchange, a *Attempt, f *Failure)
}

// UpstreamFailedHook runs when an attempt failed after it had a connection,
// also when the response body breaks off, where nothing can be retried anymore.
type UpstreamFailedHook interface {
	// UpstreamFailed may change the class of the failure and whether it may be retried.
	UpstreamFailed(x *Exchange, a *Attempt, f *Failure)
}

// UpstreamResponseHook runs in the transport on the header of each upstream
// response, before reverse_proxy and a cache see it. It does not run for 1xx
// responses other than 101.
type UpstreamResponseHook interface {
	// UpstreamResponse edits the status and the header of res; an error refuses
	// the response. It must not read the body.
	UpstreamResponse(x *Exchange, a *Attempt, res *http.Response) error
}

// UpstreamResponseBodyHook sees the upstream's body in chunks.
type UpstreamResponseBodyHook interface {
	// UpstreamResponseBody returns what is passed on; end marks the last call.
	UpstreamResponseBody(x *Exchange, a *Attempt, chunk []byte, end bool) ([]byte, error)
}

// UpstreamTrailerHook sees the upstream's trailers.
type UpstreamTrailerHook interface {
	// UpstreamTrailer edits the trailer.
	UpstreamTrailer(x *Exchange, a *Attempt, trailer http.Header) error
}

// ResponseHook runs when the header of the response is about to go to the
// client, whoever made it. It does not run for 1xx responses other than 101.
type ResponseHook interface {
	// Response edits the status and the header; an error refuses the response,
	// of which nothing has been sent.
	Response(x *Exchange, res *Response) error
}

// ResponseBodyHook sees the body on its way to the client in chunks.
type ResponseBodyHook interface {
	// ResponseBody returns what is passed on; end marks the last call.
	ResponseBody(x *Exchange, chunk []byte, end bool) ([]byte, error)
}

// ResponseTrailerHook sees the trailers on their way to the client.
type ResponseTrailerHook interface {
	// ResponseTrailer edits the trailer.
	ResponseTrailer(x *Exchange, trailer http.Header) error
}

// FailHook runs when the next handler returned an error and nothing has been
// sent to the client.
type FailHook interface {
	// Fail may answer the request through w and return true; no later Fail hook
	// runs then. Otherwise the error goes on, to handle_errors in the end.
	Fail(x *Exchange, w http.ResponseWriter, r *http.Request, f *Failure) (answered bool, err error)
}

// ErrorLogHook decides on the log line of an error.
type ErrorLogHook interface {
	// ErrorLog silences the error with true. An error that no Fail hook has
	// answered is then answered with its bare status, so that the server
	// has nothing to log.
	ErrorLog(x *Exchange, f *Failure) (silence bool)
}

// SummaryHook describes a request in error lines.
type SummaryHook interface {
	// Summary returns a short text; those of several hooks are joined by a space.
	Summary(x *Exchange, r *http.Request) string
}

// LogHook runs last, for every request that entered the handler, failed,
// aborted and panicking ones too.
type LogHook interface {
	// Log records the exchange. [Exchange.Outcome] is complete.
	Log(x *Exchange, r *http.Request)
}

// Response is the header of a response on its way to the client.
type Response struct {
	// Status code; a hook may replace it.
	Status int

	// Header of the response; it is the writer's own map.
	Header http.Header
}

// Table holds the hooks of one handler by phase, in the order of the
// configuration. It is not changed once requests are served.
type Table struct {
	EarlyRequest     []EarlyRequestHook
	Request          []RequestHook
	UpstreamRequest  []UpstreamRequestHook
	Connected        []ConnectedHook
	ConnectFailed    []ConnectFailedHook
	UpstreamFailed   []UpstreamFailedHook
	UpstreamResponse []UpstreamResponseHook
	Response         []ResponseHook
	Fail             []FailHook
	ErrorLog         []ErrorLogHook
	Summary          []SummaryHook
	Log              []LogHook
}

// Add enters hook in each phase that it implements. It returns the names of
// the phases that hook implements and this version does not run, and whether
// there was any phase at all.
func (t *Table) Add(hook any) (unsupported []string, found bool) {
	n := add(&t.EarlyRequest, hook) + add(&t.Request, hook) + add(&t.UpstreamRequest, hook) +
		add(&t.Connected, hook) + add(&t.ConnectFailed, hook) + add(&t.UpstreamFailed, hook) +
		add(&t.UpstreamResponse, hook) + add(&t.Response, hook) + add(&t.Fail, hook) +
		add(&t.ErrorLog, hook) + add(&t.Summary, hook) + add(&t.Log, hook)
	for _, p := range notRun {
		if p.implements(hook) {
			unsupported = append(unsupported, p.name)
		}
	}
	return unsupported, n > 0 || len(unsupported) > 0
}

// Upstream returns a table with the phases of the transport of outer followed
// by those of inner, for a handler inside another one.
func Upstream(outer, inner *Table) *Table {
	return &Table{
		UpstreamRequest:  join(outer.UpstreamRequest, inner.UpstreamRequest),
		Connected:        join(outer.Connected, inner.Connected),
		ConnectFailed:    join(outer.ConnectFailed, inner.ConnectFailed),
		UpstreamFailed:   join(outer.UpstreamFailed, inner.UpstreamFailed),
		UpstreamResponse: join(outer.UpstreamResponse, inner.UpstreamResponse),
	}
}

// notRun lists the phases whose interface stands and which no engine runs yet:
// a hook that relies on one is refused at load instead of being silently dead.
var notRun = []struct {
	name       string
	implements func(any) bool
}{
	{"RequestBody", is[RequestBodyHook]},
	{"ProxyUpstream", is[ProxyUpstreamHook]},
	{"UpstreamResponseBody", is[UpstreamResponseBodyHook]},
	{"UpstreamTrailer", is[UpstreamTrailerHook]},
	{"ResponseBody", is[ResponseBodyHook]},
	{"ResponseTrailer", is[ResponseTrailerHook]},
}

func is[H any](hook any) bool {
	_, ok := hook.(H)
	return ok
}

func add[H any](hooks *[]H, hook any) int {
	h, ok := hook.(H)
	if !ok {
		return 0
	}
	*hooks = append(*hooks, h)
	return 1
}

func join[H any](a, b []H) []H {
	return append(slices.Clip(a), b...)
}
