// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"encoding/json"
	"fmt"
	"runtime"
	"slices"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-gatehouse/gatehouse/internal/option"
)

func init() {
	httpcaddyfile.RegisterGlobalOption("ratelimit", parseGlobalOption)
	httpcaddyfile.RegisterHandlerDirective("ratelimit", parseCaddyfile)
	// outside the authenticators: it refuses before they work, and sees their 401s
	httpcaddyfile.RegisterDirectiveOrder("ratelimit", httpcaddyfile.Before, "basic_auth")
}

// parseGlobalOption reads the store of all zones that name none:
//
//	ratelimit {
//		store <module> …
//	}
func parseGlobalOption(d *caddyfile.Dispenser, before any) (any, error) {
	d.Next()
	if before != nil {
		return nil, d.Err("ratelimit already specified")
	}
	if d.NextArg() {
		return nil, d.ArgErr()
	}
	once := make(option.Set)
	var store json.RawMessage
	for d.NextBlock(0) {
		if err := once.First(d); err != nil {
			return nil, err
		}
		if d.Val() != "store" {
			return nil, option.Unrecognized(d, "ratelimit")
		}
		var err error
		if store, err = unmarshalStore(d); err != nil {
			return nil, err
		}
	}
	return store, nil
}

func parseCaddyfile(h httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
	p := parser{places: placesOf(h), routed: insideRoute()}
	p.store, _ = h.Option("ratelimit").(json.RawMessage)
	handler := new(Handler)
	if err := p.handler(handler, h.Dispenser); err != nil {
		return nil, err
	}
	return handler, nil
}

// UnmarshalCaddyfile reads the zones, in the order in which they see a request:
//
//	ratelimit [<matcher>] {
//		headers off|draft|legacy
//		zone <name> {
//			match        <matcher> | { <matchers> }
//			key          <text> | client [{ ipv4_prefix <n>; ipv6_prefix <n>; times <n> }]
//			ipv4_prefix  <n>
//			ipv6_prefix  <n>
//			algorithm    sliding_window|token_bucket
//			rate         <events> <window>
//			burst        <n>
//			inflight     <n>
//			queue        <n> <max_wait>
//			delay        <max_wait>
//			max_waiting  <n>
//			cost         <n|text>
//			count_when   status <status…> | error [<class…>] | cache <word…>
//			penalty      <duration> [<max>]
//			mode         off|shadow|enforce
//			scope        route|zone
//			on_empty_key skip|refuse|shared
//			log_keys
//			store        <module> …
//		}
//	}
//
// key, match and count_when may stand there more than once.
func (h *Handler) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	return new(parser).handler(h, d)
}

// parser reads the directives of one Caddyfile.
type parser struct {
	store  json.RawMessage // of zones that name none
	places map[string]place
	routed bool // inside `route`, where the order is the operator's
}

// place is where a zone was first seen, and its settings there.
type place struct{ fingerprint, at string }

// placesOf returns the zones of the Caddyfile that were read before.
func placesOf(h httpcaddyfile.Helper) map[string]place {
	const key = "gatehouse.ratelimit.zones"
	if h.State == nil {
		return make(map[string]place)
	}
	if p, ok := h.State[key].(map[string]place); ok {
		return p
	}
	p := make(map[string]place)
	h.State[key] = p
	return p
}

// insideRoute tells whether the nearest block around is that of a `route`,
// where nothing is sorted.
func insideRoute() bool {
	var pcs [64]uintptr
	frames := runtime.CallersFrames(pcs[:runtime.Callers(2, pcs[:])])
	for {
		frame, more := frames.Next()
		switch {
		case strings.HasSuffix(frame.Function, "httpcaddyfile.parseRoute"):
			return true
		case !more, strings.HasSuffix(frame.Function, "httpcaddyfile.ParseSegmentAsSubroute"):
			return false
		}
	}
}

func (p *parser) handler(h *Handler, d *caddyfile.Dispenser) error {
	d.Next()
	if d.NextArg() {
		return d.ArgErr()
	}
	once := make(option.Set)
	for d.NextBlock(0) {
		switch d.Val() {
		case "headers":
			err := once.First(d)
			if err == nil {
				h.Headers, err = option.Word(d, headersOff, headersDraft, headersLegacy)
			}
			if err != nil {
				return err
			}
		case "zone":
			z, err := p.zone(d)
			if err != nil {
				return err
			}
			h.Zones = append(h.Zones, z)
		default:
			return option.Unrecognized(d, "ratelimit")
		}
	}
	return nil
}

