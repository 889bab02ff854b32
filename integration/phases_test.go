// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-gatehouse/gatehouse/modules/hooks"
)

func TestOrderOfPhases(t *testing.T) {
	var sent http.Header
	u := serve(t, "h1", func(w http.ResponseWriter, r *http.Request) {
		sent = r.Header.Clone()
		hello(w, r)
	})
	s := start(t, fmt.Sprintf(`http://{addr} {
		log
		hooks {
			all_phases a
			all_phases b
		}
		handle /dead {
			reverse_proxy %s {
				transport hooks
			}
		}
		reverse_proxy %s {
			transport hooks
		}
	}`, freeAddr(t), u.addr))

	res, _ := s.get("/x")
	want := "early_request:a early_request:b request:a request:b upstream_request:a upstream_request:b " +
		"connected:a connected:b upstream_response:b upstream_response:a response:b response:a"
	if got := res.Header.Get("X-Trace"); got != want {
		t.Errorf("trace = %s\nwant    %s", got, want)
	}
	if got := strings.Join(sent["X-Attempt"], " "); got != "a b" {
		t.Errorf("X-Attempt = %q", got)
	}
	s.access("/x", 1)
	trace, outcome := lastVisit()
	if !strings.HasSuffix(trace, "log:a log:b") || outcome.Status != 200 || outcome.Bytes != 5 || outcome.Aborted {
		t.Errorf("trace %s, outcome %+v", trace, outcome)
	}

	if res, _ := s.get("/dead"); res.StatusCode != 502 {
		t.Errorf("status = %d", res.StatusCode)
	}
	s.access("/dead", 1)
	trace, outcome = lastVisit()
	want = "early_request:a early_request:b request:a request:b upstream_request:a upstream_request:b " +
		"connect_failed:a connect_failed:b fail:a fail:b error_log:a error_log:b log:a log:b"
	if trace != want || outcome.Err == nil {
		t.Errorf("trace = %s\nwant    %s\noutcome %+v", trace, want, outcome)
	}
	e := s.logs.await(t, "error line", 1, message("connection refused"))
	if !strings.HasSuffix(e.text("msg"), "[summary:a summary:b]") {
		t.Errorf("message = %q", e.text("msg"))
	}
}

// One handler inside another: each runs its own phases, the transport both.
func TestNestedHandlers(t *testing.T) {
	u := serve(t, "h1", hello)
	s := start(t, fmt.Sprintf(`http://{addr} {
		log
		hooks {
			connection
			all_phases outer
		}
		route /x {
			hooks {
				all_phases inner
			}
			reverse_proxy %s {
				transport hooks
			}
		}
	}`, u.addr))
	res, _ := s.get("/x")
	want := "early_request:outer request:outer early_request:inner request:inner " +
		"upstream_request:outer upstream_request:inner connected:outer connected:inner " +
		"upstream_response:inner upstream_response:outer response:inner response:outer"
	if got := res.Header.Get("X-Trace"); got != want {
		t.Errorf("trace = %s\nwant    %s", got, want)
	}
	if n := len(s.access("/x", 1).attempts()); n != 1 {
		t.Errorf("%d attempts, want 1", n)
	}
}

