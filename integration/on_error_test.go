// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
)

func TestPagesByAccept(t *testing.T) {
	s := start(t, fmt.Sprintf(`http://{addr} {
		hooks {
			on_error {
				page class refused {
					status 503
					retry_after 1500ms
					header X-Page "{http.request.uri.query}"
					html body "<p>{http.hooks.error.status} {http.request.uri.query.q}</p>"
					problem_json
					text body "{http.hooks.error.class} {http.request.uri.query.q}"
				}
			}
		}
		reverse_proxy %s
	}`, freeAddr(t)))
	for _, tt := range []struct{ accept, contentType, body string }{
		{"", "text/html; charset=utf-8", "<p>503 &lt;script&gt;{env.HOME}</p>"},
		{"*/*", "text/html; charset=utf-8", "<p>503"},
		{"text/html,application/xhtml+xml,*/*;q=0.8", "text/html; charset=utf-8", "<p>503"},
		{"application/json", "application/problem+json", ""},
		{"application/problem+json", "application/problem+json", ""},
		{"text/plain, text/html;q=0.5", "text/plain; charset=utf-8", "refused <script>{env.HOME}"},
		{"text/html;q=0, */*;q=0.1", "application/problem+json", ""},
		{"image/png", "text/html; charset=utf-8", "<p>503"},
	} {
		t.Run(tt.accept, func(t *testing.T) {
			header := []string{"Accept", tt.accept}
			if tt.accept == "" {
				header = nil
			}
			// what a client sends is neither markup nor a placeholder
			res, body := s.get("/x?q=%3Cscript%3E%7Benv.HOME%7D", header...)
			if res.StatusCode != 503 || res.Header.Get("Content-Type") != tt.contentType || !strings.Contains(body, tt.body) {
				t.Errorf("got %d %q %q, want 503 %q %q", res.StatusCode, res.Header.Get("Content-Type"), body, tt.contentType, tt.body)
			}
			if res.Header.Get("Retry-After") != "2" || res.Header.Get("Vary") != "Accept" ||
				res.Header.Get("X-Content-Type-Options") != "nosniff" || res.Header.Get("X-Page") == "" {
				t.Errorf("header = %v", res.Header)
			}
			if strings.HasSuffix(tt.contentType, "problem+json") {
				var doc map[string]any
				if err := json.Unmarshal([]byte(body), &doc); err != nil || doc["status"] != 503.0 || doc["class"] != "refused" ||
					doc["type"] != "about:blank" || doc["title"] != "Service Unavailable" ||
					doc["detail"] != "The upstream server refused the connection." {
					t.Errorf("document = %s (%v)", body, err)
				}
			}
			// HEAD says the same and sends nothing
			head, none := s.do(http.MethodHead, "/x?q=%3Cscript%3E%7Benv.HOME%7D", nil, header...)
			if none != "" || head.StatusCode != 503 || head.ContentLength != int64(len(body)) {
				if !strings.Contains(tt.contentType, "problem") { // whose error IDs differ, not their length
					t.Errorf("HEAD: %d, length %d for %d, body %q", head.StatusCode, head.ContentLength, len(body), none)
				}
			}
		})
	}
}

// JSON templates stay JSON whatever the client sends.
func TestJSONTemplate(t *testing.T) {
	s := start(t, fmt.Sprintf(`http://{addr} {
		hooks {
			on_error {
				page status 502 {
					json body <<JSON
						{"path": "{http.request.uri.query.q}", "status": {http.hooks.error.status}}
						JSON
				}
			}
		}
		reverse_proxy %s
	}`, freeAddr(t)))
	res, body := s.get(`/x?q=%22%5C%0A%3C/script%3E%22,%22a%22:%22`)
	var doc map[string]any
	if err := json.Unmarshal([]byte(body), &doc); err != nil || doc["path"] != "\"\\\n</script>\",\"a\":\"" || doc["status"] != 502.0 {
		t.Errorf("document = %s (%v)", body, err)
	}
	if res.Header.Get("Content-Type") != "application/json" || res.Header.Get("Vary") != "" {
		t.Errorf("header = %v", res.Header)
	}
}

func TestDetails(t *testing.T) {
	for _, expose := range []bool{false, true} {
		option := ""
		if expose {
			option = "expose_details"
		}
		addr := freeAddr(t)
		s := start(t, fmt.Sprintf(`http://{addr} {
			hooks {
				on_error {
					%s
					page status 5xx {
						text body "{http.hooks.error.detail} {err.message}"
					}
				}
			}
			reverse_proxy %s
		}`, option, addr))
		if _, body := s.get("/x"); strings.Contains(body, addr) != expose {
			t.Errorf("expose %v: %q", expose, body)
		}
	}
}

// What no page matches goes on unchanged, and handle_errors knows the class.
func TestUnmatchedErrorsGoOn(t *testing.T) {
	s := start(t, fmt.Sprintf(`http://{addr} {
		hooks {
			on_error {
				page class dns {
					text
				}
			}
			request_summary "{http.request.method} {http.request.uri}"
		}
		reverse_proxy %s {
			transport hooks
		}
		handle_errors {
			respond "{err.status_code} {err.message} / {http.hooks.error.class} {http.hooks.error.detail} {http.hooks.conn.error}"
		}
	}`, freeAddr(t)))
	res, body := s.get("/x")
	if res.StatusCode != 502 || !strings.Contains(body, "connect: connection refused / refused The upstream server refused the connection. refused") {
		t.Errorf("got %d %q", res.StatusCode, body)
	}
	// the summary is in the log line only
	s.logs.await(t, "error line", 1, message("connection refused [GET /x]"))
}

