// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"container/list"
	"sync"
	"time"
)

const (
	// how many resets of idle connections make a diagnosis
	resetsToDiagnose = 3

	// resets that come together, when an upstream restarts, count as one
	resetsApart = time.Second

	// how many upstreams the doctor remembers unless configured otherwise
	defaultMaxUpstreams = 1024
)

// doctor learns the idle timeout of upstreams from kept-alive connections that
// turn out to be closed when they are used again. It forgets the upstream that
// was not seen for the longest time when it knows too many. It is safe for
// concurrent use.
type doctor struct {
	mu       sync.Mutex
	max      int
	patients map[string]*list.Element // of *patient
	order    *list.List               // most recently seen first
}

// patient is what the doctor knows of one upstream.
type patient struct {
	upstream string

	// survived is the longest idle time after which a connection still worked.
	survived time.Duration

	// shortest is the shortest idle time after which one was found closed.
	shortest time.Duration

	resets    int // since the last contradiction
	lastReset time.Time
	diagnosed bool
}

func newDoctor(maxUpstreams int) *doctor {
	return &doctor{max: maxUpstreams, patients: make(map[string]*list.Element), order: list.New()}
}

// worked records that a connection to upstream answered after having been idle.
func (d *doctor) worked(upstream string, idle time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	e, ok := d.patients[upstream]
	if !ok {
		return // an upstream without resets needs no doctor
	}
	p := e.Value.(*patient)
	p.survived = max(p.survived, idle)
	if p.resets > 0 && idle >= p.shortest {
		p.resets = 0 // it was not the idle time
	}
}

// reset records that a connection to upstream was found closed after having
// been idle. The first time that this makes the idle timeout known, it returns
// the keepalive to recommend.
func (d *doctor) reset(upstream string, idle time.Duration, now time.Time) (keepalive time.Duration, diagnosed bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	p := d.see(upstream)
	if idle <= p.survived {
		return 0, false // connections live longer than that: a restart, say
	}
	if p.resets == 0 || idle < p.shortest {
		p.shortest = idle
	}
	if p.resets > 0 && now.Sub(p.lastReset) < resetsApart {
		return 0, false
	}
	p.lastReset = now
	p.resets++
	if p.diagnosed || p.resets < resetsToDiagnose {
		return 0, false
	}
	p.diagnosed = true
	return p.keepalive(), true
}

// see returns the upstream's record, a new one if it must.
func (d *doctor) see(upstream string) *patient {
	if e, ok := d.patients[upstream]; ok {
		d.order.MoveToFront(e)
		return e.Value.(*patient)
	}
	for len(d.patients) >= d.max {
		oldest := d.order.Back()
		delete(d.patients, oldest.Value.(*patient).upstream)
		d.order.Remove(oldest)
	}
	p := &patient{upstream: upstream}
	d.patients[upstream] = d.order.PushFront(p)
	return p
}

// limit sets how many upstreams are remembered.
func (d *doctor) limit(maxUpstreams int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.max = maxUpstreams
}

// all returns the records, most recently seen first.
func (d *doctor) all() []patient {
	d.mu.Lock()
	defer d.mu.Unlock()
	out := make([]patient, 0, len(d.patients))
	for e := d.order.Front(); e != nil; e = e.Next() {
		out = append(out, *e.Value.(*patient))
	}
	return out
}

// keepalive is four fifths of the shortest idle time that was too long,
// rounded down to what a person would write; 0 if nothing is known.
func (p *patient) keepalive() time.Duration {
	if p.resets < resetsToDiagnose {
		return 0
	}
	k := p.shortest * 4 / 5
	for _, unit := range []time.Duration{time.Second, 100 * time.Millisecond, time.Millisecond} {
		if k >= unit {
			return k.Truncate(unit)
		}
	}
	return k
}

// Destruct implements caddy.Destructor; there is nothing to close.
func (*doctor) Destruct() error { return nil }
