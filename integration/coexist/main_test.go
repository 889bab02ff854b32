// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/caddy-gatehouse/gatehouse/internal/caddybin"
)

// binary is this package, built once.
var binary string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "coexist")
	if err != nil {
		panic(err)
	}
	binary = caddybin.Name(dir)
	code := 1
	if out, err := exec.Command("go", "build", "-o", binary, ".").CombinedOutput(); err != nil {
		fmt.Printf("building coexist: %v\n%s", err, out)
	} else {
		code = m.Run()
	}
	os.RemoveAll(dir)
	os.Exit(code)
}

func TestModules(t *testing.T) {
	var ids []string
	for _, m := range caddybin.Modules(t, binary) {
		ids = append(ids, m.ID)
	}
	for _, want := range []string{
		"http.handlers.hooks",
		"http.hooks.connection",
		"http.hooks.on_error",
		"http.reverse_proxy.transport.hooks",
		"http.handlers.ratelimit",
		"http.ratelimit.stores.memory",
		"http.ratelimit.stores.redis",
		"admin.api.gatehouse_ratelimit",
		"cache",
		"http.handlers.cache",
		"http.handlers.rate_limit",
	} {
		if !slices.Contains(ids, want) {
			t.Errorf("module %s is missing; got %v", want, ids)
		}
	}
}

// TestServe sends requests through a cache, a rate limit, the hooks and their transport to an upstream. The cache
// stands outside the rate limit, so a hit does not count.
func TestServe(t *testing.T) {
	site, origin := caddybin.FreeAddr(t), caddybin.FreeAddr(t)
	caddybin.Serve(t, binary, fmt.Sprintf(`{
	admin off
	persist_config off
	default_bind 127.0.0.1
	cache {
		ttl 1m
	}
}

http://%[1]s {
	rate_limit {
		zone all {
			key all
			events 2
			window 1h
		}
	}
	cache
	hooks {
		upstream_request {
			header_up X-Seen "by the hooks"
		}
	}
	reverse_proxy %[2]s {
		transport hooks
	}
}

http://%[2]s {
	header Cache-Control max-age=60
	respond "seen {header.X-Seen}"
}
`, site, origin), site, origin)

	for i, tt := range []struct {
		path   string
		status int
		cache  string // in Cache-Status
	}{
		{"/one", http.StatusOK, "stored"},
		{"/one", http.StatusOK, "hit"},
		{"/two", http.StatusOK, "stored"},
		{"/three", http.StatusTooManyRequests, ""},
	} {
		resp, body := caddybin.Get(t, "http://"+site+tt.path)
		cache := resp.Header.Get("Cache-Status")
		if resp.StatusCode != tt.status || !strings.Contains(cache, tt.cache) {
			t.Errorf("request %d: status %d and Cache-Status %q, want %d and %q", i, resp.StatusCode, cache, tt.status, tt.cache)
		}
		if tt.status == http.StatusOK && body != "seen by the hooks" {
			t.Errorf("request %d: body %q, want %q", i, body, "seen by the hooks")
		}
	}
}

// TestLimits sends requests through both limiters, and through our own one in front of a cache, where only what reached
// the origin counts. That needs a route, since the cache stands outside the limiters by itself.
func TestLimits(t *testing.T) {
	site, origin := caddybin.FreeAddr(t), caddybin.FreeAddr(t)
	caddybin.Serve(t, binary, fmt.Sprintf(`{
	admin off
	persist_config off
	default_bind 127.0.0.1
	cache {
		ttl 1m
	}
}

http://%[1]s {
	rate_limit {
		zone theirs {
			match {
				path /theirs
			}
			key all
			events 1
			window 1h
		}
	}
	ratelimit {
		headers draft
		zone ours {
			match path /ours
			key all
			rate 1 1h
		}
	}
	route /cached/* {
		ratelimit {
			headers draft
			zone origin {
				key all
				rate 2 1h
				count_when cache miss
			}
		}
		cache
	}
	reverse_proxy %[2]s
}

http://%[2]s {
	header Cache-Control max-age=60
	respond ok
}
`, site, origin), site, origin)

	for i, tt := range []struct {
		path   string
		status int
		policy string // in RateLimit-Policy
	}{
		{"/theirs", http.StatusOK, ""},
		{"/theirs", http.StatusTooManyRequests, ""},
		{"/ours", http.StatusOK, `"ours";q=1;w=3600`},
		{"/ours", http.StatusTooManyRequests, `"ours";q=1;w=3600`},
		{"/theirs", http.StatusTooManyRequests, ""},
		{"/cached/1", http.StatusOK, `"origin";q=2;w=3600`},
		{"/cached/1", http.StatusOK, `"origin";q=2;w=3600`},
		{"/cached/1", http.StatusOK, `"origin";q=2;w=3600`},
		{"/cached/2", http.StatusOK, `"origin";q=2;w=3600`},
		{"/cached/3", http.StatusTooManyRequests, `"origin";q=2;w=3600`},
	} {
		resp, _ := caddybin.Get(t, "http://"+site+tt.path)
		if policy := resp.Header.Get("RateLimit-Policy"); resp.StatusCode != tt.status || policy != tt.policy {
			t.Errorf("request %d: status %d and RateLimit-Policy %q, want %d and %q", i, resp.StatusCode, policy, tt.status, tt.policy)
		}
	}
}
