// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"
)

// limited is a site with an admin endpoint, where metrics are.
type limited struct {
	*site
	admin string
}

// trusting believes what a proxy on the loopback says of clients.
const trusting = `servers {
	protocols h1 h2c
	trusted_proxies static 127.0.0.1/32
	max_header_size 3MiB
}`

func startLimited(t *testing.T, config string) *limited {
	t.Helper()
	l := &limited{admin: freeAddr(t)}
	l.site = start(t, config, l.options()...)
	return l
}

func (l *limited) options() []string {
	return []string{"admin " + l.admin, trusting, "grace_period 10s"}
}

func (l *limited) reload(config string) {
	l.t.Helper()
	l.load(config, l.options()...)
}

// status sends a request as a client behind a proxy.
func (l *limited) status(client, path string) int {
	l.t.Helper()
	res, _ := l.get(path, "X-Forwarded-For", client)
	return res.StatusCode
}

// expect sends a request for each of the statuses.
func (l *limited) expect(client, path string, statuses ...int) {
	l.t.Helper()
	for i, want := range statuses {
		if got := l.status(client, path); got != want {
			l.t.Errorf("%.40s, request %d of %s: status %d, want %d", path, i+1, client, got, want)
		}
	}
}

// metrics is what the admin endpoint shows of this module.
func (l *limited) metrics() string {
	l.t.Helper()
	res, err := http.Get("http://" + l.admin + "/metrics")
	if err != nil {
		l.t.Fatal(err)
	}
	defer res.Body.Close()
	text, _ := io.ReadAll(res.Body)
	var own strings.Builder
	for line := range strings.Lines(string(text)) {
		if strings.HasPrefix(line, "caddy_gatehouse_ratelimit_") {
			own.WriteString(line)
		}
	}
	return own.String()
}

// until waits until the metrics have a line.
func (l *limited) until(line string) {
	l.t.Helper()
	for deadline := time.Now().Add(patience); !strings.Contains(l.metrics(), "caddy_gatehouse_ratelimit_"+line+"\n"); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			l.t.Fatalf("no %s in\n%s", line, l.metrics())
		}
	}
}

func (l *limited) ask(method, path, body string) (int, string) {
	l.t.Helper()
	req, _ := http.NewRequestWithContext(l.t.Context(), method, "http://"+l.admin+"/gatehouse/ratelimit/"+path, strings.NewReader(body))
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		l.t.Fatal(err)
	}
	defer res.Body.Close()
	text, _ := io.ReadAll(res.Body)
	return res.StatusCode, string(text)
}

func repeat(n, status int) (list []int) {
	for range n {
		list = append(list, status)
	}
	return list
}

func TestRatelimitPerClient(t *testing.T) {
	u := serve(t, "h1", hello)
	for _, algorithm := range []string{"sliding_window", "token_bucket"} {
		t.Run(algorithm, func(t *testing.T) {
			l := startLimited(t, fmt.Sprintf(`http://{addr} {
				log
				ratelimit {
					zone ten-%s {
						key client
						algorithm %[1]s
						rate 10 1h
					}
				}
				reverse_proxy %[2]s
				handle_errors {
					respond "{http.ratelimit.zone} {http.ratelimit.decision} {http.ratelimit.reason} {http.ratelimit.key} {http.ratelimit.limit} {http.ratelimit.remaining}" {err.status_code}
				}
			}`, algorithm, u.addr))
			before := u.hits.Load()
			l.expect("192.0.2.1", "/x", repeat(10, 200)...)
			res, body := l.get("/x", "X-Forwarded-For", "::ffff:192.0.2.1")
			if want := "ten-" + algorithm + " refused rate 192.0.2.1 10 0"; res.StatusCode != 429 || body != want {
				t.Errorf("the eleventh: %d %q, want %q", res.StatusCode, body, want)
			}
			least := map[string]int{"sliding_window": 3590, "token_bucket": 350}[algorithm]
			var seconds int
			if fmt.Sscan(res.Header.Get("Retry-After"), &seconds); seconds < least || seconds > 3604 {
				t.Errorf("Retry-After %q", res.Header.Get("Retry-After"))
			}
			if n := u.hits.Load() - before; n != 10 {
				t.Errorf("%d requests reached the upstream", n)
			}
			l.expect("192.0.2.2", "/other", 200)
			e := l.access("/x", 11).object("ratelimit")
			if e.text("zone") != "ten-"+algorithm || e.text("decision") != "refused" || e.text("reason") != "rate" ||
				e.text("key") != "192.0.2.1" || e.number("limit") != 10 || e.number("retry_after") != float64(seconds) {
				t.Errorf("access log: %v", e)
			}
			l.logs.await(t, "line of the refusal", 1, func(e entry) bool { return e.text("msg") == "request refused" && e.text("key") == "192.0.2.1" })
		})
	}
}

