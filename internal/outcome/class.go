// SPDX-License-Identifier: Apache-2.0

package outcome

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
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

// Classify finds the class of a transport error from the error itself and from
// what the attempt had reached.
func Classify(err error, facts phase.Facts) phase.Class {
	if errors.Is(err, context.Canceled) {
		return phase.Canceled
	}
	if c := OfBody(err); c != "" {
		return c
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
		return OfDial(err)
	case !isReset(err):
		return phase.Other
	case facts.Conn.Reused && facts.FirstByte == 0:
		return phase.ResetOnReused
	}
	return phase.Reset
}

// OfResult finds the class of the error that a handler returned.
func OfResult(err error) phase.Class {
	if NoUpstream(err) {
		return phase.NoUpstream
	}
	return Classify(err, phase.Facts{})
}

// NoUpstream tells whether reverse_proxy had no upstream to choose.
func NoUpstream(err error) bool {
	he, ok := errors.AsType[caddyhttp.HandlerError](err)
	return ok && he.Err != nil && he.Err.Error() == "no upstreams available"
}

// OfDial classifies the error of a name look-up or a connect.
func OfDial(err error) phase.Class {
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

// OfBody recognises the limits on request bodies, Caddy's and ours. It returns
// an empty class for every other error.
func OfBody(err error) phase.Class {
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

// CheckClasses refuses words that are not classes.
func CheckClasses(classes []phase.Class) error {
	for _, c := range classes {
		if !c.Known() {
			return fmt.Errorf("unrecognized class %q: must be one of %s", c, classWords())
		}
	}
	return nil
}

func classWords() string {
	words := make([]string, len(phase.Classes))
	for i, c := range phase.Classes {
		words[i] = string(c)
	}
	return strings.Join(words, " ")
}
