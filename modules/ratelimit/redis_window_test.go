// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"testing"
	"time"

	"github.com/caddy-gatehouse/gatehouse/internal/redistest"
)

// TestRedisWindowChanged: what was counted in short windows does not stay for
// years when the windows become long, nor the other way round.
func TestRedisWindowChanged(t *testing.T) {
	for _, limits := range [][2]Limit{
		{{Events: 2, Window: time.Minute}, {Events: 2, Window: time.Hour}},
		{{Events: 2, Window: time.Hour}, {Events: 2, Window: time.Minute}},
		{{Events: 2, Window: time.Hour, Algorithm: TokenBucket}, {Events: 2, Window: time.Hour}},
		{{Events: 2, Window: time.Hour}, {Events: 2, Window: time.Hour, Algorithm: TokenBucket}},
	} {
		server := redistest.Start(t)
		for _, l := range limits {
			c := openRedis(t, &RedisStore{Address: []string{server.Addr}}, Spec{Levels: []Limit{l}})
			for i := range 3 {
				v := take(t, c, textAsk(1, 1))
				if v.Allowed != (i < 2) || v.Wait > l.Window+l.Window/fineResolution+time.Millisecond {
					t.Errorf("%+v after %+v: request %d: %+v", l, limits[0], i, v)
				}
			}
		}
	}
}
