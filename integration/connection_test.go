// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
)

func TestConnectionFacts(t *testing.T) {
	for _, tt := range []struct {
		protocol, transport string
		tls, alpn           string
	}{
		{"h1", "hooks", "", ""},
		{"h2", "hooks", "TLS 1.3", "h2"},
		{"h2c", "hooks", "", ""},
		{"h1", "http", "", ""},
		{"h2", "http", "TLS 1.3", "h2"},
		{"h2c", "http", "", ""},
	} {
		t.Run(tt.protocol+"/"+tt.transport, func(t *testing.T) {
			u := serve(t, tt.protocol, hello)
			s := start(t, fmt.Sprintf(`http://{addr} {
				log
				header >X-Reused "{http.hooks.conn.reused} {http.hooks.conn.attempts}"
				hooks {
					connection
				}
				reverse_proxy %s {
					transport %s {
						%s
					}
				}
			}`, u.dial, tt.transport, strings.Join(u.opts, "\n")))
			for n := 1; n <= 3; n++ {
				res, body := s.get("/x")
				if res.StatusCode != 200 || body != "hello" {
					t.Fatalf("got %d %q", res.StatusCode, body)
				}
				wantHeader := fmt.Sprintf("%v 1", n > 1)
				if got := res.Header.Get("X-Reused"); got != wantHeader {
					t.Errorf("request %d: placeholders = %q, want %q", n, got, wantHeader)
				}
				attempts := s.access("/x", n).attempts()
				if len(attempts) != 1 {
					t.Fatalf("request %d: attempts = %v, want one", n, attempts)
				}
				checkAttempt(t, n, attempts[0], tt.transport == "hooks", tt.tls, tt.alpn, u.addr)
			}
		})
	}
}

func checkAttempt(t *testing.T, n int, a entry, own bool, tlsVersion, alpn, addr string) {
	t.Helper()
	if a.flag("reused") != (n > 1) {
		t.Errorf("request %d: reused = %v", n, a["reused"])
	}
	if own && a.number("conn_requests") != float64(n) {
		t.Errorf("request %d: conn_requests = %v", n, a["conn_requests"])
	}
	if connected := a.number("connect_ms") > 0; connected != (n == 1) {
		t.Errorf("request %d: connect_ms = %v", n, a["connect_ms"])
	}
	if shook := a.number("tls_ms") > 0; shook != (n == 1 && tlsVersion != "") {
		t.Errorf("request %d: tls_ms = %v", n, a["tls_ms"])
	}
	if idle := a.number("idle_ms") > 0; idle != (n > 1) {
		t.Errorf("request %d: idle_ms = %v", n, a["idle_ms"])
	}
	if a.number("ttfb_ms") <= 0 {
		t.Errorf("request %d: ttfb_ms = %v", n, a["ttfb_ms"])
	}
	if a.text("tls") != tlsVersion || a.text("alpn") != alpn {
		t.Errorf("request %d: tls %q alpn %q, want %q %q", n, a.text("tls"), a.text("alpn"), tlsVersion, alpn)
	}
	if a.text("upstream") != addr || a.text("remote") != addr || a.text("local") == "" || a.text("error") != "" {
		t.Errorf("request %d: ends and error = %v", n, a)
	}
}

// A server name with placeholders makes Caddy do the TLS handshake itself.
func TestConnectionFactsWithOwnHandshake(t *testing.T) {
	u := serve(t, "h2", hello)
	s := start(t, fmt.Sprintf(`http://{addr} {
		log
		hooks {
			connection
		}
		reverse_proxy %s {
			transport hooks {
				tls_insecure_skip_verify
				tls_server_name {http.request.host}
			}
		}
	}`, u.dial))
	for n := 1; n <= 2; n++ {
		s.get("/x")
		a := s.access("/x", n).attempts()[0]
		if a.number("conn_requests") != float64(n) || a.flag("reused") != (n > 1) || a.text("tls") != "TLS 1.3" ||
			(a.number("tls_ms") > 0) != (n == 1) {
			t.Errorf("request %d: %v", n, a)
		}
	}
}

func TestRetriesAreListed(t *testing.T) {
	u := serve(t, "h1", hello)
	for _, transport := range []string{"hooks", "http"} {
		t.Run(transport, func(t *testing.T) {
			dead := freeAddr(t)
			s := start(t, fmt.Sprintf(`http://{addr} {
				log
				hooks {
					connection
				}
				reverse_proxy %s %s {
					lb_policy first
					lb_retries 1
					fail_duration 1m
					transport %s
				}
			}`, dead, u.addr, transport))
			if res, _ := s.get("/x"); res.StatusCode != 200 {
				t.Fatalf("status = %d", res.StatusCode)
			}
			attempts := s.access("/x", 1).attempts()
			if len(attempts) != 2 || attempts[0].text("error") != "refused" || attempts[0].text("upstream") != dead ||
				attempts[1].text("error") != "" || attempts[1].text("upstream") != u.addr {
				t.Errorf("attempts = %v", attempts)
			}
		})
	}
}

