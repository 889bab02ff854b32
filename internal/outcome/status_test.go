// SPDX-License-Identifier: Apache-2.0

package outcome

import "testing"

func TestParseStatus(t *testing.T) {
	for text, want := range map[string]StatusRange{
		"502": {502, 502}, "5xx": {500, 599}, "4XX": {400, 499}, "500-503": {500, 503}, "100-599": {100, 599},
	} {
		if got, ok := parseStatus(text); !ok || got != want {
			t.Errorf("parseStatus(%q) = %v, %v, want %v", text, got, ok, want)
		}
	}
	for _, text := range []string{"", "99", "600", "6xx", "0xx", "xx", "503-502", "5-", "-5", "500-600", "a", "+502-503x"} {
		if got, ok := parseStatus(text); ok {
			t.Errorf("parseStatus(%q) = %v", text, got)
		}
	}
}
