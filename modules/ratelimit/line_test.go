// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
)

func newLine(name string, most int) *line {
	l := new(line)
	l.init(name, most)
	return l
}

// woken tells whether a waiter was told to look, and forgets it.
func (w *waiter) woken() bool {
	select {
	case <-w.look:
		return true
	default:
		return false
	}
}

func TestLine(t *testing.T) {
	l := newLine("line", 4)
	if l.occupied(1) {
		t.Error("an empty line is occupied")
	}
	l.ended(1) // nobody is there
	a, b := l.join(1, 1, 2), l.join(1, 1, 2)
	if l.join(1, 1, 2) != nil {
		t.Error("more of a key wait than may")
	}
	c, d := l.join(2, 1, 0), l.join(2, 1, 0)
	if l.join(3, 1, 0) != nil {
		t.Error("more wait than may")
	}
	if !l.occupied(1) || l.occupied(3) {
		t.Error("occupied")
	}
	for w, first := range map[*waiter]bool{a: true, b: false, c: true, d: false} {
		if l.first(w) != first {
			t.Errorf("first: %v, want %v", !first, first)
		}
	}
	for range 3 { // being told more than once is no more than once
		l.ended(1)
	}
	if !a.woken() || a.woken() || b.woken() || c.woken() {
		t.Error("woken")
	}
	l.leave(b) // not the first: nobody else's turn has come
	if a.woken() {
		t.Error("the first was woken by the last")
	}
	l.leave(c)
	if !d.woken() || !l.first(d) {
		t.Error("the next was not woken")
	}
	l.leave(d)
	l.leave(a)
	if n := l.waiting.Load(); n != 0 || len(l.keys) != 0 {
		t.Errorf("%d wait, of %d keys", n, len(l.keys))
	}
}

// TestLineIsInOrder compares random lives with a plain list.
func TestLineIsInOrder(t *testing.T) {
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 1))
		l := newLine("line-random", 20)
		var model []*waiter
		for range 500 {
			key := uint64(1 + r.IntN(3))
			if r.IntN(2) == 0 {
				of := slices.DeleteFunc(slices.Clone(model), func(w *waiter) bool { return w.key != key })
				w := l.join(key, 1, 8)
				if (w == nil) != (len(model) == 20 || len(of) == 8) {
					t.Fatalf("seed %d: joined: %v, with %d, %d of the key", seed, w != nil, len(model), len(of))
				}
				if w != nil {
					model = append(model, w)
				}
			} else if len(model) > 0 {
				i := r.IntN(len(model))
				l.leave(model[i])
				model = slices.Delete(model, i, i+1)
			}
			seen := make(map[uint64]bool)
			for _, w := range model {
				if l.first(w) == seen[w.key] {
					t.Fatalf("seed %d: first: %v", seed, !seen[w.key])
				}
				seen[w.key] = true
			}
		}
	}
}

// TestLineInParallel: no turn is lost, whoever comes and goes.
func TestLineInParallel(t *testing.T) {
	l := newLine("line-parallel", 1000)
	var wg sync.WaitGroup
	for i := range uint64(50) {
		wg.Go(func() {
			for range 100 {
				w := l.join(i%3, 1, 0)
				for !l.first(w) {
					<-w.look
				}
				l.ended(w.key)
				l.leave(w)
			}
		})
	}
	wg.Wait()
	if n := l.waiting.Load(); n != 0 || len(l.keys) != 0 {
		t.Errorf("%d wait, of %d keys", n, len(l.keys))
	}
}