// staleServer answers the first request of each connection and cuts the
// connection at the second one, as an upstream does whose idle timeout is over.
func staleServer(t *testing.T) string {
	t.Helper()
	return rawServer(t, func(_ int, c *net.TCPConn) {
		br := bufio.NewReader(c)
		if readRequest(br) != nil {
			return
		}
		_, _ = io.WriteString(c, okResponse)
		_, _ = br.Peek(1)
		cut(c)
	})
}

func TestStaleConnection(t *testing.T) {
	addr := staleServer(t)
	s := start(t, fmt.Sprintf(`http://{addr} {
		log
		hooks {
			connection
		}
		reverse_proxy %s {
			transport hooks
		}
		handle /metrics {
			metrics
		}
	}`, addr))
	s.get("/x")
	// net/http repeats a GET on its own; the dead connection is visible nevertheless
	if res, _ := s.get("/x"); res.StatusCode != 200 {
		t.Fatalf("status = %d", res.StatusCode)
	}
	attempts := s.access("/x", 2).attempts()
	if len(attempts) != 2 || attempts[0].text("error") != "reset_on_reused" || !attempts[0].flag("reused") ||
		attempts[1].text("error") != "" || attempts[1].flag("reused") {
		t.Errorf("attempts = %v", attempts)
	}
	// a POST is not repeated
	if res, _ := s.do(http.MethodPost, "/y", strings.NewReader("body")); res.StatusCode != 502 {
		t.Errorf("status = %d, want 502", res.StatusCode)
	}
	e := s.access("/y", 1)
	if e.errorClass() != "reset_on_reused" || len(e.attempts()) != 1 || e.attempts()[0].text("error") != "reset_on_reused" {
		t.Errorf("hooks = %v", e["hooks"])
	}
	_, metrics := s.get("/metrics")
	want := fmt.Sprintf(`caddy_gatehouse_hooks_errors_total{class="reset_on_reused",upstream=%q} 2`, addr)
	if !strings.Contains(metrics, want) {
		t.Errorf("metrics lack %s", want)
	}
}

func TestMetricsLabels(t *testing.T) {
	u := serve(t, "h1", hello)
	_, port, _ := net.SplitHostPort(u.addr)
	s := start(t, fmt.Sprintf(`http://{addr} {
		hooks {
			connection
		}
		handle /literal {
			reverse_proxy %[1]s {
				transport hooks
			}
		}
		handle /placeholder {
			reverse_proxy {http.request.header.Host-Part}:%[2]s {
				transport hooks
			}
		}
		handle /source {
			reverse_proxy {
				dynamic a 127.0.0.1 %[2]s
				transport hooks
			}
		}
		handle /metrics {
			metrics
		}
	}`, u.addr, port))
	const dynamic = `caddy_gatehouse_hooks_requests_total{code_class="2xx",upstream="dynamic"} `
	_, text := s.get("/metrics")
	before := sample(text, dynamic)
	s.get("/literal")
	s.get("/placeholder", "Host-Part", "127.0.0.1")
	s.get("/source")
	_, text = s.get("/metrics")
	if got := sample(text, dynamic) - before; got != 2 {
		t.Errorf("%d requests to dynamic upstreams, want 2", got)
	}
	for _, want := range []string{
		fmt.Sprintf(`caddy_gatehouse_hooks_requests_total{code_class="2xx",upstream=%q} 1`, u.addr),
		fmt.Sprintf(`caddy_gatehouse_hooks_connections_total{reused="false",upstream=%q} 1`, u.addr),
		fmt.Sprintf(`caddy_gatehouse_hooks_first_byte_duration_seconds_count{upstream=%q} 1`, u.addr),
		fmt.Sprintf(`caddy_gatehouse_hooks_request_duration_seconds_count{code_class="2xx",upstream=%q} 1`, u.addr),
	} {
		if !strings.Contains(text, want) {
			t.Errorf("metrics lack %s", want)
		}
	}
	// the series of an upstream go with the last configuration that names it
	s.load(`http://{addr} {
		hooks {
			connection
		}
		metrics
	}`)
	if _, text := s.get("/metrics"); strings.Contains(text, u.addr) {
		t.Errorf("metrics still name %s", u.addr)
	}
}

// sample returns the value of a series in the text of /metrics, 0 if it is not there.
func sample(text, series string) (n int) {
	if _, rest, ok := strings.Cut(text, series); ok {
		_, _ = fmt.Sscan(rest, &n)
	}
	return n
}
