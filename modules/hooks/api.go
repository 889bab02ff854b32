// SPDX-License-Identifier: Apache-2.0

package hooks

import "github.com/caddy-gatehouse/gatehouse/internal/phase"

// The interfaces of the phases. A Caddy module in the namespace http.hooks that
// implements one or more of them is a hook. Contract, order, errors and
// cancellation stand in the package that each one is an alias of.
type (
	// EarlyRequestHook is a hook of the phase EarlyRequest.
	EarlyRequestHook = phase.EarlyRequestHook

	// RequestHook is a hook of the phase Request.
	RequestHook = phase.RequestHook

	// RequestBodyHook is a hook of the phase RequestBody.
	RequestBodyHook = phase.RequestBodyHook

	// ProxyUpstreamHook is a hook of the phase ProxyUpstream.
	ProxyUpstreamHook = phase.ProxyUpstreamHook

	// UpstreamRequestHook is a hook of the phase UpstreamRequest.
	UpstreamRequestHook = phase.UpstreamRequestHook

	// ConnectedHook is a hook of the phase Connected.
	ConnectedHook = phase.ConnectedHook

	// ConnectFailedHook is a hook of the phase ConnectFailed.
	ConnectFailedHook = phase.ConnectFailedHook

	// UpstreamFailedHook is a hook of the phase UpstreamFailed.
	UpstreamFailedHook = phase.UpstreamFailedHook

	// UpstreamResponseHook is a hook of the phase UpstreamResponse.
	UpstreamResponseHook = phase.UpstreamResponseHook

	// UpstreamResponseBodyHook is a hook of the phase UpstreamResponseBody.
	UpstreamResponseBodyHook = phase.UpstreamResponseBodyHook

	// UpstreamTrailerHook is a hook of the phase UpstreamTrailer.
	UpstreamTrailerHook = phase.UpstreamTrailerHook

	// ResponseHook is a hook of the phase Response.
	ResponseHook = phase.ResponseHook

	// ResponseBodyHook is a hook of the phase ResponseBody.
	ResponseBodyHook = phase.ResponseBodyHook

	// ResponseTrailerHook is a hook of the phase ResponseTrailer.
	ResponseTrailerHook = phase.ResponseTrailerHook

	// FailHook is a hook of the phase Fail.
	FailHook = phase.FailHook

	// ErrorLogHook is a hook of the phase ErrorLog.
	ErrorLogHook = phase.ErrorLogHook

	// SummaryHook is a hook of the phase Summary.
	SummaryHook = phase.SummaryHook

	// LogHook is a hook of the phase Log.
	LogHook = phase.LogHook
)

// What hooks are given.
type (
	// Exchange is the state of one request.
	Exchange = phase.Exchange

	// Attempt is one try to get a response from one upstream.
	Attempt = phase.Attempt

	// Facts is what is known of an attempt.
	Facts = phase.Facts

	// Conn is what is known of an attempt's connection.
	Conn = phase.Conn

	// Failure is why an attempt or a request failed.
	Failure = phase.Failure

	// Outcome is how a request ended.
	Outcome = phase.Outcome

	// Response is the header of a response on its way to the client.
	Response = phase.Response

	// Class says in one word why a request failed.
	Class = phase.Class

	// Retry says whether a failed attempt may be repeated.
	Retry = phase.Retry
)

// The decisions on retries, see [Failure].
const (
	RetryDefault = phase.RetryDefault
	RetrySafe    = phase.RetrySafe
	RetryNever   = phase.RetryNever
)
