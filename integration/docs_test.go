// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
)

// blocks returns the fenced blocks of a language in a page.
func blocks(t *testing.T, page, language string) []string {
	t.Helper()
	content, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, m := range regexp.MustCompile("(?s)```"+language+"\n(.*?)```").FindAllStringSubmatch(string(content), -1) {
		found = append(found, m[1])
	}
	return found
}

// TestReadme runs the README's first command and then the lines that it shows
// under it, and compares what they print; … stands for any text.
func TestReadme(t *testing.T) {
	for _, tool := range []string{"go", "bash", "curl"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("SKIPPED: the README's commands need %s: %v", tool, err)
		}
	}
	for _, port := range []string{"2019", "8080", "8081"} {
		l, err := net.Listen("tcp", "localhost:"+port)
		if err != nil {
			t.Skipf("SKIPPED: the README's example needs port %s: %v", port, err)
		}
		_ = l.Close()
	}
	const readme = "../README.md"
	commands := blocks(t, readme, "sh")
	if len(commands) == 0 || !strings.HasPrefix(commands[0], "go run ./cmd/caddy run") {
		t.Fatalf("the README's first command is not what it was: %q", commands)
	}
	runFromRoot(t, strings.TrimSpace(commands[0]))
	lines := 0
	for _, block := range blocks(t, readme, "console") {
		for example := range strings.SplitSeq(strings.TrimPrefix(block, "$ "), "\n$ ") {
			command, want, _ := strings.Cut(example, "\n")
			out, err := exec.CommandContext(t.Context(), "bash", "-o", "pipefail", "-c", command).Output()
			if err != nil {
				t.Errorf("%s: %v", command, err)
			}
			got := strings.TrimSpace(strings.ReplaceAll(string(out), "\r", ""))
			pattern := strings.ReplaceAll(regexp.QuoteMeta(strings.TrimSpace(want)), "…", ".*")
			if !regexp.MustCompile("^" + pattern + "$").MatchString(got) {
				t.Errorf("%s\n\tprints %q\n\twant   %q", command, got, want)
			}
			lines++
		}
	}
	if lines < 4 {
		t.Errorf("the README shows %d lines", lines)
	}
}

// runFromRoot starts a command in the root of the checkout and waits until
// Caddy serves; it ends with the test.
func runFromRoot(t *testing.T, command string) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	cmd := exec.CommandContext(ctx, "bash", "-c", "exec "+command)
	cmd.Dir = ".."
	ownGroup(cmd)
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	serving, ended := make(chan struct{}), make(chan string, 1)
	go func() {
		var text strings.Builder
		for sc := bufio.NewScanner(stderr); sc.Scan(); {
			fmt.Fprintln(&text, sc.Text())
			if strings.Contains(sc.Text(), "serving initial configuration") {
				close(serving)
			}
		}
		ended <- text.String()
	}()
	t.Cleanup(func() {
		endGroup(cmd)
		cancel()
		_ = cmd.Wait()
	})
	select {
	case <-serving:
	case text := <-ended:
		t.Fatalf("%s ended:\n%s", command, text)
	}
}

