// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"errors"
	"net/http"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddy-gatehouse/gatehouse/internal/option"
	"github.com/caddy-gatehouse/gatehouse/internal/phase"
)

// Connection shows what happens between Caddy and the upstream, per attempt:
// as the field `hooks` of the access log, in which `attempts` is an array, and
// as metrics. The placeholders of the [Handler] hold the same for the last attempt.
//
// It also learns from kept-alive connections that an upstream has closed
// (`reset_on_reused`) how long that upstream keeps idle connections. After three
// of them it warns, once per upstream, with the `keepalive` to set.
type Connection struct {
	// How many upstreams are remembered for that warning; beyond, the one not
	// seen for the longest time is forgotten. The value of the last loaded
	// configuration counts. Default: 1024.
	MaxUpstreams int `json:"max_upstreams,omitempty"`

	logger *zap.Logger
	doctor *doctor
}

// doctors holds the one doctor of the process, which must outlive a reload: what
// it knows took time to learn, and its warnings are given once.
var doctors = caddy.NewUsagePool()

const doctorKey = "doctor"

// CaddyModule returns the Caddy module information.
func (*Connection) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.hooks.connection",
		New: func() caddy.Module { return new(Connection) },
	}
}

// Provision registers the metrics and takes what is known of the upstreams.
func (c *Connection) Provision(ctx caddy.Context) error {
	c.logger = ctx.Logger()
	if c.MaxUpstreams == 0 {
		c.MaxUpstreams = defaultMaxUpstreams
	}
	if c.MaxUpstreams < 0 {
		return errors.New("max_upstreams must be at least 1")
	}
	v, _, err := doctors.LoadOrNew(doctorKey, func() (caddy.Destructor, error) {
		return newDoctor(c.MaxUpstreams), nil
	})
	if err != nil {
		return err
	}
	c.doctor = v.(*doctor)
	c.doctor.limit(c.MaxUpstreams)
	return metrics.register(ctx.GetMetricsRegistry())
}

// Cleanup gives the doctor back. Requests that are under way go on asking it.
func (c *Connection) Cleanup() error {
	if c.doctor == nil {
		return nil
	}
	_, err := doctors.Delete(doctorKey)
	return err
}

// Log reports the attempts of a request.
func (c *Connection) Log(x *phase.Exchange, _ *http.Request) {
	x.LogAttempts()
	now := x.Start().Add(x.Outcome().Duration)
	var room [4]*phase.Attempt
	for _, a := range x.AppendAttempts(room[:0]) {
		f := a.Facts()
		duration := f.Ended
		if duration == 0 {
			duration = now.Sub(f.Start)
		}
		metricsOf(f.Label).attempt(&f, duration.Seconds())
		c.consult(&f)
	}
}

// consult tells the doctor how a reused connection fared.
func (c *Connection) consult(f *phase.Facts) {
	switch {
	case !f.Conn.Reused || f.Conn.Idle == 0:
	case f.Class == phase.ResetOnReused:
		if keepalive, diagnosed := c.doctor.reset(f.Upstream, f.Conn.Idle, f.Start); diagnosed {
			c.logger.Warn("the upstream closes idle connections before Caddy does; set keepalive in its transport",
				zap.String("upstream", f.Upstream), zap.Duration("idle", f.Conn.Idle),
				zap.String("keepalive", keepalive.String()))
		}
	case f.FirstByte > 0:
		c.doctor.worked(f.Upstream, f.Conn.Idle)
	}
}

// UnmarshalCaddyfile reads:
//
//	connection {
//		max_upstreams <n>
//	}
func (c *Connection) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next()
	if d.NextArg() {
		return d.ArgErr()
	}
	once := make(option.Set)
	for d.NextBlock(0) {
		switch d.Val() {
		case "max_upstreams":
			if err := once.First(d); err != nil {
				return err
			}
			n, err := option.Number(d, 1, 1<<20)
			if err != nil {
				return err
			}
			c.MaxUpstreams = n
		default:
			return option.Unrecognized(d, "connection")
		}
	}
	return nil
}

// Interface guards
var (
	_ caddy.Provisioner     = (*Connection)(nil)
	_ caddy.CleanerUpper    = (*Connection)(nil)
	_ caddyfile.Unmarshaler = (*Connection)(nil)
	_ phase.LogHook         = (*Connection)(nil)
)
