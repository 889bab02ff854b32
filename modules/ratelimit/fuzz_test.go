// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

func FuzzCacheStatus(f *testing.F) {
	for _, s := range []string{"", "c; hit", `a; hit, "b,\"" ; fwd=uri-miss; key="x;hit"`, `c;key="\`, "c;key=x;hit", `",;`, "c;hit=?1,"} {
		f.Add(s, "/x?;hit")
	}
	f.Fuzz(func(t *testing.T, field, url string) {
		hit, _ := cacheStatus(field)
		if more, _ := cacheStatus("inner; fwd=uri-miss; key=\"x\", " + field); !strings.ContainsAny(field, `"`) && more != hit {
			t.Errorf("%q: hit %v behind another cache: %v", field, hit, more)
		}
		// whatever the client asks for, a miss stays a miss
		quoted := strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(url)
		for _, miss := range []string{`c; fwd=uri-miss; key="` + quoted + `"`, "Souin; fwd=uri-miss; stored; key=GET-http-a-" + url} {
			if hit, forward := cacheStatus(miss); hit || forward != "uri-miss" {
				t.Errorf("%q: hit %v, forward %q", miss, hit, forward)
			}
		}
	})
}

func FuzzKeyRead(f *testing.F) {
	for _, s := range []string{"", "1.2.3.4", "::1", "1.2.3.4/8", "::ffff:1.2.3.4/120", "fe80::1%x", "\xff", "2001:db8::/32"} {
		f.Add(s, 24, 48)
	}
	f.Fuzz(func(t *testing.T, text string, v4, v6 int) {
		k := &KeyLevel{Client: true, IPv4Prefix: 1 + (v4&31)%32, IPv6Prefix: 1 + (v6&127)%128}
		if key, err := k.read(text); err == nil {
			again, err := k.read(k.show(&key, false))
			if err != nil || again != key {
				t.Errorf("%q is %v, shown and read %v, %v", text, key, again, err)
			}
			if key.Prefix.Addr().Is4In6() || key.Prefix.Addr().Zone() != "" || key.Text != "" {
				t.Errorf("%q is %v", text, key)
			}
		}
		key := keyOfText(text)
		if key.Hash == 0 || len(key.Text) > maxKey || key != keyOfText(text) {
			t.Errorf("%q is %v", text, key)
		}
		_, err := json.Marshal((&KeyLevel{Text: "x"}).show(&key, true))
		if err != nil {
			t.Error(err)
		}
	})
}

// FuzzKeyOf sends foreign bytes as the address and as the key.
func FuzzKeyOf(f *testing.F) {
	z := textZone("fuzz")
	z.Events, z.Window, z.Cost = 5, 1e9, "{http.request.header.Cost}"
	h := newHandler(f, z)
	for _, s := range []string{"", "k", "{http.request.uri}", "\x00\xff", "{", "}", `\{`} {
		f.Add(s, "1", "1.2.3.4")
	}
	f.Fuzz(func(t *testing.T, text, cost, addr string) {
		r := httptest.NewRequest(http.MethodGet, "/", nil)
		r.Header["Key"], r.Header["Cost"] = []string{text}, []string{cost}
		r = prepared(r)
		repl := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
		key, err := z.Keys[0].of(r, repl)
		if (err == nil) != (text != "") || err == nil && key != keyOfText(text) {
			t.Errorf("%q is %v, %v", text, key, err)
		}
		if n := z.costOf(repl); n < 0 || n > maxNumber {
			t.Errorf("%q costs %d", cost, n)
		}
		if status, _ := serve(h, r, nil); status != http.StatusOK && status != http.StatusTooManyRequests {
			t.Errorf("status %d", status)
		}
		caddyhttp.SetVar(r.Context(), caddyhttp.ClientIPVarKey, addr)
		client := &KeyLevel{Client: true, IPv4Prefix: 32, IPv6Prefix: 64}
		if key, err := client.of(r, repl); err == nil && !key.Prefix.IsValid() {
			t.Errorf("%q is %v", addr, key)
		}
	})
}

