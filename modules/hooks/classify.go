// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"io/fs"
	"net"
	"net/http"
	"strings"
	"syscall"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddy-gatehouse/gatehouse/internal/phase"
)

// classify finds the class of a transport error from the error itself, from
// what the attempt had reached, and from the dial where there was one.
func classify(err error, facts phase.Facts, d *dialing) phase.Class {
	if errors.Is(err, context.Canceled) {
		return phase.Canceled
	}
	if c := classOfBody(err); c != "" {
		return c
	}
	if !facts.Conn.Known && d != nil {
		dialErr, tlsFailed := d.outcome()
		switch {
		case tlsFailed:
			return phase.TLS
		case dialErr != nil:
			return classOfDial(dialErr)
		}
	}
	// a DialError hides its cause from errors.As, so its text has to do
	if _, ok := errors.AsType[reverseproxy.DialError](err); ok {
		return classOfDialText(err.Error())
	}
	switch {
	case isTLS(err):
		return phase.TLS
	case isTimeout(err):
		return phase.ResponseTimeout
	case !facts.Conn.Known && errors.As(err, new(*net.OpError)):
		return classOfDial(err)
	case !isReset(err):
		return phase.Other
	case facts.Conn.Reused && facts.FirstByte == 0:
		return phase.ResetOnReused
	}
	return phase.Reset
}

// classOfDial classifies the error of a name look-up or a connect.
func classOfDial(err error) phase.Class {
	switch {
	case errors.Is(err, context.Canceled), strings.Contains(err.Error(), "operation was canceled"):
		return phase.Canceled
	case errors.As(err, new(*net.DNSError)):
		return phase.DNS
	case isTimeout(err):
		return phase.ConnectTimeout
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.EHOSTUNREACH),
		errors.Is(err, syscall.ENETUNREACH), errors.Is(err, fs.ErrNotExist),
		// Windows says the same in numbers of its own
		strings.Contains(err.Error(), "refused"), strings.Contains(err.Error(), "unreachable"):
		return phase.Refused
	}
	return phase.Other
}

func classOfDialText(text string) phase.Class {
	switch {
	case strings.Contains(text, "canceled"):
		return phase.Canceled
	case strings.Contains(text, "lookup "):
		return phase.DNS
	case strings.Contains(text, "timeout"):
		return phase.ConnectTimeout
	case strings.Contains(text, "refused"), strings.Contains(text, "unreachable"),
		strings.Contains(text, "no such file"):
		return phase.Refused
	}
	return phase.Other
}

// classOfBody recognises the limits on request bodies, Caddy's and ours.
func classOfBody(err error) phase.Class {
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return phase.BodyTooLarge
	}
	if he, ok := errors.AsType[caddyhttp.HandlerError](err); ok && he.StatusCode == http.StatusRequestEntityTooLarge {
		return phase.BodyTooLarge
	}
	return ""
}

func isTLS(err error) bool {
	return errors.As(err, new(tls.RecordHeaderError)) || errors.As(err, new(*tls.CertificateVerificationError)) ||
		errors.As(err, new(tls.AlertError)) || errors.As(err, new(x509.UnknownAuthorityError)) ||
		errors.As(err, new(x509.HostnameError)) || errors.As(err, new(x509.CertificateInvalidError)) ||
		strings.Contains(err.Error(), "tls: ") || strings.Contains(err.Error(), "TLS handshake")
}

func isTimeout(err error) bool {
	t, ok := errors.AsType[interface {
		error
		Timeout() bool
	}](err)
	return ok && t.Timeout()
}

// resetTexts are how net/http and its HTTP/2 speak of a connection or stream
// that the other side has ended, in errors without a type.
var resetTexts = []string{
	"server closed idle connection", "connection lost", "client connection force closed",
	"unexpected EOF", "stream error", "GOAWAY", "connection error", "broken pipe", "connection reset",
	"use of closed network connection", "forcibly closed",
}

func isReset(err error) bool {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) {
		return true
	}
	text := err.Error()
	for _, t := range resetTexts {
		if strings.Contains(text, t) {
			return true
		}
	}
	return false
}

// classOfResult finds the class of the error that the next handler returned.
// The attempts know better than the error, which reverse_proxy has wrapped.
func classOfResult(err error, x *phase.Exchange) phase.Class {
	if c := classOfBody(err); c != "" {
		return c
	}
	if _, ok := errors.AsType[*refusal](err); ok {
		return phase.RefusedByHook
	}
	he, isHandlerError := errors.AsType[caddyhttp.HandlerError](err)
	if isHandlerError && he.Err != nil && he.Err.Error() == "no upstreams available" {
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
	if c := classOfBody(err); c != "" {
		return c
	}
	return phase.RefusedByHook
}
