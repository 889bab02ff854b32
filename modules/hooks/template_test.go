// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"encoding/json"
	"html"
	"strings"
	"testing"
	"unicode/utf8"
)

func TestTemplate(t *testing.T) {
	values := func(name string) string { return "<" + name + "{http.request.uri}>" }
	for _, tt := range []struct{ name, text, want string }{
		{"plain", "no placeholder", "no placeholder"},
		{"one", "a {http.request.host} b", "a &lt;http.request.host{http.request.uri}&gt; b"},
		{"adjacent", "{env.A}{time.now}", "&lt;env.A{http.request.uri}&gt;&lt;time.now{http.request.uri}&gt;"},
		{"css", "body{margin:0} a{color:red}", "body{margin:0} a{color:red}"},
		{"json", `{"a": {"b": 1}}`, `{"a": {"b": 1}}`},
		{"javascript", "if (a) { http.get(b) }", "if (a) { http.get(b) }"},
		{"unclosed", "{http.request.host", "{http.request.host"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tpl, err := parseTemplate(tt.text)
			if err != nil {
				t.Fatal(err)
			}
			if got := tpl.render(values, html.EscapeString); got != tt.want {
				t.Errorf("render(%q) = %q, want %q", tt.text, got, tt.want)
			}
		})
	}
	if _, err := parseTemplate("{http.hooks.error.nothing}"); err == nil {
		t.Error("an unknown placeholder of ours was accepted")
	}
}

// Whatever stands in a value, it stays inside its string in HTML and JSON.
func FuzzEscaping(f *testing.F) {
	f.Add(`"</script>{http.request.uri}`)
	f.Add("\x00\xff\u2028\\")
	f.Fuzz(func(t *testing.T, value string) {
		tpl, err := parseTemplate(`{"a":"{http.request.uri}"}`)
		if err != nil {
			t.Fatal(err)
		}
		get := func(string) string { return value }
		var doc map[string]string
		text := tpl.render(get, escapeJSON)
		if err := json.Unmarshal([]byte(text), &doc); err != nil || len(doc) != 1 ||
			utf8.ValidString(value) && doc["a"] != value {
			t.Fatalf("%q: %v", text, err)
		}
		if page := tpl.render(get, html.EscapeString); strings.ContainsAny(page[len(`{"a":"`):len(page)-len(`"}`)], `<>"'`) {
			t.Fatalf("markup in %q", page)
		}
	})
}

func FuzzParseTemplate(f *testing.F) {
	f.Add("a {http.request.host} b {env.X}")
	f.Add("{{{http.}}}")
	f.Fuzz(func(t *testing.T, text string) {
		tpl, err := parseTemplate(text)
		if err != nil {
			return
		}
		// with each placeholder standing for itself nothing changes
		same := tpl.render(func(name string) string { return "{" + name + "}" }, strings.Clone)
		if same != text {
			t.Fatalf("%q became %q", text, same)
		}
	})
}
