// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"strconv"

	"github.com/dustin/go-humanize"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

func init() {
	httpcaddyfile.RegisterHandlerDirective("hooks", parseCaddyfile)
	// behind encode: the phases of the response see plain bytes, and `handle`,
	// `route` and a cache are inside
	httpcaddyfile.RegisterDirectiveOrder("hooks", httpcaddyfile.After, "encode")
}

func parseCaddyfile(h httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
	handler := new(Handler)
	if err := handler.UnmarshalCaddyfile(h.Dispenser); err != nil {
		return nil, err
	}
	return handler, nil
}

// UnmarshalCaddyfile reads the hooks, in the order in which they see a request:
//
//	hooks [<matcher>] {
//		connection           { … }
//		upstream_request     { … }
//		on_error             { … }
//		request_summary      <text>
//		suppress_error_log   <class|status…>
//		log_field            <name> <value>
//		<module>             …
//	}
//
// Any other word names the module http.hooks.<word>. All but upstream_request,
// log_field and other modules may stand there once.
func (h *Handler) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next()
	if d.NextArg() {
		return d.ArgErr()
	}
	once := make(options)
	var mods []any
	var suppress *caddyfile.Dispenser
	for d.NextBlock(0) {
		name := d.Val()
		id := "http.hooks." + name
		if _, err := caddy.GetModule(id); err != nil {
			return d.Errf("unrecognized hooks option %q: there is no module %s", name, id)
		}
		switch name {
		case "connection", "on_error", "request_summary", "suppress_error_log":
			if err := once.first(d); err != nil {
				return err
			}
		}
		if name == "suppress_error_log" {
			suppress = caddyfile.NewDispenser([]caddyfile.Token{d.Token()})
		}
		hook, err := caddyfile.UnmarshalModule(d, id)
		if err != nil {
			return err
		}
		mods = append(mods, hook)
		h.HooksRaw = append(h.HooksRaw, caddyconfig.JSONModuleObject(hook, "hook", name, nil))
	}
	if err := checkAnswers(mods); err != nil {
		suppress.Next()
		return suppress.Errf("%v", err)
	}
	return nil
}

// options remembers which options of a block were seen.
type options map[string]bool

// first reports an error if the option that d is at was there before.
func (o options) first(d *caddyfile.Dispenser) error {
	if o[d.Val()] {
		return d.Errf("%s already specified", d.Val())
	}
	o[d.Val()] = true
	return nil
}

// unrecognized is the error for an unknown word in the block of an option.
func unrecognized(d *caddyfile.Dispenser, block string) error {
	return d.Errf("unrecognized %s option %q", block, d.Val())
}

// argument returns the one argument of the option that d is at.
func argument(d *caddyfile.Dispenser) (string, error) {
	var arg string
	if !d.AllArgs(&arg) {
		return "", d.ArgErr()
	}
	return arg, nil
}

// arguments returns one or more arguments of the option that d is at.
func arguments(d *caddyfile.Dispenser) ([]string, error) {
	args := d.RemainingArgs()
	if len(args) == 0 {
		return nil, d.ArgErr()
	}
	return args, nil
}

// flag makes sure that the option that d is at has no argument.
func flag(d *caddyfile.Dispenser) error {
	if d.NextArg() {
		return d.ArgErr()
	}
	return nil
}

// number reads a whole number in a range.
func number(d *caddyfile.Dispenser, lowest, highest int) (int, error) {
	option := d.Val()
	arg, err := argument(d)
	if err != nil {
		return 0, err
	}
	n, err := strconv.Atoi(arg)
	if err != nil || n < lowest || n > highest {
		return 0, d.Errf("parsing %s %q: must be a whole number from %d to %d", option, arg, lowest, highest)
	}
	return n, nil
}

// duration reads a duration greater than zero.
func duration(d *caddyfile.Dispenser) (caddy.Duration, error) {
	option := d.Val()
	arg, err := argument(d)
	if err != nil {
		return 0, err
	}
	dur, err := caddy.ParseDuration(arg)
	if err != nil {
		return 0, d.Errf("parsing %s %q: %v", option, arg, err)
	}
	if dur <= 0 {
		return 0, d.Errf("parsing %s %q: must be greater than zero", option, arg)
	}
	return caddy.Duration(dur), nil
}

// size reads a size in bytes greater than zero.
func size(d *caddyfile.Dispenser) (int64, error) {
	option := d.Val()
	arg, err := argument(d)
	if err != nil {
		return 0, err
	}
	n, err := humanize.ParseBytes(arg)
	if err != nil {
		return 0, d.Errf("parsing %s %q: must be a size such as 64KiB", option, arg)
	}
	if n == 0 || n > 1<<62 {
		return 0, d.Errf("parsing %s %q: must be greater than zero", option, arg)
	}
	return int64(n), nil
}

// Interface guards
var _ caddyfile.Unmarshaler = (*Handler)(nil)
