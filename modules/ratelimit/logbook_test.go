// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"errors"
	"math/rand/v2"
	"net/http"
	"strconv"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"
)

// strict is a zone that admits one request a year.
func strict(name string) *Zone {
	z := textZone(name)
	z.Events, z.Window = 1, caddy.Duration(maxWindow)
	return z
}

func TestOneLinePerKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		z := strict("logbook-key")
		h := newHandler(t, z)
		logs := logged(z)
		for range 1 + 100 { // the first one passes
			serve(h, request(t.Context(), "k"), nil)
		}
		time.Sleep(logInterval / 2)
		for range 50 {
			serve(h, request(t.Context(), "k"), nil)
		}
		if n := logs.Len(); n != 1 {
			t.Fatalf("%d lines in the first minute", n)
		}
		time.Sleep(logInterval)
		synctest.Wait()
		all := logs.All()
		if len(all) != 2 {
			t.Fatalf("%d lines, want 2", len(all))
		}
		for i, want := range []int64{1, 149} {
			m := all[i].ContextMap()
			if m["count"] != want || m["zone"] != "logbook-key" || m["reason"] != "rate" || m["limit"] != int64(1) {
				t.Errorf("line %d: %v", i, m)
			}
			if key, _ := m["key"].(string); key != keyedHash("k") {
				t.Errorf("key %q", key)
			}
		}
		// who comes back after a quiet time is told at once
		time.Sleep(5 * logInterval)
		serve(h, request(t.Context(), "k"), nil)
		if n := logs.Len(); n != 3 {
			t.Errorf("%d lines, want 3", n)
		}
	})
}

// TestLinesAreBounded: ten thousand keys a minute for ten minutes, in each
// window of a minute at most one line for each of 64 of them and one for all
// others, and nothing that happened is left out of the counts.
func TestLinesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const minutes, keys = 3, 10_000
		z := strict("logbook-many")
		z.StoreRaw = nil
		h := newHandler(t, z)
		logs := logged(z)
		r := rand.New(rand.NewPCG(1, 1))
		refusals := 0
		for range minutes * keys {
			key := strconv.Itoa(r.IntN(keys))
			for range 1 + r.IntN(2) {
				if status, _ := serve(h, request(t.Context(), key), nil); status == http.StatusTooManyRequests {
					refusals++
				}
			}
			time.Sleep(time.Minute / keys)
		}
		time.Sleep(2 * logInterval)
		synctest.Wait()
		all := logs.All()
		told, others := 0, 0
		for i, e := range all {
			told += int(e.ContextMap()["count"].(int64))
			if _, ok := e.ContextMap()["key"]; !ok {
				others++
			}
			if j := i + loggedKeys + 1; j < len(all) && all[j].Time.Sub(e.Time) < logInterval {
				t.Fatalf("%d lines within %v", loggedKeys+2, all[j].Time.Sub(e.Time))
			}
		}
		if told != refusals {
			t.Errorf("%d refusals in the log, %d happened", told, refusals)
		}
		if others < minutes || others > minutes+2 {
			t.Errorf("%d lines of other keys", others)
		}
	})
}

// TestLogbookIsQuiet: nothing goes on when nothing happens.
func TestLogbookIsQuiet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		z := strict("logbook-quiet")
		h := newHandler(t, z)
		for range 2 {
			serve(h, request(t.Context(), "k"), nil)
		}
		time.Sleep(3 * logInterval)
		synctest.Wait()
		b := &z.state.lines
		if b.planned || !b.keys[loggedKeys-1].last.IsZero() && !b.keys[0].last.IsZero() {
			t.Error("the logbook remembers what is long gone")
		}
	})
}

// TestOtherLines: requests without a key, costs that are no numbers and stores
// that fail are told at most once a minute, too.
func TestOtherLines(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		z := strict("logbook-other")
		h := newHandler(t, z)
		logs := logged(z)
		for range 100 {
			serve(h, request(t.Context(), ""), nil)
			z.state.lines.badCost("x\xff")
			z.state.lines.storeFailed(errors.New("broken"))
		}
		time.Sleep(logInterval + time.Second)
		synctest.Wait()
		for _, text := range []string{"has no key", "not a number", "could not decide"} {
			list := logs.FilterMessageSnippet(text).All()
			if len(list) != 2 || list[0].ContextMap()["count"] != int64(1) || list[1].ContextMap()["count"] != int64(99) {
				t.Errorf("%s: %v", text, list)
			}
		}
	})
}

// TestShadowLines are lines of their own.
func TestShadowLines(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		z, shadowed := strict("logbook-shadow"), strict("logbook-shadow")
		shadowed.Mode = modeShadow
		h, s := newHandler(t, z), newHandler(t, shadowed)
		logs := logged(z)
		shadowed.state.lines.spec.Logger = z.state.lines.spec.Logger
		serve(h, request(t.Context(), "k"), nil)
		for range 3 {
			if status, _ := serve(h, request(t.Context(), "k"), nil); status != http.StatusTooManyRequests {
				t.Errorf("status %d", status)
			}
			if status, _ := serve(s, request(t.Context(), "k"), nil); status != http.StatusOK {
				t.Errorf("status %d in shadow mode", status)
			}
		}
		if logs.FilterMessage("request refused").Len() != 1 || logs.FilterMessageSnippet("would be refused").Len() != 1 {
			t.Errorf("lines: %v", logs.All())
		}
	})
}
