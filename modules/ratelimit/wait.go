// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"context"
	"time"
)

// polling is how often a request looks whether one that ended on another level
// or another server has made room for it.
const polling = 50 * time.Millisecond

// decide asks the counters, and waits where the zone lets requests wait. The
// error is that of a context that ended meanwhile.
func (z *Zone) decide(ctx context.Context, a *Ask) (v Verdict, waited time.Duration, err error) {
	s := z.state
	waits := z.Mode == modeEnforce && z.waits()
	if waits && s.line.occupied(a.Keys[0].Hash) {
		return z.wait(ctx, a, nil)
	}
	v = s.take(ctx, a)
	if v.Allowed || !waits || z.patience(v.Reason) == 0 || v.Reason == OverRate && a.Cost > v.Limit {
		return v, 0, nil
	}
	return z.wait(ctx, a, &v)
}

// waits tells whether requests may wait.
func (z *Zone) waits() bool { return z.Delay > 0 || z.Queue != nil }

// take is a decision of the counters. Without one, the request is refused.
func (s *state) take(ctx context.Context, a *Ask) Verdict {
	v, err := s.counters.Take(ctx, a)
	if err != nil {
		s.lines.storeFailed(err)
		return Verdict{Reason: StoreFailed}
	}
	return v
}

// patience is how long a request that was refused for a reason may wait.
func (z *Zone) patience(r Reason) time.Duration {
	switch {
	case r == OverRate:
		return time.Duration(z.Delay)
	case r == OverInflight && z.Queue != nil:
		return time.Duration(z.Queue.MaxWait)
	}
	return 0
}

// wait holds a request that was refused, or that comes behind one that waits.
func (z *Zone) wait(ctx context.Context, a *Ask, refused *Verdict) (v Verdict, waited time.Duration, err error) {
	s := z.state
	arrived := time.Now()
	if refused == nil && !z.hopeful(a) || refused != nil && refused.Wait > z.patience(refused.Reason) {
		return z.behind(ctx, a, refused), 0, nil
	}
	w := s.line.join(a.Keys[0].Hash, a.Cost, z.room(refused))
	if w == nil {
		return z.behind(ctx, a, refused), 0, nil
	}
	defer func() {
		s.line.leave(w)
		waited = time.Since(arrived)
		s.line.wait.Observe(waited.Seconds())
	}()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		pause := max(time.Duration(z.Delay), z.patience(OverInflight))
		if s.line.first(w) {
			// what ended before the request was in the line has not told it
			v = s.take(ctx, a)
			patience := z.patience(v.Reason)
			if v.Allowed || patience == 0 || v.Wait > patience-time.Since(arrived) {
				return v, 0, nil
			}
			pause = patience
			switch {
			case v.Wait > 0:
				pause = time.Since(arrived) + v.Wait
			case s.polls:
				pause = min(pause, time.Since(arrived)+polling)
			}
		}
		if pause -= time.Since(arrived); pause <= 0 {
			return z.behind(ctx, a, nil), 0, nil
		}
		timer.Reset(pause)
		select {
		case <-ctx.Done():
			return v, 0, ctx.Err()
		case <-w.look:
		case <-timer.C:
		}
	}
}

// hopeful tells whether a request that comes behind others may get its turn in
// time, as far as the counters can tell.
func (z *Zone) hopeful(a *Ask) bool {
	f, ok := z.state.counters.(Foreteller)
	if !ok || z.Delay == 0 || z.Queue != nil {
		return true
	}
	return f.Wait(a, z.state.line.ahead(a.Keys[0].Hash)+a.Cost) <= time.Duration(z.Delay)
}

// room is how many requests of a key may wait.
func (z *Zone) room(refused *Verdict) int {
	if z.Queue != nil && (z.Delay == 0 || refused != nil && refused.Reason == OverInflight) {
		return z.Queue.Size
	}
	return 0
}

// behind is the verdict on a request that did not get its turn.
func (z *Zone) behind(ctx context.Context, a *Ask, refused *Verdict) Verdict {
	if refused != nil {
		return *refused
	}
	v := Verdict{Reason: OverInflight}
	if z.Delay > 0 {
		v.Reason = OverRate
	}
	if st, err := z.state.counters.Inspect(ctx, 0, a.Keys[0]); err == nil {
		v.Limit, v.Remaining, v.Reset = st.Limit, max(st.Limit-st.Used-st.Reserved, 0), st.Reset
		if v.Reason == OverRate {
			v.Wait = max(st.Reset, time.Second) // others are before it
		}
	}
	return v
}
