// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"strings"
	"testing"
)

func TestNegotiate(t *testing.T) {
	offers := [][]string{
		{"text/html", "application/xhtml+xml"},
		{"application/problem+json", "application/json"},
		{"text/plain"},
	}
	for _, tt := range []struct {
		name   string
		accept []string
		want   int
	}{
		{"no field", nil, 0},
		{"empty field", []string{""}, 0},
		{"anything", []string{"*/*"}, 0},
		{"browser", []string{"text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}, 0},
		{"by type", []string{"application/*"}, 1},
		{"by another name", []string{"application/json"}, 1},
		{"by quality", []string{"text/html;q=0.3, text/plain;q=0.5, application/json;q=0.4"}, 2},
		{"two fields", []string{"text/html;q=0.3", "text/plain"}, 2},
		{"refused by name", []string{"text/html;q=0, */*"}, 1},
		{"specific beats general", []string{"text/*;q=0.1, text/plain;q=0.9, application/json;q=0.5"}, 2},
		{"parameters", []string{"text/html;level=1;q=0.1, text/plain ; Q=0.2"}, 2},
		{"nothing acceptable", []string{"image/png"}, 0},
		{"nonsense", []string{"text/html;q=x, ;;, /, text/, text/plain;q=2, application/json;q=0.1"}, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := negotiate(tt.accept, offers); got != tt.want {
				t.Errorf("negotiate(%q) = %d, want %d", tt.accept, got, tt.want)
			}
		})
	}
}

func FuzzNegotiate(f *testing.F) {
	f.Add("text/html,application/xhtml+xml;q=0.9,*/*;q=0.8")
	f.Add("text/*;q=0,application/json")
	f.Add(strings.Repeat("a/b,", 100))
	f.Fuzz(func(t *testing.T, accept string) {
		offers := [][]string{{"text/html"}, {"application/json"}}
		got := negotiate([]string{accept}, offers)
		if got < 0 || got >= len(offers) {
			t.Fatalf("negotiate(%q) = %d", accept, got)
		}
		ranges := parseAccept([]string{accept})
		if len(ranges) > maxMediaRanges {
			t.Fatalf("%d ranges", len(ranges))
		}
		for _, r := range ranges {
			if !(r.quality >= 0 && r.quality <= 1) {
				t.Fatalf("quality %v in %q", r.quality, accept)
			}
		}
		// the choice is never worse than the other offer
		chosen, _ := quality(ranges, offers[got][0])
		other, _ := quality(ranges, offers[1-got][0])
		if other > chosen {
			t.Fatalf("negotiate(%q) = %d of quality %v, the other one has %v", accept, got, chosen, other)
		}
	})
}
