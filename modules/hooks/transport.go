// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"context"
	"errors"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddy-gatehouse/gatehouse/internal/phase"
)

// Transport is the standard HTTP transport of reverse_proxy, which also runs
// the upstream phases of the `hooks` handlers in front of it, once per attempt:
// UpstreamRequest, Connected, ConnectFailed, UpstreamFailed and UpstreamResponse.
//
// It takes every option of `transport http`, with the same meaning and default,
// in JSON and in the Caddyfile. Requests that no `hooks` handler is in front
// of, and health checks, pass as through the standard transport.
//
// In addition to what the handler alone can see, it knows the request's number
// on its connection, the times of the very connection that is used, and the
// failure of each attempt.
type Transport struct {
	reverseproxy.HTTPTransport

	// the addresses that are written literally in the configuration, as labels
	labels map[string]*upstreamMetrics

	tlsConns tlsConns // when Caddy makes the TLS connections itself
}

// CaddyModule returns the Caddy module information.
func (*Transport) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.reverse_proxy.transport.hooks",
		New: func() caddy.Module { return new(Transport) },
	}
}

// Provision sets up the standard transport and takes the labels of its upstreams.
func (t *Transport) Provision(ctx caddy.Context) error {
	if err := t.HTTPTransport.Provision(ctx); err != nil {
		return err
	}
	rt := t.Transport
	rt.DialContext = t.dialer(rt.DialContext)
	if rt.DialTLSContext != nil {
		rt.DialTLSContext = t.tlsDialer(rt.DialTLSContext)
	}

	t.labels = make(map[string]*upstreamMetrics)
	for _, m := range ctx.Modules() {
		proxy, ok := m.(*reverseproxy.Handler)
		if !ok {
			continue
		}
		for _, u := range proxy.Upstreams {
			if _, taken := t.labels[u.Dial]; taken || strings.Contains(u.Dial, "{") {
				continue
			}
			t.labels[u.Dial] = acquireUpstream(u.Dial)
		}
	}
	return nil
}

// Cleanup gives back the labels and closes idle connections. Requests that are
// under way go on.
func (t *Transport) Cleanup() error {
	for label := range t.labels {
		releaseUpstream(label)
	}
	return t.HTTPTransport.Cleanup()
}

// RoundTrip makes one attempt and runs the upstream phases around it.
func (t *Transport) RoundTrip(req *http.Request) (*http.Response, error) {
	x := phase.FromContext(req.Context())
	if x == nil {
		return t.HTTPTransport.RoundTrip(req)
	}
	x.EnterTransport()
	defer x.LeaveTransport()
	table := x.Upstream()
	c := newCall(req.Context(), t, x, t.begin(x, req))
	out := req.WithContext(c)
	if len(table.UpstreamRequest) > 0 || len(table.Connected) > 0 {
		t.SetScheme(req)
		u := *req.URL
		out.URL = &u
	}
	if len(table.Connected) > 0 {
		c.guard(table.Connected, out)
	}
	if len(table.UpstreamRequest) > 0 {
		out.Header = req.Header.Clone()
		for _, h := range table.UpstreamRequest {
			if err := h.UpstreamRequest(x, c.attempt(), out); err != nil {
				closeBody(req)
				return nil, c.refuse(err)
			}
		}
	}

	res, err := t.HTTPTransport.RoundTrip(out)
	if err != nil {
		return nil, c.failed(table, err)
	}

	a := c.attempt()
	a.Responded(res.StatusCode)
	for i := range table.UpstreamResponse {
		h := table.UpstreamResponse[len(table.UpstreamResponse)-1-i]
		if err := h.UpstreamResponse(x, a, res); err != nil {
			_ = res.Body.Close()
			return nil, c.refuse(err)
		}
	}
	if res.StatusCode != http.StatusSwitchingProtocols && res.Body != http.NoBody {
		c.body = watchedBody{ReadCloser: res.Body, call: c, table: table}
		res.Body = &c.body
	}
	return res, nil
}

// begin records a new attempt.
func (t *Transport) begin(x *phase.Exchange, req *http.Request) *phase.Attempt {
	upstream, label := req.URL.Host, dynamicLabel
	if di, ok := reverseproxy.GetDialInfo(req.Context()); ok {
		upstream = di.Address
		if strings.HasPrefix(di.Network, "unix") {
			upstream = di.String()
		}
		if di.Upstream != nil {
			if _, literal := t.labels[di.Upstream.Dial]; literal {
				label = di.Upstream.Dial
			}
		}
	}
	return x.Begin(upstream, label, time.Now())
}

type dialFunc = func(ctx context.Context, network, addr string) (net.Conn, error)

// dialer makes next's connections count their requests and know their times.
func (t *Transport) dialer(next dialFunc) dialFunc {
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		d := new(dialing)
		if c := callOf(ctx); c != nil {
			c.dial.Store(d)
			ctx = d.trace(ctx)
		}
		nc, err := next(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		return &countedConn{Conn: nc, connState: connState{dial: d}}, nil
	}
}

// tlsDialer does the same where Caddy makes the TLS connection too (a server
// name with placeholders, or PROXY protocol): such a connection must stay a
// *tls.Conn, so its state is kept beside it.
func (t *Transport) tlsDialer(next dialFunc) dialFunc {
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		d := new(dialing)
		if c := callOf(ctx); c != nil {
			c.dial.Store(d)
			ctx = d.trace(ctx)
		}
		d.handshakeAfterConnect = true
		nc, err := next(ctx, network, addr)
		d.handshakeEnded(err)
		if err != nil {
			return nil, err
		}
		t.tlsConns.add(nc, &connState{dial: d})
		return nc, nil
	}
}

// stateOf returns what is known of a connection that this transport has made.
func (t *Transport) stateOf(c net.Conn) *connState {
	if own := countedConnOf(c); own != nil {
		return &own.connState
	}
	return t.tlsConns.get(c)
}

// retryable makes reverse_proxy take err for a failure to connect, which it
// may repeat with any method, and keeps its being a timeout or not.
type retryable struct{ error }

func (e retryable) Unwrap() error { return e.error }

func (e retryable) As(target any) bool {
	d, ok := target.(*reverseproxy.DialError)
	if ok {
		*d = reverseproxy.NewDialError(e.error)
	}
	return ok
}

func (e retryable) Timeout() bool {
	t, ok := errors.AsType[interface {
		error
		Timeout() bool
	}](e.error)
	return ok && t.Timeout()
}

func (e retryable) Temporary() bool { return false }

func closeBody(r *http.Request) {
	if r.Body != nil {
		_ = r.Body.Close()
	}
}

// UnmarshalCaddyfile reads the options of `transport http`:
//
//	transport hooks {
//		<any option of transport http>
//	}
func (t *Transport) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	return t.HTTPTransport.UnmarshalCaddyfile(d)
}

// Interface guards
var (
	_ caddy.Provisioner                                = (*Transport)(nil)
	_ caddy.CleanerUpper                               = (*Transport)(nil)
	_ caddyfile.Unmarshaler                            = (*Transport)(nil)
	_ http.RoundTripper                                = (*Transport)(nil)
	_ reverseproxy.TLSTransport                        = (*Transport)(nil)
	_ reverseproxy.H2CTransport                        = (*Transport)(nil)
	_ reverseproxy.HealthCheckSchemeOverriderTransport = (*Transport)(nil)
	_ reverseproxy.ProxyProtocolTransport              = (*Transport)(nil)
	_ reverseproxy.RequestHeaderOpsTransport           = (*Transport)(nil)
)
