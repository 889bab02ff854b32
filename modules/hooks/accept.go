// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"strconv"
	"strings"
)

// maxMediaRanges bounds the work that an Accept field can ask for.
const maxMediaRanges = 64

// mediaRange is one element of an Accept field (RFC 9110, section 12.5.1).
type mediaRange struct {
	mainType, subtype string
	quality           float64
}

// negotiate returns the index of the offer that the Accept fields prefer, the
// first one of several that are as good, and the first one of all when none is
// acceptable: an error in a form that was not asked for is better than none. An
// offer is a media type, followed by others that ask for the same by name.
func negotiate(accept []string, offers [][]string) int {
	ranges := parseAccept(accept)
	best, bestQuality := 0, 0.0
	for i, types := range offers {
		for alias, t := range types {
			q, exact := quality(ranges, t)
			if q > bestQuality && (alias == 0 || exact) {
				best, bestQuality = i, q
			}
		}
	}
	return best
}

// quality is the weight of a media type: that of the most specific range it is
// in. exact tells that the range names the type itself.
func quality(ranges []mediaRange, mediaType string) (q float64, exact bool) {
	mainType, subtype, _ := strings.Cut(mediaType, "/")
	specific := -1
	for _, r := range ranges {
		var s int
		switch {
		case r.mainType == mainType && r.subtype == subtype:
			s = 2
		case r.mainType == mainType && r.subtype == "*":
			s = 1
		case r.mainType == "*" && r.subtype == "*":
			s = 0
		default:
			continue
		}
		if s > specific {
			q, specific = r.quality, s
		}
	}
	return q, specific == 2
}

// parseAccept reads Accept fields; elements that make no sense are left out.
func parseAccept(fields []string) []mediaRange {
	var ranges []mediaRange
	for _, field := range fields {
		for element := range strings.SplitSeq(field, ",") {
			if len(ranges) == maxMediaRanges {
				return ranges
			}
			if r, ok := parseMediaRange(element); ok {
				ranges = append(ranges, r)
			}
		}
	}
	return ranges
}

func parseMediaRange(element string) (mediaRange, bool) {
	r := mediaRange{quality: 1}
	name, params, _ := strings.Cut(element, ";")
	mainType, subtype, ok := strings.Cut(strings.ToLower(strings.TrimSpace(name)), "/")
	if !ok || mainType == "" || subtype == "" {
		return r, false
	}
	r.mainType, r.subtype = mainType, subtype
	for param := range strings.SplitSeq(params, ";") {
		key, value, _ := strings.Cut(strings.TrimSpace(param), "=")
		if !strings.EqualFold(strings.TrimSpace(key), "q") {
			continue
		}
		q, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
		if err != nil || !(q >= 0 && q <= 1) {
			return r, false
		}
		r.quality = q
	}
	return r, true
}
