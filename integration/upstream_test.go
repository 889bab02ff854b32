// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"sync"
	"sync/atomic"
	"testing"
)

// upstream is a real HTTP server of one protocol.
type upstream struct {
	addr string
	dial string   // for reverse_proxy, with its scheme
	opts []string // for its transport
	hits atomic.Int64

	closeConns func() // that are open to it
}

// serve starts an upstream: h1, h2 (TLS) or h2c.
func serve(t *testing.T, protocol string, handler http.HandlerFunc) *upstream {
	t.Helper()
	u := new(upstream)
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		u.hits.Add(1)
		handler(w, r)
	}))
	t.Cleanup(srv.Close)
	u.closeConns = srv.CloseClientConnections
	u.addr = srv.Listener.Addr().String()
	u.dial = u.addr
	switch protocol {
	case "h2":
		srv.EnableHTTP2 = true
		srv.StartTLS()
		u.dial = "https://" + u.addr
		u.opts = []string{"tls_insecure_skip_verify"}
	case "h2c":
		srv.Config.Protocols = new(http.Protocols)
		srv.Config.Protocols.SetUnencryptedHTTP2(true)
		srv.Start()
		u.dial = "h2c://" + u.addr
	default:
		srv.Start()
	}
	return u
}

// hello answers every request in the same way.
func hello(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "hello") }

// rawServer hands each connection to script, with its number from 0, and
// closes it afterwards.
func rawServer(t *testing.T, script func(n int, c *net.TCPConn)) string {
	t.Helper()
	l := listen(t)
	var wg sync.WaitGroup
	var mu sync.Mutex
	open := make(map[net.Conn]bool)
	wg.Go(func() {
		for n := 0; ; n++ {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			open[c] = true
			mu.Unlock()
			wg.Go(func() {
				script(n, c.(*net.TCPConn))
				_ = c.Close()
			})
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		mu.Lock()
		for c := range open {
			_ = c.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
	return l.Addr().String()
}

// readRequest reads one request with its body.
func readRequest(r *bufio.Reader) error {
	req, err := http.ReadRequest(r)
	if err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, req.Body)
	return err
}

// cut ends a connection with a reset.
func cut(c *net.TCPConn) {
	_ = c.SetLinger(0)
	_ = c.Close()
}

const okResponse = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

// resettingServer reads each request and resets the connection.
func resettingServer(t *testing.T) string {
	t.Helper()
	return rawServer(t, func(_ int, c *net.TCPConn) {
		if readRequest(bufio.NewReader(c)) == nil {
			cut(c)
		}
	})
}
