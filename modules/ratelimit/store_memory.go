// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"fmt"

	"github.com/dustin/go-humanize"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddy-gatehouse/gatehouse/internal/option"
)

const (
	defaultMaxMemory = 16 << 20
	leastMaxMemory   = 64 << 10
	mostMaxMemory    = 1 << 40
)

// What is done with keys that can't be told apart anymore.
const (
	saturationRefuse = "refuse"
	saturationPass   = "pass"
)

// MemoryStore counts in the memory of this process. It is the default.
//
// Keys have an exact record as long as there is room. When there is none, a
// key that is near its limit takes the place of one that has used less; all
// others share a count-min sketch, which never counts too little, and may count
// too much. So no key is ever handed a fresh limit by what other keys do.
type MemoryStore struct {
	// Size of the counters of a zone, in bytes, allocated when the zone is made
	// and shared by its levels. Default: 16 MiB. At least 64 KiB.
	MaxMemory int64 `json:"max_memory,omitempty"`

	// What happens to keys without a record once there are so many keys that
	// more than 1 % of the keys that have used half of their limit would be
	// refused: `refuse` (the default) counts them as the sketch does, `pass`
	// lets them through. Either is logged once, and shown in
	// caddy_gatehouse_ratelimit_saturated.
	OnSaturation string `json:"on_saturation,omitempty"`
}

// CaddyModule returns the Caddy module information.
func (*MemoryStore) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.ratelimit.stores.memory",
		New: func() caddy.Module { return new(MemoryStore) },
	}
}

// Provision sets the defaults.
func (s *MemoryStore) Provision(ctx caddy.Context) error {
	if s.MaxMemory == 0 {
		s.MaxMemory = defaultMaxMemory
	}
	if s.OnSaturation == saturationPass {
		ctx.Logger().Warn("on_saturation pass: when there are too many keys, those without a record of their own are not limited")
	}
	return nil
}

// Validate checks the size and the words.
func (s *MemoryStore) Validate() error {
	if s.MaxMemory < leastMaxMemory || s.MaxMemory > mostMaxMemory {
		return fmt.Errorf("max_memory %d: %s", s.MaxMemory, wantMaxMemory())
	}
	return checkWord("on_saturation", s.OnSaturation, saturationRefuse, saturationPass)
}

func wantMaxMemory() string {
	return fmt.Sprintf("must be from %s to %s", humanize.IBytes(leastMaxMemory), humanize.IBytes(mostMaxMemory))
}

// Open makes the counters of a zone.
func (s *MemoryStore) Open(spec Spec) (Counters, error) {
	return openMemory(spec, s.MaxMemory, s.OnSaturation == saturationPass), nil
}

// UnmarshalCaddyfile reads:
//
//	store memory {
//		max_memory    <size>
//		on_saturation refuse|pass
//	}
func (s *MemoryStore) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next()
	if d.NextArg() {
		return d.ArgErr()
	}
	once := make(option.Set)
	for d.NextBlock(0) {
		if err := once.First(d); err != nil {
			return err
		}
		var err error
		switch d.Val() {
		case "max_memory":
			err = readMaxMemory(d, &s.MaxMemory)
		case "on_saturation":
			s.OnSaturation, err = option.Word(d, saturationRefuse, saturationPass)
		default:
			err = option.Unrecognized(d, "store memory")
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// readMaxMemory reads the size of counters.
func readMaxMemory(d *caddyfile.Dispenser, size *int64) (err error) {
	if *size, err = option.Size(d); err == nil && (*size < leastMaxMemory || *size > mostMaxMemory) {
		err = d.Errf("parsing max_memory %q: %s", d.Val(), wantMaxMemory())
	}
	return err
}

// Interface guards
var (
	_ Store                 = (*MemoryStore)(nil)
	_ caddy.Provisioner     = (*MemoryStore)(nil)
	_ caddy.Validator       = (*MemoryStore)(nil)
	_ caddyfile.Unmarshaler = (*MemoryStore)(nil)
)
