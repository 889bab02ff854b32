// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"errors"
	"io"
	"net/http"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-gatehouse/gatehouse/internal/phase"
)

func TestCacheStatus(t *testing.T) {
	for field, want := range map[string]struct {
		hit     bool
		forward string
	}{
		"":                            {},
		"cache":                       {},
		"cache; hit":                  {hit: true},
		"cache;hit=?1":                {hit: true},
		"cache;hit=?0":                {},
		`"the cache"; hit; ttl=376`:   {hit: true},
		"cache; fwd=uri-miss; stored": {forward: "uri-miss"},
		"inner; hit, outer; fwd=stale; fwd-status=304": {forward: "stale"},
		"inner; fwd=uri-miss, outer; hit":              {hit: true},
		"hit":                                          {}, // the name of the cache
		"hit, hit":                                     {},
		`"a,b;hit"; fwd=request`:                       {forward: "request"},

		// a key is what the client asked for
		`c; fwd=uri-miss; key="/x?;hit;"`:                        {forward: "uri-miss"},
		`c; fwd=uri-miss; key="/x,y;hit"`:                        {forward: "uri-miss"},
		`c; fwd=uri-miss; key="/x\";hit;\""`:                     {forward: "uri-miss"},
		`c; fwd=uri-miss; key="/x\",y;hit"`:                      {forward: "uri-miss"},
		`c; fwd=uri-miss; key="/x\\"; stored`:                    {forward: "uri-miss"},
		`c; key="/x\\";hit`:                                      {hit: true},
		`c; fwd=uri-miss; key="/x`:                               {forward: "uri-miss"},
		`c; fwd=uri-miss; key="/x\`:                              {forward: "uri-miss"},
		"Souin; hit; ttl=5; key=GET-http-a-/x; detail=OTTER":     {hit: true},
		"Souin; hit; ttl=5; key=GET-http-a-/x?a,b; detail=OTTER": {hit: true},
		"Souin; fwd=uri-miss; stored; key=GET-http-a-/x;hit":     {forward: "uri-miss"},
		"Souin; fwd=uri-miss; stored; key=GET-http-a-/x,y;hit":   {forward: "uri-miss"},
	} {
		if hit, forward := cacheStatus(field); hit != want.hit || forward != want.forward {
			t.Errorf("%s: hit %v, forward %q", field, hit, forward)
		}
	}
}

func TestCountWhen(t *testing.T) {
	failure := func(status int) caddyhttp.HandlerFunc {
		return func(http.ResponseWriter, *http.Request) error {
			return caddyhttp.HandlerError{StatusCode: status, Err: io.EOF}
		}
	}
	response := func(status int, cache ...string) caddyhttp.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) error {
			w.Header()["Cache-Status"] = cache
			if status > 0 {
				w.WriteHeader(status)
			}
			_, err := io.WriteString(w, "x")
			return err
		}
	}
	torn := func(status int) caddyhttp.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) error {
			if status > 0 {
				w.WriteHeader(status)
			}
			panic(http.ErrAbortHandler)
		}
	}
	unauthorized := &CountWhen{Statuses: []string{"401", "5xx", "420-430"}}
	miss := &CountWhen{Cache: []string{"miss"}}
	for _, c := range []struct {
		name  string
		when  *CountWhen
		next  caddyhttp.HandlerFunc
		count bool
	}{
		{"status", unauthorized, response(401), true},
		{"range", unauthorized, response(425), true},
		{"class", unauthorized, response(599), true},
		{"other", unauthorized, response(403), false},
		{"implied 200", &CountWhen{Statuses: []string{"200"}}, response(0), true},
		{"nothing written", &CountWhen{Statuses: []string{"200"}}, func(http.ResponseWriter, *http.Request) error { return nil }, true},
		{"early hints", &CountWhen{Statuses: []string{"1xx"}}, func(w http.ResponseWriter, _ *http.Request) error {
			w.WriteHeader(http.StatusEarlyHints)
			w.WriteHeader(200)
			return nil
		}, false},
		{"status of an error", unauthorized, failure(401), true},
		{"other error", unauthorized, failure(404), false},
		{"bare error", unauthorized, func(http.ResponseWriter, *http.Request) error { return io.EOF }, true}, // is a 500
		{"any error", &CountWhen{AnyError: true}, failure(404), true},
		{"no error", &CountWhen{AnyError: true}, response(404), false},
		{"class of error", &CountWhen{Classes: []phase.Class{phase.Reset}}, failure(404), true},
		{"another class", &CountWhen{Classes: []phase.Class{phase.DNS}}, failure(404), false},
		{"miss", miss, response(200, "c; fwd=uri-miss"), true},
		{"no cache", miss, response(200), true},
		{"hit", miss, response(200, "c; hit"), false},
		{"nearest of two fields", miss, response(200, "inner; fwd=uri-miss", "outer; hit"), false},
		{"hit counts", &CountWhen{Cache: []string{"hit"}}, response(200, "c; hit"), true},
		{"hit does not", &CountWhen{Cache: []string{"hit"}}, response(200), false},
		{"stale", &CountWhen{Cache: []string{"stale"}}, response(200, "c; fwd=stale"), true},
		{"refused in front of the origin", miss, failure(403), false},
		{"origin failed", miss, failure(502), true},
		{"client left", miss, failure(499), true},
		{"panic", unauthorized, torn(0), false},
		{"panic, miss", miss, torn(0), false},
		{"torn response", unauthorized, torn(401), true},
		{"torn response, other", unauthorized, torn(200), false},
		{"torn miss", miss, torn(200), true},
	} {
		t.Run(c.name, func(t *testing.T) {
			z := textZone("count-when")
			z.Events, z.Window, z.CountWhen = 100, caddy.Duration(time.Minute), c.when
			z.Cost = "3"
			h := newHandler(t, z)
			func() {
				defer func() {
					if v := recover(); v != nil && !errors.Is(v.(error), http.ErrAbortHandler) {
						panic(v)
					}
				}()
				serve(h, request(t.Context(), "k"), func(w http.ResponseWriter, r *http.Request) error {
					if st, _ := z.state.counters.Inspect(t.Context(), 0, keyOfText("k")); st.Reserved != 3 || st.Used != 0 {
						t.Errorf("under way: %+v", st)
					}
					return c.next(w, r)
				})
			}()
			st, _ := z.state.counters.Inspect(t.Context(), 0, keyOfText("k"))
			if st.Reserved != 0 || (st.Used == 3) != c.count || st.Used != 0 && !c.count {
				t.Errorf("counted: %+v, want %v", st, c.count)
			}
		})
	}
}

// TestCountWhenOtherZoneRefuses: what a zone behind refuses is not counted.
func TestCountWhenOtherZoneRefuses(t *testing.T) {
	first, second := textZone("count-when-first"), textZone("count-when-second")
	first.Events, first.Window, first.CountWhen = 5, caddy.Duration(time.Minute), &CountWhen{Statuses: []string{"4xx"}}
	second.Events, second.Window = 1, caddy.Duration(time.Minute)
	h := newHandler(t, first, second)
	for _, want := range []int{200, 429, 429} {
		if status, _ := serve(h, request(t.Context(), "k"), nil); status != want {
			t.Errorf("status %d, want %d", status, want)
		}
	}
	if st, _ := first.state.counters.Inspect(t.Context(), 0, keyOfText("k")); st.Used != 0 || st.Reserved != 0 {
		t.Errorf("counted: %+v", st)
	}
}
