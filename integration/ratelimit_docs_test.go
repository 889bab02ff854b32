// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
)

// The examples of docs/ratelimit.md are the folders of examples, word by word.
func TestRatelimitPageQuotesExamples(t *testing.T) {
	page := strings.Join(blocks(t, "../docs/ratelimit.md", "caddyfile"), "\n")
	folders, err := filepath.Glob("../examples/ratelimit-*/Caddyfile")
	if err != nil || len(folders) != 4 {
		t.Fatalf("%d examples (%v)", len(folders), err)
	}
	for _, name := range folders {
		content, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(page, string(content)) {
			t.Errorf("docs/ratelimit.md does not quote %s", name)
		}
	}
}

// The JSON in docs/ratelimit.md is what its first Caddyfile becomes.
func TestRatelimitJSONEqualsCaddyfile(t *testing.T) {
	config, doc := blocks(t, "../docs/ratelimit.md", "caddyfile"), blocks(t, "../docs/ratelimit.md", "json")
	if len(config) == 0 || len(doc) == 0 {
		t.Fatal("docs/ratelimit.md shows no configuration")
	}
	if got, want := adapted(t, config[0]), strings.TrimSpace(doc[0]); got != want {
		t.Errorf("the Caddyfile becomes:\n%s", got)
	}
}

// The admin API answers what the page shows, but for the seconds.
func TestRatelimitAdminAsDocumented(t *testing.T) {
	admin := freeAddr(t)
	s := start(t, `http://{addr} {
		ratelimit {
			headers draft
			zone login {
				match path /login
				key client
				rate 5 1m
				burst 2
				count_when status 401 403
				penalty 10m
			}
		}
		respond 401
	}`, "admin "+admin)
	for range 3 {
		s.get("/login")
	}
	control := &site{t: t, addr: admin}
	_, top := control.get("/gatehouse/ratelimit/login/top")
	content, err := os.ReadFile("../docs/ratelimit.md")
	if err != nil {
		t.Fatal(err)
	}
	page := string(content)
	if !strings.Contains(page, "\n"+top) {
		t.Errorf("the page does not show %s", top)
	}
	seconds := regexp.MustCompile(`"reset_seconds":6\d`)
	for _, verb := range []string{"inspect", "forgive"} {
		_, body := control.do(http.MethodPost, "/gatehouse/ratelimit/login/"+verb, strings.NewReader(`{"key": "127.0.0.1"}`))
		if body = seconds.ReplaceAllString(body, `"reset_seconds":61`); !strings.Contains(page, "\n"+body) {
			t.Errorf("the page does not show %s: %s", verb, body)
		}
	}
}

func TestExampleRatelimitLogin(t *testing.T) {
	s := example(t, "ratelimit-login")
	login := func(password string) (*http.Response, string) {
		return s.do(http.MethodPost, "/login", nil, "X-Password", password)
	}
	for range 20 { // what succeeds does not count
		if res, body := login("right"); res.StatusCode != 200 || body != "welcome" {
			t.Fatalf("got %d %q", res.StatusCode, body)
		}
	}
	for range 5 {
		if res, _ := login("wrong"); res.StatusCode != 401 {
			t.Fatalf("got %d", res.StatusCode)
		}
	}
	for _, password := range []string{"wrong", "right"} {
		res, body := login(password)
		if res.StatusCode != 429 || res.Header.Get("Retry-After") != "600" || body != "Too many failed logins. Try again in 600 seconds." {
			t.Errorf("%s: got %d %q after %q", password, res.StatusCode, body, res.Header.Get("Retry-After"))
		}
	}
	if res, body := s.get("/"); res.StatusCode != 200 || body != "the front page" {
		t.Errorf("another page: got %d %q", res.StatusCode, body)
	}
}

func TestExampleRatelimitTiers(t *testing.T) {
	s := example(t, "ratelimit-tiers")
	for _, tt := range []struct {
		key, tier string
		limit     int
		policy    string
	}{
		{"", "none", 5, `"anonymous";q=5;w=60`},
		{"bogus", "none", 0, ""}, // of the same client
		{"free-1", "free", 10, `"free";q=10;w=60`},
		{"gold-1", "gold", 50, `"gold";q=50;w=60`},
	} {
		var header []string
		if tt.key != "" {
			header = []string{"X-Api-Key", tt.key}
		}
		for i := range tt.limit {
			res, body := s.get("/", header...)
			if res.StatusCode != 200 || body != "tier "+tt.tier {
				t.Fatalf("%q, request %d: got %d %q", tt.key, i, res.StatusCode, body)
			}
			policies := res.Header.Values("RateLimit-Policy")
			if len(policies) != 2 || policies[0] != tt.policy || policies[1] != `"all";q=1000;w=60` {
				t.Fatalf("%q: RateLimit-Policy = %q", tt.key, policies)
			}
		}
		if res, _ := s.get("/", header...); res.StatusCode != 429 || res.Header.Get("Retry-After") == "" {
			t.Errorf("%q: got %d after %d requests", tt.key, res.StatusCode, tt.limit)
		}
	}
}

