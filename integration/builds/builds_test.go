// SPDX-License-Identifier: Apache-2.0

package builds

import (
	"bufio"
	"bytes"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/caddy-gatehouse/gatehouse/internal/caddybin"
)

const (
	module       = "github.com/caddy-gatehouse/gatehouse"
	caddyModule  = "github.com/caddyserver/caddy/v2"
	caddyVersion = "v2.11.9"
)

// alone is what a binary with one module alone has and does.
var alone = map[string]struct {
	ids     []string // beyond stock Caddy
	config  string   // of one site on %[1]s, with an upstream on %[2]s
	content string   // of its answer
}{
	"hooks": {
		ids: []string{
			"admin.api.gatehouse_hooks", "http.handlers.hooks", "http.hooks.connection", "http.hooks.log_field",
			"http.hooks.on_error", "http.hooks.request_summary", "http.hooks.suppress_error_log",
			"http.hooks.upstream_request", "http.reverse_proxy.transport.hooks",
		},
		config: `http://%[1]s {
			hooks {
				connection
				upstream_request {
					header_up X-Edge yes
				}
			}
			reverse_proxy %[2]s {
				transport hooks
			}
		}
		http://%[2]s {
			respond "edge {http.request.header.X-Edge}"
		}`,
		content: "edge yes",
	},
	"ratelimit": {
		ids: []string{
			"admin.api.gatehouse_ratelimit", "http.handlers.ratelimit", "http.ratelimit.stores.memory",
			"http.ratelimit.stores.redis",
		},
		// the first request asks the upstream twice, and the second one is over the limit there
		config: `http://%[1]s {
			reverse_proxy %[2]s {
				@ok status 200
				handle_response @ok {
					reverse_proxy %[2]s {
						@refused status 429
						handle_response @refused {
							respond "then {rp.status_code}"
						}
					}
				}
			}
		}
		http://%[2]s {
			ratelimit {
				zone all {
					key all
					rate 1 1h
				}
			}
			respond "once"
		}`,
		content: "then 429",
	},
}

func skipUnlessAsked(t *testing.T) {
	t.Helper()
	if os.Getenv("GATEHOUSE_BUILDS") != "1" {
		t.Skip("SKIPPED: builds of whole Caddy binaries take minutes; set GATEHOUSE_BUILDS=1 to run them")
	}
}

func root(t *testing.T) string {
	t.Helper()
	dir, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// run runs a command and returns what it prints.
func run(t *testing.T, dir string, env []string, name string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Dir, cmd.Env = dir, append(os.Environ(), env...)
	var out, problems bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &problems
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s %s: %v\n%s%s", name, strings.Join(args, " "), err, &out, &problems)
	}
	return out.String()
}

// xcaddy builds the tool at its pinned version.
func xcaddy(t *testing.T) string {
	t.Helper()
	tool := filepath.Join(t.TempDir(), "xcaddy")
	run(t, root(t), nil, "go", "build", "-modfile=tools.mod", "-o", tool, "github.com/caddyserver/xcaddy/cmd/xcaddy")
	return tool
}

// folders lists the modules of the repository.
func folders(t *testing.T) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(root(t), "modules", "*", "*.go"))
	if err != nil || len(files) == 0 {
		t.Fatalf("finding modules: %v", err)
	}
	names := make(map[string]bool)
	for _, f := range files {
		names[filepath.Base(filepath.Dir(f))] = true
	}
	return slices.Sorted(maps.Keys(names))
}

// proxy is the module cache as a module proxy: it answers for what has been
// downloaded and says "not found" about a module that is only here.
func proxy(t *testing.T) []string {
	t.Helper()
	cache := strings.TrimSpace(run(t, root(t), nil, "go", "env", "GOMODCACHE"))
	// xcaddy tidies, which also asks for what the tests of dependencies need
	run(t, root(t), nil, "go", "mod", "tidy", "-diff")
	return []string{
		"GOPROXY=file://" + filepath.ToSlash(filepath.Join(cache, "cache", "download")), "GOSUMDB=off",
		"GOFLAGS=-mod=mod -buildvcs=false", "GOWORK=off",
	}
}

// A binary with one module has its modules, needs no order, and serves.
func TestAlone(t *testing.T) {
	skipUnlessAsked(t)
	for _, name := range folders(t) {
		t.Run(name, func(t *testing.T) {
			want, ok := alone[name]
			if !ok {
				t.Fatalf("modules/%s has no line in this test", name)
			}
			binary := caddybin.Name(t.TempDir())
			env := append(proxy(t), "XCADDY_GO_BUILD_FLAGS=-buildvcs=false")
			run(t, t.TempDir(), env, xcaddy(t), "build", caddyVersion,
				"--with", module+"/modules/"+name, "--replace", module+"="+root(t), "--output", binary)
			checkIDs(t, binary, want.ids)

			site, upstream := caddybin.FreeAddr(t), caddybin.FreeAddr(t)
			caddybin.Serve(t, binary, "{\n\tadmin off\n\tauto_https off\n\tdefault_bind 127.0.0.1\n}\n"+fmt.Sprintf(want.config, site, upstream), site, upstream)
			if res, body := caddybin.Get(t, "http://"+site+"/"); res.StatusCode != 200 || body != want.content {
				t.Errorf("got %d %q, want %q", res.StatusCode, body, want.content)
			}
		})
	}
}

