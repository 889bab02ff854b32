// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// classSite answers each class of failure with its name.
const classSite = `http://{addr} {
	log
	hooks {
		connection
		on_error {
			page status 4xx 5xx {
				text body "{http.hooks.error.class}"
			}
		}
	}
	request_body {
		max_size 1KB
	}
	reverse_proxy %s {
		%s
		transport %s {
			%s
		}
	}
}`

func TestErrorClasses(t *testing.T) {
	for _, tt := range []struct {
		class   string
		status  int
		dial    func(t *testing.T) string
		proxy   string
		options func(t *testing.T) string
		method  string
		body    func() io.Reader
		path    []string // requested one after the other; the last one counts
		only    string   // the one transport that can tell
	}{
		{class: "refused", status: 502, dial: freeAddr},
		{class: "refused", status: 502, dial: func(t *testing.T) string { return "unix/" + t.TempDir() + "/none.sock" }},
		{
			class: "dns", status: 502,
			dial:    func(*testing.T) string { return "nowhere.invalid:80" },
			options: func(t *testing.T) string { return "resolvers " + nameServer(t) },
		},
		{
			class: "connect_timeout", status: 502, dial: fullServer,
			options: func(*testing.T) string { return "dial_timeout 200ms" },
		},
		{
			class: "tls", status: 502, dial: plainServer,
			options: func(*testing.T) string { return "tls\ntls_insecure_skip_verify" },
		},
		{
			class: "tls", status: 502, dial: func(t *testing.T) string { return serve(t, "h2", hello).dial },
		},
		{
			class: "tls", status: 504, dial: silentServer,
			options: func(*testing.T) string { return "tls\ntls_timeout 200ms" },
		},
		{class: "reset", status: 502, dial: resettingServer},
		{class: "reset", status: 502, dial: func(t *testing.T) string {
			return rawServer(t, func(_ int, c *net.TCPConn) { cut(c) }) // before it reads anything
		}},
		{class: "reset", status: 502, only: "hooks", dial: func(t *testing.T) string { // in the middle of the header
			return rawServer(t, func(_ int, c *net.TCPConn) {
				_ = readRequest(bufio.NewReader(c))
				_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Le")
				cut(c)
			})
		}},
		{
			class: "response_timeout", status: 504, dial: silentServer,
			options: func(*testing.T) string { return "response_header_timeout 200ms" },
		},
		{
			class: "response_timeout", status: 504, dial: silentServer,
			options: func(*testing.T) string { return "read_timeout 200ms" },
		},
		{class: "no_upstream", status: 503, dial: freeAddr, proxy: "fail_duration 1m", path: []string{"/a", "/b"}},
		{
			class: "body_too_large", status: 413, method: http.MethodPost,
			dial: func(t *testing.T) string { return serve(t, "h1", discard).addr },
			body: func() io.Reader { return io.MultiReader(strings.NewReader(strings.Repeat("x", 4096))) }, // chunked
		},
		{class: "other", status: 502, dial: func(t *testing.T) string {
			return rawServer(t, func(_ int, c *net.TCPConn) {
				_ = readRequest(bufio.NewReader(c))
				_, _ = io.WriteString(c, "HTTP/9.9 what\r\n\r\n")
			})
		}},
		{class: "other", status: 502, dial: func(t *testing.T) string {
			return rawServer(t, func(_ int, c *net.TCPConn) {
				_ = readRequest(bufio.NewReader(c))
				_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nbad header\r\n\r\n")
			})
		}},
	} {
		for _, transport := range []string{"hooks", "http"} {
			if tt.only != "" && tt.only != transport {
				continue
			}
			t.Run(tt.class+"/"+transport, func(t *testing.T) {
				options := ""
				if tt.options != nil {
					options = tt.options(t)
				}
				s := start(t, fmt.Sprintf(classSite, tt.dial(t), tt.proxy, transport, options))
				paths, method := tt.path, tt.method
				if paths == nil {
					paths = []string{"/a"}
				}
				if method == "" {
					method = http.MethodGet
				}
				for i, path := range paths {
					var body io.Reader
					if tt.body != nil {
						body = tt.body()
					}
					res, text := s.do(method, path, body)
					if i < len(paths)-1 {
						continue
					}
					if res.StatusCode != tt.status || text != tt.class {
						t.Errorf("got %d %q, want %d %q", res.StatusCode, text, tt.status, tt.class)
					}
					if e := s.access(path, 1); e.errorClass() != tt.class {
						t.Errorf("class in the access log = %q; log: %v", e.errorClass(), s.logs.find(message("")))
					}
				}
			})
		}
	}
}

