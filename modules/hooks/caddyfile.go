// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-gatehouse/gatehouse/internal/option"
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
	once := make(option.Set)
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
			if err := once.First(d); err != nil {
				return err
			}
		}
		if name == "suppress_error_log" {
			suppress = option.Here(d)
		}
		hook, err := caddyfile.UnmarshalModule(d, id)
		if err != nil {
			return err
		}
		mods = append(mods, hook)
		h.HooksRaw = append(h.HooksRaw, caddyconfig.JSONModuleObject(hook, "hook", name, nil))
	}
	if err := checkAnswers(mods); err != nil {
		return suppress.Errf("%v", err)
	}
	return nil
}

// Interface guards
var _ caddyfile.Unmarshaler = (*Handler)(nil)