// Without error routes the server's own line has the summary, too.
func TestSummaryInServerLog(t *testing.T) {
	s := start(t, fmt.Sprintf(`http://{addr} {
		hooks {
			request_summary "{http.request.method} {http.request.header.X-Evil}{http.request.uri}"
		}
		reverse_proxy %s
	}`, freeAddr(t)))
	s.get("/x", "X-Evil", "a\tb")
	e := s.logs.await(t, "error line", 1, message("connection refused [GET a b/x]"))
	if !strings.HasPrefix(e.text("logger"), "http.log.error") {
		t.Errorf("logger = %q", e.text("logger"))
	}
}

func TestOriginPages(t *testing.T) {
	size, sizes := 10, []int{0, 10, 300_000, 10}
	u := serve(t, "h1", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/secret")
		w.Header().Set("Etag", `"x"`)
		w.Header().Set("X-Kept", "yes")
		if strings.HasPrefix(r.URL.Path, "/bad") {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
		if r.URL.Path == "/bad-endless" {
			for r.Context().Err() == nil {
				_, _ = io.WriteString(w, strings.Repeat("s", 1000))
			}
			return
		}
		_, _ = io.WriteString(w, strings.Repeat("s", size))
	})
	for _, transport := range []string{"hooks", "http"} {
		t.Run(transport, func(t *testing.T) {
			s := start(t, fmt.Sprintf(`http://{addr} {
				log
				encode
				hooks {
					connection
					on_error {
						page origin 5xx {
							problem_json
						}
					}
				}
				respond /own 503 {
					body own
				}
				reverse_proxy %s {
					transport %s
				}
			}`, u.addr, transport))
			for _, path := range []string{"/bad", "/bad", "/bad", "/bad-endless"} {
				size = sizes[0]
				sizes = append(sizes[1:], sizes[0])
				res, body := s.get(path)
				if res.StatusCode != 503 || !strings.Contains(body, `"status":503`) || strings.Contains(body, "sss") ||
					res.Header.Get("Content-Type") != "application/problem+json" || res.Header.Get("Etag") != "" || res.Header.Get("X-Kept") != "yes" {
					t.Errorf("%d bytes: got %d %q %v", size, res.StatusCode, body, res.Header)
				}
			}
			size = 10
			if res, body := s.get("/good"); res.StatusCode != 200 || body != strings.Repeat("s", 10) {
				t.Errorf("good answer: %d %q", res.StatusCode, body)
			}
			if res, body := s.get("/own"); res.StatusCode != 503 || body != "own" {
				t.Errorf("an answer that is not the origin's was replaced: %d %q", res.StatusCode, body)
			}
			// a small answer was read to its end, so its connection is kept
			size = 50_000
			s.get("/bad-small")
			s.get("/bad-small")
			if a := s.access("/bad-small", 2).attempts(); !a[0].flag("reused") {
				t.Errorf("the connection was not kept: %v", a)
			}
		})
	}
}

func TestSuppressErrorLog(t *testing.T) {
	s := start(t, fmt.Sprintf(`http://{addr} {
		log
		hooks {
			on_error {
				page class refused {
					status 503
				}
				page status 404 {
					text
				}
			}
			suppress_error_log refused 404
		}
		error /missing 404
		error /broken "loud" 500
		handle /metrics {
			metrics
		}
		reverse_proxy %s
	}`, freeAddr(t)))
	const series = `caddy_gatehouse_hooks_suppressed_errors_total{class="refused"} `
	_, text := s.get("/metrics")
	before := sample(text, series)
	if res, body := s.get("/x"); res.StatusCode != 503 || body != "" {
		t.Errorf("got %d %q", res.StatusCode, body)
	}
	s.get("/missing")
	s.get("/broken")
	s.logs.await(t, "error line", 1, message("loud"))
	if lines := s.logs.find(message("connection refused")); len(lines) > 0 {
		t.Errorf("the error was logged: %v", lines)
	}
	if _, text := s.get("/metrics"); sample(text, series)-before != 1 {
		t.Errorf("%s%d, want one more than %d", series, sample(text, series), before)
	}
}

func TestLogFields(t *testing.T) {
	u := serve(t, "h1", hello)
	s := start(t, fmt.Sprintf(`http://{addr} {
		log
		hooks {
			log_field upstream_address "{http.hooks.conn.upstream} {http.request.uri.path}"
		}
		reverse_proxy %s
	}`, u.addr))
	s.get("/x")
	if got := s.access("/x", 1).text("upstream_address"); got != u.addr+" /x" {
		t.Errorf("upstream_address = %q", got)
	}
}

// What a page has answered is logged all the same.
func TestAnsweredErrorsAreLogged(t *testing.T) {
	s := start(t, fmt.Sprintf(`http://{addr} {
		hooks {
			on_error {
				page status 4xx 5xx {
					text
				}
			}
			request_summary {http.request.uri}
		}
		error /missing "gone" 404
		reverse_proxy %s
	}`, freeAddr(t)))
	s.get("/x")
	e := s.logs.await(t, "error line", 1, message("connect: connection refused [/x]"))
	if e.text("logger") != "http.handlers.hooks" || e.text("level") != "error" || e.text("class") != "refused" ||
		e.number("status") != 502 || e.text("err_id") == "" || e.object("request").text("uri") != "/x" {
		t.Errorf("line = %v", e)
	}
	s.get("/missing")
	if e := s.logs.await(t, "error line", 1, message("gone [/missing]")); e.text("level") != "debug" {
		t.Errorf("line = %v", e)
	}
}