// A client that goes away: no page, no error line, but a class in log and metrics.
func TestCanceled(t *testing.T) {
	arrived := make(chan struct{}, 1)
	u := serve(t, "h1", func(_ http.ResponseWriter, r *http.Request) {
		arrived <- struct{}{}
		<-r.Context().Done()
	})
	for _, transport := range []string{"hooks", "http"} {
		t.Run(transport, func(t *testing.T) {
			s := start(t, fmt.Sprintf(classSite, u.addr, "", transport, ""))
			ctx, cancel := context.WithCancel(t.Context())
			req, _ := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+s.addr+"/x", nil)
			go func() {
				<-arrived
				cancel()
			}()
			if _, err := http.DefaultClient.Do(req); err == nil {
				t.Fatal("the request was answered")
			}
			e := s.access("/x", 1)
			if e.errorClass() != "canceled" || e.number("status") != 499 {
				t.Errorf("class %q, status %v", e.errorClass(), e["status"])
			}
			if a := e.attempts(); len(a) != 1 || a[0].text("error") != "canceled" {
				t.Errorf("attempts = %v", a)
			}
		})
	}
}

// A response that breaks off is never completed: the client sees the cut, and
// the class is recorded.
func TestBrokenBodies(t *testing.T) {
	for name, response := range map[string]string{
		"length":  "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nonly this",
		"chunked": "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nonly this\r\n",
	} {
		for _, transport := range []string{"hooks", "http"} {
			t.Run(name+"/"+transport, func(t *testing.T) {
				addr := rawServer(t, func(_ int, c *net.TCPConn) {
					_ = readRequest(bufio.NewReader(c))
					_, _ = io.WriteString(c, response)
					_ = c.CloseWrite()
					_, _ = io.Copy(io.Discard, c)
				})
				s := start(t, fmt.Sprintf(classSite, addr, "", transport, ""))
				_, body, err := s.try(http.MethodGet, "/x", nil)
				if err == nil {
					t.Errorf("the body %q looks complete", body)
				}
				if strings.Contains(body, "reset") {
					t.Errorf("something was appended to the body: %q", body)
				}
				e := s.access("/x", 1)
				if e.errorClass() != "reset" || e.attempts()[0].text("error") != "reset" {
					t.Errorf("hooks = %v", e["hooks"])
				}
			})
		}
	}
}

// An error after the header is out aborts the response instead of adding to it.
func TestNothingIsAppended(t *testing.T) {
	s := start(t, `http://{addr} {
		log
		hooks {
			on_error {
				page status 4xx 5xx {
					text body "appended"
				}
			}
		}
		route {
			late_error
		}
		handle_errors {
			respond "appended by handle_errors"
		}
	}`, "order late_error before respond")
	_, body, err := s.try(http.MethodGet, "/x", nil)
	if err == nil || strings.Contains(body, "appended") {
		t.Errorf("body %q, error %v", body, err)
	}
	s.logs.await(t, "error line", 1, message("aborting the response: failed after the header was sent: too late"))
}

func discard(_ http.ResponseWriter, r *http.Request) { _, _ = io.Copy(io.Discard, r.Body) }

// nameServer is a real DNS server that knows no name.
func nameServer(t *testing.T) string {
	t.Helper()
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	started := make(chan struct{})
	srv := &dns.Server{
		PacketConn:        pc,
		NotifyStartedFunc: func() { close(started) },
		Handler: dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
			_ = w.WriteMsg(new(dns.Msg).SetRcode(q, dns.RcodeNameError))
		}),
	}
	go func() { _ = srv.ActivateAndServe() }()
	<-started
	t.Cleanup(func() { _ = srv.Shutdown() })
	return pc.LocalAddr().String()
}

// silentServer accepts connections and never says a word.
func silentServer(t *testing.T) string {
	t.Helper()
	return rawServer(t, func(_ int, c *net.TCPConn) { _, _ = io.Copy(io.Discard, c) })
}

// plainServer speaks no TLS.
func plainServer(t *testing.T) string {
	t.Helper()
	return rawServer(t, func(_ int, c *net.TCPConn) {
		_, _ = io.WriteString(c, "HTTP/1.0 400 Bad Request\r\n\r\nthis is plain HTTP")
	})
}

// fullServer is an address whose queue of connections is full, so that
// connecting neither succeeds nor fails.
func fullServer(t *testing.T) string {
	t.Helper()
	addr := listenWithoutQueue(t)
	for range 8 {
		c, err := net.DialTimeout("tcp", addr, 100*time.Millisecond)
		if err != nil {
			return addr
		}
		t.Cleanup(func() { _ = c.Close() })
	}
	t.Fatal("the queue of connections does not fill")
	return ""
}
