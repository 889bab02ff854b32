// SPDX-License-Identifier: Apache-2.0

// Package caddybin drives built Caddy binaries in tests: it lists their modules and serves configurations with them,
// each process with directories and ports of its own and without the proxies of the environment.
package caddybin

import (
	"bytes"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
)

// startTimeout is generous, because a binary may start beside a compiler that keeps every core busy.
const startTimeout = time.Minute

// Module is one line of list-modules.
type Module struct {
	ID   string `json:"module_name"`
	Kind string `json:"module_type"` // standard, non-standard or unknown
	Path string `json:"package_url"` // the Go module, not the package
}

// Modules returns the modules of the binary beyond stock Caddy.
func Modules(t *testing.T, binary string) []Module {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), binary, "list-modules", "--skip-standard", "--json")
	cmd.Env = environ(t.TempDir())
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("listing modules of %s: %v", binary, err)
	}
	var modules []Module
	if err := json.Unmarshal(out, &modules); err != nil {
		t.Fatalf("reading modules of %s: %v\n%s", binary, err, out)
	}
	return modules
}

// Name returns the path of a binary in dir, with the suffix the system wants.
func Name(dir string) string {
	if runtime.GOOS == "windows" {
		return filepath.Join(dir, "caddy.exe")
	}
	return filepath.Join(dir, "caddy")
}

// FreeAddr returns a loopback address with a port that was free a moment ago.
func FreeAddr(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().String()
}

// Serve runs the binary with a Caddyfile until the test ends, and returns once every address accepts connections.
// When the test fails, it shows what the process logged.
func Serve(t *testing.T, binary, caddyfile string, addrs ...string) {
	t.Helper()
	dir := t.TempDir()
	file := filepath.Join(dir, "Caddyfile")
	if err := os.WriteFile(file, []byte(caddyfile), 0o600); err != nil {
		t.Fatal(err)
	}

	var log bytes.Buffer
	cmd := exec.Command(binary, "run", "--config", file)
	cmd.Dir, cmd.Env = dir, environ(dir)
	cmd.Stdout, cmd.Stderr = &log, &log
	cmd.WaitDelay = time.Second
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan struct{})
	go func() {
		_ = cmd.Wait()
		close(exited)
	}()
	t.Cleanup(func() {
		stop(cmd.Process, exited)
		if t.Failed() {
			t.Logf("log of %s:\n%s", binary, &log)
		}
	})

	deadline := time.Now().Add(startTimeout)
	for _, addr := range addrs {
		for {
			conn, err := net.DialTimeout("tcp", addr, time.Second)
			if err == nil {
				conn.Close()
				break
			}
			select {
			case <-exited:
				t.Fatal("caddy ended before it served")
			case <-time.After(20 * time.Millisecond):
			}
			if time.Now().After(deadline) {
				t.Fatalf("nothing listened on %s within %s", addr, startTimeout)
			}
		}
	}
}

// Get returns the response for a URL and its whole body, over a connection of its own.
func Get(t *testing.T, url string) (*http.Response, string) {
	t.Helper()
	client := &http.Client{
		Transport: &http.Transport{DisableKeepAlives: true},
		Timeout:   30 * time.Second,
	}
	resp, err := client.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("reading body of %s: %v", url, err)
	}
	return resp, string(body)
}

// environ is the environment of this process with all of Caddy's directories below dir and no proxy.
func environ(dir string) []string {
	env := slices.DeleteFunc(os.Environ(), func(kv string) bool {
		name, _, _ := strings.Cut(kv, "=")
		return strings.HasSuffix(strings.ToUpper(name), "_PROXY")
	})
	return append(env,
		"HOME="+dir,
		"AppData="+dir,
		"XDG_CONFIG_HOME="+filepath.Join(dir, "config"),
		"XDG_DATA_HOME="+filepath.Join(dir, "data"),
	)
}

// stop asks the process to end, and kills it when it does not.
func stop(p *os.Process, exited <-chan struct{}) {
	if p.Signal(os.Interrupt) != nil {
		_ = p.Kill()
	}
	select {
	case <-exited:
	case <-time.After(10 * time.Second):
		_ = p.Kill()
		<-exited
	}
}
