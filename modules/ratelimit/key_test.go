// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
)

func TestClientPrefix(t *testing.T) {
	for _, c := range []struct {
		addr   string
		v4, v6 int
		shown  string
	}{
		{"192.0.2.77", 0, 0, "192.0.2.77"},
		{"192.0.2.77", 24, 0, "192.0.2.0/24"},
		{"192.0.2.77", 1, 0, "128.0.0.0/1"},
		{"::ffff:192.0.2.77", 0, 0, "192.0.2.77"},
		{"::ffff:192.0.2.77", 16, 0, "192.0.0.0/16"},
		{"::ffff:c000:24d", 0, 0, "192.0.2.77"},
		{"2001:db8:1:2:3:4:5:6", 0, 0, "2001:db8:1:2::/64"},
		{"2001:db8:1:2:3:4:5:6", 0, 48, "2001:db8:1::/48"},
		{"2001:db8:1:2:3:4:5:6", 0, 128, "2001:db8:1:2:3:4:5:6"},
		{"fe80::1%eth0", 0, 128, "fe80::1"},
		{"::", 0, 1, "::/1"},
	} {
		k := &KeyLevel{Client: true, IPv4Prefix: c.v4, IPv6Prefix: c.v6}
		k.setDefaults()
		if err := k.check(); err != nil {
			t.Fatal(err)
		}
		key, err := k.read(c.addr)
		if err != nil || k.show(&key, false) != c.shown {
			t.Errorf("%s: %s, %v, want %s", c.addr, k.show(&key, false), err, c.shown)
		}
		if again, err := k.read(c.shown); err != nil || again != key {
			t.Errorf("%s read as %v, %v, want %v", c.shown, again, err, key)
		}
	}
}

// TestClientKeysDiffer: an IPv4 address and the IPv6 address with its bytes are
// two clients, prefixes of different lengths are different keys.
func TestClientKeysDiffer(t *testing.T) {
	k := &KeyLevel{Client: true, IPv4Prefix: 32, IPv6Prefix: 128}
	wide := &KeyLevel{Client: true, IPv4Prefix: 24, IPv6Prefix: 64}
	seen := make(map[uint64]string)
	for _, addr := range []string{"1.2.3.4", "::102:304", "::1.2.3.5", "1.2.3.0", "2001:db8::", "0.0.0.0", "::"} {
		for _, level := range []*KeyLevel{k, wide} {
			key, err := level.read(addr)
			if err != nil {
				t.Fatal(err)
			}
			name := key.Prefix.String()
			if other, ok := seen[key.Hash]; ok && other != name {
				t.Errorf("%s and %s are one key", name, other)
			}
			seen[key.Hash] = name
		}
	}
}

func TestKeyRead(t *testing.T) {
	client := &KeyLevel{Client: true, IPv4Prefix: 32, IPv6Prefix: 64}
	for _, text := range []string{"", "x", "1.2.3", "1.2.3.4/33", "1.2.3.4:80", "[::1]", "::1/129", "1.2.3.4 ", "\x00"} {
		if key, err := client.read(text); err == nil {
			t.Errorf("%q read as %v", text, key)
		}
	}
}

func TestTextKey(t *testing.T) {
	long := strings.Repeat("x", maxKey)
	for _, text := range []string{"x", "\x00", "\xff\xfe", "a\nb", long, "sha256:", "{http.request.uri}", "hmac:00"} {
		if k := keyOfText(text); k.Text != text || k.Hash == 0 {
			t.Errorf("%q is kept as %q", text, k.Text)
		}
	}
	k := keyOfText(long + "x")
	if !strings.HasPrefix(k.Text, "sha256:") || len(k.Text) != 71 {
		t.Errorf("a long key is kept as %q", k.Text)
	}
	if other := keyOfText(long + "y"); other == k {
		t.Error("two long keys are one")
	}
	if huge := strings.Repeat("x", 1<<20); keyOfText(huge) != keyOfText(strings.Clone(huge)) {
		t.Error("a long key is not itself")
	}
}

