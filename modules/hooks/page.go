// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"encoding/json"
	"errors"
	"fmt"
	"html"
	"math"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"

	"github.com/caddy-gatehouse/gatehouse/internal/outcome"
	"github.com/caddy-gatehouse/gatehouse/internal/phase"
)

// Page answers errors. It is chosen by exactly one of classes, statuses and origin.
type Page struct {
	// Classes of errors that this page answers: refused, dns, connect_timeout,
	// tls, reset, reset_on_reused, response_timeout, no_upstream,
	// body_too_large, refused_by_hook, other.
	Classes []phase.Class `json:"classes,omitempty"`

	// Statuses of errors that this page answers: codes (`502`), classes of codes
	// (`5xx`) and ranges (`502-504`).
	Statuses []string `json:"statuses,omitempty"`

	// Statuses of the origin's own answers that this page replaces. The
	// answer's body is read and thrown away up to 64 KiB; of its header fields,
	// those that describe the body go, the others stay.
	Origin []string `json:"origin,omitempty"`

	// The status to answer with, from 200 to 599. Default: the error's own.
	Status int `json:"status,omitempty"`

	// Value of the Retry-After field, in whole seconds. Default: no field.
	RetryAfter caddy.Duration `json:"retry_after,omitempty"`

	// Further header fields, with placeholders.
	Header http.Header `json:"header,omitempty"`

	// The forms in which the page exists. The client's Accept field chooses, the
	// first form is the default. Without any the answer has no body.
	Formats []*Format `json:"formats,omitempty"`

	statuses, origin outcome.Statuses
	offers           [][]string
	expose           bool
}

// Format is one form of a page. Placeholders are replaced once, and their
// values are escaped for the format.
type Format struct {
	// html, json, problem_json (RFC 9457) or text.
	Type string `json:"type"`

	// File with the template, relative to the working directory, read when the
	// configuration is loaded.
	File string `json:"file,omitempty"`

	// The template itself. Without file and body a plain built-in one is used.
	Body string `json:"body,omitempty"`

	kind     *formatKind
	template *template
}

// formatKind is what the formats differ in.
type formatKind struct {
	contentType string
	mediaTypes  []string // that a client may ask for
	escape      func(string) string
	builtin     string // the template when none is given; "" makes a problem document
}

var formatKinds = map[string]*formatKind{
	"html": {
		contentType: "text/html; charset=utf-8",
		mediaTypes:  []string{"text/html", "application/xhtml+xml"},
		escape:      html.EscapeString,
		builtin: "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n" +
			"<meta name=\"viewport\" content=\"width=device-width\">\n" +
			"<title>{http.hooks.error.status} {http.hooks.error.title}</title>\n" +
			"<h1>{http.hooks.error.title}</h1>\n<p>{http.hooks.error.detail}</p>\n</html>\n",
	},
	"json": {
		contentType: "application/json",
		mediaTypes:  []string{"application/json"},
		escape:      escapeJSON,
	},
	"problem_json": {
		contentType: "application/problem+json",
		mediaTypes:  []string{"application/problem+json", "application/json"},
		escape:      escapeJSON,
	},
	"text": {
		contentType: "text/plain; charset=utf-8",
		mediaTypes:  []string{"text/plain"},
		escape:      strings.Clone,
		builtin:     "{http.hooks.error.status} {http.hooks.error.title}\n{http.hooks.error.detail}\n",
	},
}

// maxTemplate bounds the size of a template file.
const maxTemplate = 1 << 20

// provision checks the page and reads its templates.
func (p *Page) provision(expose bool) error {
	p.expose = expose
	if err := p.checkSelectors(); err != nil {
		return err
	}
	if err := p.check(); err != nil {
		return err
	}
	p.statuses, _ = outcome.ParseStatuses(p.Statuses)
	p.origin, _ = outcome.ParseStatuses(p.Origin)
	for _, f := range p.Formats {
		if err := f.provision(); err != nil {
			return err
		}
		p.offers = append(p.offers, f.kind.mediaTypes)
	}
	return nil
}

