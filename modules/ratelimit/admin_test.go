// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
)

// TestTopIsBounded: of many more keys than the answer may have, the heaviest
// hundred of each level.
func TestTopIsBounded(t *testing.T) {
	z := textZone("admin-top")
	z.Keys = append(z.Keys, &KeyLevel{Text: "all {http.request.header.Key}"})
	z.StoreRaw = json.RawMessage(`{"store":"memory","max_memory":33554432}`)
	z.Events, z.Window, z.LogKeys = 1000, caddy.Duration(time.Hour), true
	h := newHandler(t, z)
	for i := range 400 {
		serve(h, request(t.Context(), fmt.Sprintf("light-%d", i)), nil)
	}
	for i := range 30 {
		for range 20 {
			serve(h, request(t.Context(), fmt.Sprintf("heavy-%d", i)), nil)
		}
	}
	list := statesOf("admin-top")
	for level := range z.Keys {
		if n := len(list[0].counters.Top(level)); n <= maxTop {
			t.Fatalf("level %d: the counters name %d keys, which shows nothing", level, n)
		}
	}
	views := topOf(list)
	if len(views) != 2*maxTop {
		t.Fatalf("%d keys, want %d of each of two levels", len(views), maxTop)
	}
	for i, v := range views {
		place := i % maxTop
		if heavy := strings.Contains(v.Key, "heavy-"); v.Level != i/maxTop || heavy != (place < 30) {
			t.Errorf("place %d: %+v", i, v)
		}
		if place > 0 && v.Count > views[i-1].Count {
			t.Errorf("place %d: %+v is behind %+v", i, v, views[i-1])
		}
	}
}

// TestKeysInClearAgain: once the last use without log_keys is gone, its keys
// are shown, as the uses that stay want it.
func TestKeysInClearAgain(t *testing.T) {
	zone := func(clearly bool) *Zone {
		z := textZone("admin-secret")
		z.Inflight, z.LogKeys = 5, clearly
		return z
	}
	shown := func() string { return topOf(statesOf("admin-secret"))[0].Key }
	serve(newHandler(t, zone(true)), request(t.Context(), "alice"), nil)
	t.Run("beside one without", func(t *testing.T) {
		newHandler(t, zone(false))
		if key := shown(); !strings.HasPrefix(key, "hmac:") {
			t.Errorf("key %q", key)
		}
	})
	if key := shown(); key != "alice" {
		t.Errorf("key %q after the use without log_keys has gone", key)
	}
}

// TestQuestion: the body is one object and nothing else.
func TestQuestion(t *testing.T) {
	for _, body := range []string{`{"key":"k"}`, " {\"key\":\"k\"}\r\n\t ", `{"key_base64":"aw=="}`} {
		if q, err := readQuestion(strings.NewReader(body)); err != nil || q.text != "k" {
			t.Errorf("%q: %+v, %v", body, q, err)
		}
	}
	const follows = "something follows"
	for body, want := range map[string]string{
		`{"key":"k"} x`:                   follows,
		`{"key":"k"}{"key":"j"}`:          follows,
		`{"key":"k"} null`:                follows,
		`{"key":"k"}]`:                    follows,
		`{"key":"k"},`:                    follows,
		"{\"key\":\"k\"}\x00":             follows,
		`{"key":"k"`:                      "unexpected EOF",
		``:                                "EOF",
		`{"key":"k","kye":"j"}`:           "unknown field",
		`{"key":"k","key_base64":"aw=="}`: `must have "key" or "key_base64"`,
		`{"key_base64":"a"}`:              "reading key_base64",
		`{"key":"` + strings.Repeat("k", maxAdminBody) + `"}`: "unexpected EOF",
	} {
		if q, err := readQuestion(strings.NewReader(body)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.40q: %+v, %v, want %s", body, q, err, want)
		}
	}
}
