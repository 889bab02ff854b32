// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"testing"
	"time"

	"go.uber.org/zap"
	zaptest "go.uber.org/zap/zaptest/observer"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-gatehouse/gatehouse/internal/phase"
)

// ward is a doctor with a clock.
type ward struct {
	t   *testing.T
	d   *doctor
	now time.Time
}

func newWard(t *testing.T, maxUpstreams int) *ward {
	t.Helper()
	return &ward{t: t, d: newDoctor(maxUpstreams), now: time.Unix(1e9, 0)}
}

// reset lets a connection be found closed, some time after the last one.
func (w *ward) reset(idle time.Duration, later time.Duration, want time.Duration) {
	w.t.Helper()
	w.now = w.now.Add(later)
	got, diagnosed := w.d.reset("a:1", idle, w.now)
	if diagnosed != (want > 0) || got != want {
		w.t.Errorf("reset after %v idle: %v, %v; want %v", idle, got, diagnosed, want)
	}
}

func TestDoctorLearnsTheIdleTimeout(t *testing.T) {
	w := newWard(t, 8)
	w.reset(6*time.Second, time.Minute, 0)
	w.d.worked("a:1", 4*time.Second)
	w.reset(5200*time.Millisecond, time.Minute, 0)
	w.reset(30*time.Second, time.Minute, 4*time.Second)
	w.reset(10*time.Second, time.Minute, 0) // once only
}

func TestDoctorIsNotMisled(t *testing.T) {
	t.Run("a restart", func(t *testing.T) {
		w := newWard(t, 8)
		for i := range 10 {
			w.reset(time.Duration(i+1)*100*time.Millisecond, time.Millisecond, 0)
		}
	})
	t.Run("resets sooner than connections that work", func(t *testing.T) {
		w := newWard(t, 8)
		w.reset(10*time.Second, time.Minute, 0)
		w.d.worked("a:1", 8*time.Second)
		for range 5 {
			w.reset(time.Second, time.Minute, 0)
		}
	})
	t.Run("connections that work longer", func(t *testing.T) {
		w := newWard(t, 8)
		w.reset(5*time.Second, time.Minute, 0)
		w.reset(5*time.Second, time.Minute, 0)
		w.d.worked("a:1", 6*time.Second)
		w.reset(7*time.Second, time.Minute, 0)
		w.reset(7*time.Second, time.Minute, 0)
		w.reset(7*time.Second, time.Minute, 5*time.Second)
	})
}

func TestDoctorForgets(t *testing.T) {
	d := newDoctor(2)
	for i, upstream := range []string{"a", "b", "a", "c"} {
		d.reset(upstream, time.Second, time.Unix(int64(i)*100, 0))
	}
	if all := d.all(); len(all) != 2 || all[0].upstream != "c" || all[1].upstream != "a" {
		t.Errorf("the doctor remembers %v", all)
	}
}

func TestKeepaliveIsRound(t *testing.T) {
	for shortest, want := range map[time.Duration]time.Duration{
		5*time.Second + 3*time.Millisecond: 4 * time.Second,
		61 * time.Second:                   48 * time.Second,
		1100 * time.Millisecond:            800 * time.Millisecond,
		120 * time.Millisecond:             96 * time.Millisecond,
	} {
		p := patient{shortest: shortest, resets: resetsToDiagnose}
		if got := p.keepalive(); got != want {
			t.Errorf("keepalive for %v = %v, want %v", shortest, got, want)
		}
	}
}

// The connection hook asks the doctor and warns once.
func TestConnectionWarnsOnce(t *testing.T) {
	core, logs := zaptest.New(zap.WarnLevel)
	c := &Connection{logger: zap.New(core), doctor: newDoctor(8)}
	for i := range 6 {
		x := phase.NewExchange(t.Context(), &phase.Table{}, time.Now())
		a := x.Begin("app:3000", dynamicLabel, time.Unix(int64(i)*60, 0))
		a.Connected(phase.Conn{Known: true, Reused: true, Idle: 5 * time.Second})
		a.Failed(phase.ResetOnReused, errStaleConn, time.Now())
		c.Log(x, nil)
	}
	entries := logs.All()
	if len(entries) != 1 {
		t.Fatalf("%d warnings, want 1", len(entries))
	}
	fields := entries[0].ContextMap()
	if fields["upstream"] != "app:3000" || fields["keepalive"] != "4s" {
		t.Errorf("fields = %v", fields)
	}
}

// The doctor outlives a configuration as long as another one needs it.
func TestDoctorSurvivesReload(t *testing.T) {
	ctx, cancel := caddy.NewContext(caddy.Context{Context: t.Context()})
	defer cancel()
	load := func() *Connection {
		t.Helper()
		c := new(Connection)
		if err := c.Provision(ctx); err != nil {
			t.Fatal(err)
		}
		return c
	}
	first := load()
	first.doctor.reset("a:1", time.Second, time.Now())
	second := load()
	if err := first.Cleanup(); err != nil {
		t.Fatal(err)
	}
	if len(second.doctor.all()) != 1 {
		t.Error("the reload forgot an upstream")
	}
	if err := second.Cleanup(); err != nil {
		t.Fatal(err)
	}
	if third := load(); len(third.doctor.all()) != 0 {
		t.Error("an unused doctor was kept")
	} else if err := third.Cleanup(); err != nil {
		t.Fatal(err)
	}
	if err := new(Connection).Cleanup(); err != nil {
		t.Errorf("cleaning up what was never provisioned: %v", err)
	}
}