// Every configuration in the documentation is one that loads.
func TestDocumentedConfigurations(t *testing.T) {
	t.Chdir("..")
	t.Setenv("REDIS_PASSWORD", "not-a-real-password")
	pages, err := filepath.Glob("docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	count := 0
	for _, page := range append(pages, "README.md") {
		for i, config := range blocks(t, page, "caddyfile") {
			t.Run(fmt.Sprintf("%s/caddyfile-%d", page, i), func(t *testing.T) { validate(t, adapted(t, config)) })
			count++
		}
		for i, config := range blocks(t, page, "json") {
			t.Run(fmt.Sprintf("%s/json-%d", page, i), func(t *testing.T) { validate(t, config) })
			count++
		}
	}
	if count == 0 {
		t.Error("no configuration was found")
	}
}

// The JSON in docs/hooks.md is what its first Caddyfile becomes.
func TestDocumentedJSONEqualsCaddyfile(t *testing.T) {
	t.Chdir("..")
	config, doc := blocks(t, "docs/hooks.md", "caddyfile"), blocks(t, "docs/hooks.md", "json")
	if len(config) == 0 || len(doc) == 0 {
		t.Fatal("docs/hooks.md shows no configuration")
	}
	if got, want := adapted(t, config[0]), strings.TrimSpace(doc[0]); got != want {
		t.Errorf("the Caddyfile becomes:\n%s", got)
	}
}

// example runs a configuration of the folder examples on ports of its own.
func example(t *testing.T, name string) *site {
	t.Helper()
	return exampleBefore(t, name, freeAddr(t))
}

// exampleBefore is example with an address in the place of its port 8081.
func exampleBefore(t *testing.T, name, upstream string) *site {
	t.Helper()
	t.Chdir("..")
	content, err := os.ReadFile(filepath.Join("examples", name, "Caddyfile"))
	if err != nil {
		t.Fatal(err)
	}
	s := &site{t: t, addr: freeAddr(t), logs: newLogbook()}
	text := strings.NewReplacer(
		"admin localhost:2019", "admin off\npersist_config off",
		"localhost:8080", s.addr, "localhost:8081", upstream, "localhost:*", "127.0.0.1:*",
	).Replace(string(content))
	doc, _, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(text), map[string]any{"filename": name})
	if err != nil {
		t.Fatal(err)
	}
	if err := caddy.Load(doc, true); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = caddy.Stop() })
	return s
}

func TestExampleHandleErrors(t *testing.T) {
	s := example(t, "handle-errors")
	res, body := s.get("/x")
	if res.StatusCode != 503 || body != "Back soon (refused after 1 attempt)" || res.Header.Get("Retry-After") != "30" {
		t.Errorf("got %d %q", res.StatusCode, body)
	}
}

func TestExampleHooks(t *testing.T) {
	s := example(t, "hooks")
	if res, body := s.get("/api/x"); res.StatusCode != 200 || !strings.Contains(body, "Bearer not-a-real-token sig1=(") {
		t.Errorf("got %d %q", res.StatusCode, body)
	}
	if res, body := s.get("/other"); res.StatusCode != 200 || strings.TrimSpace(body) != "" {
		t.Errorf("got %d %q", res.StatusCode, body)
	}
	if res, body := s.get("/away", "Accept", "text/html"); res.StatusCode != 503 || !strings.Contains(body, "Back soon") {
		t.Errorf("got %d %q", res.StatusCode, body)
	}
	if res, body := s.get("/fail"); res.StatusCode != 500 || !strings.Contains(body, `"status":500`) {
		t.Errorf("got %d %q", res.StatusCode, body)
	}
}

// Every folder of examples has a test here or in ratelimit_docs_test.go; TestReadme runs the quickstart.
func TestExamplesAreTested(t *testing.T) {
	tested := map[string]bool{
		"quickstart": true, "handle-errors": true, "hooks": true,
		"ratelimit-login": true, "ratelimit-tiers": true, "ratelimit-websocket": true, "ratelimit-origin": true,
	}
	folders, err := os.ReadDir("../examples")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range folders {
		if !tested[f.Name()] {
			t.Errorf("examples/%s has no test", f.Name())
		}
	}
}

// The admin endpoint shows the upstreams that close idle connections.
func TestAdminUpstreams(t *testing.T) {
	addr := staleServer(t)
	admin := freeAddr(t)
	s := start(t, fmt.Sprintf(`http://{addr} {
		log
		hooks {
			connection
		}
		reverse_proxy %s {
			transport hooks
		}
	}`, addr), "admin "+admin)
	s.get("/x")
	s.get("/x")
	s.access("/x", 2)
	control := &site{t: t, addr: admin}
	res, body := control.get("/gatehouse/hooks/upstreams")
	if res.StatusCode != 200 || !strings.Contains(body, fmt.Sprintf(`"upstream":%q,"resets":1`, addr)) {
		t.Errorf("got %d %s", res.StatusCode, body)
	}
	if res, _ := control.do(http.MethodPost, "/gatehouse/hooks/upstreams", nil); res.StatusCode != 405 {
		t.Errorf("POST: status %d", res.StatusCode)
	}
}
