// SPDX-License-Identifier: Apache-2.0

package main

import (
	"path/filepath"
	"slices"
	"strings"
)

// command is one call of xcaddy.
type command struct {
	env  []string // NAME=value
	args []string // without the program's name
}

// command returns the call that builds m. Paths in m are relative to dir.
func (m *manifest) command(dir, output string) command {
	var c command
	set := func(name, value string) {
		if value != "" {
			c.env = append(c.env, name+"="+value)
		}
	}
	set("GOOS", m.OS)
	set("GOARCH", m.Arch)
	set("GOARM", m.ARM)
	set("CGO_ENABLED", flagValue(m.Cgo))
	set("XCADDY_GO_BUILD_FLAGS", m.BuildFlags)
	set("XCADDY_GO_MOD_FLAGS", m.ModFlags)
	set("XCADDY_RACE_DETECTOR", flagValue(m.RaceDetector))
	set("XCADDY_DEBUG", flagValue(m.Debug))
	set("XCADDY_SKIP_BUILD", flagValue(m.SkipBuild))
	set("XCADDY_SKIP_CLEANUP", flagValue(m.SkipCleanup))

	c.args = append(c.args, "build", m.CaddyVersion)
	replacements := slices.Clone(m.Replacements)
	for _, p := range m.Plugins {
		with := p.ModulePath + "@" + p.Version
		// A replacement of the plugin itself joins its version in one option: xcaddy then asks no
		// module proxy about a module that only this machine has.
		i := slices.IndexFunc(replacements, func(r replacement) bool {
			path, version := splitModule(r.Old)
			return path == p.ModulePath && (version == "" || version == p.Version)
		})
		if i >= 0 {
			with += "=" + target(dir, replacements[i].New)
			replacements = slices.Delete(replacements, i, i+1)
		}
		c.args = append(c.args, "--with", with)
	}
	for _, r := range replacements {
		c.args = append(c.args, "--replace", joinModule(r.Old)+"="+target(dir, r.New))
	}
	for _, e := range m.EmbedDirs {
		arg := localPath(dir, e.Dir)
		if e.Name != "" {
			arg = e.Name + ":" + arg
		}
		c.args = append(c.args, "--embed", arg)
	}
	if m.PgoProfile != "" {
		c.args = append(c.args, "--pgo", localPath(dir, m.PgoProfile))
	}
	if output != "" {
		c.args = append(c.args, "--output", output)
	}
	return c
}

// String returns the call as a line for a POSIX shell.
func (c command) String() string {
	words := make([]string, 0, len(c.env)+1+len(c.args))
	for _, kv := range c.env {
		name, value, _ := strings.Cut(kv, "=")
		words = append(words, name+"="+quote(value))
	}
	words = append(words, "xcaddy")
	for _, arg := range c.args {
		words = append(words, quote(arg))
	}
	return strings.Join(words, " ")
}

// quote returns s as one shell word.
func quote(s string) string {
	plain := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("-_=+./:@,%", r)
	}
	if s != "" && strings.TrimFunc(s, plain) == "" {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// target returns the new side of a replacement as xcaddy wants it.
func target(dir, s string) string {
	if isLocal(s) {
		return localPath(dir, s)
	}
	return joinModule(s)
}

// localPath makes a path of the manifest relative to the working directory. It keeps a leading dot, by which xcaddy
// tells a path from a module.
func localPath(dir, path string) string {
	if filepath.IsAbs(path) {
		return path
	}
	path = filepath.ToSlash(filepath.Join(dir, path))
	if strings.HasPrefix(path, ".") || filepath.IsAbs(path) {
		return path
	}
	return "./" + path
}

func isLocal(s string) bool {
	return s == "." || s == ".." || strings.HasPrefix(s, "./") || strings.HasPrefix(s, "../") || filepath.IsAbs(s)
}

// splitModule cuts "path version", the form in which a Builder is encoded, or "path@version".
func splitModule(s string) (path, version string) {
	path, version, _ = strings.Cut(strings.Replace(s, " ", "@", 1), "@")
	return path, version
}

func joinModule(s string) string {
	path, version := splitModule(s)
	if version == "" {
		return path
	}
	return path + "@" + version
}

func flagValue(set bool) string {
	if set {
		return "1"
	}
	return ""
}
