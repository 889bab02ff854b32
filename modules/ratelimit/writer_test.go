// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"bufio"
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// hijackable is a response whose connection can be taken over.
type hijackable struct {
	*httptest.ResponseRecorder
	conn net.Conn
}

func (h *hijackable) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	if h.conn == nil {
		return nil, nil, http.ErrNotSupported
	}
	return h.conn, bufio.NewReadWriter(bufio.NewReader(h.conn), bufio.NewWriter(h.conn)), nil
}

// closable is a connection both of whose sides can be closed.
type closable struct {
	net.Conn
	halves int
}

func (c *closable) CloseWrite() error { c.halves++; return nil }

func inflightOf(z *Zone) int {
	st, _ := z.state.counters.Inspect(context.Background(), 0, keyOfText("k"))
	return st.Inflight
}

func oneAtATime(t *testing.T, name string) (*Handler, *Zone) {
	t.Helper()
	z := textZone(name)
	z.Inflight = 1
	return newHandler(t, z), z
}

// TestTunnel: a connection that was taken over counts until it is closed, by
// whomever and how often.
func TestTunnel(t *testing.T) {
	for name, inHandler := range map[string]bool{"closed in the handler": true, "closed later": false} {
		t.Run(name, func(t *testing.T) {
			h, z := oneAtATime(t, "writer-tunnel")
			ours, theirs := net.Pipe()
			defer theirs.Close()
			var tunnel net.Conn
			w := &hijackable{httptest.NewRecorder(), &closable{Conn: ours}}
			err := h.ServeHTTP(w, request(t.Context(), "k"), caddyhttp.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) (err error) {
				if tunnel, _, err = http.NewResponseController(w).Hijack(); err != nil {
					return err
				}
				if inHandler {
					_ = tunnel.Close()
					if n := inflightOf(z); n != 1 {
						t.Errorf("%d in flight while the handler runs", n)
					}
				}
				return nil
			}))
			if err != nil {
				t.Fatal(err)
			}
			if half, ok := tunnel.(halfCloser); !ok || half.CloseWrite() != nil || w.conn.(*closable).halves != 1 {
				t.Error("the sides can't be closed on their own anymore")
			}
			want := 1
			if inHandler {
				want = 0
			}
			if n := inflightOf(z); n != want {
				t.Errorf("%d in flight after the handler, want %d", n, want)
			}
			for range 3 {
				_ = tunnel.Close()
				if n := inflightOf(z); n != 0 {
					t.Errorf("%d in flight after the end", n)
				}
			}
			if status, _ := serve(h, request(t.Context(), "k"), nil); status != 200 {
				t.Errorf("the next request: %d", status)
			}
		})
	}
}

// TestTunnelWithoutHalves must not pretend that they can be closed.
func TestTunnelWithoutHalves(t *testing.T) {
	h, _ := oneAtATime(t, "writer-halves")
	ours, theirs := net.Pipe()
	defer theirs.Close()
	err := h.ServeHTTP(&hijackable{httptest.NewRecorder(), ours}, request(t.Context(), "k"), caddyhttp.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) error {
		conn, _, err := http.NewResponseController(w).Hijack()
		if _, ok := conn.(halfCloser); ok {
			t.Error("the tunnel has halves")
		}
		go func() { _, _ = io.Copy(io.Discard, theirs) }()
		if n, err := conn.(io.ReaderFrom).ReadFrom(strings.NewReader("text")); n != 4 || err != nil {
			t.Errorf("copied %d, %v", n, err)
		}
		_ = conn.Close()
		return err
	}))
	if err != nil {
		t.Error(err)
	}
}

// TestForgottenTunnel: one that nobody closes ends with the last reference.
func TestForgottenTunnel(t *testing.T) {
	h, z := oneAtATime(t, "writer-forgotten")
	ours, theirs := net.Pipe()
	defer theirs.Close()
	_ = h.ServeHTTP(&hijackable{httptest.NewRecorder(), ours}, request(t.Context(), "k"), caddyhttp.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) error {
		_, _, err := http.NewResponseController(w).Hijack()
		return err
	}))
	for deadline := time.Now().Add(20 * time.Second); inflightOf(z) > 0; runtime.GC() {
		if time.Now().After(deadline) {
			t.Fatal("a forgotten connection holds its place")
		}
		runtime.Gosched()
	}
}

// TestFailedHijack holds nothing.
func TestFailedHijack(t *testing.T) {
	h, z := oneAtATime(t, "writer-failed")
	for range 3 {
		err := h.ServeHTTP(&hijackable{httptest.NewRecorder(), nil}, request(t.Context(), "k"), caddyhttp.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) error {
			if _, _, err := http.NewResponseController(w).Hijack(); err == nil {
				t.Error("hijacked")
			}
			w.WriteHeader(http.StatusTeapot)
			return nil
		}))
		if err != nil || inflightOf(z) != 0 {
			t.Errorf("%v, %d in flight", err, inflightOf(z))
		}
	}
}

// TestTunnelPanics: a handler that takes the connection over and then panics.
func TestTunnelPanics(t *testing.T) {
	h, z := oneAtATime(t, "writer-panics")
	ours, theirs := net.Pipe()
	defer theirs.Close()
	var tunnel net.Conn
	func() {
		defer func() { _ = recover() }()
		_ = h.ServeHTTP(&hijackable{httptest.NewRecorder(), ours}, request(t.Context(), "k"), caddyhttp.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) error {
			tunnel, _, _ = http.NewResponseController(w).Hijack()
			panic("after the hijack")
		}))
	}()
	if n := inflightOf(z); n != 1 {
		t.Errorf("%d in flight while the connection is open", n)
	}
	_ = tunnel.Close()
	if n := inflightOf(z); n != 0 {
		t.Errorf("%d in flight at the end", n)
	}
}

// TestWriterStatus is the first final one.
func TestWriterStatus(t *testing.T) {
	for name, c := range map[string]struct {
		write  func(w http.ResponseWriter)
		status int
	}{
		"header":      {func(w http.ResponseWriter) { w.WriteHeader(204) }, 204},
		"twice":       {func(w http.ResponseWriter) { w.WriteHeader(201); w.WriteHeader(500) }, 201},
		"hints first": {func(w http.ResponseWriter) { w.WriteHeader(103); w.WriteHeader(401) }, 401},
		"switching":   {func(w http.ResponseWriter) { w.WriteHeader(101) }, 101},
		"body":        {func(w http.ResponseWriter) { _, _ = io.WriteString(w, "x"); w.WriteHeader(500) }, 200},
		"copied":      {func(w http.ResponseWriter) { _, _ = io.Copy(w, strings.NewReader("x")) }, 200},
		"flushed":     {func(w http.ResponseWriter) { _ = http.NewResponseController(w).Flush(); w.WriteHeader(500) }, 200},
	} {
		w := &writer{v: new(visit)}
		rec := httptest.NewRecorder()
		w.ResponseWriter = rec
		c.write(w)
		if w.status != c.status {
			t.Errorf("%s: status %d, want %d", name, w.status, c.status)
		}
	}
}

// TestNoWriter: who only counts arrivals puts nothing in the way.
func TestNoWriter(t *testing.T) {
	z := textZone("writer-none")
	z.Events, z.Window = 5, 1e9
	own := httptest.NewRecorder()
	_ = newHandler(t, z).ServeHTTP(own, request(t.Context(), "k"), caddyhttp.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) error {
		if w != http.ResponseWriter(own) {
			t.Errorf("the response goes through a %T", w)
		}
		return nil
	}))
}