func TestRatelimitPrefixes(t *testing.T) {
	l := startLimited(t, `http://{addr} {
		ratelimit {
			zone prefixes {
				key client
				key client {
					ipv6_prefix 48
					ipv4_prefix 24
					times 2
				}
				rate 2 1h
			}
		}
		respond ok
	}`)
	l.expect("2001:db8:1:1::1", "/", 200)
	l.expect("2001:db8:1:1::2", "/", 200, 429) // the same /64
	l.expect("2001:db8:1:2::1", "/", 200, 200, 429)
	l.expect("2001:db8:1:3::1", "/", 429) // the /48 has had four
	l.expect("2001:db8:2:3::1", "/", 200)
	l.expect("192.0.2.1", "/", 200, 200, 429)
	l.expect("192.0.2.2", "/", 200, 200, 429)
	l.expect("192.0.2.3", "/", 429)
	l.expect("192.0.3.3", "/", 200)
}

func TestRatelimitZones(t *testing.T) {
	l := startLimited(t, `http://{addr} {
		ratelimit {
			zone posts {
				match method POST
				key client
				rate 1 1h
			}
			zone watched {
				key client
				rate 1 1h
				mode shadow
			}
			zone unused {
				key client
				rate 1 1h
				mode off
			}
			zone burst {
				key client
				rate 2 1h
				burst 1
			}
		}
		route /second {
			ratelimit {
				zone second {
					key client
					rate 1 1h
				}
			}
		}
		respond ok
	}`)
	l.expect("192.0.2.1", "/", 200, 200, 200, 429)
	l.expect("192.0.2.2", "/second", 200, 429, 429, 429)
	if res, _ := l.do(http.MethodPost, "/", nil, "X-Forwarded-For", "192.0.2.3"); res.StatusCode != 200 {
		t.Errorf("first POST: %d", res.StatusCode)
	}
	if res, _ := l.do(http.MethodPost, "/", nil, "X-Forwarded-For", "192.0.2.3"); res.StatusCode != 429 {
		t.Errorf("second POST: %d", res.StatusCode)
	}
	l.expect("192.0.2.3", "/", 200)
	m := l.metrics()
	if !strings.Contains(m, `decisions_total{decision="shadow",zone="watched"} 7`) || strings.Contains(m, `"unused"`) {
		t.Errorf("metrics:\n%s", m)
	}
}

func TestRatelimitEmptyKeys(t *testing.T) {
	l := startLimited(t, `http://{addr} {
		ratelimit /skip {
			zone empty-skip {
				key {http.request.header.X-Api-Key}
				rate 1 1h
			}
		}
		ratelimit /refuse {
			zone empty-refuse {
				key {http.vars.nothing_like_this}{http.no.such.placeholder}
				rate 1 1h
				on_empty_key refuse
			}
		}
		ratelimit /shared {
			zone empty-shared {
				key {http.request.header.X-Api-Key}
				rate 1 1h
				on_empty_key shared
			}
		}
		respond ok
	}`)
	l.expect("192.0.2.1", "/skip", 200, 200)
	l.expect("192.0.2.1", "/refuse", 429)
	l.expect("192.0.2.1", "/shared", 200, 429)
	for _, zone := range []string{"empty-skip", "empty-refuse", "empty-shared"} {
		l.logs.await(t, "line of "+zone, 1, func(e entry) bool { return e.text("msg") == "a request has no key" && e.text("zone") == zone })
	}
}

// TestRatelimitHugeKey: a key of a megabyte and one with any bytes.
func TestRatelimitHugeKey(t *testing.T) {
	l := startLimited(t, `http://{addr} {
		ratelimit {
			zone huge {
				key {http.request.uri.query}
				rate 1 1h
			}
			zone huge-header {
				key {http.request.header.X-Key}
				rate 1 1h
			}
		}
		respond ok
	}`)
	huge := strings.Repeat("k", 900<<10)
	l.expect("192.0.2.1", "/?"+huge, 200, 429)
	l.expect("192.0.2.1", "/?"+huge+"1", 200)
	for _, key := range []string{"\xff\xfe", "\xff\xfd", `{http.request.uri}`} {
		for _, want := range []int{200, 429} {
			if res, _ := l.get("/", "X-Key", key); res.StatusCode != want {
				t.Errorf("key %.40q: %d, want %d", key, res.StatusCode, want)
			}
		}
	}
}

