// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

// write puts a manifest and a replacement's folder into a fresh working directory.
func write(t *testing.T, manifest string) {
	t.Helper()
	t.Chdir(t.TempDir())
	for name, content := range map[string]string{
		"xcaddy.json":     manifest,
		"go.mod":          "module example.com/here\n",
		"plugin/go.mod":   "module example.com/plugin\n",
		"deep/xc.json":    manifest,
		"deep/go.mod":     "module example.com/deep\n",
		"empty/README.md": "",
	} {
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func printed(t *testing.T, args ...string) string {
	t.Helper()
	var out bytes.Buffer
	if err := run(t.Context(), args, &out, os.Stderr); err != nil {
		t.Fatalf("run(%q): %v", args, err)
	}
	return strings.TrimSpace(out.String())
}

func TestPrint(t *testing.T) {
	for _, tt := range []struct {
		name     string
		manifest string
		args     []string
		want     string
	}{
		{
			name:     "stock",
			manifest: `{"caddy_version": "v2.11.9"}`,
			want:     "xcaddy build v2.11.9",
		},
		{
			name: "local checkout",
			manifest: `{"caddy_version": "v2.11.9",
				"plugins": [{"module_path": "example.com/here", "version": "v0.0.0"}],
				"replacements": [{"old": "example.com/here", "new": "."}]}`,
			args: []string{"-output", "my caddy"},
			want: "xcaddy build v2.11.9 --with example.com/here@v0.0.0=. --output 'my caddy'",
		},
		{
			name: "manifest in another folder",
			manifest: `{"caddy_version": "v2.11.9",
				"plugins": [{"module_path": "example.com/deep", "version": "v0.0.0"}],
				"replacements": [{"old": "example.com/deep v0.0.0", "new": "."}]}`,
			args: []string{"-file", "deep/xc.json"},
			want: "xcaddy build v2.11.9 --with example.com/deep@v0.0.0=./deep",
		},
		{
			name: "replacements of other modules",
			manifest: `{"caddy_version": "v2.11.9",
				"plugins": [{"module_path": "example.com/here/modules/one", "version": "v1.2.3-rc.1"}],
				"replacements": [
					{"old": "example.com/plugin", "new": "./plugin"},
					{"old": "example.com/dep v1.0.0", "new": "example.com/fork v1.0.1"},
					{"old": "example.com/dep@v1.1.0", "new": "example.com/fork@v1.1.1"}]}`,
			want: "xcaddy build v2.11.9 --with example.com/here/modules/one@v1.2.3-rc.1" +
				" --replace example.com/plugin=./plugin" +
				" --replace example.com/dep@v1.0.0=example.com/fork@v1.0.1" +
				" --replace example.com/dep@v1.1.0=example.com/fork@v1.1.1",
		},
		{
			name: "replacement of another version of the plugin",
			manifest: `{"caddy_version": "v2.11.9",
				"plugins": [{"module_path": "example.com/here", "version": "v1.0.0"}],
				"replacements": [{"old": "example.com/here@v0.9.0", "new": "."}]}`,
			want: "xcaddy build v2.11.9 --with example.com/here@v1.0.0 --replace example.com/here@v0.9.0=.",
		},
		{
			name: "everything else",
			manifest: `{"caddy_version": "v2.11.9", "os": "linux", "arch": "arm", "arm": "7", "cgo": true,
				"build_flags": "-tags 'a b'", "mod_flags": "-x", "race_detector": true, "debug": true,
				"skip_build": true, "skip_cleanup": true, "pgo_profile": "cpu.pprof",
				"embed_dir": [{"dir": "site", "name": "www"}, {"dir": "plain"}]}`,
			want: `GOOS=linux GOARCH=arm GOARM=7 CGO_ENABLED=1 XCADDY_GO_BUILD_FLAGS='-tags '\''a b'\''' XCADDY_GO_MOD_FLAGS=-x` +
				" XCADDY_RACE_DETECTOR=1 XCADDY_DEBUG=1 XCADDY_SKIP_BUILD=1 XCADDY_SKIP_CLEANUP=1" +
				" xcaddy build v2.11.9 --embed www:./site --embed ./plain --pgo ./cpu.pprof",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			write(t, tt.manifest)
			if got := printed(t, tt.args...); got != tt.want {
				t.Errorf("printed\n%s\nwant\n%s", got, tt.want)
			}
		})
	}
}

func TestManifestErrors(t *testing.T) {
	for _, tt := range []struct{ name, manifest, want string }{
		{"empty", ``, `xcaddy.json:1: reading manifest: unexpected EOF`},
		{"cut off", "{\n\"plugins\": [\n", `xcaddy.json:2: reading manifest: unexpected EOF`},
		{"no object", `[]`, `xcaddy.json:1: manifest must be an object`},
		{"syntax", "{\n\"caddy_version\": v2\n}", `xcaddy.json:2: reading manifest: invalid character 'v'`},
		{"trailing", "{}\n{}", `xcaddy.json:2: reading manifest: something follows its end`},
		{"unknown field", "{\n\"dependencies\": []}", `xcaddy.json:2: unknown field "dependencies"`},
		{"unknown in a plugin", "{\"plugins\": [{},\n{\"module\": \"x\"}]}", `xcaddy.json:2: unknown field "plugins[1].module"`},
		{"no such option", `{"timeout_get": 1}`, `unknown field "timeout_get"`},
		{"other case", `{"Caddy_Version": "v2.11.9"}`, `unknown field "Caddy_Version"`},
		{"repeated field", "{\"os\": \"linux\",\n\"os\": \"darwin\"}", `xcaddy.json:2: repeated field "os"`},
		{"wrong type", "{\n\n\"debug\": 1}", `xcaddy.json:3: debug must not be of type number`},
		{"wrong object", `{"plugins": {"module_path": "x"}}`, `unknown field "plugins.module_path"`},
		{"no caddy version", `{}`, `xcaddy.json:1: caddy_version of the build is missing`},
		{"latest", `{"caddy_version": "latest"}`, `caddy_version of the build must be exact, such as v1.2.3; got "latest"`},
		{
			"no module", "{\"caddy_version\": \"v2.11.9\", \"plugins\": [\n{\"version\": \"v1.0.0\"}]}",
			`xcaddy.json:2: plugins[0].module_path is missing`,
		},
		{
			"no path", `{"caddy_version": "v2.11.9", "plugins": [{"module_path": "./x", "version": "v1.0.0"}]}`,
			`plugins[0].module_path must be a module path, such as example.com/name; got "./x"`,
		},
		{
			"no version", "{\"caddy_version\": \"v2.11.9\", \"plugins\": [\n{\n\"module_path\": \"example.com/x\"}]}",
			`xcaddy.json:2: plugins[0].version of example.com/x is missing`,
		},
		{
			"plugin twice", "{\"caddy_version\": \"v2.11.9\", \"plugins\": [\n{\"module_path\": \"example.com/x\", \"version\": \"v1.0.0\"},\n{\"module_path\": \"example.com/x\", \"version\": \"v1.0.1\"}]}",
			`xcaddy.json:3: plugins[1].module_path names "example.com/x" a second time`,
		},
		{"replacing nothing", `{"caddy_version": "v2.11.9", "replacements": [{"new": "."}]}`, `replacements[0].old is missing`},
		{
			"replacing with nothing", `{"caddy_version": "v2.11.9", "replacements": [{"old": "example.com/x"}]}`,
			`replacements[0].new is missing`,
		},
		{
			"replacing a branch", `{"caddy_version": "v2.11.9", "replacements": [{"old": "example.com/x main", "new": "."}]}`,
			`replacements[0].old of example.com/x must be exact, such as v1.2.3; got "main"`,
		},
		{
			"replacing with no module", "{\"caddy_version\": \"v2.11.9\", \"replacements\": [{\"old\": \"example.com/x\",\n\"new\": \"./empty\"}]}",
			`xcaddy.json:2: replacements[0].new must be a folder with a go.mod; got "./empty"`,
		},
		{
			"replacing with a bare folder", `{"caddy_version": "v2.11.9", "replacements": [{"old": "example.com/x", "new": "plugin"}]}`,
			`replacements[0].new must be a path that starts with ./ or ../, or a module with its version; got "plugin"`,
		},
		{"embedding nothing", `{"caddy_version": "v2.11.9", "embed_dir": [{"name": "x"}]}`, `embed_dir[0].dir is missing`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			write(t, tt.manifest)
			err := run(t.Context(), nil, os.Stdout, os.Stderr)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("run() = %v, want %s", err, tt.want)
			}
		})
	}
}