func checkIDs(t *testing.T, binary string, want []string) {
	t.Helper()
	var ids []string
	for _, m := range caddybin.Modules(t, binary) {
		ids = append(ids, m.ID)
	}
	slices.Sort(ids)
	if !slices.Equal(ids, want) {
		t.Errorf("modules = %v\nwant      %v", ids, want)
	}
}

// The manifest builds a binary with the whole set.
func TestManifest(t *testing.T) {
	skipUnlessAsked(t)
	binary := caddybin.Name(t.TempDir())
	run(t, root(t), []string{"XCADDY_GO_BUILD_FLAGS=-buildvcs=false"}, "go", "run", "./cmd/xcaddyjson", "-run", "-output", binary)
	var want []string
	for _, a := range alone {
		want = append(want, a.ids...)
	}
	slices.Sort(want)
	checkIDs(t, binary, want)
}

// The order of imports changes nothing: each directive has a place of its own.
func TestImportOrder(t *testing.T) {
	skipUnlessAsked(t)
	dir := t.TempDir()
	config := filepath.Join(dir, "Caddyfile")
	if err := os.WriteFile(config, []byte(`:8080 {
	respond ok
	encode gzip
	hooks {
		connection
	}
	reverse_proxy localhost:8081 {
		transport hooks
	}
	basic_auth {
		user $2a$14$Zkx19XLiW6VYouLHR5NmfOFU0z2GTNmpkT/5qqR7hx4IjWJPDhjvG
	}
	ratelimit {
		zone z {
			key client
			rate 10 1m
		}
	}
	header X-One 1
}
`), 0o600); err != nil {
		t.Fatal(err)
	}
	names := folders(t)
	var docs []string
	for range 2 {
		slices.Reverse(names)
		var imports strings.Builder
		for _, name := range names {
			fmt.Fprintf(&imports, "import _ %q\n", module+"/modules/"+name)
		}
		source, binary := filepath.Join(t.TempDir(), "main.go"), caddybin.Name(t.TempDir())
		text := "package main\n\nimport caddycmd \"" + caddyModule + "/cmd\"\n" + imports.String() +
			"import _ \"" + caddyModule + "/modules/standard\"\n\nfunc main() { caddycmd.Main() }\n"
		if err := os.WriteFile(source, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		run(t, root(t), []string{"GOFLAGS=-buildvcs=false"}, "go", "build", "-o", binary, source)
		docs = append(docs, run(t, dir, nil, binary, "adapt", "--config", config))
	}
	if docs[0] != docs[1] || !strings.Contains(docs[0], `"ratelimit"`) {
		t.Errorf("imported as %v:\n%s\nthe other way round:\n%s", names, docs[0], docs[1])
	}
	at := func(handler string) int { return strings.Index(docs[0], `"handler":"`+handler+`"`) }
	if at("ratelimit") > at("authentication") || at("hooks") < at("encode") {
		t.Errorf("a handler is out of its place: %s", docs[0])
	}
}

// versions lists what a build of Caddy with the given requirements selects.
func versions(t *testing.T, with ...string) map[string]string {
	t.Helper()
	dir := t.TempDir()
	env := []string{"GOFLAGS=-mod=mod", "GOWORK=off"}
	run(t, dir, env, "go", "mod", "init", "caddy")
	run(t, dir, env, "go", "mod", "edit", "-require="+caddyModule+"@"+caddyVersion)
	for _, m := range with {
		run(t, dir, env, "go", "mod", "edit", "-require="+m+"@v0.0.0", "-replace="+m+"="+root(t))
	}
	selected := make(map[string]string)
	for sc := bufio.NewScanner(strings.NewReader(run(t, dir, env, "go", "list", "-m", "all"))); sc.Scan(); {
		if path, version, ok := strings.Cut(sc.Text(), " "); ok {
			selected[path] = version
		}
	}
	return selected
}

// Our requirements change no version that Caddy selects by itself.
func TestLightVersions(t *testing.T) {
	skipUnlessAsked(t)
	stock, ours := versions(t), versions(t, module)
	if len(stock) < 50 {
		t.Fatalf("only %d modules in stock Caddy", len(stock))
	}
	for path, version := range stock {
		if ours[path] != version {
			t.Errorf("%s: %s becomes %s", path, version, ours[path])
		}
	}
	for path, version := range ours {
		if stock[path] == "" {
			t.Logf("more than stock: %s %s", path, version)
		}
	}
}

// foreign are engines that no module may bring into a build by itself, but for
// the one that is named.
var foreign = map[string]string{
	"coraza": "", "souin": "", "cache-handler": "", "otter": "", "ristretto": "", "rueidis": "ratelimit", "consul": "", "k8s.io": "",
}

// A module depends on none of its siblings and on no foreign engine.
func TestLightDependencies(t *testing.T) {
	stock := make(map[string]bool)
	for dep := range strings.FieldsSeq(run(t, root(t), nil, "go", "list", "-deps", caddyModule+"/modules/standard")) {
		stock[dep] = true
	}
	for _, name := range folders(t) {
		deps := run(t, root(t), nil, "go", "list", "-deps", "./modules/"+name)
		for dep := range strings.FieldsSeq(deps) {
			if stock[dep] {
				continue
			}
			if strings.HasPrefix(dep, module+"/modules/") && dep != module+"/modules/"+name {
				t.Errorf("%s depends on %s", name, dep)
			}
			for f, but := range foreign {
				if name != but && strings.Contains(dep, f) {
					t.Errorf("%s depends on %s", name, dep)
				}
			}
		}
	}
}
