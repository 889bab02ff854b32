// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddy-gatehouse/gatehouse/internal/caddybin"
)

// caddyBinary builds ./cmd/caddy once per run, into the directory that TestMain removes.
var caddyBinary = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp(os.Getenv("XDG_DATA_HOME"), "binary-")
	if err != nil {
		return "", err
	}
	binary := caddybin.Name(dir)
	out, err := exec.Command("go", "build", "-buildvcs=false", "-o", binary, "../cmd/caddy").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("building cmd/caddy: %w\n%s", err, out)
	}
	return binary, nil
})

// nodeGlobals is the head of every configuration of a process.
const nodeGlobals = `{
	admin {admin}
	default_bind 127.0.0.1
	persist_config off
	grace_period 5s
	log {
		output stderr
		format json
	}
	` + trusting + `
}
`

// node is a Caddy of its own: a process of the built binary.
type node struct {
	t      *testing.T
	addr   string
	admin  string
	logs   *logbook
	output *lines
	client *http.Client // keeps connections

	process *os.Process
	exited  chan struct{}
}

// startNode runs the binary with a configuration, in which {addr} stands for
// the address of the site, and ends it with the test.
func startNode(t *testing.T, config string) *node {
	t.Helper()
	binary, err := caddyBinary()
	if err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{MaxIdleConnsPerHost: 100}
	n := &node{
		t: t, addr: freeAddr(t), admin: freeAddr(t), logs: newLogbook(), exited: make(chan struct{}),
		client: &http.Client{Transport: transport, Timeout: patience},
	}
	n.output = &lines{logs: n.logs}
	dir := t.TempDir()
	file := filepath.Join(dir, "Caddyfile")
	if err := os.WriteFile(file, []byte(n.config(config)), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(binary, "run", "--config", file)
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, n.output, n.output
	cmd.Env = append(os.Environ(), "HOME="+dir, "XDG_DATA_HOME="+dir, "XDG_CONFIG_HOME="+dir)
	cmd.WaitDelay = time.Second
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	n.process = cmd.Process
	go func() {
		_ = cmd.Wait()
		close(n.exited)
	}()
	t.Cleanup(func() {
		transport.CloseIdleConnections()
		n.stop()
		if text := n.output.String(); t.Failed() || strings.Contains(text, "goroutine ") || strings.Contains(text, "DATA RACE") {
			t.Errorf("the output of %s:\n%s", n.addr, text)
		}
	})
	eventually(t, "the node serves", func() bool {
		select {
		case <-n.exited:
			t.Fatal("the node ended before it served")
		default:
		}
		_, err := n.try(http.MethodGet, n.admin, "/config/", "")
		return err == nil
	})
	return n
}

// config puts the addresses in, and the usual head in front of a configuration
// without one of its own.
func (n *node) config(config string) string {
	if !strings.HasPrefix(config, "{\n") {
		config = nodeGlobals + config
	}
	return strings.NewReplacer("{addr}", n.addr, "{admin}", n.admin).Replace(config)
}

// stop asks the process to end, and kills it when it does not.
func (n *node) stop() {
	if n.process.Signal(os.Interrupt) != nil {
		_ = n.process.Kill()
	}
	select {
	case <-n.exited:
	case <-time.After(patience):
		n.kill()
	}
}

// kill ends the process without a word.
func (n *node) kill() {
	_ = n.process.Kill()
	<-n.exited
}

// answer is a response with its body.
type answer struct {
	status int
	header http.Header
	body   string
}

// try sends a request over a connection of its own.
func (n *node) try(method, addr, path, body string, header ...string) (*answer, error) {
	return ask(&http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: patience}, method, addr, path, body, header...)
}

func ask(client *http.Client, method, addr, path, body string, header ...string) (*answer, error) {
	req, err := http.NewRequest(method, "http://"+addr+path, strings.NewReader(body))
	if err != nil {
		return nil, err
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Add(header[i], header[i+1])
	}
	res, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	return &answer{res.StatusCode, res.Header, string(text)}, err
}

// do is try, once more if it got no answer: after a reload the old server may
// still take a connection.
func (n *node) do(method, addr, path, body string, header ...string) *answer {
	n.t.Helper()
	a, err := n.try(method, addr, path, body, header...)
	for tries := 0; err != nil && tries < 5; tries++ {
		a, err = n.try(method, addr, path, body, header...)
	}
	if err != nil {
		n.t.Fatalf("%s %s%s: %v", method, addr, path, err)
	}
	return a
}

// get sends a request to the site.
func (n *node) get(path string, header ...string) *answer {
	n.t.Helper()
	return n.do(http.MethodGet, n.addr, path, "", header...)
}

// load replaces the configuration through the admin endpoint.
func (n *node) load(config string) {
	n.t.Helper()
	if a := n.do(http.MethodPost, n.admin, "/load", n.config(config), "Content-Type", "text/caddyfile"); a.status != 200 {
		n.t.Fatalf("loading: %d %s", a.status, a.body)
	}
}

// metric is a sample of this set, such as ratelimit_store_away{zone="z"}; -1 if there is none.
func (n *node) metric(series string) float64 {
	n.t.Helper()
	for line := range strings.Lines(n.do(http.MethodGet, n.admin, "/metrics", "").body) {
		if value, ok := strings.CutPrefix(line, "caddy_gatehouse_"+series+" "); ok {
			f, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
			if err != nil {
				n.t.Fatal(err)
			}
			return f
		}
	}
	return -1
}

// goroutines counts those of the process.
func (n *node) goroutines() (count int) {
	n.t.Helper()
	n.client.CloseIdleConnections()
	text := n.do(http.MethodGet, n.admin, "/debug/pprof/goroutine?debug=1", "").body
	if _, err := fmt.Sscanf(text, "goroutine profile: total %d", &count); err != nil {
		n.t.Fatalf("%v in %.200s", err, text)
	}
	return count
}

// eventually waits until a condition holds.
func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !condition(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited for %v until %s", patience, what)
		}
	}
}

// lines keeps what a process writes, and hands on whole lines.
type lines struct {
	logs *logbook

	mu   sync.Mutex
	text bytes.Buffer
	done int // what of the text was handed on
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	l.text.Write(p)
	fresh := l.text.Bytes()[l.done:]
	fresh = bytes.Clone(fresh[:bytes.LastIndexByte(fresh, '\n')+1])
	l.done += len(fresh)
	l.mu.Unlock()
	if len(fresh) > 0 {
		_, _ = l.logs.Write(fresh)
	}
	return len(p), nil
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// parse reads JSON of the admin endpoint.
func parse[T any](t *testing.T, a *answer) (v T) {
	t.Helper()
	if a.status != 200 {
		t.Fatalf("%d %s", a.status, a.body)
	}
	if err := json.Unmarshal([]byte(a.body), &v); err != nil {
		t.Fatalf("%v in %s", err, a.body)
	}
	return v
}
