// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
)

// manifest is xcaddy's Builder, as far as xcaddy's command line can express it.
type manifest struct {
	CaddyVersion string        `json:"caddy_version"`
	Plugins      []plugin      `json:"plugins"`
	Replacements []replacement `json:"replacements"`
	EmbedDirs    []embedDir    `json:"embed_dir"`
	OS           string        `json:"os"`
	Arch         string        `json:"arch"`
	ARM          string        `json:"arm"`
	Cgo          bool          `json:"cgo"`
	BuildFlags   string        `json:"build_flags"`
	ModFlags     string        `json:"mod_flags"`
	PgoProfile   string        `json:"pgo_profile"`
	RaceDetector bool          `json:"race_detector"`
	Debug        bool          `json:"debug"`
	SkipBuild    bool          `json:"skip_build"`
	SkipCleanup  bool          `json:"skip_cleanup"`
}

type plugin struct {
	ModulePath string `json:"module_path"`
	Version    string `json:"version"`
}

type replacement struct {
	Old string `json:"old"`
	New string `json:"new"`
}

type embedDir struct {
	Dir  string `json:"dir"`
	Name string `json:"name"`
}

var (
	exactVersion = regexp.MustCompile(`^v\d+\.\d+\.\d+(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?$`)
	modulePath   = regexp.MustCompile(`^[0-9A-Za-z][0-9A-Za-z.-]*\.[0-9A-Za-z.-]+(/[0-9A-Za-z._~-]+)+$`)
)

// readManifest reads and checks a manifest. Every error starts with the file, and with the line where there is one.
func readManifest(file string) (*manifest, error) {
	data, err := os.ReadFile(file) //nolint:gosec // the operator names the file
	if err != nil {
		return nil, err
	}
	m, err := parseManifest(data, filepath.Dir(file))
	if e, ok := errors.AsType[*lineError](err); ok {
		return nil, fmt.Errorf("%s:%d: %w", file, e.line, e.err)
	}
	return m, err
}

func parseManifest(data []byte, dir string) (*manifest, error) {
	lines, err := locate(data)
	if err != nil {
		return nil, err
	}
	m := new(manifest)
	err = json.Unmarshal(data, m)
	if e, ok := errors.AsType[*json.UnmarshalTypeError](err); ok {
		return nil, &lineError{lineAt(data, e.Offset), fmt.Errorf("%s must not be of type %s", e.Field, e.Value)}
	}
	if err != nil {
		return nil, err
	}
	return m, m.check(dir, lines)
}

// check looks at the values alone and at the local folders they name.
func (m *manifest) check(dir string, lines map[string]int) error {
	fail := func(where, format string, args ...any) error {
		line, at := lines[where], where
		// What is missing has no line of its own: it belongs to the object that lacks it.
		for line == 0 && at != "" {
			at = at[:max(0, strings.LastIndex(at, "."))]
			line = lines[at]
		}
		return &lineError{line, fmt.Errorf(where+" "+format, args...)}
	}
	version := func(where, of, v string) error {
		switch {
		case v == "":
			return fail(where, "of %s is missing", of)
		case !exactVersion.MatchString(v):
			return fail(where, "of %s must be exact, such as v1.2.3; got %q", of, v)
		}
		return nil
	}
	module := func(where, path string) error {
		switch {
		case path == "":
			return fail(where, "is missing")
		case !modulePath.MatchString(path):
			return fail(where, "must be a module path, such as example.com/name; got %q", path)
		}
		return nil
	}

	if err := version("caddy_version", "the build", m.CaddyVersion); err != nil {
		return err
	}
	seen := make(map[string]bool)
	for i, p := range m.Plugins {
		at := fmt.Sprintf("plugins[%d]", i)
		if err := module(at+".module_path", p.ModulePath); err != nil {
			return err
		}
		if err := version(at+".version", p.ModulePath, p.Version); err != nil {
			return err
		}
		if seen[p.ModulePath] {
			return fail(at+".module_path", "names %q a second time", p.ModulePath)
		}
		seen[p.ModulePath] = true
	}
	for i, r := range m.Replacements {
		at := fmt.Sprintf("replacements[%d]", i)
		path, v := splitModule(r.Old)
		if err := module(at+".old", path); err != nil {
			return err
		}
		if v != "" {
			if err := version(at+".old", path, v); err != nil {
				return err
			}
		}
		switch path, v := splitModule(r.New); {
		case r.New == "":
			return fail(at+".new", "is missing")
		case isLocal(r.New):
			if _, err := os.Stat(filepath.Join(localPath(dir, r.New), "go.mod")); err != nil {
				return fail(at+".new", "must be a folder with a go.mod; got %q: %w", r.New, err)
			}
		case !modulePath.MatchString(path) || !exactVersion.MatchString(v):
			return fail(at+".new", "must be a path that starts with ./ or ../, or a module with its version; got %q", r.New)
		}
	}
	for i, e := range m.EmbedDirs {
		if e.Dir == "" {
			return fail(fmt.Sprintf("embed_dir[%d].dir", i), "is missing")
		}
	}
	return nil
}