func TestRatelimitScope(t *testing.T) {
	other := freeAddr(t)
	l := startLimited(t, strings.ReplaceAll(`http://{addr} {
		ratelimit /a {
			zone scope-zone {
				key client
				rate 2 1h
			}
		}
		ratelimit /b {
			zone scope-zone {
				key client
				rate 2 1h
			}
		}
		ratelimit /c {
			zone scope-route {
				key client
				rate 1 1h
				scope route
			}
		}
		ratelimit /d {
			zone scope-route {
				key client
				rate 1 1h
				scope route
			}
		}
		respond ok
	}
	http://{other} {
		ratelimit /a {
			zone scope-zone {
				key client
				rate 2 1h
			}
		}
		respond ok
	}`, "{other}", other))
	l.expect("127.0.0.1", "/a", 200)
	l.expect("127.0.0.1", "/b", 200, 429)
	res, err := http.Get("http://" + other + "/a")
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	if res.StatusCode != 429 {
		t.Errorf("the other server: %d", res.StatusCode)
	}
	l.expect("127.0.0.1", "/c", 200, 429)
	l.expect("127.0.0.1", "/d", 200, 429)
}

// TestRatelimitLogin: only failures count, those of authenticators as well.
func TestRatelimitLogin(t *testing.T) {
	u := serve(t, "h1", func(w http.ResponseWriter, r *http.Request) {
		if r.URL.RawQuery != "right" {
			w.WriteHeader(http.StatusUnauthorized)
		}
	})
	l := startLimited(t, `http://{addr} {
		ratelimit {
			zone login {
				key client
				rate 2 1h
				count_when status 401
			}
			zone broken {
				key client
				rate 1 1h
				count_when error refused
			}
		}
		hooks /hooks {
			connection
		}
		reverse_proxy /login `+u.addr+`
		reverse_proxy /broken 127.0.0.1:1
		reverse_proxy /hooks 127.0.0.1:1 {
			transport hooks
		}
	}`)
	l.expect("192.0.2.1", "/login?right", 200, 200, 200, 200)
	l.expect("192.0.2.1", "/login", 401, 401, 429)
	l.expect("192.0.2.1", "/login?right", 429)
	l.expect("192.0.2.2", "/broken", 502, 429)
	l.expect("192.0.2.3", "/hooks", 502, 429)
}

func TestRatelimitHeaders(t *testing.T) {
	u := serve(t, "h1", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("RateLimit-Policy", `"upstream";q=1`)
		w.Header().Set("RateLimit", `"upstream";r=1`)
	})
	zone := func(name string, events int) string {
		return fmt.Sprintf("zone %s {\nkey client\nrate %d 1h\n}\n", name, events)
	}
	l := startLimited(t, `http://{addr} {
		ratelimit /draft {
			headers draft
			`+zone("h-one", 3)+zone("h-two", 2)+`
		}
		route /draft {
			ratelimit {
				headers draft
				`+zone("h-inner", 9)+`
			}
		}
		ratelimit /legacy {
			headers legacy
			`+zone("h-three", 3)+zone("h-four", 2)+`
		}
		ratelimit /off {
			`+zone("h-five", 2)+`
		}
		reverse_proxy `+u.addr+`
	}`)
	res, _ := l.get("/draft")
	policies, members := strings.Join(res.Header.Values("RateLimit-Policy"), ", "), strings.Join(res.Header.Values("RateLimit"), ", ")
	if want := `"h-one";q=3;w=3600, "h-two";q=2;w=3600, "h-inner";q=9;w=3600, "upstream";q=1`; policies != want {
		t.Errorf("policies %s, want %s", policies, want)
	}
	for i, part := range []string{`"h-one";r=2;t=`, `"h-two";r=1;t=`, `"h-inner";r=8;t=`, `"upstream";r=1`} {
		if got := res.Header.Values("RateLimit"); len(got) != 4 || !strings.HasPrefix(got[i], part) {
			t.Errorf("members %s, want %s", members, part)
		}
	}
	l.get("/draft")
	if res, _ := l.get("/draft"); res.StatusCode != 429 || len(res.Header.Values("RateLimit")) != 2 ||
		!strings.HasPrefix(res.Header.Values("RateLimit")[1], `"h-two";r=0;t=`+res.Header.Get("Retry-After")) {
		t.Errorf("refused: %d %v", res.StatusCode, res.Header)
	}
	res, _ = l.get("/legacy")
	if h := res.Header; h.Get("X-RateLimit-Limit") != "2" || h.Get("X-RateLimit-Remaining") != "1" || h.Get("X-RateLimit-Reset") == "" {
		t.Errorf("legacy: %v", h)
	}
	res, _ = l.get("/off")
	if h := res.Header; h.Get("X-RateLimit-Limit") != "" || len(h.Values("RateLimit")) != 1 {
		t.Errorf("off: %v", h)
	}
}