// A refusal reaches the client with its status, runs handle_errors, and counts
// neither as the upstream's failure nor as worth a retry.
func TestRefusalsNeverCountAgainstAnUpstream(t *testing.T) {
	for _, tt := range []struct {
		hook     string
		protocol string
		reaches  bool // the upstream
	}{
		{"on_request", "h1", false},
		{"on_upstream_request", "h1", false},
		{"on_connected", "h1", false},
		{"on_connected", "h2", false},
		{"on_connected", "h2c", false},
		{"on_upstream_response", "h1", true},
		{"on_response", "h1", true},
	} {
		t.Run(tt.hook+"/"+tt.protocol, func(t *testing.T) {
			u := serve(t, tt.protocol, hello)
			s := start(t, fmt.Sprintf(`http://{addr} {
				log
				hooks {
					connection
					%s guard
				}
				reverse_proxy %s {
					fail_duration 1m
					max_fails 1
					lb_retries 3
					transport hooks {
						%s
					}
				}
				handle_errors {
					header Refused-By "{http.hooks.error.class}"
					respond "handled {err.status_code} {err.message}"
				}
			}`, tt.hook, u.dial, strings.Join(u.opts, "\n")))
			s.get("/warm")

			refuse(t, "guard", caddyhttp.HandlerError{StatusCode: 451, Err: errors.New("not today")})
			before := u.hits.Load()
			for range 100 {
				res, body := s.get("/x")
				if res.StatusCode != 451 || body != "handled 451 not today" || res.Header.Get("Refused-By") != "refused_by_hook" {
					t.Fatalf("got %d %q %v", res.StatusCode, body, res.Header)
				}
				if res.Header.Get("Via") != "" {
					t.Fatalf("header fields of the refused response came along: %v", res.Header)
				}
			}
			wantHits := int64(0)
			if tt.reaches {
				wantHits = 100
			}
			if got := u.hits.Load() - before; got != wantHits {
				t.Errorf("the upstream saw %d requests, want %d", got, wantHits)
			}
			if e := s.access("/x", 100); e.errorClass() != "refused_by_hook" {
				t.Errorf("class = %q", e.errorClass())
			}
			setError("guard", nil)
			if res, _ := s.get("/x"); res.StatusCode != 200 {
				t.Errorf("after the refusals: status %d: they counted against the upstream", res.StatusCode)
			}
		})
	}
}

// An error that is not a HandlerError still ends in a proper status.
func TestPlainErrorsOfHooks(t *testing.T) {
	u := serve(t, "h1", hello)
	for hook, want := range map[string]int{"on_request": 500, "on_upstream_request": 502, "on_connected": 502, "on_response": 500} {
		t.Run(hook, func(t *testing.T) {
			s := start(t, fmt.Sprintf(`http://{addr} {
				hooks {
					%s guard
				}
				reverse_proxy %s {
					transport hooks
				}
			}`, hook, u.addr))
			refuse(t, "guard", errors.New("plain"))
			if res, _ := s.get("/x"); res.StatusCode != want {
				t.Errorf("status = %d, want %d", res.StatusCode, want)
			}
		})
	}
}

// Hooks decide whether a failed attempt is repeated.
func TestRetryDecisions(t *testing.T) {
	u := serve(t, "h1", hello)
	decide := func(r hooks.Retry) {
		script.Lock()
		defer script.Unlock()
		script.fail = func(f *hooks.Failure) { f.Retry = r }
	}
	t.Cleanup(func() { script.Lock(); defer script.Unlock(); script.fail = nil })
	for _, tt := range []struct {
		name, method string
		retry        hooks.Retry
		reset        bool // the first upstream accepts and resets
		want         int
	}{
		{"default repeats a refused POST", http.MethodPost, hooks.RetryDefault, false, 200},
		{"default does not repeat a reset POST", http.MethodPost, hooks.RetryDefault, true, 502},
		{"safe repeats a reset POST", http.MethodPost, hooks.RetrySafe, true, 200},
		{"never ends a refused GET", http.MethodGet, hooks.RetryNever, false, 502},
		{"never ends a reset GET", http.MethodGet, hooks.RetryNever, true, 502},
	} {
		t.Run(tt.name, func(t *testing.T) {
			first := freeAddr(t)
			if tt.reset {
				first = resettingServer(t)
			}
			s := start(t, fmt.Sprintf(`http://{addr} {
				hooks {
					on_failed x
				}
				reverse_proxy %s %s {
					lb_policy round_robin
					lb_retries 1
					transport hooks
				}
			}`, u.addr, first))
			decide(tt.retry)
			// round_robin begins with its second upstream
			if res, body := s.do(tt.method, "/x", nil); res.StatusCode != tt.want {
				t.Errorf("got %d %q, want %d", res.StatusCode, body, tt.want)
			}
		})
	}
}

func TestUnrunnablePhaseIsRefused(t *testing.T) {
	s := &site{t: t, addr: freeAddr(t), logs: newLogbook()}
	err := s.tryLoad(`http://{addr} {
		hooks {
			on_body x
		}
	}`)
	if err == nil || !strings.Contains(err.Error(), `adding hook "http.hooks.on_body": this version does not run the phase RequestBody`) {
		t.Errorf("err = %v", err)
	}
}
