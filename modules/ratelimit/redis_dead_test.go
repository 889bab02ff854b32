// SPDX-License-Identifier: Apache-2.0

package ratelimit

import "testing"

// TestRedisDeadLease: a lease that has run out does not count, also while
// nothing has cleared it away: what lives beside it keeps the key, and clears
// only when it is renewed.
func TestRedisDeadLease(t *testing.T) {
	server, c := plainRedis(t, Spec{Levels: []Limit{{Inflight: 2}}})
	a := textAsk(1, 1)
	if v := take(t, c, a); !v.Allowed {
		t.Fatalf("%+v", v)
	}
	key := c.names.keys(a.Keys, c.levels)[0]
	inflight := func() int {
		st, err := c.Inspect(t.Context(), 0, textKey(1))
		if err != nil {
			t.Fatal(err)
		}
		return st.Inflight
	}
	// as a node leaves it that died long ago; the lease of a is renewed only in seconds
	for _, dead := range []string{"dead:1", "dead:2", "dead:3"} {
		server.CLI("zadd", key, "1", dead)
	}
	if n := server.CLI("zcard", key); n != "4" {
		t.Fatalf("%s leases are kept", n)
	}
	if n := inflight(); n != 1 {
		t.Errorf("%d in flight beside dead leases, want 1", n)
	}
	b := textAsk(1, 1)
	if v := take(t, c, b); !v.Allowed || v.Remaining != 0 {
		t.Errorf("dead leases hold places: %+v", v)
	}
	if n := server.CLI("zcard", key); n != "2" {
		t.Errorf("%s leases are kept, want those of two requests", n)
	}
	if v := take(t, c, textAsk(1, 1)); v.Allowed || v.Reason != OverInflight {
		t.Errorf("a third request is in flight: %+v", v)
	}
	settle(t, c, a, false)
	if b.ticket.lease != nil {
		settle(t, c, b, false)
	}
	if n := inflight(); n != 0 {
		t.Errorf("%d in flight at the end", n)
	}
}
