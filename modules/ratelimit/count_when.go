// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddy-gatehouse/gatehouse/internal/option"
	"github.com/caddy-gatehouse/gatehouse/internal/outcome"
	"github.com/caddy-gatehouse/gatehouse/internal/phase"
)

// CountWhen says which responses count. One condition is enough. A request
// that a zone refuses, or that ends in a panic before its response has begun,
// does not count.
type CountWhen struct {
	// Statuses of the response, or of the error that the handlers behind
	// return: a code (`401`), a class of codes (`4xx`) or a range (`500-504`).
	Statuses []string `json:"statuses,omitempty"`

	// Whether any error counts that the handlers behind return.
	AnyError bool `json:"any_error,omitempty"`

	// Classes of errors, as the hooks handler tells them; without it, as far as
	// the error itself shows it: refused, dns, connect_timeout, tls, reset,
	// reset_on_reused, response_timeout, canceled, no_upstream, body_too_large,
	// refused_by_hook, other.
	Classes []phase.Class `json:"classes,omitempty"`

	// What the cache nearest to the client says in the response field
	// Cache-Status (RFC 9211): `hit`; `miss` for every response that was not
	// served by a cache, also without that field, and for errors from 499 on,
	// which may have reached the origin; or a reason to forward, such as
	// `stale`, `bypass`, `uri-miss`, `vary-miss`, `method`, `request`, `partial`.
	Cache []string `json:"cache,omitempty"`
}

var cacheWords = []string{"hit", "miss", "bypass", "method", "uri-miss", "vary-miss", "request", "stale", "partial"}

// conditions are the parsed form.
type conditions struct {
	statuses outcome.Statuses
	anyError bool
	classes  []phase.Class
	cache    []string
}

func (z *Zone) parseConditions() (err error) {
	c := z.CountWhen
	if c == nil {
		return nil
	}
	if len(c.Statuses)+len(c.Classes)+len(c.Cache) == 0 && !c.AnyError {
		return errors.New("count_when names no condition")
	}
	if err := outcome.CheckClasses(c.Classes); err != nil {
		return fmt.Errorf("count_when: %w", err)
	}
	for _, word := range c.Cache {
		if !slices.Contains(cacheWords, word) {
			return fmt.Errorf("count_when: cache %q: must be %s", word, option.Choice(cacheWords))
		}
	}
	z.counts = conditions{anyError: c.AnyError, classes: c.Classes, cache: c.Cache}
	if z.counts.statuses, err = outcome.ParseStatuses(c.Statuses); err != nil {
		return fmt.Errorf("count_when: %w", err)
	}
	return nil
}

// hold tells whether a request that has ended counts.
func (c *conditions) hold(v *visit) bool {
	switch {
	case len(c.statuses) > 0 && c.statuses.Contain(v.status()):
		return true
	case v.err != nil && (c.anyError || len(c.classes) > 0 && slices.Contains(c.classes, v.class())):
		return true
	case len(c.cache) == 0 || v.err != nil && v.status() < statusClientClosed:
		return false
	}
	var field string
	if v.err == nil && v.writer != nil {
		field = v.writer.cache
	}
	hit, forward := cacheStatus(field)
	return slices.ContainsFunc(c.cache, func(word string) bool {
		switch word {
		case "hit":
			return hit
		case "miss":
			return !hit
		}
		return word == forward
	})
}

// class is the class of the error, from the hooks handler if there is one.
func (v *visit) class() phase.Class {
	if c, _ := v.repl.GetString("http.hooks.error.class"); c != "" {
		return phase.Class(c)
	}
	return outcome.OfResult(v.err)
}

// cacheStatus reads the last member of a Cache-Status field: the cache that is
// nearest to the client (RFC 9211, section 2). A key has what the client chose:
// where one is not in quotes, as it must be, all that follows is taken for a
// part of it.
func cacheStatus(field string) (hit bool, forward string) {
	for name := true; ; {
		end := endOfPart(field)
		if !name {
			parameter, value, _ := strings.Cut(strings.TrimSpace(field[:end]), "=")
			switch {
			case parameter == "hit" && (value == "" || value == "?1"):
				hit = true
			case parameter == "fwd":
				forward = value
			case parameter == "key" && !strings.HasPrefix(value, `"`):
				return hit, forward
			}
		}
		if end == len(field) {
			return hit, forward
		}
		if name = field[end] == ','; name {
			hit, forward = false, ""
		}
		field = field[end+1:]
	}
}

// endOfPart is where the first part of a field ends: at a separator that is not
// in quotes.
func endOfPart(field string) int {
	quoted := false
	for i := 0; i < len(field); i++ {
		switch c := field[i]; {
		case quoted && c == '\\':
			i++
		case c == '"':
			quoted = !quoted
		case !quoted && (c == ';' || c == ','):
			return i
		}
	}
	return len(field)
}

// unmarshalCountWhen reads one condition.
func (z *Zone) unmarshalCountWhen(d *caddyfile.Dispenser) error {
	if z.CountWhen == nil {
		z.CountWhen = new(CountWhen)
	}
	c := z.CountWhen
	if !d.NextArg() {
		return d.ArgErr()
	}
	switch kind := d.Val(); kind {
	case "status":
		words, err := option.Arguments(d)
		if err != nil {
			return err
		}
		if _, err := outcome.ParseStatuses(words); err != nil {
			return d.Errf("%v", err)
		}
		c.Statuses = append(c.Statuses, words...)
	case "error":
		words := d.RemainingArgs()
		c.AnyError = c.AnyError || len(words) == 0
		for _, word := range words {
			c.Classes = append(c.Classes, phase.Class(word))
		}
		if err := outcome.CheckClasses(c.Classes); err != nil {
			return d.Errf("%v", err)
		}
	case "cache":
		words, err := option.Arguments(d)
		if err != nil {
			return err
		}
		for _, word := range words {
			if !slices.Contains(cacheWords, word) {
				return d.Errf("parsing cache %q: must be %s", word, option.Choice(cacheWords))
			}
		}
		c.Cache = append(c.Cache, words...)
	default:
		return d.Errf("parsing count_when %q: must be status, error or cache", kind)
	}
	return nil
}