// zone reads one zone and checks it as a whole.
func (p *parser) zone(d *caddyfile.Dispenser) (*Zone, error) {
	here := option.Here(d)
	name, err := option.Argument(d)
	if err != nil {
		return nil, err
	}
	if !zoneName.MatchString(name) {
		return nil, d.Errf("parsing zone %q: %s", name, nameWanted)
	}
	z := &Zone{Name: name, StoreRaw: p.store}
	if err := z.unmarshal(d); err != nil {
		return nil, err
	}
	full := z.copied()
	full.setDefaults()
	if err := full.check(); err != nil {
		return nil, here.Errf("zone %q: %v", name, err)
	}
	at := fmt.Sprintf("%s:%d", here.File(), here.Line())
	own := place{full.fingerprint(), at}
	if other, ok := p.places[name]; ok && other.fingerprint != own.fingerprint {
		return nil, here.Errf("zone %q: it is there twice with different settings, first at %s", name, other.at)
	}
	if p.places != nil {
		p.places[name] = own
	}
	if !p.routed && z.readsUser() {
		caddy.Log().Named("http.handlers.ratelimit").Sugar().Warnf(
			"%s: zone %q reads {http.auth.*}, which is not set yet: ratelimit is in front of the authenticators; put both into a `route`", at, name)
	}
	return z, nil
}

// copied is a copy whose defaults can be set.
func (z *Zone) copied() *Zone {
	c := *z
	c.Keys = make([]*KeyLevel, len(z.Keys))
	for i, k := range z.Keys {
		level := *k
		c.Keys[i] = &level
	}
	return &c
}

// readsUser tells whether the zone needs what authenticators find out.
func (z *Zone) readsUser() bool {
	texts := []string{z.Cost}
	for _, k := range z.Keys {
		texts = append(texts, k.Text)
	}
	for _, set := range z.MatcherSetsRaw {
		for _, m := range set {
			texts = append(texts, string(m))
		}
	}
	return slices.ContainsFunc(texts, func(text string) bool { return strings.Contains(text, "{http.auth.") })
}

// unmarshal reads the block of a zone.
func (z *Zone) unmarshal(d *caddyfile.Dispenser) error {
	once := make(option.Set)
	var prefixes KeyLevel
	var prefix *caddyfile.Dispenser // where one of them is
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		switch d.Val() {
		case "key", "match", "count_when":
		case "ipv4_prefix", "ipv6_prefix":
			prefix = option.Here(d)
			fallthrough
		default:
			if err := once.First(d); err != nil {
				return err
			}
		}
		if err := z.unmarshalOption(d, &prefixes); err != nil {
			return err
		}
	}
	if prefix != nil && !slices.ContainsFunc(z.Keys, func(k *KeyLevel) bool { return k.Client }) {
		return prefix.Errf("%s is for `key client`", prefix.Val())
	}
	for _, k := range z.Keys {
		if k.Client && k.IPv4Prefix == 0 {
			k.IPv4Prefix = prefixes.IPv4Prefix
		}
		if k.Client && k.IPv6Prefix == 0 {
			k.IPv6Prefix = prefixes.IPv6Prefix
		}
	}
	return nil
}

func (z *Zone) unmarshalOption(d *caddyfile.Dispenser, prefixes *KeyLevel) (err error) {
	switch d.Val() {
	case "match":
		return z.unmarshalMatch(d)
	case "key":
		return z.unmarshalKey(d)
	case "ipv4_prefix", "ipv6_prefix":
		return prefixes.unmarshalPrefix(d)
	case "algorithm":
		z.Algorithm, err = option.Word(d, algorithmSliding, algorithmBucket)
	case "rate":
		return z.unmarshalRate(d)
	case "burst":
		z.Burst, err = option.Number(d, 1, maxNumber)
	case "inflight":
		z.Inflight, err = option.Number(d, 1, maxNumber)
	case "queue":
		return z.unmarshalQueue(d)
	case "delay":
		z.Delay, err = option.Duration(d)
	case "max_waiting":
		z.MaxWaiting, err = option.Number(d, 1, maxNumber)
	case "cost":
		if z.Cost, err = option.Argument(d); err == nil {
			err = wrap(d, z.parseCost())
		}
		if err == nil && z.Cost == "" {
			err = d.Err("parsing cost \"\": must not be empty")
		}
	case "count_when":
		return z.unmarshalCountWhen(d)
	case "penalty":
		return z.unmarshalPenalty(d)
	case "mode":
		z.Mode, err = option.Word(d, modeOff, modeShadow, modeEnforce)
	case "scope":
		z.Scope, err = option.Word(d, scopeRoute, scopeZone)
	case "on_empty_key":
		z.OnEmptyKey, err = option.Word(d, emptySkip, emptyRefuse, emptyShared)
	case "log_keys":
		z.LogKeys, err = true, option.Flag(d)
	case "store":
		z.StoreRaw, err = unmarshalStore(d)
	default:
		return option.Unrecognized(d, "zone")
	}
	return err
}

