// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"context"
	"errors"

	"github.com/caddy-gatehouse/gatehouse/internal/outcome"
	"github.com/caddy-gatehouse/gatehouse/internal/phase"
)

// classify finds the class of a transport error, also from the dial where there
// was one.
func classify(err error, facts phase.Facts, d *dialing) phase.Class {
	class := outcome.Classify(err, facts)
	if class == phase.Canceled || class == phase.BodyTooLarge || facts.Conn.Known || d == nil {
		return class
	}
	switch dialErr, tlsFailed := d.outcome(); {
	case tlsFailed:
		return phase.TLS
	case dialErr != nil:
		return outcome.OfDial(dialErr)
	}
	return class
}

// classOfResult finds the class of the error that the next handler returned.
// The attempts know better than the error, which reverse_proxy has wrapped.
func classOfResult(err error, x *phase.Exchange) phase.Class {
	if c := outcome.OfBody(err); c != "" {
		return c
	}
	if _, ok := errors.AsType[*refusal](err); ok {
		return phase.RefusedByHook
	}
	if outcome.NoUpstream(err) {
		return phase.NoUpstream
	}
	if a := x.Last(); a != nil {
		if c := a.Facts().Class; c != "" {
			return c
		}
	}
	if errors.Is(err, context.Canceled) {
		return phase.Canceled
	}
	return phase.Other
}

// classOfRefusal finds the class of an error with which a hook refuses.
func classOfRefusal(err error) phase.Class {
	if c := outcome.OfBody(err); c != "" {
		return c
	}
	return phase.RefusedByHook
}
