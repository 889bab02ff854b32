// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
)

// loadError is what Caddy says to routes with these handlers, each in a server
// of its own.
func loadError(t *testing.T, handlers ...string) error {
	t.Helper()
	var servers []string
	for i, h := range handlers {
		servers = append(servers, fmt.Sprintf(`"srv%d": {"listen": ["127.0.0.1:%d"], "routes": [{"handle": [%s]}]}`, i, 8080+i, h))
	}
	doc := `{"admin": {"disabled": true, "config": {"persist": false}}, "logging": {"logs": {"default": {"level": "FATAL"}}},
		"apps": {"http": {"servers": {` + strings.Join(servers, ",") + `}}}}`
	var cfg caddy.Config
	if err := json.Unmarshal([]byte(doc), &cfg); err != nil {
		t.Fatalf("%v in %s", err, doc)
	}
	return caddy.Validate(&cfg)
}

// What only JSON can say wrongly is found when it is loaded.
func TestRatelimitJSON(t *testing.T) {
	const client = `"keys": [{"client": true}]`
	zones := func(list string) string { return `{"handler": "ratelimit", "zones": [` + list + `]}` }
	zone := func(rest string) string { return zones(`{"name": "z", ` + rest + `}`) }
	rate := func(rest string) string { return zone(client + `, "events": 10, "window": "1m", ` + rest) }
	redis := func(rest string) string {
		return rate(`"store": {"store": "redis", "address": ["localhost:6379"], ` + rest + `}`)
	}
	for _, tt := range []struct{ name, handler, want string }{
		{"no zones is fine", `{"handler": "ratelimit"}`, ""},
		{"a rate is fine", rate(`"burst": 1`), ""},

		{"headers", `{"handler": "ratelimit", "headers": "all"}`, `headers "all": must be off, draft or legacy`},
		{"unknown field", `{"handler": "ratelimit", "zone": []}`, `unknown field "zone"`},
		{"null zone", zones(`null`), `zones: there is a null`},
		{"unknown zone field", rate(`"bogus": 1`), `unknown field "bogus"`},
		{"no name", zones(`{` + client + `, "events": 1, "window": "1m"}`), `zone "": the name must be 1 to 64 letters`},
		{"bad name", zones(`{"name": "a b", ` + client + `, "events": 1, "window": "1m"}`), `zone "a b": the name must be 1 to 64 letters`},

		{"no keys", zone(`"events": 1, "window": "1m"`), `zone "z": it has no key; write ` + "`key all`"},
		{"null key", zone(`"keys": [null], "events": 1, "window": "1m"`), `zone "z": keys: there is a null`},
		{"empty key", zone(`"keys": [{}], "events": 1, "window": "1m"`), "zone \"z\": a key is either `client` or a text"},
		{"two kinds of key", zone(`"keys": [{"client": true, "text": "x"}], "events": 1, "window": "1m"`), "a key is either `client` or a text"},
		{"prefix of a text", zone(`"keys": [{"text": "x", "ipv6_prefix": 64}], "events": 1, "window": "1m"`), "ipv4_prefix and ipv6_prefix are for `key client`"},
		{"ipv4_prefix", zone(`"keys": [{"client": true, "ipv4_prefix": 33}], "events": 1, "window": "1m"`), `ipv4_prefix 33: must be from 1 to 32`},
		{"negative ipv4_prefix", zone(`"keys": [{"client": true, "ipv4_prefix": -1}], "events": 1, "window": "1m"`), `ipv4_prefix -1: must be from 1 to 32`},
		{"ipv6_prefix", zone(`"keys": [{"client": true, "ipv6_prefix": 129}], "events": 1, "window": "1m"`), `ipv6_prefix 129: must be from 1 to 128`},
		{"negative times", zone(`"keys": [{"client": true, "times": -1}], "events": 1, "window": "1m"`), `times -1: must be from 1 to 1073741824`},
		{"times", zone(`"keys": [{"client": true, "times": 1073741824}], "events": 2, "window": "1m"`), `times 1073741824: the limit would be more than 1073741824`},
		{"levels", zone(`"keys": [{"text": "1"}, {"text": "2"}, {"text": "3"}, {"text": "4"}, {"text": "5"}], "events": 1, "window": "1m"`), `it has 5 keys, and at most 4 levels are possible`},

		{"nothing limited", zone(client), `zone "z": it limits nothing: it has neither rate nor inflight`},
		{"negative events", zone(client + `, "events": -1, "window": "1m"`), `events -1: must be from 0 to 1073741824`},
		{"too many events", zone(client + `, "events": 2000000000, "window": "1m"`), `events 2000000000: must be from 0 to 1073741824`},
		{"negative burst", rate(`"burst": -1`), `burst -1: must be from 0 to 1073741824`},
		{"negative inflight", rate(`"inflight": -1`), `inflight -1: must be from 0 to 1073741824`},
		{"no window", zone(client + `, "events": 1`), `the window 0s must be from 1ms to 8760h0m0s`},
		{"negative window", zone(client + `, "events": 1, "window": -60000000000`), `the window -1m0s must be from 1ms to 8760h0m0s`},
		{"window alone", zone(client + `, "inflight": 1, "window": "1m"`), `a window needs events`},
		{"burst alone", zone(client + `, "inflight": 1, "burst": 2`), `burst needs a rate`},
		{"penalty alone", zone(client + `, "inflight": 1, "penalty": "1m"`), `penalty needs a rate`},
		{"delay alone", zone(client + `, "inflight": 1, "delay": "1m"`), `delay needs a rate`},
		{"cost alone", zone(client + `, "inflight": 1, "cost": "2"`), `cost needs a rate`},
		{"count_when alone", zone(client + `, "inflight": 1, "count_when": {"any_error": true}`), `count_when needs a rate`},

		{"mode", rate(`"mode": "loud"`), `mode "loud": must be off, shadow or enforce`},
		{"scope", rate(`"scope": "site"`), `scope "site": must be route or zone`},
		{"algorithm", rate(`"algorithm": "fixed"`), `algorithm "fixed": must be sliding_window or token_bucket`},
		{"on_empty_key", rate(`"on_empty_key": "pass"`), `on_empty_key "pass": must be skip, refuse or shared`},
		{"negative delay", rate(`"delay": -1`), `penalty, max_penalty and delay must not be negative`},
		{"negative penalty", rate(`"penalty": -1`), `penalty, max_penalty and delay must not be negative`},
		{"negative max_penalty", rate(`"penalty": 1, "max_penalty": -1`), `penalty, max_penalty and delay must not be negative`},
		{"short max_penalty", rate(`"penalty": "2m", "max_penalty": "1m"`), `the longest penalty 1m0s is shorter than the penalty 2m0s`},
		{"delay and penalty", rate(`"penalty": "2m", "delay": "1m"`), `delay and penalty exclude each other`},
		{"negative max_waiting", rate(`"max_waiting": -1`), `max_waiting -1: must be from 1 to 1073741824`},
		{"queue without inflight", rate(`"queue": {"size": 1, "max_wait": "1s"}`), `queue needs inflight`},
		{"empty queue", zone(client + `, "inflight": 1, "queue": {}`), `queue: its size and max_wait must be greater than zero`},
		{"negative queue", zone(client + `, "inflight": 1, "queue": {"size": -1, "max_wait": "1s"}`), `queue: its size and max_wait must be greater than zero`},
		{"negative max_wait", zone(client + `, "inflight": 1, "queue": {"size": 1, "max_wait": -1}`), `queue: its size and max_wait must be greater than zero`},
		{"cost", rate(`"cost": "many"`), `cost "many": must be a whole number from 0 to 1073741824 or have a placeholder`},
		{"negative cost", rate(`"cost": "-1"`), `cost "-1": must be a whole number`},

		{"count_when without conditions", rate(`"count_when": {}`), `count_when names no condition`},
		{"class", rate(`"count_when": {"classes": ["bogus"]}`), `count_when: unrecognized class "bogus"`},
		{"status", rate(`"count_when": {"statuses": ["4x"]}`), `count_when: parsing status "4x"`},
		{"cache word", rate(`"count_when": {"cache": ["maybe"]}`), `count_when: cache "maybe": must be hit, miss`},

		{"matcher", rate(`"match": [{"bogus": 1}]`), `http.matchers.bogus`},
		{"store", rate(`"store": {"store": "disk"}`), `unknown module: http.ratelimit.stores.disk`},
		{"small memory", rate(`"store": {"store": "memory", "max_memory": 1000}`), `max_memory 1000: must be from 64 KiB to 1.0 TiB`},
		{"negative memory", rate(`"store": {"store": "memory", "max_memory": -1}`), `max_memory -1: must be from 64 KiB`},
		{"on_saturation", rate(`"store": {"store": "memory", "on_saturation": "open"}`), `on_saturation "open": must be refuse or pass`},

		{"no address", rate(`"store": {"store": "redis"}`), `store redis has no address`},
		{"address", rate(`"store": {"store": "redis", "address": ["localhost"]}`), `address "localhost": must be host:port`},
		{"several addresses", rate(`"store": {"store": "redis", "address": ["a:1", "b:1"]}`), `several addresses need sentinel or cluster`},
		{"negative db", redis(`"db": -1`), `db -1: must be a whole number from 0 to 1048576`},
		{"deadline", redis(`"deadline": "1m"`), `deadline 1m0s: must be from 1ms to 10s`},
		{"negative deadline", redis(`"deadline": -1`), `deadline -1ns: must be from 1ms to 10s`},
		{"lease", redis(`"lease": -1`), `lease -1ns: must be from 1s to 24h`},
		{"on_failure", redis(`"on_failure": "pass"`), `on_failure "pass": must be local, open or closed`},
		{"local memory", redis(`"max_memory": 5`), `max_memory 5: must be from 64 KiB`},
		{"local on_saturation", redis(`"on_saturation": "open"`), `on_saturation "open": must be refuse or pass`},
		{"password that is not there", redis(`"password": "{env.GATEHOUSE_NO_SUCH}"`), `password: `},
		{"username that is not there", redis(`"username": "{env.GATEHOUSE_NO_SUCH}", "password": "x"`), `username: `},
		{"sentinel password that is not there", redis(`"sentinel": {"master": "m", "password": "{env.GATEHOUSE_NO_SUCH}"}`), `sentinel password: `},
		{"sentinel", redis(`"sentinel": {}`), `sentinel needs the name of the master`},
		{"sentinel and cluster", redis(`"sentinel": {"master": "m"}, "cluster": true`), `sentinel and cluster exclude each other`},
		{"ca that is not there", redis(`"tls": {"ca": "testdata/none.pem"}`), `open testdata/none.pem`},
		{"ca that is none", redis(`"tls": {"ca": "testdata/token"}`), `ca testdata/token: no certificate in PEM found`},
		{"certificate that is none", redis(`"tls": {"certificate": "testdata/token", "key": "testdata/key"}`), `certificate testdata/token: `},
		{"certificate without key", redis(`"tls": {"certificate": "testdata/client.pem"}`), `tls needs a certificate and its key, or neither`},
		{
			"levels in a cluster",
			zone(`"keys": [{"text": "{path}"}, {"client": true}], "events": 1, "window": "1m", "store": {"store": "redis", "address": ["a:1"], "cluster": true}`),
			`in a Redis cluster the keys of a zone must be prefixes of one address`,
		},
		{
			"twice in one handler",
			zones(`{"name": "z", ` + client + `, "events": 1, "window": "1m"}, {"name": "z", ` + client + `, "events": 2, "window": "1m"}`),
			`zone "z": it is there twice with different settings, in the ratelimit handlers srv0/1 and srv0/1`,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := loadError(t, tt.handler)
			if tt.want == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got  %v\nwant %s", err, tt.want)
			}
		})
	}
}

