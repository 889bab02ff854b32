// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"net"
	"net/http"
	"strings"
	"time"

	"go.uber.org/zap/zapcore"

	"github.com/caddy-gatehouse/gatehouse/internal/phase"
)

// record is the access-log field `hooks` of an exchange.
type record struct{ x *phase.Exchange }

// MarshalLogObject implements [zapcore.ObjectMarshaler].
func (r record) MarshalLogObject(enc zapcore.ObjectEncoder) error {
	if f := r.x.Failure(); f != nil {
		if err := enc.AddObject("error", failureRecord{f}); err != nil {
			return err
		}
	}
	if !r.x.LogsAttempts() {
		return nil
	}
	return enc.AddArray("attempts", attemptRecords(r.x.Attempts()))
}

type failureRecord struct{ f *phase.Failure }

// MarshalLogObject implements [zapcore.ObjectMarshaler].
func (r failureRecord) MarshalLogObject(enc zapcore.ObjectEncoder) error {
	enc.AddString("class", string(r.f.Class))
	return nil
}

type attemptRecords []*phase.Attempt

// MarshalLogArray implements [zapcore.ArrayMarshaler].
func (r attemptRecords) MarshalLogArray(enc zapcore.ArrayEncoder) error {
	for _, a := range r {
		f := a.Facts()
		if err := enc.AppendObject(attemptRecord(f)); err != nil {
			return err
		}
	}
	return nil
}

type attemptRecord phase.Facts

// MarshalLogObject implements [zapcore.ObjectMarshaler].
func (r attemptRecord) MarshalLogObject(enc zapcore.ObjectEncoder) error {
	enc.AddString("upstream", r.Upstream)
	enc.AddBool("reused", r.Conn.Reused)
	enc.AddFloat64("idle_ms", milliseconds(r.Conn.Idle))
	enc.AddInt64("conn_requests", r.Conn.Requests)
	enc.AddFloat64("dns_ms", milliseconds(r.Conn.DNS))
	enc.AddFloat64("connect_ms", milliseconds(r.Conn.Connect))
	enc.AddFloat64("tls_ms", milliseconds(r.Conn.TLS))
	enc.AddFloat64("ttfb_ms", milliseconds(r.FirstByte))
	enc.AddString("tls", r.Conn.TLSVersion)
	enc.AddString("alpn", r.Conn.ALPN)
	enc.AddString("local", addrText(r.Conn.Local))
	enc.AddString("remote", addrText(r.Conn.Remote))
	enc.AddString("error", string(r.Class))
	return nil
}

// milliseconds is d to the microsecond.
func milliseconds(d time.Duration) float64 {
	return float64(d.Microseconds()) / 1e3
}

func addrText(a net.Addr) string {
	if a == nil {
		return ""
	}
	return a.String()
}

// placeholders provides {http.hooks.conn.*} and {http.hooks.error.*} of x.
func placeholders(x *phase.Exchange) func(key string) (any, bool) {
	return func(key string) (any, bool) {
		name, ok := strings.CutPrefix(key, "http.hooks.")
		if !ok {
			return nil, false
		}
		if field, ok := strings.CutPrefix(name, "conn."); ok {
			return connValue(x, field)
		}
		if field, ok := strings.CutPrefix(name, "error."); ok {
			return errorValue(x, field)
		}
		return nil, false
	}
}

// connValue is the value of {http.hooks.conn.<field>}: of the last attempt, and
// empty as long as there is none.
func connValue(x *phase.Exchange, field string) (any, bool) {
	read, ok := connFields[field]
	if !ok {
		return nil, false
	}
	a := x.Last()
	if a == nil {
		return "", true
	}
	return read(a.Facts()), true
}

var connFields = map[string]func(f phase.Facts) any{
	"upstream":   func(f phase.Facts) any { return f.Upstream },
	"attempts":   func(f phase.Facts) any { return f.Number },
	"reused":     func(f phase.Facts) any { return f.Conn.Reused },
	"idle_ms":    func(f phase.Facts) any { return milliseconds(f.Conn.Idle) },
	"requests":   func(f phase.Facts) any { return f.Conn.Requests },
	"dns_ms":     func(f phase.Facts) any { return milliseconds(f.Conn.DNS) },
	"connect_ms": func(f phase.Facts) any { return milliseconds(f.Conn.Connect) },
	"tls_ms":     func(f phase.Facts) any { return milliseconds(f.Conn.TLS) },
	"ttfb_ms":    func(f phase.Facts) any { return milliseconds(f.FirstByte) },
	"tls":        func(f phase.Facts) any { return f.Conn.TLSVersion },
	"alpn":       func(f phase.Facts) any { return f.Conn.ALPN },
	"local":      func(f phase.Facts) any { return addrText(f.Conn.Local) },
	"remote":     func(f phase.Facts) any { return addrText(f.Conn.Remote) },
	"error":      func(f phase.Facts) any { return string(f.Class) },
}

// errorValue is the value of {http.hooks.error.<field>}, empty without a failure.
func errorValue(x *phase.Exchange, field string) (any, bool) {
	if !errorFields[field] {
		return nil, false
	}
	f := x.Failure()
	if f == nil {
		return "", true
	}
	switch field {
	case "class":
		return string(f.Class), true
	case "status":
		return f.Status, true
	case "title":
		return http.StatusText(f.Status), true
	case "id":
		return f.ID, true
	default:
		return detailOf(f, false), true
	}
}

var errorFields = map[string]bool{"class": true, "status": true, "title": true, "detail": true, "id": true}

// knownPlaceholder tells whether a name in the namespace http.hooks exists.
func knownPlaceholder(name string) bool {
	field, ok := strings.CutPrefix(name, "http.hooks.conn.")
	if ok {
		_, known := connFields[field]
		return known
	}
	field, ok = strings.CutPrefix(name, "http.hooks.error.")
	return ok && errorFields[field]
}

// details are what a client may read of a failure: no address, no error text.
var details = map[phase.Class]string{
	phase.Refused:         "The upstream server refused the connection.",
	phase.DNS:             "The upstream server's name could not be resolved.",
	phase.ConnectTimeout:  "The upstream server did not accept the connection in time.",
	phase.TLS:             "A secure connection to the upstream server could not be made.",
	phase.Reset:           "The upstream server closed the connection before its response was complete.",
	phase.ResetOnReused:   "The upstream server closed a kept connection before it responded.",
	phase.ResponseTimeout: "The upstream server did not respond in time.",
	phase.Canceled:        "The request was canceled.",
	phase.NoUpstream:      "No upstream server is available.",
	phase.BodyTooLarge:    "The request body is too large.",
	phase.RefusedByHook:   "The request was refused.",
}

// detailOf is the sentence of f; with expose it is the error's own text.
func detailOf(f *phase.Failure, expose bool) string {
	if expose && f.Err != nil {
		return rootText(f.Err)
	}
	return details[f.Class]
}
