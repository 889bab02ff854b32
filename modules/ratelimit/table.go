// SPDX-License-Identifier: Apache-2.0

package ratelimit

import "math"

// ways is how many places a key may have in a table: one cache line of IDs.
const ways = 8

// table is what the exact records of keys have in common: a fixed number of
// places, found by the hash of the key. It is not safe for concurrent use.
type table struct {
	ids     []uint64 // 0: never used
	meta    []meta
	full    []int64 // per bucket: until when surely none of its places is free
	claimed int     // places that were ever used
}

// meta is what a record of either algorithm has.
type meta struct {
	// guard is when the record may be given up although nothing is counted: it
	// tells of a block, or that the key was forgiven.
	guard int64
	since int64 // when the block began; 0: there is none
}

func newTable(places int) table {
	places = max(places/ways, 1) * ways
	return table{ids: make([]uint64, places), meta: make([]meta, places), full: make([]int64, places/ways)}
}

// metaSize is the size of a place without the record itself, in bytes.
const metaSize = 8 + 16 + 8/ways

// bucket is the first place of a key.
func (t *table) bucket(hash uint64) int {
	return int(uint64(uint32(hash>>8))*uint64(len(t.ids)/ways)>>32) * ways
}

// find returns the place of a key, or -1.
func (t *table) find(hash uint64) int {
	b := t.bucket(hash)
	for i, id := range t.ids[b : b+ways] {
		if id == hash {
			return b + i
		}
	}
	return -1
}

// place returns a place for a key that has none: one that nothing is counted
// in, else the one with the smallest count, if that is below the given one. In
// the latter case it is a victim, whose count the caller keeps elsewhere. It
// returns -1 if all places are needed. used tells the count of a place and
// until when that is not 0.
func (t *table) place(hash uint64, now int64, below int, used func(e int) (n int, until int64)) (e int, victim bool) {
	b := t.bucket(hash)
	full := &t.full[b/ways]
	if below == 0 && *full > now {
		return -1, false
	}
	least, e := below, -1
	free := int64(math.MaxInt64)
	for i := b; i < b+ways; i++ {
		if t.ids[i] == 0 {
			t.claimed++
			return i, false
		}
		guard := t.meta[i].guard
		if guard > now {
			free = min(free, guard)
			continue
		}
		n, until := used(i)
		if n == 0 {
			return i, false
		}
		free = min(free, until)
		if n < least {
			least, e = n, i
		}
	}
	if e < 0 {
		*full = free
	}
	return e, true
}

// runs is a table of sliding windows: per key a ring of runs, each one the
// events of one quantum, oldest first.
type runs[T counter] struct {
	table
	grid   grid
	length int // runs per record
	heads  []runHead
	quanta []uint16 // the low bits; the window is shorter than 2^16 quanta
	counts []T
}

type runHead struct {
	last  int64 // quantum of the newest run
	total uint32
	head  uint8 // index of the oldest run
	n     uint8 // runs
}

// newRuns makes a table of at most that many bytes.
func newRuns[T counter](bytes, size int, l Limit, g grid) *runs[T] {
	length := min(l.Capacity(), maxRuns)
	t := newTable(bytes / (metaSize + 16 + length*(2+size)))
	places := len(t.ids)
	return &runs[T]{
		table: t, grid: g, length: length,
		heads:  make([]runHead, places),
		quanta: make([]uint16, places*length),
		counts: make([]T, places*length),
	}
}

// at is the index of the run that is i runs behind the oldest.
func (t *runs[T]) at(e, i int) int {
	i += int(t.heads[e].head)
	if i >= t.length {
		i -= t.length
	}
	return e*t.length + i
}

// quantum is the whole quantum of a run.
func (t *runs[T]) quantum(e, i int) int64 {
	last := t.heads[e].last
	return last - int64(uint16(last)-t.quanta[t.at(e, i)])
}

// expire forgets what is not in the window anymore and returns the total.
func (t *runs[T]) expire(e int, now int64) int {
	h := &t.heads[e]
	if h.n == 0 {
		return 0
	}
	oldest := now - t.grid.span
	if h.last < oldest {
		h.n, h.total = 0, 0
		return 0
	}
	for h.n > 0 && t.quantum(e, 0) < oldest {
		i := t.at(e, 0)
		h.total -= uint32(t.counts[i])
		h.n--
		if h.head++; int(h.head) == t.length {
			h.head = 0
		}
	}
	return int(h.total)
}

// add counts n events. There must be room for them, and what is too old must
// have been forgotten. A quantum before the last one counts as the last one.
func (t *runs[T]) add(e int, quantum int64, n int) {
	h := &t.heads[e]
	h.total += uint32(n)
	if h.n > 0 && quantum <= h.last {
		t.counts[t.at(e, int(h.n)-1)] += T(n)
		return
	}
	h.last = quantum
	if int(h.n) == t.length { // forgets the run before late; callers leave room, and early would be wrong
		i := t.at(e, int(h.n)-1)
		t.quanta[i] = uint16(quantum)
		t.counts[i] += T(n)
		return
	}
	h.n++
	i := t.at(e, int(h.n)-1)
	t.quanta[i], t.counts[i] = uint16(quantum), T(n)
}

// wait says how long it takes, in microseconds, until n events have room.
func (t *runs[T]) wait(e, n, limit int, now int64) int64 {
	h := &t.heads[e]
	over := int64(h.total) + int64(n) - int64(limit)
	for i := 0; i < int(h.n) && over > 0; i++ {
		over -= int64(t.counts[t.at(e, i)])
		if over <= 0 {
			return max(t.grid.forgotten(t.quantum(e, i))-now, 1)
		}
	}
	return t.grid.forgotten(t.grid.at(now)) - now
}

// used is what a place counts, and until when that is not 0.
func (t *runs[T]) used(e int, quantum int64) (n int, until int64) {
	n = t.expire(e, quantum)
	return n, t.grid.forgotten(t.heads[e].last)
}

// reset is when the last event will be forgotten.
func (t *runs[T]) reset(e int, now int64) int64 {
	if t.heads[e].n == 0 {
		return 0
	}
	return max(t.grid.forgotten(t.heads[e].last)-now, 0)
}

// claim makes a place the one of a key, with nothing counted.
func (t *runs[T]) claim(e int, hash uint64) {
	t.ids[e], t.meta[e], t.heads[e] = hash, meta{}, runHead{}
}
