// SPDX-License-Identifier: Apache-2.0

package hooks

import "github.com/caddy-gatehouse/gatehouse/internal/phase"

// The interfaces of the phases: a Caddy module in the namespace http.hooks that
// implements one or more of them is a hook. Contract, order, errors and
// cancellation stand at each interface and in the package comment above them.
type (
	EarlyRequestHook         = phase.EarlyRequestHook
	RequestHook              = phase.RequestHook
	RequestBodyHook          = phase.RequestBodyHook
	ProxyUpstreamHook        = phase.ProxyUpstreamHook
	UpstreamRequestHook      = phase.UpstreamRequestHook
	ConnectedHook            = phase.ConnectedHook
	ConnectFailedHook        = phase.ConnectFailedHook
	UpstreamFailedHook       = phase.UpstreamFailedHook
	UpstreamResponseHook     = phase.UpstreamResponseHook
	UpstreamResponseBodyHook = phase.UpstreamResponseBodyHook
	UpstreamTrailerHook      = phase.UpstreamTrailerHook
	ResponseHook             = phase.ResponseHook
	ResponseBodyHook         = phase.ResponseBodyHook
	ResponseTrailerHook      = phase.ResponseTrailerHook
	FailHook                 = phase.FailHook
	ErrorLogHook             = phase.ErrorLogHook
	SummaryHook              = phase.SummaryHook
	LogHook                  = phase.LogHook
)

// What the phases are given.
type (
	Exchange = phase.Exchange
	Attempt  = phase.Attempt
	Facts    = phase.Facts
	Conn     = phase.Conn
	Failure  = phase.Failure
	Outcome  = phase.Outcome
	Response = phase.Response
	Class    = phase.Class
	Retry    = phase.Retry
)

// The decisions on retries, see [Failure].
const (
	RetryDefault = phase.RetryDefault
	RetrySafe    = phase.RetrySafe
	RetryNever   = phase.RetryNever
)