func TestKeyOfRequest(t *testing.T) {
	for _, c := range []struct{ text, key, err string }{
		{"{http.request.header.Key}", "value", ""},
		{"{http.request.header.None}", "", "empty"},
		{"{http.auth.user.id}", "", "http.auth.user.id"},
		{"a{http.auth.user.id}", "", "http.auth.user.id"},
		{"a-{http.request.header.None}", "a-", ""},
		{"{http.request.header.Braces}", "{http.request.header.Key}", ""}, // is not read again
		{"{http.request.header.Bytes}", "\xff\x01", ""},
		{"all", "all", ""},
	} {
		r := request(t.Context(), "value")
		r.Header.Set("Braces", "{http.request.header.Key}")
		r.Header.Set("Bytes", "\xff\x01")
		key, err := (&KeyLevel{Text: c.text}).of(r, r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer))
		if c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)) || c.err == "" && (err != nil || key.Text != c.key) {
			t.Errorf("%s: %q, %v", c.text, key.Text, err)
		}
	}
	r := httptest.NewRequest("GET", "/", nil)
	r.RemoteAddr = "@" // a socket of the file system
	if key, err := (&KeyLevel{Client: true, IPv4Prefix: 32, IPv6Prefix: 64}).of(prepared(r), nil); err == nil {
		t.Errorf("a client without an address has the key %v", key)
	}
}

func TestKeyShown(t *testing.T) {
	k := &KeyLevel{Text: "x"}
	key := keyOfText("secret")
	if text := k.show(&key, false); !strings.HasPrefix(text, "hmac:") || len(text) != len("hmac:")+16 {
		t.Errorf("shown as %q", text)
	}
	other := keyOfText("secrets")
	if k.show(&key, false) == k.show(&other, false) {
		t.Error("two keys are shown alike")
	}
	key = keyOfText("a\xff\nb")
	if text := k.show(&key, true); text != "a\ufffd\nb" {
		t.Errorf("shown as %q with log_keys", text)
	}
	for _, key := range []Key{{}, sharedKey} {
		if text := k.show(&key, false); text != "" {
			t.Errorf("no key is shown as %q", text)
		}
	}
}

func TestNested(t *testing.T) {
	level := func(v4, v6 int) *KeyLevel { return &KeyLevel{Client: true, IPv4Prefix: v4, IPv6Prefix: v6} }
	for want, levels := range map[bool][][]*KeyLevel{
		true:  {{level(32, 64)}, {level(32, 64), level(24, 48)}, {level(32, 64), level(32, 48)}},
		false: {{{Text: "x"}}, {level(32, 64), {Text: "x"}}, {level(24, 64), level(32, 48)}, {level(32, 48), level(32, 64)}},
	} {
		for i, l := range levels {
			if nested(l) != want {
				t.Errorf("%v %d", want, i)
			}
		}
	}
}

// TestCost: what a request may cost, and what is said of the rest.
func TestCost(t *testing.T) {
	z := textZone("key-cost")
	z.Events, z.Window, z.Cost = 1<<30, caddy.Duration(1e9), "{http.request.header.Cost}"
	newHandler(t, z)
	logs := logged(z)
	for text, cost := range map[string]int{
		"1": 1, "0": 0, "7": 7, "0.1": 1, "2.5": 3, "1e3": 1000, "1e300": maxNumber, "inf": maxNumber, "-0": 0,
	} {
		r := request(t.Context(), "k")
		r.Header.Set("Cost", text)
		if n := z.costOf(r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)); n != cost {
			t.Errorf("cost %q is %d, want %d", text, n, cost)
		}
	}
	if n := logs.Len(); n != 0 {
		t.Errorf("%d lines about costs that are right", n)
	}
	for _, text := range []string{"", "x", "-1", "-inf", "nan", "1 ", "1,5", "1e999", strings.Repeat("9", 1<<20), "\xff"} {
		r := request(t.Context(), "k")
		r.Header.Set("Cost", text)
		if n := z.costOf(r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)); n != 1 {
			t.Errorf("cost %.20q is %d, want 1", text, n)
		}
	}
	if n := logs.FilterMessageSnippet("not a number").Len(); n != 1 {
		t.Errorf("%d lines about costs that are wrong, want 1", n)
	}
}
