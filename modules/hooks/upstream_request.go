// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"errors"
	"fmt"
	"net/http"
	"strings"

	"golang.org/x/net/http/httpguts"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/headers"

	"github.com/caddy-gatehouse/gatehouse/internal/option"
	"github.com/caddy-gatehouse/gatehouse/internal/phase"
)

// UpstreamRequest edits what is sent to an upstream, per attempt, when it is
// known which one it is. It needs `transport hooks`.
type UpstreamRequest struct {
	// Restricts the block to upstreams whose address matches one of these
	// patterns, in which `*` stands for any text: `api.internal:*`. Default: all.
	Upstreams []string `json:"upstreams,omitempty"`

	// Restricts the block to requests, as the handlers behind `hooks` see them.
	MatcherSetsRaw caddyhttp.RawMatcherSets `json:"match,omitempty" caddy:"namespace=http.matchers"`

	// Header fields to add, set, delete and replace; Host is the Host field.
	// Values may hold placeholders, {http.reverse_proxy.upstream.*} among them.
	// Fields that frame a message or belong to one connection can't be touched.
	Headers *headers.HeaderOps `json:"headers,omitempty"`

	// At most one credential that sets Authorization, and one signature, which
	// is made last.
	Credentials []*Credential `json:"credentials,omitempty"`

	matchers caddyhttp.MatcherSets
}

// CaddyModule returns the Caddy module information.
func (*UpstreamRequest) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.hooks.upstream_request",
		New: func() caddy.Module { return new(UpstreamRequest) },
	}
}

// Provision loads the matchers and reads the secrets.
func (u *UpstreamRequest) Provision(ctx caddy.Context) error {
	if err := u.check(); err != nil {
		return err
	}
	if len(u.MatcherSetsRaw) > 0 {
		sets, err := ctx.LoadModule(u, "MatcherSetsRaw")
		if err != nil {
			return fmt.Errorf("loading matchers: %w", err)
		}
		if err := u.matchers.FromInterface(sets); err != nil {
			return fmt.Errorf("loading matchers: %w", err)
		}
	}
	if err := u.Headers.Provision(ctx); err != nil {
		return fmt.Errorf("provisioning headers: %w", err)
	}
	for _, c := range u.Credentials {
		if err := c.provision(ctx.Logger()); err != nil {
			return err
		}
	}
	return nil
}

// check looks at what the block itself says.
func (u *UpstreamRequest) check() error {
	if u.Headers == nil && len(u.Credentials) == 0 {
		return errors.New("upstream_request changes nothing: it needs header_up or credential")
	}
	if err := checkHeaderOps(u.Headers); err != nil {
		return err
	}
	kinds := make(map[bool]bool)
	for _, c := range u.Credentials {
		signs := c.Type == "hmac"
		if kinds[signs] {
			return errors.New("credential already specified: at most one sets Authorization, and one signs")
		}
		kinds[signs] = true
	}
	return nil
}

// UpstreamRequest edits r.
func (u *UpstreamRequest) UpstreamRequest(x *phase.Exchange, a *phase.Attempt, r *http.Request) error {
	if len(u.Upstreams) > 0 && !matchesAny(u.Upstreams, a.Facts().Upstream) {
		return nil
	}
	if len(u.matchers) > 0 {
		matched, err := u.matchers.AnyMatchWithError(x.Request())
		if err != nil || !matched {
			return err
		}
	}
	if u.Headers != nil {
		u.Headers.ApplyToRequest(r)
		if err := checkValues(r); err != nil {
			return err
		}
	}
	for _, signs := range []bool{false, true} {
		for _, c := range u.Credentials {
			if (c.Type == "hmac") != signs {
				continue
			}
			if err := c.apply(x, r); err != nil {
				return err
			}
		}
	}
	return nil
}

// checkValues refuses the request when a placeholder has put something into a
// header field that may not stand there, a line break out of a query say. The
// transport would fail on it, and reverse_proxy would blame the upstream.
func checkValues(r *http.Request) error {
	for name, values := range r.Header {
		for _, v := range values {
			if !httpguts.ValidHeaderFieldValue(v) {
				return badValue(name)
			}
		}
	}
	if !httpguts.ValidHostHeader(r.Host) {
		return badValue("Host")
	}
	return nil
}

func badValue(name string) error {
	return caddyhttp.HandlerError{
		StatusCode: http.StatusBadRequest,
		Err:        fmt.Errorf("the header field %s of the upstream request would hold what is not allowed there", name),
	}
}

