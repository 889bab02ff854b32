// SPDX-License-Identifier: Apache-2.0

package phase

import (
	"context"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"
)

// maxAttempts bounds the attempts that one request remembers. Of a request
// that needs more, the first ones and the last one are kept.
const maxAttempts = 32

// Exchange is the state of one request, shared by the hooks handler, the
// hooks transport and all hooks. It is the context of the request that the
// handlers behind `hooks` see. It is safe for concurrent use.
type Exchange struct {
	context.Context //nolint:containedctx // it is the request's context, extended

	start        time.Time
	request      *http.Request
	ownTransport atomic.Int32
	upstream     atomic.Pointer[Table]

	mu          sync.Mutex
	logAttempts bool
	attempts    []*Attempt
	last        *Attempt
	count       int
	failure     *Failure
	refusal     error
	values      map[any]any
	outcome     Outcome

	// room for the one attempt that most requests make
	firstAttempt Attempt
	firstSlot    [1]*Attempt
}

// Outcome is how an exchange ended.
type Outcome struct {
	// Status that was sent to the client; 0 when none was.
	Status int

	// Bytes of the body that were handed to the client's side.
	Bytes int64

	// Duration from the entry into the handler to its end.
	Duration time.Duration

	// Err is the error of the handlers behind, if any; it is also set when a
	// page has answered it.
	Err error

	// Aborted tells that the response was cut: the client got less than the whole.
	Aborted bool
}

type exchangeKey struct{}

// NewExchange starts an exchange for a request with the context ctx. The
// transport runs the upstream phases of table.
func NewExchange(ctx context.Context, table *Table, now time.Time) *Exchange {
	x := new(Exchange)
	x.Begins(ctx, table, now)
	return x
}

// Begins makes a zero Exchange what [NewExchange] returns, for one that is part
// of something larger.
func (x *Exchange) Begins(ctx context.Context, table *Table, now time.Time) {
	x.Context, x.start = ctx, now
	x.upstream.Store(table)
	x.attempts = x.firstSlot[:0]
}

// FromContext returns the exchange of the request that ctx belongs to, nil if
// no `hooks` handler with any hook is in front: health checks, other routes.
func FromContext(ctx context.Context) *Exchange {
	x, _ := ctx.Value(exchangeKey{}).(*Exchange)
	return x
}

// Value implements [context.Context].
func (x *Exchange) Value(key any) any {
	if _, ok := key.(exchangeKey); ok {
		return x
	}
	return x.Context.Value(key)
}

// Start is when the request entered the handler.
func (x *Exchange) Start() time.Time { return x.start }

// Upstream is the table whose upstream phases the transport runs.
func (x *Exchange) Upstream() *Table { return x.upstream.Load() }

// SwapUpstream sets the table of the upstream phases and returns the one before.
func (x *Exchange) SwapUpstream(t *Table) *Table { return x.upstream.Swap(t) }

// Set keeps a value for the rest of the request. The key should be a type of
// the hook's own package, as for [context.WithValue].
func (x *Exchange) Set(key, value any) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.values == nil {
		x.values = make(map[any]any)
	}
	x.values[key] = value
}

// Get returns what [Exchange.Set] has kept, nil if nothing.
func (x *Exchange) Get(key any) any {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.values[key]
}

// Attempts returns the attempts so far, oldest first.
func (x *Exchange) Attempts() []*Attempt { return x.AppendAttempts(nil) }

// AppendAttempts appends the attempts so far to list, oldest first.
func (x *Exchange) AppendAttempts(list []*Attempt) []*Attempt {
	x.mu.Lock()
	defer x.mu.Unlock()
	return append(list, x.attempts...)
}

// Last returns the newest attempt, nil if there was none.
func (x *Exchange) Last() *Attempt {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.last
}

// Failure returns why the request failed, nil as long as it has not.
func (x *Exchange) Failure() *Failure {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.failure
}

// SetFailure records why the request failed.
func (x *Exchange) SetFailure(f *Failure) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.failure = f
}

// Refuse records the error with which a hook in the transport has refused the
// request: what reverse_proxy says about it afterwards is not true.
func (x *Exchange) Refuse(err error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.refusal = err
}

// Refusal returns the error given to [Exchange.Refuse], if any.
func (x *Exchange) Refusal() error {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.refusal
}

// Outcome returns how the exchange ended; it is complete in the Log phase.
func (x *Exchange) Outcome() Outcome {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.outcome
}