func FuzzCost(f *testing.F) {
	for _, s := range []string{"", "1", "-1", "{x}", "1e3", "0x1p0", "999999999999999999999", "\xff"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		z := &Zone{Cost: text}
		if err := z.parseCost(); err == nil && (z.cost < -1 || z.cost > maxNumber) {
			t.Errorf("%q costs %d", text, z.cost)
		}
	})
}

func FuzzAdmin(f *testing.F) {
	zones := []*Zone{textZone("fuzz-admin"), {
		Name: "fuzz-admin-client", Events: 5, Window: 1e9, StoreRaw: smallStore,
		Keys: []*KeyLevel{{Client: true}, {Client: true, IPv4Prefix: 24, IPv6Prefix: 48}},
	}}
	zones[0].Inflight = 1
	newHandler(f, zones...)
	for _, s := range []string{
		"", "{}", "null", "[]", `{"key":"k"}`, `{"key":"1.2.3.4","level":1}`, `{"key_base64":"/w=="}`, `{"key":null}`,
		`{"key":"k","key_base64":"aw=="}`, `{"key":"k","level":-1}`, `{"key":"k","level":1e99}`, `{"key":"k"} x`, `{"key":"k","more":1}`,
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, body string) {
		q, err := readQuestion(strings.NewReader(body))
		if err != nil {
			return
		}
		if (q.Key == nil) == (q.Base64 == nil) || q.Key != nil && q.text != *q.Key {
			t.Errorf("%q read as %+v", body, q)
		}
		if q.Base64 != nil {
			if text, err := base64.StdEncoding.DecodeString(*q.Base64); err != nil || string(text) != q.text {
				t.Errorf("%q read as %q, %v", body, q.text, err)
			}
		}
		for _, z := range zones {
			for _, forgive := range []bool{false, true} {
				views, err := q.ask(context.Background(), statesOf(z.Name), forgive)
				if err == nil && (len(views) == 0 || len(views) > len(z.Keys)) {
					t.Errorf("%q: %v", body, views)
				}
			}
		}
	})
}

func FuzzCaddyfile(f *testing.F) {
	for _, s := range []string{
		"zone z {\nkey client\nrate 5 1m\n}",
		"headers draft\nzone z {\nkey client {\nipv4_prefix 24\ntimes 2\n}\nkey all\ninflight 5\nqueue 5 1s\n}",
		"zone z {\nkey {header.x}\nrate 5 1m\nburst 2\ncost {x}\ncount_when status 401 4xx 500-504\ncount_when error dns\ncount_when cache miss\npenalty 1m 1h\n}",
		"zone z {\nmatch path /x\nmatch {\nmethod GET\n}\nkey all\nrate 1 1s\ndelay 1s\nmax_waiting 5\nmode shadow\nscope route\non_empty_key refuse\nlog_keys\nstore memory {\nmax_memory 1MiB\non_saturation pass\n}\n}",
		"zone z {\nkey client\ninflight 3\nstore redis {\naddress 127.0.0.1:1\n}\n}",
		"zone", "zone z", "zone z {", "}", "zone z {\n{\n}\n}", "zone z {\nrate\n}", "zone z {\nkey\n}", "zone z {\nmatch\n}", "headers", "zone z {\nstore\n}",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, block string) {
		h := new(Handler)
		if err := h.UnmarshalCaddyfile(caddyfile.NewTestDispenser("ratelimit {\n" + block + "\n}")); err != nil {
			return
		}
		// what the Caddyfile accepts is a configuration
		text, err := json.Marshal(h)
		if err != nil {
			t.Fatal(err)
		}
		again := new(Handler)
		if err := json.Unmarshal(text, again); err != nil {
			t.Fatal(err)
		}
		for i, z := range again.Zones {
			z.setDefaults()
			if err := z.check(); err != nil {
				t.Errorf("%s: %v", text, err)
			}
			h.Zones[i].setDefaults()
			if h.Zones[i].fingerprint() != z.fingerprint() {
				t.Errorf("%s is another zone when it is read again", text)
			}
		}
	})
}