func TestRatelimitAdmin(t *testing.T) {
	l := startLimited(t, `http://{addr} {
		ratelimit {
			zone admin-client {
				key client
				key client {
					ipv4_prefix 24
					times 100
				}
				rate 2 1h
			}
			zone admin-key {
				match header X-Key *
				key {http.request.header.X-Key}
				rate 2 1h
			}
		}
		respond ok
	}`)
	l.expect("192.0.2.1", "/", 200, 200, 429)
	for _, want := range []int{200, 200, 429} {
		if res, _ := l.get("/", "X-Key", "secret\xff"); res.StatusCode != want {
			t.Errorf("status %d, want %d", res.StatusCode, want)
		}
	}
	_, top := l.ask("GET", "admin-client/top", "")
	if !strings.Contains(top, `"level":0,"key":"192.0.2.1","count":3`) || !strings.Contains(top, `"level":1,"key":"192.0.2.0/24"`) {
		t.Errorf("top: %s", top)
	}
	if _, top := l.ask("GET", "admin-key/top", ""); strings.Contains(top, "secret") || !strings.Contains(top, `"key":"hmac:`) {
		t.Errorf("top: %s", top)
	}
	_, text := l.ask("POST", "admin-client/inspect", `{"key":"192.0.2.1"}`)
	var views []map[string]any
	if err := json.Unmarshal([]byte(text), &views); err != nil || len(views) != 2 || views[0]["used"] != 2.0 || views[0]["limit"] != 2.0 || views[1]["limit"] != 200.0 {
		t.Errorf("inspect: %s", text)
	}
	if _, text := l.ask("POST", "admin-client/forgive", `{"key":"192.0.2.1","level":0}`); !strings.Contains(text, `"used":0`) {
		t.Errorf("forgive: %s", text)
	}
	l.expect("192.0.2.1", "/", 200, 200, 429)
	l.ask("POST", "admin-key/forgive", `{"key_base64":"c2VjcmV0/w=="}`)
	if res, _ := l.get("/", "X-Key", "secret\xff", "X-Forwarded-For", "192.0.2.9"); res.StatusCode != 200 {
		t.Errorf("after forgiving: %d", res.StatusCode)
	}
	for _, c := range []struct {
		method, path, body string
		status             int
	}{
		{"POST", "admin-client/top", "", 405},
		{"GET", "admin-client/inspect", "", 405},
		{"GET", "none/top", "", 404},
		{"GET", "admin-client", "", 404},
		{"GET", "admin-client/top/x", "", 404},
		{"POST", "admin-client/inspect", "", 400},
		{"POST", "admin-client/inspect", "{}", 400},
		{"POST", "admin-client/inspect", `{"key":"no address"}`, 400},
		{"POST", "admin-client/inspect", `{"key":"192.0.2.1","level":2}`, 400},
		{"POST", "admin-client/inspect", `{"key":"192.0.2.1"} x`, 400},
		{"POST", "admin-key/inspect", `{"key_base64":"!"}`, 400},
		{"POST", "admin-key/inspect", `{"key":"` + strings.Repeat("x", 1<<20) + `"}`, 200},
		{"POST", "admin-key/inspect", `{"key":"` + strings.Repeat("x", 5<<20) + `"}`, 400},
	} {
		if status, text := l.ask(c.method, c.path, c.body); status != c.status {
			t.Errorf("%s %s %.40s: %d %.80s, want %d", c.method, c.path, c.body, status, text, c.status)
		}
	}
}
