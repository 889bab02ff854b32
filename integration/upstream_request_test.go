// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"
)

// seen keeps the requests that an upstream got.
type seen struct {
	mu     sync.Mutex
	header http.Header
	host   string
	path   string
	query  string
	method string
	body   []byte
}

func (s *seen) handler(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.header, s.host, s.path, s.query, s.method, s.body = r.Header.Clone(), r.Host, r.URL.EscapedPath(), r.URL.RawQuery, r.Method, body
	hello(w, r)
}

func TestUpstreamHeaders(t *testing.T) {
	got := new(seen)
	u := serve(t, "h1", got.handler)
	s := start(t, fmt.Sprintf(`http://{addr} {
		hooks {
			upstream_request {
				header_up Host {upstream_hostport}
				header_up X-Set {http.request.uri.path}
				header_up +X-Add two
				header_up -X-Gone
				header_up X-Old ^old(.*) new$1
				credential basic user pass
			}
			upstream_request {
				upstreams 10.0.0.*:80 other:*
				header_up X-Other yes
			}
			upstream_request {
				upstreams 127.0.0.1:*
				match path /special*
				header_up X-Special yes
			}
		}
		reverse_proxy %s {
			lb_retries 1
			transport hooks
		}
	}`, u.addr))
	for path, special := range map[string]string{"/special": "yes", "/plain": ""} {
		s.get(path, "X-Add", "one", "X-Gone", "x", "X-Old", "old-value", "Authorization", "Bearer client")
		for name, want := range map[string]string{
			"X-Set": path, "X-Add": "one,two", "X-Gone": "", "X-Old": "new-value", "X-Other": "", "X-Special": special,
			"Authorization": "Basic " + base64.StdEncoding.EncodeToString([]byte("user:pass")),
		} {
			if value := strings.Join(got.header[name], ","); value != want {
				t.Errorf("%s: %s = %q, want %q", path, name, value, want)
			}
		}
		if got.host != u.addr {
			t.Errorf("host = %q, want %q", got.host, u.addr)
		}
	}
}

// Each attempt starts from the request as reverse_proxy made it, and knows its
// own upstream.
func TestUpstreamHeadersPerAttempt(t *testing.T) {
	got := new(seen)
	u := serve(t, "h1", got.handler)
	dead := freeAddr(t)
	s := start(t, fmt.Sprintf(`http://{addr} {
		hooks {
			upstream_request {
				header_up +X-Upstream {upstream_hostport}
			}
			upstream_request {
				upstreams %[1]s
				header_up X-Dead yes
			}
		}
		reverse_proxy %[1]s %[2]s {
			lb_policy first
			lb_retries 2
			fail_duration 1m
			transport hooks
		}
	}`, dead, u.addr))
	if res, _ := s.get("/x"); res.StatusCode != 200 {
		t.Fatalf("status = %d", res.StatusCode)
	}
	if value := strings.Join(got.header["X-Upstream"], ","); value != u.addr || got.header.Get("X-Dead") != "" {
		t.Errorf("X-Upstream = %q, X-Dead = %q", value, got.header.Get("X-Dead"))
	}
}

func TestBearerFile(t *testing.T) {
	got := new(seen)
	u := serve(t, "h1", got.handler)
	token := filepath.Join(t.TempDir(), "token")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(token+".new", []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(token+".new", token); err != nil {
			t.Fatal(err)
		}
	}
	write("first\n")
	s := start(t, fmt.Sprintf(`http://{addr} {
		hooks {
			upstream_request {
				credential bearer_file %s
			}
		}
		reverse_proxy %s {
			transport hooks
		}
	}`, token, u.addr))
	// the file is looked at once a second, so a change takes effect after some requests
	until := func(want string) {
		t.Helper()
		for deadline := time.Now().Add(patience); ; {
			s.get("/x")
			if got.header.Get("Authorization") == want {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("Authorization = %q, want %q", got.header.Get("Authorization"), want)
			}
		}
	}
	until("Bearer first")
	write("second")
	until("Bearer second")
	if err := os.Remove(token); err != nil {
		t.Fatal(err)
	}
	logged := s.logs.await
	for len(s.logs.find(message("the last good secret stays in use"))) == 0 {
		s.get("/x")
	}
	logged(t, "line", 1, message("the last good secret stays in use"))
	until("Bearer second")
	write("third")
	until("Bearer third")
	if n := len(s.logs.find(message("the last good secret stays in use"))); n != 1 {
		t.Errorf("the lost file was logged %d times", n)
	}
}

// verify checks a signature as an upstream would, with nothing but the
// request and the secret.
func verify(t *testing.T, s *seen, secret []byte) (components string) {
	t.Helper()
	input := s.header.Get("Signature-Input")
	m := regexp.MustCompile(`^edge=(\(([^)]*)\);created=\d+;keyid="edge-1";alg="hmac-sha256")$`).FindStringSubmatch(input)
	if m == nil {
		t.Fatalf("Signature-Input = %q", input)
	}
	var base strings.Builder
	for quoted := range strings.FieldsSeq(m[2]) {
		name := strings.Trim(quoted, `"`)
		var value string
		switch name {
		case "@method":
			value = s.method
		case "@authority":
			value = s.host
		case "@path":
			value = s.path
		case "@query":
			value = "?" + s.query
		default:
			value = strings.Join(s.header.Values(name), ", ")
		}
		fmt.Fprintf(&base, "%s: %s\n", quoted, value)
	}
	fmt.Fprintf(&base, `"@signature-params": %s`, m[1])
	mac := hmac.New(sha256.New, secret)
	mac.Write([]byte(base.String()))
	want := "edge=:" + base64.StdEncoding.EncodeToString(mac.Sum(nil)) + ":"
	if got := s.header.Get("Signature"); got != want {
		t.Errorf("Signature = %s, want %s for\n%s", got, want, base.String())
	}
	return m[2]
}

