// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"context"
	"crypto/tls"
	"errors"
	"net/http"
	"net/http/httptrace"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-gatehouse/gatehouse/internal/phase"
)

// observer follows the attempts of a request whose transport is not ours, as
// far as httptrace sees them. While our own transport is at work it is silent.
type observer struct {
	x *phase.Exchange

	mu   sync.Mutex
	cur  *phase.Attempt
	dial *dialing
}

// trace returns the client trace that the handler puts into the request.
func (o *observer) trace() *httptrace.ClientTrace {
	return &httptrace.ClientTrace{
		GetConn:              o.getConn,
		GotConn:              o.gotConn,
		GotFirstResponseByte: o.firstByte,
		DNSStart: func(i httptrace.DNSStartInfo) {
			if d := o.dialing(); d != nil {
				d.onDNSStart(i)
			}
		},
		DNSDone: func(i httptrace.DNSDoneInfo) {
			if d := o.dialing(); d != nil {
				d.onDNSDone(i)
			}
		},
		ConnectStart: func(network, addr string) {
			if d := o.dialing(); d != nil {
				d.onConnectStart(network, addr)
			}
		},
		ConnectDone: func(network, addr string, err error) {
			if d := o.dialing(); d != nil {
				d.onConnectDone(network, addr, err)
			}
		},
		TLSHandshakeStart: func() {
			if d := o.dialing(); d != nil {
				d.handshakeStarted()
			}
		},
		TLSHandshakeDone: func(_ tls.ConnectionState, err error) {
			if d := o.dialing(); d != nil {
				d.handshakeEnded(err)
			}
		},
	}
}

func (o *observer) getConn(hostPort string) {
	if o.x.OwnTransport() || o.looksAgain(hostPort) {
		return
	}
	o.ended(nil)
	o.mu.Lock()
	defer o.mu.Unlock()
	o.cur = o.x.Begin(hostPort, dynamicLabel, time.Now())
	o.dial = new(dialing)
}

// looksAgain tells that the current attempt is still in search of its
// connection: HTTP/2 without TLS asks twice.
func (o *observer) looksAgain(hostPort string) bool {
	a, d := o.attempt()
	if a == nil {
		return false
	}
	facts := a.Facts()
	err, tlsFailed := d.outcome()
	return facts.Upstream == hostPort && !facts.Conn.Known && facts.Class == "" && err == nil && !tlsFailed
}

func (o *observer) gotConn(info httptrace.GotConnInfo) {
	a, d := o.attempt()
	if a == nil {
		return
	}
	c := observed(info)
	c.TLSVersion, c.ALPN = tlsFacts(info.Conn)
	if !info.Reused {
		d.report(&c)
	}
	a.Connected(c)
}

func (o *observer) firstByte() {
	if a, _ := o.attempt(); a != nil {
		a.FirstByte(time.Now())
	}
}

// ended closes the books of the current attempt: with the error of the whole
// request, or with none when the next attempt begins. No first byte is a
// failure then, whose error httptrace does not tell.
func (o *observer) ended(err error) {
	o.mu.Lock()
	a, d := o.cur, o.dial
	o.cur = nil
	o.mu.Unlock()
	if a == nil {
		return
	}
	facts := a.Facts()
	if facts.FirstByte > 0 && !fromProxy(err) {
		return
	}
	if err == nil {
		err = errUnanswered
	}
	a.Failed(classify(err, facts, d), err, time.Now())
}

// fromProxy tells whether err may be reverse_proxy's about an attempt, rather
// than some other handler's after the response was there.
func fromProxy(err error) bool {
	if errors.Is(err, context.Canceled) {
		return true
	}
	he, ok := errors.AsType[caddyhttp.HandlerError](err)
	return ok && (he.StatusCode == http.StatusBadGateway || he.StatusCode == http.StatusGatewayTimeout)
}

// attempt returns the current attempt, nil while it is not the observer's to see.
func (o *observer) attempt() (*phase.Attempt, *dialing) {
	if o.x.OwnTransport() {
		return nil, nil
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.cur, o.dial
}

func (o *observer) dialing() *dialing {
	_, d := o.attempt()
	return d
}

// errUnanswered counts as a reset: nothing else is known of an attempt that
// had its connection and was followed by another one.
var errUnanswered = errors.New("connection lost before a response; followed by another attempt")

// answered notes the status of the response that the current attempt ended with.
func (o *observer) answered(status int) {
	o.mu.Lock()
	a := o.cur
	o.mu.Unlock()
	if a != nil && status != 0 && a.Facts().FirstByte > 0 {
		a.Responded(status)
	}
}

// sees tells whether a is the observer's current attempt.
func (o *observer) sees(a *phase.Attempt) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.cur == a
}
