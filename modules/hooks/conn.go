// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
	"weak"

	"github.com/caddy-gatehouse/gatehouse/internal/phase"
)

// dialing is the making of one connection: its times and what went wrong.
// Its events may still come when the request that began it has long got
// another connection.
type dialing struct {
	mu sync.Mutex

	dnsStart, connectStart, tlsStart time.Time
	dns, connect, tls                time.Duration

	err             error // of the name look-up or the connect, as net made it
	tlsBegun, tlsOK bool

	// the dial function makes the TLS handshake as well
	handshakeAfterConnect bool
}

// trace reports the look-up and the connect of a dial under ctx to d.
func (d *dialing) trace(ctx context.Context) context.Context {
	return httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		DNSStart:     d.onDNSStart,
		DNSDone:      d.onDNSDone,
		ConnectStart: d.onConnectStart,
		ConnectDone:  d.onConnectDone,
	})
}

func (d *dialing) onDNSStart(httptrace.DNSStartInfo) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.dnsStart = time.Now()
}

func (d *dialing) onDNSDone(info httptrace.DNSDoneInfo) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.dns = time.Since(d.dnsStart)
	if info.Err != nil {
		d.err = info.Err
	}
}

func (d *dialing) onConnectStart(_, _ string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.connectStart.IsZero() {
		d.connectStart = time.Now()
	}
}

func (d *dialing) onConnectDone(_, _ string, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.connect = time.Since(d.connectStart)
	if err != nil {
		if d.err == nil {
			d.err = err
		}
		return
	}
	d.err = nil
	if d.handshakeAfterConnect {
		d.tlsStart, d.tlsBegun = time.Now(), true
	}
}

func (d *dialing) handshakeStarted() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.tlsStart, d.tlsBegun = time.Now(), true
}

func (d *dialing) handshakeEnded(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.tlsBegun {
		d.tls, d.tlsOK = time.Since(d.tlsStart), err == nil
	}
}

// report copies the times into c.
func (d *dialing) report(c *phase.Conn) {
	d.mu.Lock()
	defer d.mu.Unlock()
	c.DNS, c.Connect, c.TLS = d.dns, d.connect, d.tls
}

// outcome tells how far the dial came.
func (d *dialing) outcome() (err error, tlsFailed bool) { //nolint:revive // the error is a finding here, not a result
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.err, d.tlsBegun && !d.tlsOK
}

// connState is what a connection remembers from request to request.
type connState struct {
	dial     *dialing
	requests atomic.Int64

	// a read has failed or found the end: what net/http makes of the bytes
	// before that may look malformed
	ended atomic.Bool

	tlsOnce          sync.Once
	tlsVersion, alpn string
}

// use counts a request on the connection and describes the connection to it.
func (s *connState) use(info httptrace.GotConnInfo) phase.Conn {
	c := observed(info)
	c.Requests = s.requests.Add(1)
	s.tlsOnce.Do(func() { s.tlsVersion, s.alpn = tlsFacts(info.Conn) })
	c.TLSVersion, c.ALPN = s.tlsVersion, s.alpn
	if c.Requests == 1 {
		s.dial.report(&c)
	}
	return c
}

// observed describes a connection as far as httptrace knows it, without TLS.
func observed(info httptrace.GotConnInfo) phase.Conn {
	return phase.Conn{
		Known:  true,
		Reused: info.Reused,
		Idle:   info.IdleTime,
		Local:  info.Conn.LocalAddr(),
		Remote: info.Conn.RemoteAddr(),
	}
}

func tlsFacts(c net.Conn) (version, alpn string) {
	tc, ok := c.(interface{ ConnectionState() tls.ConnectionState })
	if !ok {
		return "", ""
	}
	state := tc.ConnectionState()
	return tls.VersionName(state.Version), state.NegotiatedProtocol
}

// countedConn is a connection of this transport.
type countedConn struct {
	net.Conn
	connState
}

// countedConnOf finds the countedConn below c, nil if there is none.
func countedConnOf(c net.Conn) *countedConn {
	for {
		switch v := c.(type) {
		case *countedConn:
			return v
		case interface{ NetConn() net.Conn }:
			c = v.NetConn()
		default:
			return nil
		}
	}
}

// Read notes the end of the connection.
func (c *countedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if err != nil {
		c.ended.Store(true)
	}
	return n, err
}

// ReadFrom keeps the kernel's copying where the connection has it.
func (c *countedConn) ReadFrom(r io.Reader) (int64, error) {
	if rf, ok := c.Conn.(io.ReaderFrom); ok {
		return rf.ReadFrom(r)
	}
	return io.Copy(struct{ io.Writer }{c.Conn}, r)
}

// CloseWrite half-closes an upgraded connection.
func (c *countedConn) CloseWrite() error {
	if cw, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return cw.CloseWrite()
	}
	return fmt.Errorf("closing the write side: %w", http.ErrNotSupported)
}

// tlsConns holds the state of TLS connections that can't be wrapped, as long
// as they live.
type tlsConns struct{ m sync.Map } // weak.Pointer[tls.Conn] -> *connState

func (t *tlsConns) add(c net.Conn, s *connState) {
	tc, ok := c.(*tls.Conn)
	if !ok {
		return
	}
	key := weak.Make(tc)
	t.m.Store(key, s)
	runtime.AddCleanup(tc, func(key weak.Pointer[tls.Conn]) { t.m.Delete(key) }, key)
}

func (t *tlsConns) get(c net.Conn) *connState {
	tc, ok := c.(*tls.Conn)
	if !ok {
		return nil
	}
	s, _ := t.m.Load(weak.Make(tc))
	state, _ := s.(*connState)
	return state
}
