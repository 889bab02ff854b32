// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"net/http"
	"reflect"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

func TestDraftFields(t *testing.T) {
	rate := textZone("api")
	rate.Events, rate.Burst, rate.Window = 10, 5, caddy.Duration(1500*time.Millisecond)
	inflight := textZone("at.once")
	inflight.Inflight = 3
	for _, c := range []struct {
		zone          *Zone
		verdict       Verdict
		policy, field string
	}{
		{rate, Verdict{Remaining: 14, Reset: time.Millisecond}, `"api";q=15;w=2`, `"api";r=14;t=1`},
		{rate, Verdict{Remaining: 0, Wait: 61 * time.Second, Reset: time.Minute}, `"api";q=15;w=2`, `"api";r=0;t=61`},
		{rate, Verdict{Remaining: 15}, `"api";q=15;w=2`, `"api";r=15`},
		{inflight, Verdict{Remaining: 2}, `"at.once";q=3;qu="concurrent-requests"`, `"at.once";r=2`},
	} {
		h := http.Header{"Ratelimit": {`"other";r=1`}}
		f := newPolicyFields(c.zone)
		f.draft(h, &c.verdict)
		if got := h["Ratelimit-Policy"]; !reflect.DeepEqual(got, []string{c.policy}) {
			t.Errorf("policy %q, want %q", got, c.policy)
		}
		if got := h["Ratelimit"]; !reflect.DeepEqual(got, []string{`"other";r=1`, c.field}) {
			t.Errorf("field %q, want %q", got, c.field)
		}
	}
}

func TestLegacyFields(t *testing.T) {
	h := make(http.Header)
	legacyFields(h, &Verdict{Limit: 7, Remaining: 2, Reset: 1001 * time.Millisecond})
	if h.Get("X-RateLimit-Limit") != "7" || h.Get("X-RateLimit-Remaining") != "2" || h.Get("X-RateLimit-Reset") != "2" {
		t.Errorf("fields %v", h)
	}
}

// TestRetryAfter is rounded up, and left out where nobody knows.
func TestRetryAfter(t *testing.T) {
	e := newRefusal("z")
	for wait, want := range map[time.Duration]string{
		0: "", 1: "1", time.Second: "1", time.Second + 1: "2", 59*time.Second + time.Millisecond: "60", 365 * 24 * time.Hour: "31536000",
	} {
		h := make(http.Header)
		err := e.of(h, &Verdict{Reason: OverRate, Wait: wait})
		he, ok := err.(caddyhttp.HandlerError) //nolint:errorlint // it must be bare
		if !ok || he.StatusCode != http.StatusTooManyRequests || he.Err == nil || he.ID != "" || he.Trace != "" {
			t.Errorf("error %#v is not bare", err)
		}
		if got := h.Get("Retry-After"); got != want {
			t.Errorf("%v: Retry-After %q, want %q", wait, got, want)
		}
	}
	if he := caddyhttp.Error(0, e.of(make(http.Header), &Verdict{Reason: StoreFailed})); he.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("store failed: %d", he.StatusCode)
	}
}
