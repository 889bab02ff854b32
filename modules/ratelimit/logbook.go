// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/caddyserver/caddy/v2"
)

// logbook writes what a zone has to say: at most one line per key and minute,
// with a count of what was left unsaid. It remembers a fixed number of keys;
// what happens to others is told together. It is safe for concurrent use.
type logbook struct {
	spec Spec

	mu      sync.Mutex
	keys    [loggedKeys]entry
	others  entry
	empty   entry
	cost    entry
	store   entry
	planned bool // whether a look at what is left to say is planned
}

const (
	loggedKeys  = 64
	logInterval = time.Minute
)

// entry is one thing that happens again and again.
type entry struct {
	hash  uint64
	last  time.Time // when it was told; zero: the entry is free
	count int       // since then

	level   zapcore.Level
	message string
	fields  []zap.Field
}

// refused tells of a request that was refused, or would have been.
func (b *logbook) refused(z *Zone, d decision, v *Verdict, k *Key) {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := time.Now()
	e := b.entryOf(k.Hash^uint64(d), now)
	if e.last.IsZero() {
		e.level, e.message = zap.InfoLevel, "request refused"
		if d == shadow {
			e.message = "request would be refused (mode shadow)"
		}
		e.fields = []zap.Field{zap.String("zone", b.spec.Zone), zap.Stringer("reason", v.Reason)}
		if e == &b.others {
			e.message += ", of other keys"
		} else {
			e.fields = append(e.fields, zap.String("key", z.Keys[v.Level].show(k, z.LogKeys)), zap.Int("limit", v.Limit))
		}
	}
	b.happened(e, now)
}

// entryOf returns the entry of a key, else a free one, else that of all others.
func (b *logbook) entryOf(hash uint64, now time.Time) *entry {
	free := &b.others
	for i := range b.keys {
		e := &b.keys[i]
		if e.last.IsZero() || e.count == 0 && now.Sub(e.last) >= logInterval {
			free = e
		} else if e.hash == hash {
			return e
		}
	}
	if free != &b.others {
		*free = entry{hash: hash}
	}
	return free
}

// emptyKey tells of a request without a key.
func (b *logbook) emptyKey(err error) {
	b.always(&b.empty, zap.WarnLevel, "a request has no key", zap.Error(err))
}

// badCost tells of a cost that is no number.
func (b *logbook) badCost(text string) {
	if len(text) > 64 {
		text = text[:64]
	}
	b.always(&b.cost, zap.WarnLevel, "the cost of a request is not a number; it counts as 1", zap.String("cost", text))
}

// storeFailed tells of a decision that the store could not make.
func (b *logbook) storeFailed(err error) {
	b.always(&b.store, zap.ErrorLevel, "the store could not decide", zap.Error(err))
}

func (b *logbook) always(e *entry, level zapcore.Level, message string, field zap.Field) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if e.last.IsZero() {
		e.level, e.message, e.fields = level, message, []zap.Field{zap.String("zone", b.spec.Zone), field}
	}
	b.happened(e, time.Now())
}

// happened counts, and tells of it if the last time is long ago.
func (b *logbook) happened(e *entry, now time.Time) {
	e.count++
	if e.last.IsZero() || now.Sub(e.last) >= logInterval {
		b.write(e, now)
	}
	if !b.planned {
		b.planned = true
		time.AfterFunc(logInterval, b.flush)
	}
}

func (b *logbook) write(e *entry, now time.Time) {
	if c := b.spec.Logger.Check(e.level, e.message); c != nil {
		c.Write(append(slices.Clip(e.fields), zap.Int("count", e.count))...)
	}
	e.last, e.count = now, 0
}

// flush tells what is left to say, and forgets what did not happen again.
func (b *logbook) flush() {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := time.Now()
	b.planned = false
	visit := func(e *entry) {
		switch {
		case e.last.IsZero():
			return
		case now.Sub(e.last) < logInterval:
		case e.count > 0:
			b.write(e, now)
		default:
			*e = entry{}
			return
		}
		b.planned = true
	}
	for i := range b.keys {
		visit(&b.keys[i])
	}
	for _, e := range []*entry{&b.others, &b.empty, &b.cost, &b.store} {
		visit(e)
	}
	if b.planned {
		time.AfterFunc(logInterval, b.flush)
	}
}

// processLogger writes to the default log of the configuration that is loaded
// at the time: what is counted outlives configurations and their logs.
var processLogger = zap.New(processCore{}).Named("http.handlers.ratelimit")

type processCore struct{ fields []zapcore.Field }

// Enabled implements [zapcore.LevelEnabler].
func (processCore) Enabled(l zapcore.Level) bool { return caddy.Log().Core().Enabled(l) }

// With implements [zapcore.Core].
func (c processCore) With(fields []zapcore.Field) zapcore.Core {
	return processCore{append(slices.Clip(c.fields), fields...)}
}

// Check implements [zapcore.Core].
func (c processCore) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) {
		return ce.AddCore(e, c)
	}
	return ce
}

// Write implements [zapcore.Core].
func (c processCore) Write(e zapcore.Entry, fields []zapcore.Field) error {
	if ce := caddy.Log().Core().Check(e, nil); ce != nil {
		ce.Write(append(slices.Clip(c.fields), fields...)...)
	}
	return nil
}

// Sync implements [zapcore.Core].
func (processCore) Sync() error { return caddy.Log().Core().Sync() }
