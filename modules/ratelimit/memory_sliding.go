// SPDX-License-Identifier: Apache-2.0

package ratelimit

// tier is one shard of a rate limit in memory. It is not safe for concurrent use.
type tier interface {
	// check says whether n events may happen now, and where.
	// In a saturated sketch nobody is told apart anymore.
	check(hash uint64, now int64, n int, saturated bool) spot

	// charge counts n events where check has found the key. Nothing else may
	// have been called in between.
	charge(s spot, now int64, n int)

	// block refuses a key until a time; since is when that began.
	block(s spot, now, until, since int64)

	// forgive forgets what is known of a key.
	forgive(hash uint64, now int64)

	// noisy tells whether a key that was never seen would be taken for one
	// that has used half of its limit.
	noisy(hash uint64, now int64) bool

	// held is the number of keys that have an exact record.
	held() int
}

// spot is what a tier knows of a key.
type spot struct {
	hash  uint64
	place int // in the table; -1: only the sketch knows the key
	used  int
	wait  int64 // microseconds until n events are allowed; 0: they are
	reset int64 // microseconds until the whole capacity is there again
	after int64 // the same, if the events happen now

	blocked int64 // until when the key is blocked; 0: it is not
	since   int64 // when the block began
}

// sliding is a shard of a sliding window. A key has an exact record as long as
// the table has room; the keys without one share the sketch. A record that
// makes room for a key that has more is written into the sketch, so that
// nothing is forgotten.
type sliding[T counter] struct {
	limit  int
	window int64
	table  *runs[T]
	sketch *panes[T]
	blocks *deadlines // blocks of keys without a record; nil: there are no penalties
	pass   bool       // what a saturated sketch would refuse
	luck   luck
}

// luck is a generator of chances of one to eight.
type luck uint64

func (l *luck) next() bool {
	*l = *l*6364136223846793005 + 1442695040888963407
	return *l>>61 == 0
}

func newSliding[T counter](l Limit, bytes, size int, pass bool) *sliding[T] {
	g := newGrid(l)
	s := &sliding[T]{limit: l.Capacity(), window: l.Window.Microseconds(), pass: pass}
	if l.Penalty > 0 {
		s.blocks = newDeadlines(bytes / 16)
		bytes -= bytes / 16
	}
	s.table = newRuns[T](bytes/2, size, l, g)
	s.sketch = newPanes[T](bytes-bytes/2, size, g)
	return s
}

func (s *sliding[T]) held() int { return s.table.claimed }

func (s *sliding[T]) check(hash uint64, now int64, n int, saturated bool) spot {
	quantum := s.table.grid.at(now)
	e := s.table.find(hash)
	if e < 0 {
		s.sketch.advance(quantum)
		t := s.sketch.estimate(hash)
		if e = s.admit(hash, now, quantum, n, &t, saturated); e < 0 {
			return s.sketched(hash, now, n, &t, saturated)
		}
	}
	m := &s.table.meta[e]
	r := spot{hash: hash, place: e, used: s.table.expire(e, quantum)}
	if m.since > 0 && m.guard > now {
		r.blocked, r.since = m.guard, m.since
	}
	if r.used+n > s.limit {
		r.wait = s.table.wait(e, n, s.limit, now)
	}
	r.reset, r.after = s.table.reset(e, now), s.table.grid.forgotten(quantum)-now
	return r
}

// sketched is the spot of a key that only the sketch knows.
func (s *sliding[T]) sketched(hash uint64, now int64, n int, t *tally, saturated bool) spot {
	r := spot{hash: hash, place: -1, used: int(min(t.total, uint64(s.limit)))}
	r.after = s.sketch.reset(now)
	if t.total > 0 {
		r.reset = s.sketch.wait(t, s.limit, s.limit, now)
	}
	if s.blocks != nil {
		if until := s.blocks.get(hash); until > now {
			r.blocked, r.since = until, now
		}
	}
	if t.total+uint64(n) > uint64(s.limit) && (!saturated || !s.pass) {
		r.wait = s.sketch.wait(t, n, s.limit, now)
	}
	return r
}