// locate returns the line of every value by its path, such as plugins[0].version, and "" for the whole. It refuses
// fields that the manifest does not have, which encoding/json reports without a line or, in another case, accepts.
func locate(data []byte) (map[string]int, error) {
	l := locator{data: data, dec: json.NewDecoder(bytes.NewReader(data)), lines: make(map[string]int)}
	if err := l.value("", reflect.TypeFor[manifest]()); err != nil {
		return nil, err
	}
	if _, err := l.dec.Token(); !errors.Is(err, io.EOF) {
		return nil, l.errorf("reading manifest: something follows its end")
	}
	return l.lines, nil
}

type locator struct {
	data  []byte
	dec   *json.Decoder
	lines map[string]int
}

// value reads the next value, which stands at path and should have the type t.
func (l *locator) value(path string, t reflect.Type) error {
	token, err := l.token()
	if err != nil {
		return err
	}
	if path == "" && token != json.Delim('{') {
		return l.errorf("manifest must be an object")
	}
	if _, ok := l.lines[path]; !ok {
		l.lines[path] = lineAt(l.data, l.dec.InputOffset())
	}
	switch token {
	case json.Delim('['):
		if t.Kind() == reflect.Slice {
			t = t.Elem()
		}
		for i := 0; l.dec.More(); i++ {
			if err := l.value(fmt.Sprintf("%s[%d]", path, i), t); err != nil {
				return err
			}
		}
	case json.Delim('{'):
		for l.dec.More() {
			if err := l.field(path, t); err != nil {
				return err
			}
		}
	default:
		return nil
	}
	_, err = l.token() // the closing bracket
	return err
}

// field reads one member of an object.
func (l *locator) field(path string, t reflect.Type) error {
	token, err := l.token()
	if err != nil {
		return err
	}
	name, _ := token.(string)
	path = strings.TrimPrefix(path+"."+name, ".")
	typ, ok := fieldType(t, name)
	if !ok {
		return l.errorf("unknown field %q", path)
	}
	if l.lines[path] != 0 {
		return l.errorf("repeated field %q", path)
	}
	l.lines[path] = lineAt(l.data, l.dec.InputOffset())
	return l.value(path, typ)
}

func (l *locator) token() (json.Token, error) {
	token, err := l.dec.Token()
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return nil, l.errorf("reading manifest: %w", err)
	}
	return token, nil
}

func (l *locator) errorf(format string, args ...any) error {
	return &lineError{lineAt(l.data, l.dec.InputOffset()), fmt.Errorf(format, args...)}
}

func fieldType(t reflect.Type, name string) (reflect.Type, bool) {
	if t.Kind() == reflect.Struct {
		for f := range t.Fields() {
			if f.Tag.Get("json") == name {
				return f.Type, true
			}
		}
	}
	return nil, false
}

func lineAt(data []byte, offset int64) int {
	return 1 + bytes.Count(data[:min(offset, int64(len(data)))], []byte("\n"))
}

// lineError is an error with its place in the manifest.
type lineError struct {
	line int
	err  error
}

func (e *lineError) Error() string { return e.err.Error() }
func (e *lineError) Unwrap() error { return e.err }