// checkHeaderOps refuses operations on fields that are not the operator's.
func checkHeaderOps(ops *headers.HeaderOps) error {
	if ops == nil {
		return nil
	}
	var names []string
	for name := range ops.Set {
		names = append(names, name)
	}
	for name := range ops.Add {
		names = append(names, name)
	}
	for name := range ops.Replace {
		names = append(names, name)
	}
	for _, name := range append(names, ops.Delete...) {
		if err := checkUpstreamField(name); err != nil {
			return err
		}
	}
	return nil
}

func checkUpstreamField(name string) error {
	switch {
	case strings.Contains(name, "{"):
		return fmt.Errorf("header field name %q can't be a placeholder", name)
	case strings.Contains(name, "*"):
		if connectionPattern(name) {
			return fmt.Errorf("header field pattern %q covers fields that frame a message or belong to one connection", name)
		}
	case phase.ConnectionField(name):
		return fmt.Errorf("header field %s can't be set: it frames the message or belongs to one connection", name)
	}
	return nil
}

// connectionPattern tells whether a wildcard covers a connection field.
func connectionPattern(pattern string) bool {
	for _, name := range phase.ConnectionFields {
		if glob(strings.ToLower(pattern), strings.ToLower(name)) {
			return true
		}
	}
	return false
}

func matchesAny(patterns []string, s string) bool {
	for _, p := range patterns {
		if glob(p, s) {
			return true
		}
	}
	return false
}

// glob matches s against a pattern in which * stands for any text.
func glob(pattern, s string) bool {
	head, rest, wild := strings.Cut(pattern, "*")
	if !wild {
		return pattern == s
	}
	if !strings.HasPrefix(s, head) {
		return false
	}
	s = s[len(head):]
	for {
		part, next, more := strings.Cut(rest, "*")
		if !more {
			return strings.HasSuffix(s, rest)
		}
		i := strings.Index(s, part)
		if i < 0 {
			return false
		}
		s, rest = s[i+len(part):], next
	}
}

// UnmarshalCaddyfile reads:
//
//	upstream_request {
//		upstreams  <pattern…>
//		match      <matcher> | { <matchers> }
//		header_up  [+|-]<field> [<value|regexp> [<replacement>]]
//		credential bearer_file <path>
//		credential basic       <username> <password>
//		credential basic_file  <path>
//		credential hmac {
//			key_id      <text>
//			secret_file <path>
//			label       <text>
//			components  <name…>
//			max_body    <size>
//		}
//	}
func (u *UpstreamRequest) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next()
	if d.NextArg() {
		return d.ArgErr()
	}
	once := make(option.Set)
	for d.NextBlock(0) {
		switch d.Val() {
		case "upstreams":
			if err := once.First(d); err != nil {
				return err
			}
			var err error
			if u.Upstreams, err = option.Arguments(d); err != nil {
				return err
			}
		case "match":
			set, err := caddyhttp.ParseCaddyfileNestedMatcherSet(d)
			if err != nil {
				return err
			}
			if len(set) == 0 {
				return d.ArgErr()
			}
			u.MatcherSetsRaw = append(u.MatcherSetsRaw, set)
		case "header_up":
			if err := u.unmarshalHeader(d); err != nil {
				return err
			}
		case "credential":
			c := new(Credential)
			if err := c.unmarshal(d); err != nil {
				return err
			}
			u.Credentials = append(u.Credentials, c)
		default:
			return option.Unrecognized(d, "upstream_request")
		}
		if len(u.Credentials) > 1 {
			if err := u.check(); err != nil {
				return d.Errf("%v", err)
			}
		}
	}
	if err := u.check(); err != nil {
		return d.Errf("%v", err)
	}
	return nil
}

func (u *UpstreamRequest) unmarshalHeader(d *caddyfile.Dispenser) error {
	args, err := option.Arguments(d)
	if err != nil {
		return err
	}
	field := args[0]
	if deletes := strings.HasPrefix(field, "-"); len(args) > 3 || deletes != (len(args) == 1) {
		return d.ArgErr()
	}
	if err := checkUpstreamField(strings.TrimLeft(field, "+->?")); err != nil {
		return d.Errf("%v", err)
	}
	if u.Headers == nil {
		u.Headers = new(headers.HeaderOps)
	}
	var value string
	var replacement *string
	if len(args) > 1 {
		value = args[1]
	}
	if len(args) > 2 {
		replacement = &args[2]
	}
	if err := headers.CaddyfileHeaderOp(u.Headers, field, value, replacement); err != nil {
		return d.Errf("parsing header_up: %v", err)
	}
	return nil
}

// Interface guards
var (
	_ caddy.Provisioner         = (*UpstreamRequest)(nil)
	_ caddyfile.Unmarshaler     = (*UpstreamRequest)(nil)
	_ phase.UpstreamRequestHook = (*UpstreamRequest)(nil)
)
