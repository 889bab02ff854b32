// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"fmt"
	"net/http"
	"strconv"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// What responses tell of the limits.
const (
	headersOff    = "off"
	headersDraft  = "draft"
	headersLegacy = "legacy"
)

func checkHeaders(word string) error {
	return checkWord("headers", word, headersOff, headersDraft, headersLegacy)
}

// policyFields are what the draft's fields have of a zone, made once:
// draft-ietf-httpapi-ratelimit-headers, sections 3 and 4.
type policyFields struct {
	name   string // as a string of structured fields
	policy string
}

func newPolicyFields(z *Zone) policyFields {
	name := `"` + z.Name + `"`
	if z.Events == 0 {
		return policyFields{name, fmt.Sprintf(`%s;q=%d;qu="concurrent-requests"`, name, z.Inflight)}
	}
	return policyFields{name, fmt.Sprintf("%s;q=%d;w=%d", name, z.limit().Capacity(), seconds(time.Duration(z.Window)))}
}

// draft adds the zone's members to what others have put there.
func (f *policyFields) draft(h http.Header, v *Verdict) {
	h.Add("Ratelimit-Policy", f.policy)
	var room [128]byte
	b := append(room[:0], f.name...)
	b = append(b, ";r="...)
	b = strconv.AppendInt(b, int64(v.Remaining), 10)
	reset := v.Reset
	if v.Wait > 0 {
		reset = v.Wait
	}
	if reset > 0 {
		b = append(b, ";t="...)
		b = strconv.AppendInt(b, seconds(reset), 10)
	}
	h.Add("Ratelimit", string(b))
}

// legacyFields tells of one zone, unless a zone of another handler with less
// remaining is there.
func legacyFields(h http.Header, v *Verdict) {
	if other, err := strconv.Atoi(h.Get("X-Ratelimit-Remaining")); err == nil && other <= v.Remaining {
		return
	}
	h.Set("X-Ratelimit-Limit", strconv.Itoa(v.Limit))
	h.Set("X-Ratelimit-Remaining", strconv.Itoa(v.Remaining))
	h.Set("X-Ratelimit-Reset", strconv.FormatInt(seconds(max(v.Reset, v.Wait)), 10))
}

// seconds is d in whole seconds, rounded up.
func seconds(d time.Duration) int64 { return int64((d + time.Second - 1) / time.Second) }

// refusal is the errors with which a zone refuses, made once.
type refusal struct{ exceeded, failed error }

func newRefusal(zone string) refusal {
	return refusal{
		caddyhttp.HandlerError{StatusCode: http.StatusTooManyRequests, Err: fmt.Errorf("limit of zone %s exceeded", zone)},
		caddyhttp.HandlerError{StatusCode: http.StatusServiceUnavailable, Err: fmt.Errorf("the store of zone %s does not answer (on_failure closed)", zone)},
	}
}

// of returns the error for a verdict and sets Retry-After where the time is known.
func (e *refusal) of(h http.Header, v *Verdict) error {
	if v.Wait > 0 {
		h.Set("Retry-After", strconv.FormatInt(seconds(v.Wait), 10))
	}
	if v.Reason == StoreFailed {
		return e.failed
	}
	return e.exceeded
}
