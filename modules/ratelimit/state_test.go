// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// TestMain silences Caddy's own log, which tells of every event.
func TestMain(m *testing.M) {
	quiet := []byte(`{"admin":{"disabled":true,"config":{"persist":false}},"logging":{"logs":{"default":{"level":"PANIC"}}}}`)
	if err := caddy.Load(quiet, true); err != nil {
		panic(err)
	}
	// not to be made in the bubble of the test that happens to be the first
	_ = caddy.ActiveContext().Done()
	os.Exit(m.Run())
}

// newHandler provisions a handler without a server.
func newHandler(t testing.TB, zones ...*Zone) *Handler {
	t.Helper()
	h, err := provisioned(t, zones...)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func provisioned(t testing.TB, zones ...*Zone) (*Handler, error) {
	t.Helper()
	ctx, cancel := caddy.NewContext(caddy.ActiveContext())
	h := &Handler{Zones: zones, ctx: ctx, events: new(caddyevents.App), logs: true, load: enterLoad(ctx)}
	t.Cleanup(func() {
		_ = h.Cleanup()
		cancel()
	})
	if err := h.events.Provision(ctx); err != nil {
		return nil, err
	}
	for _, z := range zones {
		if err := z.provision(ctx, h.load, h.load.route(nil)); err != nil {
			return nil, err
		}
		if z.Mode != modeOff {
			z.state.lines.spec.Logger = zap.NewNop()
			h.zones = append(h.zones, z)
		}
	}
	return h, nil
}

// logged makes a zone write to a log that can be looked at.
func logged(z *Zone) *observer.ObservedLogs {
	core, logs := observer.New(zapcore.DebugLevel)
	z.state.lines.spec.Logger = zap.New(core)
	return logs
}

// smallStore is enough for a test of few keys.
var smallStore = json.RawMessage(`{"store":"memory","max_memory":65536}`)

// textZone limits by the header field Key.
func textZone(name string) *Zone {
	return &Zone{Name: name, Keys: []*KeyLevel{{Text: "{http.request.header.Key}"}}, StoreRaw: smallStore}
}

// request is one with a key, as a server hands it on.
func request(ctx context.Context, key string) *http.Request {
	r := httptest.NewRequestWithContext(ctx, http.MethodGet, "/", nil)
	r.Header.Set("Key", key)
	return prepared(r)
}

func prepared(r *http.Request) *http.Request {
	return caddyhttp.PrepareRequest(r, caddy.NewReplacer(), httptest.NewRecorder(), new(caddyhttp.Server))
}

// serve sends a request through the handler and returns the status.
func serve(h *Handler, r *http.Request, next caddyhttp.HandlerFunc) (int, http.Header) {
	w := httptest.NewRecorder()
	if next == nil {
		next = func(http.ResponseWriter, *http.Request) error { return nil }
	}
	err := h.ServeHTTP(w, r, next)
	if err != nil {
		return caddyhttp.Error(http.StatusInternalServerError, err).StatusCode, w.Header()
	}
	return w.Code, w.Header()
}

func TestStateIsShared(t *testing.T) {
	zone := func(change func(*Zone)) *Zone {
		z := textZone("state-shared")
		z.Events, z.Window, z.Burst, z.Inflight = 10, caddy.Duration(time.Minute), 1, 5
		if change != nil {
			change(z)
		}
		return z
	}
	first := newHandler(t, zone(nil)).zones[0].state
	for name, change := range map[string]func(*Zone){
		"match":      func(z *Zone) { z.MatcherSetsRaw = caddyhttp.RawMatcherSets{{"path": json.RawMessage(`["/x"]`)}} },
		"mode":       func(z *Zone) { z.Mode = modeShadow },
		"cost":       func(z *Zone) { z.Cost = "2" },
		"log_keys":   func(z *Zone) { z.LogKeys = true },
		"defaults":   func(z *Zone) { z.Mode, z.Algorithm = modeEnforce, algorithmSliding },
		"key, level": func(z *Zone) { z.Keys[0].Times = 1 },
	} {
		if newHandler(t, zone(change)).zones[0].state != first {
			t.Errorf("%s makes another state", name)
		}
	}
	for name, change := range map[string]func(*Zone){
		"events":     func(z *Zone) { z.Events = 11 },
		"window":     func(z *Zone) { z.Window = caddy.Duration(time.Hour) },
		"burst":      func(z *Zone) { z.Burst = 2 },
		"inflight":   func(z *Zone) { z.Inflight = 6 },
		"queue":      func(z *Zone) { z.Queue = &Queue{Size: 1, MaxWait: 1} },
		"penalty":    func(z *Zone) { z.Penalty = 1 },
		"key":        func(z *Zone) { z.Keys[0].Text = "x" },
		"times":      func(z *Zone) { z.Keys[0].Times = 2 },
		"algorithm":  func(z *Zone) { z.Algorithm = algorithmBucket },
		"scope":      func(z *Zone) { z.Scope = scopeRoute },
		"count_when": func(z *Zone) { z.CountWhen = &CountWhen{AnyError: true} },
		"store":      func(z *Zone) { z.StoreRaw = json.RawMessage(`{"store":"memory","max_memory":65537}`) },
	} {
		if newHandler(t, zone(change)).zones[0].state == first {
			t.Errorf("%s makes no other state", name)
		}
	}
}

// TestStateIsGivenUp: neither a configuration that is gone nor one that was
// never complete leaves anything.
func TestStateIsGivenUp(t *testing.T) {
	const name = "state-given-up"
	t.Run("used", func(t *testing.T) {
		z := textZone(name)
		z.Inflight = 1
		newHandler(t, z)
		if len(statesOf(name)) != 1 {
			t.Error("the state is not listed")
		}
		again, other := textZone(name), textZone(name)
		again.Inflight, other.Inflight = 1, 2
		h, err := provisioned(t, again, other)
		if h != nil || err == nil || !strings.Contains(err.Error(), "twice") {
			t.Errorf("zones that disagree: %v", err)
		}
	})
	if list := statesOf(name); len(list) != 0 {
		t.Errorf("%d states are left", len(list))
	}
	if n, ok := zoneSeries.References(name); ok {
		t.Errorf("%d references to the series are left", n)
	}
	loadsMu.Lock()
	defer loadsMu.Unlock()
	if len(loads) != 0 {
		t.Errorf("%d loads are left", len(loads))
	}
}

// TestNullInJSON: what the Caddyfile never makes must not end in a panic.
func TestNullInJSON(t *testing.T) {
	for _, text := range []string{
		`{"zones":[null]}`,
		`{"zones":[{"name":"null","inflight":1,"keys":[null]}]}`,
		`{"zones":[{"name":"null","inflight":1}]}`,
		`{"zones":[{"name":"null","keys":[{"client":true}]}]}`,
		`{"zones":[{"name":"null","keys":[{"client":true,"text":"x"}],"inflight":1}]}`,
		`{"zones":[{"name":"null","keys":[{"client":true}],"inflight":1,"queue":{}}]}`,
		`{"zones":[{"name":"null","keys":[{"client":true}],"inflight":1,"count_when":{}}]}`,
		`{"zones":[{"name":"null","keys":[{"client":true}],"events":5,"window":"1m","count_when":{}}]}`,
		`{"zones":[{"name":"null","keys":[{"client":true,"times":1073741824}],"events":9223372036854775807,"window":"1m"}]}`,
		`{"zones":[{"name":"null","keys":[{"client":true,"times":-1}],"events":5,"window":"1m"}]}`,
		`{"zones":[{"name":"null","keys":[{"client":true}],"events":5,"window":-60000000000}]}`,
		`{"zones":[{"name":"null","keys":[{"client":true}],"events":-5,"window":"1m"}]}`,
		`{"zones":[{"name":"null","keys":[{"client":true}],"inflight":1,"store":{"store":"memory","max_memory":-1}}]}`,
		`{"zones":[{"name":"null","keys":[{"client":true}],"inflight":1,"store":{"store":"none"}}]}`,
		`{"headers":"some"}`,
	} {
		ctx, cancel := caddy.NewContext(caddy.Context{Context: t.Context()})
		h := new(Handler)
		if err := json.Unmarshal([]byte(text), h); err != nil {
			t.Fatal(err)
		}
		// the events app comes after these checks only where there is a zone
		err := func() error {
			if len(h.Zones) == 0 || h.Zones[0] == nil {
				return h.Provision(ctx)
			}
			_, err := provisioned(t, h.Zones...)
			return err
		}()
		if err == nil {
			t.Errorf("%s: no error", text)
		}
		cancel()
	}
}

// TestKeysStaySecret: one use of the zone without log_keys is enough to hide
// its keys from the admin API, whichever was loaded last.
func TestKeysStaySecret(t *testing.T) {
	zone := func(clearly bool) *Zone {
		z := textZone("state-secret")
		z.Inflight, z.LogKeys = 5, clearly
		return z
	}
	shown := func() string { return topOf(statesOf("state-secret"))[0].Key }
	h := newHandler(t, zone(false))
	serve(h, request(t.Context(), "alice"), nil)
	if key := shown(); !strings.HasPrefix(key, "hmac:") {
		t.Errorf("key %q without log_keys", key)
	}
	t.Run("with log_keys", func(t *testing.T) {
		newHandler(t, zone(true)) // say, of a configuration that fails later
		if key := shown(); !strings.HasPrefix(key, "hmac:") {
			t.Errorf("key %q although one use has no log_keys", key)
		}
	})
	if key := shown(); !strings.HasPrefix(key, "hmac:") {
		t.Errorf("key %q after the other use has gone", key)
	}
}

func TestKeysInClear(t *testing.T) {
	z := textZone("state-clear")
	z.Inflight, z.LogKeys = 5, true
	serve(newHandler(t, z), request(t.Context(), "alice\xff"), nil)
	if key := topOf(statesOf("state-clear"))[0].Key; key != "alice\ufffd" {
		t.Errorf("key %q with log_keys", key)
	}
}