// admit gives a key a record if there is room, or if it has come near its limit
// and another one has less. It returns the place, or -1.
func (s *sliding[T]) admit(hash uint64, now, quantum int64, n int, t *tally, saturated bool) int {
	known := int(min(t.total, uint64(s.limit)))
	below := 0
	near := 2*(t.total+uint64(n)) > uint64(s.limit)
	switch {
	case near && saturated && s.pass:
		// a key gets its record by chance, which favours those that come often
		known = 0
		if s.luck.next() {
			below = 2
		}
	case near && !saturated:
		below = known
	}
	e, victim := s.table.place(hash, now, below, func(e int) (int, int64) { return s.table.used(e, quantum) })
	if e < 0 {
		return -1
	}
	if victim {
		s.spill(e)
	}
	s.table.claim(e, hash)
	if s.blocks != nil {
		if until := s.blocks.get(hash); until > now {
			s.table.meta[e] = meta{guard: until, since: now}
		}
	}
	if known > 0 {
		s.seed(e, quantum, t)
	}
	return e
}

// seed writes what the sketch knows of a key into its record, each pane as late
// as it can have been.
func (s *sliding[T]) seed(e int, quantum int64, t *tally) {
	room := s.limit
	// the newest panes matter longest
	for i := int(s.sketch.count) - 1; i >= 0; i-- {
		c := min(int(t.counts[i]), room)
		t.counts[i] = uint32(c)
		room -= c
	}
	for i := range int(s.sketch.count) {
		if c := int(t.counts[i]); c > 0 && min(s.sketch.quantum(i), quantum) >= quantum-s.table.grid.span {
			s.table.add(e, min(s.sketch.quantum(i), quantum), c)
		}
	}
}

// spill writes a record into the sketch.
func (s *sliding[T]) spill(e int) {
	hash := s.table.ids[e]
	h := &s.table.heads[e]
	var pane int64
	sum := 0
	for i := range int(h.n) {
		q := s.table.quantum(e, i)
		if p := q / s.sketch.quanta; p != pane {
			pane, sum = p, 0
		}
		sum += int(s.table.counts[s.table.at(e, i)])
		s.sketch.merge(hash, q, sum)
	}
}

func (s *sliding[T]) charge(r spot, now int64, n int) {
	if n == 0 {
		return
	}
	quantum := s.table.grid.at(now)
	if r.place < 0 {
		s.sketch.advance(quantum)
		s.sketch.add(r.hash, n)
		return
	}
	s.table.expire(r.place, quantum)
	// more than the limit is only charged after the fact, and need not be told apart
	if room := s.limit - int(s.table.heads[r.place].total); n > room {
		n = room
	}
	if n > 0 {
		s.table.add(r.place, quantum, n)
	}
}

func (s *sliding[T]) block(r spot, now, until, since int64) {
	if r.place < 0 {
		if r.place = s.admitBlocked(r.hash, now); r.place < 0 {
			s.blocks.raise(r.hash, until)
			return
		}
	}
	s.table.meta[r.place] = meta{guard: until, since: since}
}

// admitBlocked makes room for a key that is to be blocked.
func (s *sliding[T]) admitBlocked(hash uint64, now int64) int {
	quantum := s.table.grid.at(now)
	s.sketch.advance(quantum)
	t := s.sketch.estimate(hash)
	e, victim := s.table.place(hash, now, s.limit+1, func(e int) (int, int64) { return s.table.used(e, quantum) })
	if e < 0 {
		return -1
	}
	if victim {
		s.spill(e)
	}
	s.table.claim(e, hash)
	s.seed(e, quantum, &t)
	return e
}

// forgive gives the key an empty record that stands until the sketch has
// forgotten it. Where all records are guarded, the place of one is taken
// anyway and what it counts is kept in the sketch.
func (s *sliding[T]) forgive(hash uint64, now int64) {
	quantum := s.table.grid.at(now)
	s.sketch.advance(quantum)
	e := s.table.find(hash)
	if e < 0 {
		var victim bool
		if e, victim = s.table.place(hash, now, s.limit+1, func(e int) (int, int64) { return s.table.used(e, quantum) }); e < 0 {
			e, victim = s.table.bucket(hash), true
			if m := s.table.meta[e]; m.since > 0 && s.blocks != nil {
				s.blocks.raise(s.table.ids[e], m.guard)
			}
		}
		if victim {
			s.spill(e)
		}
	}
	s.table.claim(e, hash)
	guard := now + 2*s.window
	if s.blocks != nil {
		guard = max(guard, s.blocks.get(hash))
	}
	s.table.meta[e] = meta{guard: guard}
}

func (s *sliding[T]) noisy(hash uint64, now int64) bool {
	s.sketch.advance(s.table.grid.at(now))
	return s.sketch.estimate(hash).total > uint64(s.limit-s.limit/2)
}
