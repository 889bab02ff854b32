// SPDX-License-Identifier: Apache-2.0

// Package outcome tells how a request ended: it reads statuses and finds the
// class of an error.
package outcome

import (
	"fmt"
	"strconv"
	"strings"
)

// StatusRange is a range of status codes, both ends included.
type StatusRange struct{ First, Last int }

// Statuses is any of some ranges.
type Statuses []StatusRange

// Contain tells whether a status is in one of the ranges.
func (s Statuses) Contain(status int) bool {
	for _, r := range s {
		if r.First <= status && status <= r.Last {
			return true
		}
	}
	return false
}

// ParseStatuses reads codes (502), classes of codes (5xx) and ranges (502-504).
func ParseStatuses(texts []string) (Statuses, error) {
	ranges := make(Statuses, 0, len(texts))
	for _, text := range texts {
		r, ok := parseStatus(text)
		if !ok {
			return nil, fmt.Errorf("parsing status %q: must be a code, a class like 5xx, or a range like 502-504", text)
		}
		ranges = append(ranges, r)
	}
	return ranges, nil
}

func parseStatus(text string) (StatusRange, bool) {
	if class, ok := strings.CutSuffix(strings.ToLower(text), "xx"); ok {
		n, err := strconv.Atoi(class)
		return StatusRange{n * 100, n*100 + 99}, err == nil && n >= 1 && n <= 5
	}
	from, to, isRange := strings.Cut(text, "-")
	if !isRange {
		to = from
	}
	first, err1 := strconv.Atoi(from)
	last, err2 := strconv.Atoi(to)
	return StatusRange{first, last}, err1 == nil && err2 == nil && 100 <= first && first <= last && last <= 599
}