// SetOutcome records how the exchange ended.
func (x *Exchange) SetOutcome(o Outcome) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.outcome = o
}

// Begin adds an attempt to reach upstream.
func (x *Exchange) Begin(upstream, label string, now time.Time) *Attempt {
	x.mu.Lock()
	defer x.mu.Unlock()
	a := &x.firstAttempt
	if x.count > 0 {
		a = new(Attempt)
	}
	x.count++
	a.facts = Facts{Upstream: upstream, Label: label, Number: x.count, Start: now}
	if len(x.attempts) < maxAttempts {
		x.attempts = append(x.attempts, a)
	} else {
		x.attempts[maxAttempts-1] = a
	}
	x.last = a
	return a
}

// Attempt is one try to get a response from one upstream. It is safe for
// concurrent use.
type Attempt struct {
	mu    sync.Mutex
	facts Facts
}

// Facts is what is known of an attempt.
type Facts struct {
	// Upstream is the address that was dialed.
	Upstream string

	// Label stands for the upstream in metrics: its address if it was written
	// in the configuration, else "dynamic".
	Label string

	// Number of the attempt within its request, from 1.
	Number int

	// Start of the attempt.
	Start time.Time

	// Conn is what is known of the connection.
	Conn Conn

	// FirstByte is the time from the start to the first byte of the response; 0 if none came.
	FirstByte time.Duration

	// Status of the response; 0 if none came.
	Status int

	// Ended is the time from the start to the failure of the attempt; 0 as long as it has not failed.
	Ended time.Duration

	// Class and Err of the failure; empty if there was none.
	Class Class
	Err   error
}

// Conn is what is known of the connection of an attempt.
type Conn struct {
	// Known tells that there is a connection. It is false for attempts that
	// got none and for HTTP/3 upstreams.
	Known bool

	// Reused tells that the connection carried a request before.
	Reused bool

	// Idle is how long a reused connection had been idle; 0 for one that
	// carried other streams at the time.
	Idle time.Duration

	// Requests is the number of this request on the connection, from 1; 0 when
	// it is not known (a stock transport).
	Requests int64

	// DNS, Connect and TLS are the times that this connection took to be set
	// up; they are 0 on a reused connection.
	DNS, Connect, TLS time.Duration

	// TLSVersion is the version as in [tls.VersionName]; empty without TLS.
	TLSVersion string

	// ALPN is the protocol that was negotiated in the handshake.
	ALPN string

	// Local and Remote are the connection's ends.
	Local, Remote net.Addr
}

// Facts returns a copy of what is known so far.
func (a *Attempt) Facts() Facts {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.facts
}

// Connected records the connection. It reports false, and records nothing,
// when the attempt has one already.
func (a *Attempt) Connected(c Conn) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.facts.Conn.Known {
		return false
	}
	a.facts.Conn = c
	return true
}

// FirstByte records the arrival of the first byte of the response.
func (a *Attempt) FirstByte(now time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.facts.FirstByte == 0 {
		a.facts.FirstByte = now.Sub(a.facts.Start)
	}
}

// Responded records the status of the response.
func (a *Attempt) Responded(status int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.facts.Status = status
}

// Failed records the failure of the attempt; the first one stays.
func (a *Attempt) Failed(class Class, err error, now time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.facts.Class == "" {
		a.facts.Class, a.facts.Err, a.facts.Ended = class, err, now.Sub(a.facts.Start)
	}
}

// EnterTransport tells that our own transport makes an attempt, until
// [Exchange.LeaveTransport].
func (x *Exchange) EnterTransport() { x.ownTransport.Add(1) }

// LeaveTransport ends what [Exchange.EnterTransport] has begun.
func (x *Exchange) LeaveTransport() { x.ownTransport.Add(-1) }

// OwnTransport tells whether our own transport is making an attempt.
func (x *Exchange) OwnTransport() bool { return x.ownTransport.Load() > 0 }

// LogAttempts asks for the attempts in the access log.
func (x *Exchange) LogAttempts() {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.logAttempts = true
}

// LogsAttempts tells whether [Exchange.LogAttempts] was called.
func (x *Exchange) LogsAttempts() bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.logAttempts
}

// Request returns the request as the handlers behind `hooks` got it, nil
// before they did. The transport sends a copy of it.
func (x *Exchange) Request() *http.Request { return x.request }

// SetRequest sets what [Exchange.Request] returns, before any handler runs.
func (x *Exchange) SetRequest(r *http.Request) { x.request = r }
