// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net/http"
	"net/http/httptrace"
	"sync/atomic"
	"time"

	"github.com/caddy-gatehouse/gatehouse/internal/phase"
)

// call is one RoundTrip of the transport: the context of its request, the
// trace that fills the attempt's facts, and what the hooks decided.
type call struct {
	context.Context //nolint:containedctx // it is the attempt's context, extended

	x     *phase.Exchange
	t     *Transport
	trace httptrace.ClientTrace

	cur  atomic.Pointer[phase.Attempt]
	dial atomic.Pointer[dialing] // the newest connection that was begun for this call
	conn *connState              // of the connection in use, if it is one of ours

	// only where Connected hooks may abort
	guards []phase.ConnectedHook
	out    *http.Request
	cancel context.CancelCauseFunc

	refusal error
	body    watchedBody // of the response
}

type callKey struct{}

// callOf returns the call that ctx belongs to, also in the goroutine that dials for it.
func callOf(ctx context.Context) *call {
	c, _ := ctx.Value(callKey{}).(*call)
	return c
}

// newCall extends ctx, the context of an attempt's request. The trace in force
// is copied and called first: [httptrace.WithClientTrace] would compose the two
// by reflection and make every event pay for it.
func newCall(ctx context.Context, t *Transport, x *phase.Exchange, a *phase.Attempt) *call {
	c := &call{Context: ctx, x: x, t: t}
	c.cur.Store(a)
	if outer := httptrace.ContextClientTrace(ctx); outer != nil {
		c.trace = *outer
	} else {
		c.Context = httptrace.WithClientTrace(ctx, &c.trace)
	}
	gotConn, firstByte := c.trace.GotConn, c.trace.GotFirstResponseByte
	c.trace.GotConn = func(info httptrace.GotConnInfo) {
		if gotConn != nil {
			gotConn(info)
		}
		c.gotConn(info)
	}
	c.trace.GotFirstResponseByte = func() {
		if firstByte != nil {
			firstByte()
		}
		c.attempt().FirstByte(time.Now())
	}
	if t.TLS == nil {
		return c
	}
	tlsStart, tlsDone := c.trace.TLSHandshakeStart, c.trace.TLSHandshakeDone
	c.trace.TLSHandshakeStart = func() {
		if tlsStart != nil {
			tlsStart()
		}
		if d := c.dial.Load(); d != nil {
			d.handshakeStarted()
		}
	}
	c.trace.TLSHandshakeDone = func(state tls.ConnectionState, err error) {
		if tlsDone != nil {
			tlsDone(state, err)
		}
		if d := c.dial.Load(); d != nil {
			d.handshakeEnded(err)
		}
	}
	return c
}

// Value implements [context.Context]: where the parent knows a trace, it is this call's.
func (c *call) Value(key any) any {
	if _, ok := key.(callKey); ok {
		return c
	}
	v := c.Context.Value(key)
	if _, ok := v.(*httptrace.ClientTrace); ok {
		return &c.trace
	}
	return v
}

func (c *call) attempt() *phase.Attempt { return c.cur.Load() }

// guard lets hooks abort the call when it has its connection.
func (c *call) guard(hooks []phase.ConnectedHook, out *http.Request) {
	c.guards, c.out = hooks, out
	c.Context, c.cancel = context.WithCancelCause(c.Context)
}

// gotConn runs in the goroutine of RoundTrip, before the request is written.
func (c *call) gotConn(info httptrace.GotConnInfo) {
	var conn phase.Conn
	if c.conn = c.t.stateOf(info.Conn); c.conn != nil {
		conn = c.conn.use(info)
	} else {
		conn = observed(info)
		conn.TLSVersion, conn.ALPN = tlsFacts(info.Conn)
	}
	a := c.attempt()
	if !a.Connected(conn) {
		c.repeated(a, conn)
	}
	for _, h := range c.guards {
		if c.refusal != nil {
			return
		}
		if err := h.Connected(c.x, c.attempt()); err != nil {
			c.abort(c.refuse(err))
		}
	}
}

// repeated records that net/http found the connection of a dead and repeats
// the request on another one, of its own accord.
func (c *call) repeated(a *phase.Attempt, conn phase.Conn) {
	f := a.Facts()
	class := phase.Reset
	if f.Conn.Reused {
		class = phase.ResetOnReused
	}
	now := time.Now()
	for _, h := range c.x.Upstream().UpstreamFailed {
		failure := &phase.Failure{Err: errStaleConn, Class: class}
		h.UpstreamFailed(c.x, a, failure)
		class = failure.Class
	}
	a.Failed(class, errStaleConn, now)
	next := c.x.Begin(f.Upstream, f.Label, now)
	next.Connected(conn)
	c.cur.Store(next)
}

var errStaleConn = errors.New("the upstream closed the connection before it answered; repeated on another one")

// abort keeps the request from being written. The context alone would not do:
// net/http looks at it and at the connection at the same time. So the request
// target becomes one that neither HTTP/1.1 nor HTTP/2 writes.
func (c *call) abort(err error) {
	c.out.URL.Opaque = "\x00"
	c.cancel(err)
}

// refuse ends the request with a hook's error. What RoundTrip returns then
// looks to reverse_proxy like a client that went away, the one error that it
// neither retries nor holds against the upstream; the handler's writer
// swallows the 499 that follows.
func (c *call) refuse(err error) error {
	c.refusal = newRefusal(err, http.StatusBadGateway)
	c.attempt().Failed(classOfRefusal(err), err, time.Now())
	c.x.Refuse(c.refusal)
	return c.refusal
}

// failed classifies the error of a RoundTrip, lets the hooks judge it and
// returns what reverse_proxy shall see.
func (c *call) failed(table *phase.Table, err error) error {
	if c.refusal != nil {
		return c.refusal
	}
	a := c.attempt()
	facts := a.Facts()
	f := &phase.Failure{Err: err, Class: classify(err, facts, c.dial.Load())}
	if f.Class == phase.Other && c.conn != nil && c.conn.ended.Load() {
		f.Class = phase.Reset
	}
	if facts.Conn.Known {
		for _, h := range table.UpstreamFailed {
			h.UpstreamFailed(c.x, a, f)
		}
	} else {
		for _, h := range table.ConnectFailed {
			h.ConnectFailed(c.x, a, f)
		}
	}
	a.Failed(f.Class, err, time.Now())
	switch f.Retry {
	case phase.RetrySafe:
		return retryable{err}
	case phase.RetryNever:
		final := newRefusal(err, statusOf(err))
		c.x.Refuse(final)
		return final
	case phase.RetryDefault:
	}
	return err
}

// statusOf is the status that reverse_proxy gives a transport error.
func statusOf(err error) int {
	if t, ok := errors.AsType[interface {
		error
		Timeout() bool
	}](err); ok && t.Timeout() {
		return http.StatusGatewayTimeout
	}
	return http.StatusBadGateway
}

// watchedBody notices when an upstream's body breaks off.
type watchedBody struct {
	io.ReadCloser
	call  *call
	table *phase.Table
}

func (b *watchedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if err != nil && err != io.EOF {
		b.broke(err)
	}
	return n, err
}

func (b *watchedBody) broke(err error) {
	a := b.call.attempt()
	facts := a.Facts()
	if facts.Class != "" {
		return
	}
	f := &phase.Failure{Err: err, Class: classify(err, facts, nil)}
	for _, h := range b.table.UpstreamFailed {
		h.UpstreamFailed(b.call.x, a, f)
	}
	a.Failed(f.Class, err, time.Now())
}
