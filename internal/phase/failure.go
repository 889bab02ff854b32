// SPDX-License-Identifier: Apache-2.0

package phase

import (
	"net/http"
	"slices"
)

// Class says in one word why a request failed. The set is closed: classes are
// metric labels and words of the configuration.
type Class string

// The classes of failures.
const (
	// Refused: nothing accepts connections at the upstream's address, or no
	// route leads there.
	Refused Class = "refused"
	// DNS: the upstream's name could not be resolved.
	DNS Class = "dns"
	// ConnectTimeout: no connection within dial_timeout.
	ConnectTimeout Class = "connect_timeout"
	// TLS: the handshake with the upstream failed, timed out or was cut.
	TLS Class = "tls"
	// Reset: the upstream closed a connection before its response was complete.
	Reset Class = "reset"
	// ResetOnReused: a kept-alive connection was closed by the upstream before
	// the first byte of a response: most often its idle timeout is shorter than ours.
	ResetOnReused Class = "reset_on_reused"
	// ResponseTimeout: the connection stood, and the response did not come in time.
	ResponseTimeout Class = "response_timeout"
	// Canceled: the client went away.
	Canceled Class = "canceled"
	// NoUpstream: no upstream was available to choose.
	NoUpstream Class = "no_upstream"
	// BodyTooLarge: the request body exceeds a limit of this server.
	BodyTooLarge Class = "body_too_large"
	// RefusedByHook: a hook refused the request or the response.
	RefusedByHook Class = "refused_by_hook"
	// Other: everything else, malformed responses among it.
	Other Class = "other"
)

// Classes lists all classes.
var Classes = []Class{
	Refused, DNS, ConnectTimeout, TLS, Reset, ResetOnReused, ResponseTimeout,
	Canceled, NoUpstream, BodyTooLarge, RefusedByHook, Other,
}

// Known tells whether c is one of [Classes].
func (c Class) Known() bool { return slices.Contains(Classes, c) }

// Retry says whether a failed attempt may be repeated.
type Retry uint8

// The retry decisions.
const (
	// RetryDefault leaves the decision to reverse_proxy: failures to connect are
	// retried, later ones for GET or where lb_retry_match matches.
	RetryDefault Retry = iota
	// RetrySafe marks the failure as one to connect: it may be retried with any
	// method, as long as reverse_proxy has retries left.
	RetrySafe
	// RetryNever ends the request with this failure. It does then not count in
	// the passive health checks either.
	RetryNever
)

// Failure is why an attempt or the whole request failed.
type Failure struct {
	// Err is the error as it was returned.
	Err error

	// Class of the error. A hook may replace it.
	Class Class

	// Status is what the client gets if nothing else is decided; 0 in the
	// phases of the transport.
	Status int

	// ID is what Caddy's error log calls the error; it may be empty.
	ID string

	// Retry is read after the ConnectFailed and UpstreamFailed hooks only.
	Retry Retry
}

// ConnectionFields frame a message or belong to one connection (RFC 9110,
// section 7.6.1, and RFC 9112, section 6). net/http and reverse_proxy set them.
var ConnectionFields = []string{
	"Connection", "Content-Length", "Expect", "Http2-Settings", "Keep-Alive", "Proxy-Connection", "Te",
	"Trailer", "Transfer-Encoding", "Upgrade",
}

// ConnectionField tells whether the header field frames the message or belongs
// to one connection, so that no hook may set it.
func ConnectionField(name string) bool {
	return slices.Contains(ConnectionFields, http.CanonicalHeaderKey(name))
}