func TestMissingFile(t *testing.T) {
	t.Chdir(t.TempDir())
	if err := run(t.Context(), nil, os.Stdout, os.Stderr); err == nil || !strings.Contains(err.Error(), "xcaddy.json") {
		t.Errorf("run() = %v, want an error about xcaddy.json", err)
	}
}

// TestRun puts a script in place of xcaddy.
func TestRun(t *testing.T) {
	const manifest = `{"caddy_version": "v2.11.9", "race_detector": true}`
	if runtime.GOOS == "windows" {
		t.Skip("needs a shell script in PATH")
	}
	for _, tt := range []struct{ name, script, out, err string }{
		{"passes words and environment", "echo \"$XCADDY_RACE_DETECTOR $*\"", "1 build v2.11.9 --output a b\n", ""},
		{"fails with xcaddy", "exit 3", "", "running xcaddy: exit status 3"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			write(t, manifest)
			bin := t.TempDir()
			if err := os.WriteFile(filepath.Join(bin, "xcaddy"), []byte("#!/bin/sh\n"+tt.script+"\n"), 0o700); err != nil {
				t.Fatal(err)
			}
			t.Setenv("PATH", bin+string(os.PathListSeparator)+os.Getenv("PATH"))

			var out, log bytes.Buffer
			err := run(t.Context(), []string{"-run", "-output", "a b"}, &out, &log)
			if out.String() != tt.out || (err == nil) != (tt.err == "") || err != nil && err.Error() != tt.err {
				t.Errorf("run() printed %q and returned %v, want %q and %q", &out, err, tt.out, tt.err)
			}
			if want := "XCADDY_RACE_DETECTOR=1 xcaddy build v2.11.9 --output 'a b'\n"; log.String() != want {
				t.Errorf("run() logged %q, want %q", &log, want)
			}
		})
	}
}

func TestRunWithoutXcaddy(t *testing.T) {
	write(t, `{"caddy_version": "v2.11.9"}`)
	t.Setenv("PATH", t.TempDir())
	err := run(t.Context(), []string{"-run"}, os.Stdout, &bytes.Buffer{})
	if err == nil || !strings.HasPrefix(err.Error(), "finding xcaddy") {
		t.Errorf("run() = %v, want an error about finding xcaddy", err)
	}
}

// TestOwnManifest reads the manifest of this repository.
func TestOwnManifest(t *testing.T) {
	t.Chdir("../..")
	want := "xcaddy build v2.11.9 --with github.com/caddy-gatehouse/gatehouse@v0.0.0=."
	if got := printed(t); got != want {
		t.Errorf("printed %s, want %s", got, want)
	}
}