// checkSelectors looks at what chooses the page.
func (p *Page) checkSelectors() error {
	selectors := 0
	for _, n := range []int{len(p.Classes), len(p.Statuses), len(p.Origin)} {
		if n > 0 {
			selectors++
		}
	}
	if selectors != 1 {
		return errors.New("a page needs one of classes, statuses and origin")
	}
	if err := outcome.CheckClasses(p.Classes); err != nil {
		return err
	}
	if slices.Contains(p.Classes, phase.Canceled) {
		return errors.New("a page for class canceled would reach nobody: the client is gone; the class exists in logs and metrics")
	}
	for _, statuses := range [][]string{p.Statuses, p.Origin} {
		if _, err := outcome.ParseStatuses(statuses); err != nil {
			return err
		}
	}
	return nil
}

// check looks at what the page consists of.
func (p *Page) check() error {
	if p.Status != 0 && (p.Status < 200 || p.Status > 599) {
		return fmt.Errorf("status must be from 200 to 599; got %d", p.Status)
	}
	if bodiless(p.Status) && len(p.Formats) > 0 {
		return fmt.Errorf("status %d has no body, but the page has formats", p.Status)
	}
	for name := range p.Header {
		if err := checkPageField(name); err != nil {
			return err
		}
	}
	seen := make(map[string]bool)
	for _, f := range p.Formats {
		if seen[f.Type] {
			return fmt.Errorf("format %s already specified", f.Type)
		}
		seen[f.Type] = true
	}
	return nil
}

// checkPageField refuses fields that the page itself or the connection sets.
func checkPageField(name string) error {
	name = http.CanonicalHeaderKey(name)
	if phase.ConnectionField(name) || name == "Content-Type" || name == "Content-Encoding" {
		return fmt.Errorf("header field %s can't be set on a page", name)
	}
	return nil
}

func bodiless(status int) bool {
	return status == http.StatusNoContent || status == http.StatusResetContent || status == http.StatusNotModified
}

func (f *Format) provision() error {
	kind, ok := formatKinds[f.Type]
	if !ok {
		return fmt.Errorf("unrecognized format %q: must be html, json, problem_json or text", f.Type)
	}
	f.kind = kind
	text := kind.builtin
	switch {
	case f.File != "" && f.Body != "":
		return fmt.Errorf("format %s has both a file and a body", f.Type)
	case f.File != "":
		content, err := readLimited(f.File, maxTemplate)
		if err != nil {
			return fmt.Errorf("reading template %q: %w", f.File, err)
		}
		text = expandShorthands(string(content))
	case f.Body != "":
		text = f.Body
	}
	if text == "" {
		return nil
	}
	var err error
	if f.template, err = parseTemplate(text); err != nil {
		return fmt.Errorf("parsing the %s template: %w", f.Type, err)
	}
	return nil
}

// expandShorthands makes {host} and the like mean in a file what they mean in
// a Caddyfile.
func expandShorthands(text string) string {
	segment := caddyfile.Segment{{Text: text}}
	httpcaddyfile.NewShorthandReplacer().ApplyToSegment(&segment)
	return segment[0].Text
}

// readLimited reads a file of at most limit bytes.
func readLimited(name string, limit int64) ([]byte, error) {
	info, err := os.Stat(name)
	if err != nil {
		return nil, err
	}
	if info.IsDir() {
		return nil, errors.New("is a directory")
	}
	if info.Size() > limit {
		return nil, fmt.Errorf("has %d bytes; at most %d are read", info.Size(), limit)
	}
	return os.ReadFile(name) //nolint:gosec // the operator names the file
}

// matches tells whether the page answers f.
func (p *Page) matches(f *phase.Failure) bool {
	return slices.Contains(p.Classes, f.Class) || p.statuses.Contain(f.Status)
}

// bodyFields describe the body that a page replaces (RFC 9110, section 8).
var bodyFields = []string{
	"Accept-Ranges", "Content-Digest", "Content-Disposition", "Content-Encoding", "Content-Language", "Content-Length",
	"Content-Location", "Content-Md5", "Content-Range", "Content-Type", "Digest", "Etag", "Last-Modified",
	"Repr-Digest", "Trailer",
}