// A zone that is there twice: both places are named, and what may differ may differ.
func TestRatelimitJSONZoneTwice(t *testing.T) {
	zone := func(rest string) string {
		return `{"handler": "ratelimit", "zones": [{"name": "shared", "keys": [{"client": true}], "events": 10, ` + rest + `}]}`
	}
	first := zone(`"window": "1m", "count_when": {"statuses": ["401"]}`)
	if err := loadError(t, first, zone(`"window": "60s", "count_when": {"statuses": ["5xx"]}, "cost": "2", "mode": "shadow", "log_keys": true, "match": [{"method": ["GET"]}]`)); err != nil {
		t.Error(err)
	}
	for _, other := range []string{
		`"window": "2m", "count_when": {"statuses": ["401"]}`,
		`"window": "1m"`,
		`"window": "1m", "count_when": {"statuses": ["401"]}, "burst": 1`,
		`"window": "1m", "count_when": {"statuses": ["401"]}, "scope": "route"`,
		`"window": "1m", "count_when": {"statuses": ["401"]}, "algorithm": "token_bucket"`,
		`"window": "1m", "count_when": {"statuses": ["401"]}, "store": {"store": "memory", "max_memory": 65536}`,
	} {
		err := loadError(t, first, zone(other))
		if err == nil || !strings.Contains(err.Error(), `zone "shared": it is there twice with different settings, in the ratelimit handlers srv`) {
			t.Errorf("%s: %v", other, err)
			continue
		}
		for _, place := range []string{"srv0/1", "srv1/1"} {
			if !strings.Contains(err.Error(), place) {
				t.Errorf("%s is not named in %v", place, err)
			}
		}
	}
}

