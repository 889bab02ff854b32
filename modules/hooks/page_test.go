// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"testing"

	"github.com/caddy-gatehouse/gatehouse/internal/outcome"
	"github.com/caddy-gatehouse/gatehouse/internal/phase"
)

func TestGlob(t *testing.T) {
	for _, tt := range []struct {
		pattern, s string
		want       bool
	}{
		{"a:1", "a:1", true},
		{"a:1", "a:12", false},
		{"a:*", "a:12", true},
		{"*:80", "b.c:80", true},
		{"*:80", "b.c:8080", false},
		{"10.*.1:*", "10.2.3.1:8", true},
		{"*", "", true},
		{"a*a", "a", false},
		{"a**b", "ab", true},
		{"*b*", "abc", true},
		{"*ab", "aab", true},
	} {
		if got := glob(tt.pattern, tt.s); got != tt.want {
			t.Errorf("glob(%q, %q) = %v, want %v", tt.pattern, tt.s, got, tt.want)
		}
	}
}

func TestAnswers(t *testing.T) {
	pages := []*Page{
		{Classes: []phase.Class{phase.Refused}},
		{Statuses: []string{"500-502"}},
		{Statuses: []string{"503-599"}},
		{Origin: []string{"4xx"}},
	}
	for c, want := range map[phase.Class]bool{phase.Refused: true, phase.DNS: false} {
		if got := answersClass(pages, c); got != want {
			t.Errorf("answersClass(%s) = %v", c, got)
		}
	}
	for r, want := range map[outcome.StatusRange]bool{
		{First: 500, Last: 599}: true, {First: 499, Last: 500}: false, {First: 404, Last: 404}: false,
	} {
		if got := answersStatuses(pages, r); got != want {
			t.Errorf("answersStatuses(%v) = %v", r, got)
		}
	}
	if !answersClass(append(pages, &Page{Statuses: []string{"4xx"}}), phase.DNS) {
		t.Error("pages for all statuses do not answer a class")
	}
}

// Every class has a sentence for clients, except the one that says nothing.
func TestDetailsAreComplete(t *testing.T) {
	for _, c := range phase.Classes {
		if (details[c] == "") != (c == phase.Other) {
			t.Errorf("detail of %s = %q", c, details[c])
		}
	}
}
