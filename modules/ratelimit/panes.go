// SPDX-License-Identifier: Apache-2.0

package ratelimit

// counter is the width of a counter: the narrowest that holds the limit, since
// more than the limit need not be told apart.
type counter interface{ ~uint8 | ~uint16 | ~uint32 }

// rows is the depth of the sketches.
const rows = 4

// spots are the places of a key in a sketch, one per row.
type spots [rows]uint32

// locate returns the places of a key by double hashing (Kirsch, Mitzenmacher:
// Less Hashing, Same Performance).
func locate(hash uint64, width uint32) (at spots) {
	h := mix(hash)
	step := h>>32 | 1
	for r := range at {
		at[r] = uint32(r)*width + uint32(uint64(uint32(h))*uint64(width)>>32)
		h += step
	}
	return at
}

// mix is the finalizer of MurmurHash3, so that what else is derived from the
// hash of a key is independent of its places.
func mix(h uint64) uint64 {
	h ^= h >> 33
	h *= 0xff51afd7ed558ccd
	h ^= h >> 33
	h *= 0xc4ceb9fe1a85ec53
	h ^= h >> 33
	return h
}

// panes is a count-min sketch (Cormode, Muthukrishnan 2005) with conservative
// update over a sliding window: each cell has one counter per pane of time, and
// what a key has is the sum over the panes of the least counter of its cells.
// It never says less than there was, and forgets a pane late rather than early.
// It is not safe for concurrent use.
type panes[T counter] struct {
	cells  []T
	width  uint32 // cells per row
	count  int64  // panes per cell
	quanta int64  // per pane
	grid   grid

	pane   int64 // the current one
	filled int64 // the last pane in which something was counted
}

// paneCount is the number of panes for the width of a counter.
func paneCount[T counter]() int64 {
	if ^T(0) == T(^uint8(0)) {
		return 16
	}
	return 8
}

// newPanes makes a sketch of at most that many bytes.
func newPanes[T counter](bytes int, size int, g grid) *panes[T] {
	count := paneCount[T]()
	width := max(bytes/(size*int(count)*rows), 1)
	return &panes[T]{
		cells:  make([]T, width*rows*int(count)),
		width:  uint32(width),
		count:  count,
		quanta: (g.span + count - 2) / (count - 1),
		grid:   g,
		filled: -1 << 62,
	}
}

// advance goes on to the pane of a quantum and empties what is reused. It never
// goes back.
func (p *panes[T]) advance(quantum int64) {
	pane := quantum / p.quanta
	if pane <= p.pane {
		return
	}
	first := max(p.pane+1, pane-p.count+1)
	if !p.empty() {
		for n := first; n <= pane; n++ {
			for i := n % p.count; i < int64(len(p.cells)); i += p.count {
				p.cells[i] = 0
			}
		}
	}
	p.pane = pane
}

// empty tells whether no pane of the window has anything in it.
func (p *panes[T]) empty() bool { return p.filled <= p.pane-p.count }

// tally is what a key has in each pane, oldest first.
type tally struct {
	counts [16]uint32
	total  uint64
}

// estimate says what a key has, at least what it really has.
func (p *panes[T]) estimate(hash uint64) (t tally) {
	if p.empty() {
		return t
	}
	at := locate(hash, p.width)
	var cells [rows][]T
	for r := range cells {
		i := int(at[r]) * int(p.count)
		cells[r] = p.cells[i : i+int(p.count)]
	}
	slot := int((p.pane + 1) % p.count)
	for i := range int(p.count) {
		c := min(cells[0][slot], cells[1][slot], cells[2][slot], cells[3][slot])
		t.counts[i] = uint32(c)
		t.total += uint64(c)
		if slot++; slot == int(p.count) {
			slot = 0
		}
	}
	return t
}

// quantum is the latest quantum of the pane at an index of a tally.
func (p *panes[T]) quantum(index int) int64 {
	return (p.pane-p.count+2+int64(index))*p.quanta - 1
}

// add counts n events in the current pane.
func (p *panes[T]) add(hash uint64, n int) {
	at := locate(hash, p.width)
	slot := uint32(p.pane % p.count)
	least := ^T(0)
	for r, i := range at {
		at[r] = i*uint32(p.count) + slot
		least = min(least, p.cells[at[r]])
	}
	p.raise(at, saturate(least, n))
	p.filled = p.pane
}

// merge sees to it that the key has at least n in the pane of a quantum.
func (p *panes[T]) merge(hash uint64, quantum int64, n int) {
	pane := min(quantum/p.quanta, p.pane)
	if pane <= p.pane-p.count {
		return
	}
	at := locate(hash, p.width)
	for r, i := range at {
		at[r] = i*uint32(p.count) + uint32(pane%p.count)
	}
	p.raise(at, saturate(T(0), n))
	p.filled = max(p.filled, pane)
}

func (p *panes[T]) raise(at spots, to T) {
	for _, i := range at {
		p.cells[i] = max(p.cells[i], to)
	}
}

// saturate is c + n, or the largest T.
func saturate[T counter](c T, n int) T {
	most := ^T(0)
	if n < 0 || uint64(n) > uint64(most-c) {
		return most
	}
	return c + T(n)
}

// wait says how long it takes, in microseconds, until the key with this tally
// has room for n events below a limit.
func (p *panes[T]) wait(t *tally, n, limit int, now int64) int64 {
	over := int64(t.total) + int64(n) - int64(limit)
	for i := 0; i < int(p.count) && over > 0; i++ {
		over -= int64(t.counts[i])
		if over <= 0 {
			// the pane is emptied when its slot is needed
			return max((p.pane-p.count+1+int64(i)+p.count)*p.quanta*p.grid.quantum-now, 1)
		}
	}
	return p.grid.forgotten(p.grid.at(now)) - now
}

// reset says how long it takes, in microseconds, until what is counted now is
// forgotten.
func (p *panes[T]) reset(now int64) int64 {
	return (p.pane+p.count)*p.quanta*p.grid.quantum - now
}

// deadlines is a count-min sketch of times: what it says of a key is never
// earlier than the latest that it was told. It is not safe for concurrent use.
type deadlines struct {
	cells []int64
	width uint32
}

func newDeadlines(bytes int) *deadlines {
	width := max(bytes/(8*rows), 1)
	return &deadlines{cells: make([]int64, width*rows), width: uint32(width)}
}

func (d *deadlines) get(hash uint64) int64 {
	at := locate(hash, d.width)
	return min(d.cells[at[0]], d.cells[at[1]], d.cells[at[2]], d.cells[at[3]])
}

func (d *deadlines) raise(hash uint64, to int64) {
	for _, i := range locate(hash, d.width) {
		d.cells[i] = max(d.cells[i], to)
	}
}