func wrap(d *caddyfile.Dispenser, err error) error {
	if err != nil {
		return d.Errf("parsing %v", err)
	}
	return nil
}

func (z *Zone) unmarshalMatch(d *caddyfile.Dispenser) error {
	here := option.Here(d)
	set, err := caddyhttp.ParseCaddyfileNestedMatcherSet(d)
	if err != nil {
		return err
	}
	if len(set) == 0 {
		return here.ArgErr()
	}
	z.MatcherSetsRaw = append(z.MatcherSetsRaw, set)
	return nil
}

func (z *Zone) unmarshalKey(d *caddyfile.Dispenser) error {
	text, err := option.Argument(d)
	if err != nil {
		return err
	}
	if text == "" {
		return d.Err("parsing key \"\": must not be empty")
	}
	k := &KeyLevel{Text: text}
	if text == "client" {
		k = &KeyLevel{Client: true}
	}
	z.Keys = append(z.Keys, k)
	once := make(option.Set)
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		if err := once.First(d); err != nil {
			return err
		}
		switch {
		case d.Val() == "times":
			k.Times, err = option.Number(d, 1, maxNumber)
		case k.Client && (d.Val() == "ipv4_prefix" || d.Val() == "ipv6_prefix"):
			err = k.unmarshalPrefix(d)
		default:
			err = option.Unrecognized(d, "key")
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (k *KeyLevel) unmarshalPrefix(d *caddyfile.Dispenser) (err error) {
	if d.Val() == "ipv4_prefix" {
		k.IPv4Prefix, err = option.Number(d, 1, 32)
	} else {
		k.IPv6Prefix, err = option.Number(d, 1, 128)
	}
	return err
}

func (z *Zone) unmarshalRate(d *caddyfile.Dispenser) (err error) {
	if z.Events, err = option.NextNumber(d, "rate", 1, maxNumber); err != nil {
		return err
	}
	if z.Window, err = option.NextDuration(d, "rate"); err != nil {
		return err
	}
	return option.Flag(d)
}

func (z *Zone) unmarshalQueue(d *caddyfile.Dispenser) (err error) {
	z.Queue = new(Queue)
	if z.Queue.Size, err = option.NextNumber(d, "queue", 1, maxNumber); err != nil {
		return err
	}
	if z.Queue.MaxWait, err = option.NextDuration(d, "queue"); err != nil {
		return err
	}
	return option.Flag(d)
}

func (z *Zone) unmarshalPenalty(d *caddyfile.Dispenser) (err error) {
	if z.Penalty, err = option.NextDuration(d, "penalty"); err != nil {
		return err
	}
	if d.CountRemainingArgs() == 0 {
		return nil
	}
	if z.MaxPenalty, err = option.NextDuration(d, "penalty"); err != nil {
		return err
	}
	return option.Flag(d)
}

// unmarshalStore reads a store module.
func unmarshalStore(d *caddyfile.Dispenser) (json.RawMessage, error) {
	if !d.NextArg() {
		return nil, d.ArgErr()
	}
	name := d.Val()
	id := "http.ratelimit.stores." + name
	if _, err := caddy.GetModule(id); err != nil {
		return nil, d.Errf("unrecognized store %q: there is no module %s", name, id)
	}
	mod, err := caddyfile.UnmarshalModule(d, id)
	if err != nil {
		return nil, err
	}
	return caddyconfig.JSONModuleObject(mod, "store", name, nil), nil
}

// Interface guards
var _ caddyfile.Unmarshaler = (*Handler)(nil)
