// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"runtime"
	"sync"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// writer sees how a response begins, and whether the connection is taken over.
type writer struct {
	caddyhttp.ResponseWriterWrapper

	v        *visit
	status   int // 0: no header yet
	cache    string
	hijacked bool
}

// begin remembers the header of the response.
func (w *writer) begin(status int) {
	if w.status != 0 {
		return
	}
	w.status = status
	if values := w.Header()["Cache-Status"]; len(values) > 0 {
		w.cache = values[len(values)-1] // has the cache that is nearest to the client
	}
}

// WriteHeader implements [http.ResponseWriter].
func (w *writer) WriteHeader(status int) {
	if status >= 200 || status == http.StatusSwitchingProtocols {
		w.begin(status)
	}
	w.ResponseWriter.WriteHeader(status)
}

// Write implements [http.ResponseWriter].
func (w *writer) Write(b []byte) (int, error) {
	w.begin(http.StatusOK)
	return w.ResponseWriter.Write(b)
}

// ReadFrom implements [io.ReaderFrom].
func (w *writer) ReadFrom(r io.Reader) (int64, error) {
	w.begin(http.StatusOK)
	return w.ResponseWriterWrapper.ReadFrom(r)
}

// FlushError is for [http.ResponseController].
func (w *writer) FlushError() error {
	w.begin(http.StatusOK)
	return http.NewResponseController(w.ResponseWriter).Flush()
}

// Hijack implements [http.Hijacker]. What the request holds is then given back
// when the handlers have returned and the connection is closed.
func (w *writer) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, rw, err := http.NewResponseController(w.ResponseWriter).Hijack()
	if err != nil {
		return nil, nil, err
	}
	w.begin(http.StatusSwitchingProtocols)
	w.hijacked = true
	w.v.open.Add(1)
	t := &tunnel{Conn: conn, ended: sync.OnceFunc(w.v.end)}
	// whoever forgets to close it must not hold a place for ever
	runtime.AddCleanup(t, func(end func()) { end() }, t.ended)
	if c, ok := conn.(halfCloser); ok {
		return &halfTunnel{t, c}, rw, nil
	}
	return t, rw, nil
}

// tunnel is a connection that a handler has taken over.
type tunnel struct {
	net.Conn
	ended func()
}

// Close implements [net.Conn].
func (t *tunnel) Close() error {
	defer t.ended()
	return t.Conn.Close()
}

// ReadFrom lets the kernel copy where it can.
func (t *tunnel) ReadFrom(r io.Reader) (int64, error) {
	if f, ok := t.Conn.(io.ReaderFrom); ok {
		return f.ReadFrom(r)
	}
	return io.Copy(struct{ io.Writer }{t.Conn}, r)
}

// halfTunnel is one whose sides can be closed on their own.
type halfTunnel struct {
	*tunnel
	half halfCloser
}

type halfCloser interface{ CloseWrite() error }

// CloseWrite closes our side.
func (t *halfTunnel) CloseWrite() error { return t.half.CloseWrite() }

// Interface guards
var (
	_ http.ResponseWriter = (*writer)(nil)
	_ http.Hijacker       = (*writer)(nil)
	_ io.ReaderFrom       = (*writer)(nil)
)
