// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"fmt"
	"net/http"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddy-gatehouse/gatehouse/internal/option"
	"github.com/caddy-gatehouse/gatehouse/internal/phase"
)

// OnError decides what the client sees when a handler behind fails: pages by
// the class of the error or by its status, in the form that the client accepts.
// The first page that matches answers. An error that none matches goes on
// unchanged, to handle_errors in the end.
//
// Nothing is appended to a response that has begun: it is aborted. HEAD gets
// the header only. An error that was answered is still logged, by this module,
// at the level that Caddy would use; see suppress_error_log.
type OnError struct {
	// The pages, in the order in which they are tried.
	Pages []*Page `json:"pages,omitempty"`

	// Whether {http.hooks.error.detail} in pages, and the detail of problem
	// documents, is the text of the error, addresses of upstreams included.
	// Default: false; a fixed sentence for each class.
	ExposeDetails bool `json:"expose_details,omitempty"`
}

// CaddyModule returns the Caddy module information.
func (*OnError) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.hooks.on_error",
		New: func() caddy.Module { return new(OnError) },
	}
}

// Provision checks the pages and reads their templates.
func (o *OnError) Provision(caddy.Context) error {
	for i, p := range o.Pages {
		if err := p.provision(o.ExposeDetails); err != nil {
			return fmt.Errorf("provisioning page %d: %w", i, err)
		}
	}
	return nil
}

// Fail answers with the first page that matches.
func (o *OnError) Fail(x *phase.Exchange, w http.ResponseWriter, r *http.Request, f *phase.Failure) (bool, error) {
	if f.Class == phase.Canceled {
		return false, nil
	}
	for _, p := range o.Pages {
		if p.matches(f) {
			return true, p.write(w, r, x, f)
		}
	}
	return false, nil
}

// originPage returns the page that replaces an answer of the origin, if any.
func (o *OnError) originPage(x *phase.Exchange, status int) *Page {
	for _, p := range o.Pages {
		if !p.origin.Contain(status) {
			continue
		}
		// what another handler answers is not the origin's
		if a := x.Last(); a == nil || (a.Facts().Status == 0 && a.Facts().FirstByte == 0) {
			return nil
		}
		return p
	}
	return nil
}

// UnmarshalCaddyfile reads the pages:
//
//	on_error {
//		expose_details
//		page class  <class…>  { … }
//		page status <status…> { … }
//		page origin <status…> {
//			status       <code>
//			retry_after  <duration>
//			header       <field> <value>
//			html|json|problem_json|text [file <path> | body <text>]
//		}
//	}
func (o *OnError) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next()
	if d.NextArg() {
		return d.ArgErr()
	}
	once := make(option.Set)
	for d.NextBlock(0) {
		switch d.Val() {
		case "expose_details":
			if err := once.First(d); err != nil {
				return err
			}
			if err := option.Flag(d); err != nil {
				return err
			}
			o.ExposeDetails = true
		case "page":
			p := new(Page)
			if err := p.unmarshal(d); err != nil {
				return err
			}
			o.Pages = append(o.Pages, p)
		default:
			return option.Unrecognized(d, "on_error")
		}
	}
	return nil
}

func (p *Page) unmarshal(d *caddyfile.Dispenser) error {
	if !d.NextArg() {
		return d.ArgErr()
	}
	switch d.Val() {
	case "class", "status", "origin":
	default:
		return d.Errf("unrecognized page selector %q: must be class, status or origin", d.Val())
	}
	selector := d.Val()
	values, err := option.Arguments(d)
	if err != nil {
		return err
	}
	switch selector {
	case "class":
		for _, v := range values {
			p.Classes = append(p.Classes, phase.Class(v))
		}
	case "status":
		p.Statuses = values
	case "origin":
		p.Origin = values
	}
	if err := p.checkSelectors(); err != nil {
		return d.Errf("%v", err)
	}
	once := make(option.Set)
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		if d.Val() != "header" {
			if err := once.First(d); err != nil {
				return err
			}
		}
		if err := p.unmarshalOption(d); err != nil {
			return err
		}
	}
	if err := p.check(); err != nil {
		return d.Errf("%v", err)
	}
	return nil
}

func (p *Page) unmarshalOption(d *caddyfile.Dispenser) (err error) {
	switch d.Val() {
	case "status":
		p.Status, err = option.Number(d, 200, 599)
		return err
	case "retry_after":
		p.RetryAfter, err = option.Duration(d)
		return err
	case "header":
		var name, value string
		if !d.AllArgs(&name, &value) {
			return d.ArgErr()
		}
		if err := checkPageField(name); err != nil {
			return d.Errf("%v", err)
		}
		if p.Header == nil {
			p.Header = make(http.Header)
		}
		p.Header.Add(name, value)
		return nil
	case "html", "json", "problem_json", "text":
		return p.unmarshalFormat(d)
	}
	return option.Unrecognized(d, "page")
}

func (p *Page) unmarshalFormat(d *caddyfile.Dispenser) error {
	f := &Format{Type: d.Val()}
	if d.NextArg() {
		source := d.Val()
		text, err := option.Argument(d)
		if err != nil {
			return err
		}
		switch source {
		case "file":
			f.File = text
		case "body":
			f.Body = text
		default:
			return d.Errf("unrecognized source %q: must be file or body", source)
		}
	}
	// the template is read here too, for the line in the error
	if probe := *f; !strings.Contains(f.File, "{") {
		if err := probe.provision(); err != nil {
			return d.Errf("%v", err)
		}
	}
	p.Formats = append(p.Formats, f)
	return nil
}

// Interface guards
var (
	_ caddy.Provisioner     = (*OnError)(nil)
	_ caddyfile.Unmarshaler = (*OnError)(nil)
	_ phase.FailHook        = (*OnError)(nil)
	_ originPager           = (*OnError)(nil)
)
