// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"fmt"
	"regexp"
	"strings"
)

// template is a text with placeholders, split once. Values are put in as they
// are, escaped for the format and never looked at again, so nothing that a
// client sends is ever taken for a placeholder or for markup.
type template struct {
	parts []templatePart
}

// templatePart is literal text, or the name of a placeholder.
type templatePart struct{ literal, name string }

// placeholderPattern finds what is meant as a placeholder among the braces of
// HTML, CSS, JavaScript and JSON: a name in one of Caddy's namespaces.
var placeholderPattern = regexp.MustCompile(`\{((?:http|env|system|time|file)\.[^{}\s"'<>]+)\}`)

// parseTemplate splits a text. Names in our own namespace must exist.
func parseTemplate(text string) (*template, error) {
	t := new(template)
	end := 0
	for _, m := range placeholderPattern.FindAllStringSubmatchIndex(text, -1) {
		name := text[m[2]:m[3]]
		if strings.HasPrefix(name, "http.hooks.") && !knownPlaceholder(name) {
			return nil, fmt.Errorf("unrecognized placeholder {%s}", name)
		}
		t.parts = append(t.parts, templatePart{literal: text[end:m[0]]}, templatePart{name: name})
		end = m[1]
	}
	t.parts = append(t.parts, templatePart{literal: text[end:]})
	return t, nil
}

// render puts the values in.
func (t *template) render(value func(name string) string, escape func(string) string) string {
	var b strings.Builder
	for _, p := range t.parts {
		if p.name == "" {
			b.WriteString(p.literal)
			continue
		}
		b.WriteString(escape(value(p.name)))
	}
	return b.String()
}