// echo is a WebSocket server, as far as Caddy can tell: it accepts upgrades
// and sends back what it gets.
func echo(t *testing.T) string {
	t.Helper()
	l := listen(t)
	srv := &http.Server{ReadHeaderTimeout: patience, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") != "websocket" {
			_, _ = io.WriteString(w, "a page")
			return
		}
		conn, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return
		}
		defer conn.Close()
		_, _ = rw.WriteString("HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
		_ = rw.Flush()
		_, _ = io.Copy(conn, rw)
	})}
	go func() { _ = srv.Serve(l) }()
	t.Cleanup(func() { _ = srv.Close() })
	return l.Addr().String()
}

// upgrade asks for a WebSocket connection as a user.
func (s *site) upgrade(user string) (net.Conn, *http.Response) {
	s.t.Helper()
	conn, err := net.DialTimeout("tcp", s.addr, patience)
	if err != nil {
		s.t.Fatal(err)
	}
	_ = conn.SetDeadline(time.Now().Add(patience))
	req, _ := http.NewRequestWithContext(s.t.Context(), http.MethodGet, "http://"+s.addr+"/", nil)
	req.SetBasicAuth(user, user)
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", "websocket")
	if err := req.Write(conn); err != nil {
		s.t.Fatal(err)
	}
	r := bufio.NewReader(conn)
	res, err := http.ReadResponse(r, req)
	if err != nil {
		s.t.Fatal(err)
	}
	if res.StatusCode == http.StatusSwitchingProtocols {
		if _, err := fmt.Fprint(conn, "hello"); err != nil {
			s.t.Fatal(err)
		}
		back := make([]byte, 5)
		if _, err := io.ReadFull(r, back); err != nil || string(back) != "hello" {
			s.t.Fatalf("got back %q (%v)", back, err)
		}
	}
	return conn, res
}

// released waits until a key has no request in flight anymore.
func released(t *testing.T, zone, key string) {
	t.Helper()
	info, err := caddy.GetModule("admin.api.gatehouse_ratelimit")
	if err != nil {
		t.Fatal(err)
	}
	api := info.New().(caddy.AdminRouter).Routes()[0].Handler
	for deadline := time.Now().Add(patience); ; runtime.Gosched() {
		w := httptest.NewRecorder()
		body := strings.NewReader(fmt.Sprintf(`{"key": %q}`, key))
		if err := api.ServeHTTP(w, httptest.NewRequest(http.MethodPost, "/gatehouse/ratelimit/"+zone+"/inspect", body)); err != nil {
			t.Fatal(err)
		}
		if strings.Contains(w.Body.String(), `"inflight":0`) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s holds what it should have given back: %s", key, w.Body)
		}
	}
}

func TestExampleRatelimitWebsocket(t *testing.T) {
	s := exampleBefore(t, "ratelimit-websocket", echo(t))
	var open []net.Conn
	for i := range 3 {
		conn, res := s.upgrade("alice")
		defer conn.Close()
		if res.StatusCode != 101 {
			t.Fatalf("connection %d: got %d", i, res.StatusCode)
		}
		open = append(open, conn)
	}
	conn, res := s.upgrade("alice")
	conn.Close()
	if res.StatusCode != 429 || res.Header.Get("Retry-After") != "" {
		t.Errorf("the fourth one: got %d, Retry-After %q", res.StatusCode, res.Header.Get("Retry-After"))
	}
	conn, res = s.upgrade("bob")
	conn.Close()
	if res.StatusCode != 101 {
		t.Errorf("another user: got %d", res.StatusCode)
	}
	req, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+s.addr+"/", nil)
	req.SetBasicAuth("alice", "alice")
	if page, err := http.DefaultClient.Do(req); err != nil || page.StatusCode != 200 {
		t.Errorf("a page: got %v (%v)", page, err)
	}
	released(t, "sockets", "bob")
	// one that is closed makes room, as soon as Caddy has seen it
	open[0].Close()
	for deadline := time.Now().Add(patience); ; {
		conn, res := s.upgrade("alice")
		conn.Close()
		if res.StatusCode == 101 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("a closed connection gives no place back: got %d", res.StatusCode)
		}
	}
	// Caddy 2.11.9 itself has a data race when it is stopped while one is open
	for _, conn := range open {
		conn.Close()
	}
	released(t, "sockets", "alice")
}

func TestExampleRatelimitOrigin(t *testing.T) {
	s := example(t, "ratelimit-origin")
	for range 20 {
		if res, body := s.get("/cached/x"); res.StatusCode != 200 || body != "from the cache" {
			t.Fatalf("got %d %q", res.StatusCode, body)
		}
	}
	for i := range 5 {
		res, body := s.get("/x")
		if res.StatusCode != 200 || body != "from the origin" {
			t.Fatalf("request %d: got %d %q", i, res.StatusCode, body)
		}
		if got, want := res.Header.Get("RateLimit"), fmt.Sprintf(`"origin";r=%d;`, 4-i); !strings.HasPrefix(got, want) {
			t.Errorf("request %d: RateLimit = %q, want %s…", i, got, want)
		}
	}
	if res, _ := s.get("/x"); res.StatusCode != 429 {
		t.Errorf("after five requests: got %d", res.StatusCode)
	}
}
