// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	_ "github.com/caddyserver/caddy/v2/modules/standard"

	_ "github.com/caddy-gatehouse/gatehouse"
)

func TestMain(m *testing.M) {
	for _, name := range []string{"HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY", "all_proxy"} {
		_ = os.Unsetenv(name)
	}
	dir, err := os.MkdirTemp("", "gatehouse-integration-")
	if err != nil {
		panic(err)
	}
	_ = os.Setenv("XDG_DATA_HOME", dir)
	_ = os.Setenv("XDG_CONFIG_HOME", dir)
	caddy.RegisterModule(new(sink))
	code := m.Run()
	_ = os.RemoveAll(dir)
	os.Exit(code)
}

// patience bounds every wait of these tests; nothing is measured with it.
const patience = 20 * time.Second

// globals is the head of every configuration of these tests. The admin
// endpoint is off, logs go to the test, and TLS is Caddy's own.
const globals = `{
	%s
	persist_config off
	skip_install_trust
	auto_https disable_redirects
	local_certs
	log {
		output gatehouse_test
		format json
		level DEBUG
	}
	%s
}
`

// site is a running Caddy with one configuration.
type site struct {
	t    *testing.T
	addr string
	logs *logbook
}

// start runs Caddy with a site on a free port, in which {addr} stands for its
// address, and stops it with the test. options go into the global block.
func start(t *testing.T, config string, options ...string) *site {
	t.Helper()
	s := &site{t: t, addr: freeAddr(t), logs: newLogbook()}
	s.load(config, options...)
	t.Cleanup(func() {
		if err := caddy.Stop(); err != nil {
			t.Errorf("stopping: %v", err)
		}
		current.Store(nil)
	})
	return s
}

// load replaces the configuration.
func (s *site) load(config string, options ...string) {
	s.t.Helper()
	if err := s.tryLoad(config, options...); err != nil {
		s.t.Fatalf("loading: %v", err)
	}
}

func (s *site) tryLoad(config string, options ...string) error {
	s.t.Helper()
	doc, err := s.adapt(config, options...)
	if err != nil {
		return err
	}
	current.Store(s.logs)
	return caddy.Load(doc, true)
}

func (s *site) adapt(config string, options ...string) ([]byte, error) {
	admin := "admin off"
	for i, option := range options {
		if strings.HasPrefix(option, "admin ") {
			admin, options = option, slices.Delete(slices.Clone(options), i, i+1)
			break
		}
	}
	text := fmt.Sprintf(globals, admin, strings.Join(options, "\n")) + strings.ReplaceAll(config, "{addr}", s.addr)
	doc, _, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(text), map[string]any{"filename": "Caddyfile"})
	return doc, err
}

// get sends a GET request and returns the response with its body read.
func (s *site) get(path string, header ...string) (*http.Response, string) {
	s.t.Helper()
	return s.do(http.MethodGet, path, nil, header...)
}

// do sends a request over a connection of its own. One that gets no answer and
// has no body is repeated: after a reload the old server may still take it.
func (s *site) do(method, path string, body io.Reader, header ...string) (*http.Response, string) {
	s.t.Helper()
	res, text, err := s.try(method, path, body, header...)
	for n := 0; err != nil && res == nil && body == nil && n < 5; n++ {
		res, text, err = s.try(method, path, nil, header...)
	}
	if err != nil {
		s.t.Fatalf("%s %s: %v", method, path, err)
	}
	return res, text
}

func (s *site) try(method, path string, body io.Reader, header ...string) (*http.Response, string, error) {
	s.t.Helper()
	req, err := http.NewRequestWithContext(s.t.Context(), method, "http://"+s.addr+path, body)
	if err != nil {
		s.t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Add(header[i], header[i+1])
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: patience}
	res, err := client.Do(req)
	if err != nil {
		return nil, "", err
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	return res, string(text), err
}

// freeAddr returns an address of the loopback that nothing listens on.
func freeAddr(t *testing.T) string {
	t.Helper()
	l := listen(t)
	addr := l.Addr().String()
	_ = l.Close()
	return addr
}

func listen(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// logbook collects what Caddy logs.
type logbook struct {
	mu      sync.Mutex
	changed chan struct{}
	entries []entry
}

// entry is one line of the log.
type entry map[string]any

func newLogbook() *logbook { return &logbook{changed: make(chan struct{})} }

func (b *logbook) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for line := range bytes.SplitSeq(bytes.TrimSpace(p), []byte("\n")) {
		var e entry
		if json.Unmarshal(line, &e) == nil {
			b.entries = append(b.entries, e)
		}
	}
	close(b.changed)
	b.changed = make(chan struct{})
	return len(p), nil
}

// find returns the entries that match, without waiting.
func (b *logbook) find(match func(entry) bool) []entry {
	b.mu.Lock()
	defer b.mu.Unlock()
	var found []entry
	for _, e := range b.entries {
		if match(e) {
			found = append(found, e)
		}
	}
	return found
}

// await waits until n entries match and returns the last one.
func (b *logbook) await(t *testing.T, what string, n int, match func(entry) bool) entry {
	t.Helper()
	deadline := time.After(patience)
	for {
		b.mu.Lock()
		changed := b.changed
		b.mu.Unlock()
		if found := b.find(match); len(found) >= n {
			return found[n-1]
		}
		select {
		case <-changed:
		case <-deadline:
			t.Fatalf("no %s in the log (wanted %d)", what, n)
		}
	}
}

// access waits for the nth access-log line of a path.
func (s *site) access(path string, n int) entry {
	s.t.Helper()
	return s.logs.await(s.t, "access line of "+path, n, func(e entry) bool {
		return strings.HasPrefix(e.text("logger"), "http.log.access") && e.object("request").text("uri") == path
	})
}

// message matches lines whose message contains text.
func message(text string) func(entry) bool {
	return func(e entry) bool { return strings.Contains(e.text("msg"), text) }
}

func (e entry) text(key string) string    { s, _ := e[key].(string); return s }
func (e entry) number(key string) float64 { n, _ := e[key].(float64); return n }
func (e entry) flag(key string) bool      { b, _ := e[key].(bool); return b }
func (e entry) object(key string) entry   { o, _ := e[key].(map[string]any); return o }
func (e entry) errorClass() string        { return e.object("hooks").object("error").text("class") }
func (e entry) attempts() (list []entry) {
	array, _ := e.object("hooks")["attempts"].([]any)
	for _, a := range array {
		o, _ := a.(map[string]any)
		list = append(list, o)
	}
	return list
}

// sink is the log writer that hands lines to the running test.
type sink struct{}

var current sinkPointer

type sinkPointer struct {
	mu sync.Mutex
	b  *logbook
}

func (p *sinkPointer) Store(b *logbook) { p.mu.Lock(); defer p.mu.Unlock(); p.b = b }
func (p *sinkPointer) Load() *logbook   { p.mu.Lock(); defer p.mu.Unlock(); return p.b }

func (*sink) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "caddy.logging.writers.gatehouse_test", New: func() caddy.Module { return new(sink) }}
}

func (*sink) String() string    { return "the test" }
func (*sink) WriterKey() string { return "gatehouse_test" }

func (*sink) OpenWriter() (io.WriteCloser, error) { return sinkWriter{}, nil }

func (*sink) UnmarshalCaddyfile(d *caddyfile.Dispenser) error { d.Next(); return nil }

type sinkWriter struct{}

func (sinkWriter) Write(p []byte) (int, error) {
	if b := current.Load(); b != nil {
		return b.Write(p)
	}
	return len(p), nil
}

func (sinkWriter) Close() error { return nil }