func TestSignature(t *testing.T) {
	got := new(seen)
	u := serve(t, "h1", got.handler)
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("base64:"+base64.StdEncoding.EncodeToString([]byte("s3cret"))+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	site := func(maxBody string) string {
		return fmt.Sprintf(`http://{addr} {
			hooks {
				on_error {
					page class body_too_large {
						text body "{http.hooks.error.class}"
					}
				}
				upstream_request {
					header_up X-Edge "a  b"
					credential hmac {
						key_id edge-1
						label edge
						secret_file %s
						components @method @authority @path @query x-edge x-absent
						%s
					}
				}
			}
			reverse_proxy %s %s {
				lb_policy first
				lb_retries 1
				fail_duration 1m
				transport hooks
			}
		}`, secret, maxBody, freeAddr(t), u.addr)
	}
	s := start(t, site(""))
	s.do(http.MethodPost, "/a%20b?q=1", strings.NewReader("body"))
	if c := verify(t, got, []byte("s3cret")); c != `"@method" "@authority" "@path" "@query" "x-edge"` || string(got.body) != "body" {
		t.Errorf("components %s, body %q", c, got.body)
	}

	// with a digest the body is held, and still there for the second attempt
	s.load(site("max_body 1KiB"))
	for _, body := range []io.Reader{strings.NewReader("some body"), io.MultiReader(strings.NewReader("some body")), nil} {
		s.do(http.MethodPost, "/x", body)
		if c := verify(t, got, []byte("s3cret")); !strings.HasSuffix(c, `"content-digest"`) {
			t.Errorf("components %s", c)
		}
		sum := sha256.Sum256(got.body)
		if want := "sha-256=:" + base64.StdEncoding.EncodeToString(sum[:]) + ":"; got.header.Get("Content-Digest") != want {
			t.Errorf("Content-Digest = %s, want %s", got.header.Get("Content-Digest"), want)
		}
		if body != nil && string(got.body) != "some body" {
			t.Errorf("body = %q", got.body)
		}
	}
	hits := u.hits.Load()
	for _, body := range []io.Reader{bytes.NewReader(make([]byte, 1025)), io.MultiReader(bytes.NewReader(make([]byte, 1025)))} {
		if res, text := s.do(http.MethodPost, "/x", body); res.StatusCode != 413 || text != "body_too_large" {
			t.Errorf("got %d %q", res.StatusCode, text)
		}
	}
	if u.hits.Load() != hits {
		t.Error("a body that is too large reached the upstream")
	}
	if res, _ := s.get("/x"); res.StatusCode != 200 {
		t.Errorf("status = %d: the refusals counted against the upstream", res.StatusCode)
	}
}

// The hooks run for requests only, not for health checks.
func TestHealthChecksPassWithoutHooks(t *testing.T) {
	probed := make(chan http.Header, 8)
	u := serve(t, "h1", func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/health" {
			select {
			case probed <- r.Header.Clone():
			default:
			}
		}
		hello(w, r)
	})
	s := start(t, fmt.Sprintf(`http://{addr} {
		hooks {
			connection
			upstream_request {
				header_up X-Edge yes
			}
		}
		reverse_proxy %s {
			health_uri /health
			health_interval 50ms
			transport hooks
		}
	}`, u.addr))
	for range 2 {
		select {
		case h := <-probed:
			if h.Get("X-Edge") != "" {
				t.Errorf("a health check carries %v", h)
			}
		case <-time.After(patience):
			t.Fatal("no health check")
		}
	}
	if res, _ := s.get("/x"); res.StatusCode != 200 {
		t.Errorf("status = %d", res.StatusCode)
	}
}

// What a client smuggles into a placeholder is the client's failure, not the upstream's.
func TestHeaderInjection(t *testing.T) {
	got := new(seen)
	u := serve(t, "h1", got.handler)
	s := start(t, fmt.Sprintf(`http://{addr} {
		log
		hooks {
			upstream_request {
				header_up X-Query {http.request.uri.query.q}
			}
		}
		reverse_proxy %s {
			fail_duration 1m
			transport hooks
		}
	}`, u.addr))
	if res, _ := s.get("/x?q=a%0d%0aX-Evil:%20yes"); res.StatusCode != 400 {
		t.Errorf("status = %d, want 400", res.StatusCode)
	}
	if e := s.access("/x?q=a%0d%0aX-Evil:%20yes", 1); e.errorClass() != "refused_by_hook" {
		t.Errorf("class = %q", e.errorClass())
	}
	if res, _ := s.get("/x?q=fine"); res.StatusCode != 200 || got.header.Get("X-Query") != "fine" {
		t.Errorf("status = %d: the upstream was blamed", res.StatusCode)
	}
}
