// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"unicode"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-gatehouse/gatehouse/internal/option"
	"github.com/caddy-gatehouse/gatehouse/internal/outcome"
	"github.com/caddy-gatehouse/gatehouse/internal/phase"
)

// RequestSummary describes a request in error lines: in the message that
// Caddy logs for an error that goes on to it, and in the line that this module
// logs for one that it answered. `{err.message}` stays as it is.
type RequestSummary struct {
	// The text, with placeholders. Control characters in their values become
	// spaces; the whole is cut at 1 KiB.
	Text string `json:"text"`
}

const maxSummary = 1 << 10

// CaddyModule returns the Caddy module information.
func (*RequestSummary) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.hooks.request_summary",
		New: func() caddy.Module { return new(RequestSummary) },
	}
}

// Validate refuses an empty text.
func (s *RequestSummary) Validate() error {
	if s.Text == "" {
		return errors.New("text must not be empty")
	}
	return nil
}

// Summary returns the text for a request.
func (s *RequestSummary) Summary(_ *phase.Exchange, r *http.Request) string {
	text := strings.Map(func(c rune) rune {
		if unicode.IsControl(c) {
			return ' '
		}
		return c
	}, replacer(r).ReplaceAll(s.Text, ""))
	if len(text) > maxSummary {
		text = strings.ToValidUTF8(text[:maxSummary], "")
	}
	return text
}

// UnmarshalCaddyfile reads:
//
//	request_summary <text>
func (s *RequestSummary) UnmarshalCaddyfile(d *caddyfile.Dispenser) (err error) {
	d.Next()
	s.Text, err = option.Argument(d)
	return err
}

// SuppressErrorLog keeps errors of some classes or statuses out of the error
// log. It can only do so for errors that are answered here, so each of them
// needs a page of `on_error`, which may be one without a body; without one the
// configuration is not loaded. What reverse_proxy itself logs while it aborts a
// response that has begun can't be suppressed.
//
// The errors are counted in caddy_gatehouse_hooks_suppressed_errors_total.
type SuppressErrorLog struct {
	// Classes of errors, see on_error.
	Classes []phase.Class `json:"classes,omitempty"`

	// Statuses of errors: a code (`502`), a class of codes (`5xx`) or a range
	// (`502-504`).
	Statuses []string `json:"statuses,omitempty"`

	statuses outcome.Statuses
}

// CaddyModule returns the Caddy module information.
func (*SuppressErrorLog) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.hooks.suppress_error_log",
		New: func() caddy.Module { return new(SuppressErrorLog) },
	}
}

// Provision registers the metrics and reads the statuses.
func (s *SuppressErrorLog) Provision(ctx caddy.Context) error {
	if err := s.parse(); err != nil {
		return err
	}
	return metrics.register(ctx.GetMetricsRegistry())
}

func (s *SuppressErrorLog) parse() (err error) {
	if len(s.Classes)+len(s.Statuses) == 0 {
		return errors.New("suppress_error_log names no class and no status")
	}
	if err := outcome.CheckClasses(s.Classes); err != nil {
		return err
	}
	s.statuses, err = outcome.ParseStatuses(s.Statuses)
	return err
}

// ErrorLog silences the errors that were named.
func (s *SuppressErrorLog) ErrorLog(_ *phase.Exchange, f *phase.Failure) bool {
	if !slices.Contains(s.Classes, f.Class) && !s.statuses.Contain(f.Status) {
		return false
	}
	metrics.suppressed.WithLabelValues(string(f.Class)).Inc()
	return true
}

// UnmarshalCaddyfile reads:
//
//	suppress_error_log <class|status…>
func (s *SuppressErrorLog) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next()
	if !d.NextArg() {
		return d.ArgErr()
	}
	for ok := true; ok; ok = d.NextArg() {
		if c := phase.Class(d.Val()); c.Known() {
			s.Classes = append(s.Classes, c)
			continue
		}
		if _, err := outcome.ParseStatuses([]string{d.Val()}); err != nil {
			return d.Errf("suppress_error_log %q is neither a class nor a status", d.Val())
		}
		s.Statuses = append(s.Statuses, d.Val())
	}
	return nil
}

// checkAnswers makes sure that each suppressed error has an answer among hooks.
func checkAnswers(hooks []any) error {
	var suppress *SuppressErrorLog
	var pages []*Page
	for _, h := range hooks {
		switch h := h.(type) {
		case *SuppressErrorLog:
			suppress = h
		case *OnError:
			pages = append(pages, h.Pages...)
		}
	}
	if suppress == nil {
		return nil
	}
	if err := suppress.parse(); err != nil {
		return err
	}
	for _, c := range suppress.Classes {
		if !answersClass(pages, c) {
			return fmt.Errorf("suppress_error_log %s has no answer: no page of on_error is for class %s", c, c)
		}
	}
	for i, s := range suppress.statuses {
		if !answersStatuses(pages, s) {
			text := suppress.Statuses[i]
			return fmt.Errorf("suppress_error_log %s has no answer: no page of on_error is for status %s", text, text)
		}
	}
	return nil
}

// LogField adds a field to the access log. Its value is made when the request
// is over, so all placeholders have their last values.
type LogField struct {
	// Name of the field.
	Name string `json:"name"`

	// Value of the field, with placeholders.
	Value string `json:"value"`
}

// CaddyModule returns the Caddy module information.
func (*LogField) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.hooks.log_field",
		New: func() caddy.Module { return new(LogField) },
	}
}

// Validate refuses a field without a name, and the module's own.
func (f *LogField) Validate() error {
	switch f.Name {
	case "":
		return errors.New("log_field has no name")
	case "hooks":
		return errors.New(`log_field "hooks": the name is taken`)
	}
	return nil
}

// Log adds the field.
func (f *LogField) Log(_ *phase.Exchange, r *http.Request) {
	if extra, ok := r.Context().Value(caddyhttp.ExtraLogFieldsCtxKey).(*caddyhttp.ExtraLogFields); ok {
		extra.Set(zap.String(f.Name, replacer(r).ReplaceAll(f.Value, "")))
	}
}

// UnmarshalCaddyfile reads:
//
//	log_field <name> <value>
func (f *LogField) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next()
	if !d.AllArgs(&f.Name, &f.Value) {
		return d.ArgErr()
	}
	if err := f.Validate(); err != nil {
		return d.Errf("%v", err)
	}
	return nil
}

// replacer returns the request's replacer.
func replacer(r *http.Request) *caddy.Replacer {
	if repl, ok := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer); ok {
		return repl
	}
	return caddy.NewReplacer()
}

// Interface guards
var (
	_ phase.SummaryHook     = (*RequestSummary)(nil)
	_ phase.ErrorLogHook    = (*SuppressErrorLog)(nil)
	_ phase.LogHook         = (*LogField)(nil)
	_ caddy.Validator       = (*RequestSummary)(nil)
	_ caddy.Validator       = (*LogField)(nil)
	_ caddy.Provisioner     = (*SuppressErrorLog)(nil)
	_ caddyfile.Unmarshaler = (*RequestSummary)(nil)
	_ caddyfile.Unmarshaler = (*SuppressErrorLog)(nil)
	_ caddyfile.Unmarshaler = (*LogField)(nil)
)
