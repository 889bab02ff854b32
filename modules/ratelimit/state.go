// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"fmt"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// state is what all handlers of a zone share. It outlives a reload.
type state struct {
	id       string
	spec     Spec
	keys     []*KeyLevel
	counters Counters
	polls    bool // what ends elsewhere makes room, too
	line     line
	lines    logbook
	series   *series
	secret   atomic.Int32 // uses of the zone without log_keys
}

// states are the zones of all loaded configurations, by ID.
var (
	states = caddy.NewUsagePool()

	zonesMu sync.RWMutex
	zones   = make(map[string][]*state) // by name
)

// acquireState returns the state of a zone that has the same settings, or makes
// one with the counters of a store.
func acquireState(z *Zone, route string, store Store) (*state, error) {
	spec := z.spec(route)
	id := spec.Zone + "\n" + spec.Route + "\n" + z.settings
	v, _, err := states.LoadOrNew(id, func() (caddy.Destructor, error) {
		counters, err := store.Open(spec)
		if err != nil {
			return nil, err
		}
		_, inMemory := store.(*MemoryStore)
		s := &state{
			id: id, spec: spec, keys: z.Keys, counters: counters, series: acquireSeries(spec.Zone),
			polls: !inMemory || len(spec.Levels) > 1,
			lines: logbook{spec: spec},
		}
		if z.waits() {
			s.line.init(spec.Zone, z.MaxWaiting)
		}
		s.join()
		return s, nil
	})
	if err != nil {
		return nil, err
	}
	s := v.(*state)
	if !z.LogKeys {
		s.secret.Add(1)
	}
	return s, nil
}

func releaseState(z *Zone) {
	if !z.LogKeys {
		z.state.secret.Add(-1)
	}
	_, _ = states.Delete(z.state.id)
}

// logKeys tells whether the admin API may show keys in clear: all uses of the
// zone must want it.
func (s *state) logKeys() bool { return s.secret.Load() == 0 }

func (s *state) join() {
	zonesMu.Lock()
	defer zonesMu.Unlock()
	zones[s.spec.Zone] = append(zones[s.spec.Zone], s)
}

// Destruct gives up the counters of a zone that no configuration has anymore.
func (s *state) Destruct() error {
	zonesMu.Lock()
	name := s.spec.Zone
	zones[name] = slices.DeleteFunc(zones[name], func(o *state) bool { return o == s })
	if len(zones[name]) == 0 {
		delete(zones, name)
	}
	zonesMu.Unlock()
	releaseSeries(name)
	return s.counters.Close()
}

// statesOf returns the states of a zone, more than one with `scope route` or
// while one configuration replaces another.
func statesOf(name string) []*state {
	zonesMu.RLock()
	defer zonesMu.RUnlock()
	return slices.Clone(zones[name])
}

// load is one loading of a configuration. It finds zones that disagree, and
// gives routes their names.
type load struct {
	registry *prometheus.Registry

	handlers int // guarded by loadsMu
	mu       sync.Mutex
	zones    map[string]place // by name
	routes   map[string]int   // handlers by server
}

var (
	loadsMu sync.Mutex
	loads   = make(map[*prometheus.Registry]*load)
)

// enterLoad returns the load that a context belongs to.
func enterLoad(ctx caddy.Context) *load {
	loadsMu.Lock()
	defer loadsMu.Unlock()
	reg := ctx.GetMetricsRegistry()
	l := loads[reg]
	if l == nil {
		l = &load{registry: reg, zones: make(map[string]place), routes: make(map[string]int)}
		loads[reg] = l
	}
	l.handlers++
	return l
}

func (l *load) leave() {
	loadsMu.Lock()
	defer loadsMu.Unlock()
	if l.handlers--; l.handlers == 0 {
		delete(loads, l.registry)
	}
}

// route names a handler by its server and its place among those there.
func (l *load) route(srv *caddyhttp.Server) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	name := ""
	if srv != nil {
		name = srv.Name()
	}
	l.routes[name]++
	return name + "/" + strconv.Itoa(l.routes[name])
}

// agree refuses zones of the same name with different settings.
func (l *load) agree(z *Zone, route string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	own := place{z.settings, route}
	if other, ok := l.zones[z.Name]; ok && other.fingerprint != own.fingerprint {
		return fmt.Errorf("zone %q: it is there twice with different settings, in the ratelimit handlers %s and %s", z.Name, other.at, route)
	}
	l.zones[z.Name] = own
	return nil
}