// The adapter warns about zones that read what only authenticators behind them know.
func TestRatelimitWarnsAboutUser(t *testing.T) {
	s := start(t, `http://{addr} {
		respond ok
	}`)
	in := func(before, zone, after string) string {
		return ":8080 {\n" + before + "ratelimit {\nzone users {\n" + zone + "\n}\n}\n" + after + "}\n"
	}
	seen := 0
	for _, tt := range []struct {
		name, config string
		line         int // of the zone that is warned about
	}{
		{"key", in("", "key {http.auth.user.id}\nrate 10 1m", ""), 3},
		{"second key", in("", "key client\nkey {http.auth.user.id}\nrate 10 1m", ""), 3},
		{"cost", in("", "key client\nrate 10 1m\ncost {http.auth.user.cost}", ""), 3},
		{"handle", in("handle /a {\n", "key {http.auth.user.id}\nrate 10 1m", "}\n"), 4},
		{"other key", in("", "key client\nrate 10 1m", ""), 0},
		{"route", in("route {\n", "key {http.auth.user.id}\nrate 10 1m", "}\n"), 0},
	} {
		if _, _, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(tt.config), map[string]any{"filename": "Caddyfile"}); err != nil {
			t.Fatalf("%s: %v", tt.name, err)
		}
		lines := s.logs.find(message("{http.auth.*}"))
		if tt.line > 0 {
			seen++
		}
		if len(lines) != seen {
			t.Fatalf("%s: %d warnings in all, want %d", tt.name, len(lines), seen)
		}
		if tt.line == 0 {
			continue
		}
		line := lines[len(lines)-1]
		if msg := line.text("msg"); line.text("level") != "warn" || line.text("logger") != "http.handlers.ratelimit" ||
			!strings.HasPrefix(msg, fmt.Sprintf(`Caddyfile:%d: zone "users" reads {http.auth.*}`, tt.line)) {
			t.Errorf("%s: got %v", tt.name, line)
		}
	}
}
