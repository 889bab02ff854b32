// SPDX-License-Identifier: Apache-2.0

package ratelimit

// flights counts what is under way: requests in flight and events that are
// reserved. Up to a number of keys it is exact; the others share a count-min
// sketch. Whatever is added must be taken away again with the same overflow.
// It is not safe for concurrent use.
type flights struct {
	keys map[uint64]flight
	most int

	over  []flight // made when it is first needed
	width uint32
	held  int // in over
}

type flight struct{ inflight, reserved int32 }

const (
	flightSize = 48 // of an entry of the map, at the worst
	cellSize   = 8
)

// newFlights makes a table of at most that many bytes.
func newFlights(bytes int) flights {
	most := max(bytes*3/4/flightSize, 8)
	return flights{
		keys:  make(map[uint64]flight, most),
		most:  most,
		width: uint32(max(bytes/4/cellSize/rows, 1)),
	}
}

// get is what a key has under way, at least what it really has.
func (f *flights) get(hash uint64) flight {
	k := f.keys[hash]
	if f.held == 0 {
		return k
	}
	at := locate(hash, f.width)
	o := f.over[at[0]]
	for _, i := range at[1:] {
		o.inflight = min(o.inflight, f.over[i].inflight)
		o.reserved = min(o.reserved, f.over[i].reserved)
	}
	return flight{k.inflight + o.inflight, k.reserved + o.reserved}
}

// add counts for a key, and tells whether it did so in the sketch.
func (f *flights) add(hash uint64, n flight) (overflow bool) {
	k, ok := f.keys[hash]
	if ok || len(f.keys) < f.most {
		f.keys[hash] = flight{k.inflight + n.inflight, k.reserved + n.reserved}
		return false
	}
	if f.over == nil {
		f.over = make([]flight, rows*int(f.width))
	}
	f.held++
	f.spread(hash, n)
	return true
}

func (f *flights) remove(hash uint64, n flight, overflow bool) {
	if overflow {
		f.held--
		f.spread(hash, flight{-n.inflight, -n.reserved})
		return
	}
	k := f.keys[hash]
	k.inflight -= n.inflight
	k.reserved -= n.reserved
	if k == (flight{}) {
		delete(f.keys, hash)
		return
	}
	f.keys[hash] = k
}

func (f *flights) spread(hash uint64, n flight) {
	for _, i := range locate(hash, f.width) {
		f.over[i].inflight += n.inflight
		f.over[i].reserved += n.reserved
	}
}