// write answers the request with the page.
func (p *Page) write(w http.ResponseWriter, r *http.Request, x *phase.Exchange, f *phase.Failure) error {
	if p.Status != 0 {
		f.Status = p.Status
	}
	h := w.Header()
	for _, name := range bodyFields {
		h.Del(name)
	}
	if p.RetryAfter > 0 {
		h.Set("Retry-After", strconv.Itoa(int(math.Ceil(time.Duration(p.RetryAfter).Seconds()))))
	}
	values := pageValues{p: p, x: x, f: f, repl: replacer(r)}
	for name, fields := range p.Header {
		h.Del(name)
		for _, field := range fields {
			h.Add(name, values.repl.ReplaceAll(field, ""))
		}
	}
	var body string
	if len(p.Formats) > 0 && !bodiless(f.Status) {
		if len(p.Formats) > 1 {
			h.Add("Vary", "Accept")
		}
		format := p.Formats[negotiate(r.Header["Accept"], p.offers)]
		h.Set("Content-Type", format.kind.contentType)
		h.Set("X-Content-Type-Options", "nosniff")
		body = format.render(&values)
	}
	if !bodiless(f.Status) {
		h.Set("Content-Length", strconv.Itoa(len(body)))
	}
	w.WriteHeader(f.Status)
	if r.Method == http.MethodHead || body == "" {
		return nil
	}
	_, err := w.Write([]byte(body))
	return err
}

func (f *Format) render(v *pageValues) string {
	if f.template == nil {
		return v.problem()
	}
	return f.template.render(v.get, f.kind.escape)
}

// pageValues are the values of the placeholders of one answer.
type pageValues struct {
	p    *Page
	x    *phase.Exchange
	f    *phase.Failure
	repl *caddy.Replacer
}

// get returns the value of a placeholder. Those of the error are the page's
// own: Caddy sets {http.error.*} only when the error goes on to it.
func (v *pageValues) get(name string) string {
	switch name {
	case "http.hooks.error.status", "http.error.status_code":
		return strconv.Itoa(v.f.Status)
	case "http.hooks.error.title", "http.error.status_text":
		return http.StatusText(v.f.Status)
	case "http.hooks.error.detail", "http.error.message":
		return v.detail()
	case "http.hooks.error.class":
		return string(v.f.Class)
	case "http.hooks.error.id", "http.error.id":
		return v.f.ID
	}
	s, _ := v.repl.GetString(name)
	return s
}

func (v *pageValues) detail() string { return detailOf(v.f, v.p.expose) }

// problem is a problem document (RFC 9457, section 3).
func (v *pageValues) problem() string {
	doc, err := json.Marshal(struct {
		Type   string      `json:"type"`
		Title  string      `json:"title"`
		Status int         `json:"status"`
		Detail string      `json:"detail,omitempty"`
		Class  phase.Class `json:"class,omitempty"`
		ID     string      `json:"id,omitempty"`
	}{"about:blank", http.StatusText(v.f.Status), v.f.Status, v.detail(), v.f.Class, v.f.ID})
	if err != nil {
		return "{}"
	}
	return string(doc) + "\n"
}

// escapeJSON makes s the inside of a JSON string.
func escapeJSON(s string) string {
	quoted, err := json.Marshal(s)
	if err != nil {
		return ""
	}
	return string(quoted[1 : len(quoted)-1])
}

// answersClass tells whether errors of class c are sure to get one of the pages.
func answersClass(pages []*Page, c phase.Class) bool {
	for _, p := range pages {
		if slices.Contains(p.Classes, c) {
			return true
		}
	}
	return c != phase.Canceled && answersStatuses(pages, outcome.StatusRange{First: 400, Last: 599})
}

// answersStatuses tells whether errors of all statuses of r are sure to get one.
func answersStatuses(pages []*Page, r outcome.StatusRange) bool {
	var ranges outcome.Statuses
	for _, p := range pages {
		own, err := outcome.ParseStatuses(p.Statuses)
		if err != nil {
			return false
		}
		ranges = append(ranges, own...)
	}
	for status := r.First; status <= r.Last; status++ {
		if !ranges.Contain(status) {
			return false
		}
	}
	return true
}
