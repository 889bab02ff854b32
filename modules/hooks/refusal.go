// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"context"
	"errors"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// refusal is an error with which a hook ends a request. To reverse_proxy it is
// a cancellation: no retry, no strike against the upstream.
type refusal struct {
	caddyhttp.HandlerError
}

// newRefusal makes err a refusal with its own status, or with the given one.
func newRefusal(err error, status int) *refusal {
	if r, ok := errors.AsType[*refusal](err); ok {
		return r
	}
	return &refusal{handlerError(err, status)}
}

func (*refusal) Is(target error) bool { return target == context.Canceled }

func (r *refusal) Unwrap() error { return r.HandlerError }

// handlerError returns err as the bare error that Caddy's error routes
// understand, with its own status if it has one.
func handlerError(err error, status int) caddyhttp.HandlerError {
	if he, ok := errors.AsType[caddyhttp.HandlerError](err); ok {
		if he.StatusCode == 0 {
			he.StatusCode = status
		}
		return he
	}
	return caddyhttp.HandlerError{StatusCode: status, Err: err}
}
