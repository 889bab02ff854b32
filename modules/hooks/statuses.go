// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/caddy-gatehouse/gatehouse/internal/phase"
)

// statusRange is a range of status codes, both ends included.
type statusRange struct{ first, last int }

type statusRanges []statusRange

func (s statusRanges) contain(status int) bool {
	for _, r := range s {
		if r.first <= status && status <= r.last {
			return true
		}
	}
	return false
}

// parseStatuses reads codes (502), classes of codes (5xx) and ranges (502-504).
func parseStatuses(texts []string) (statusRanges, error) {
	ranges := make(statusRanges, 0, len(texts))
	for _, text := range texts {
		r, ok := parseStatus(text)
		if !ok {
			return nil, fmt.Errorf("parsing status %q: must be a code, a class like 5xx, or a range like 502-504", text)
		}
		ranges = append(ranges, r)
	}
	return ranges, nil
}

func parseStatus(text string) (statusRange, bool) {
	if class, ok := strings.CutSuffix(strings.ToLower(text), "xx"); ok {
		n, err := strconv.Atoi(class)
		return statusRange{n * 100, n*100 + 99}, err == nil && n >= 1 && n <= 5
	}
	from, to, isRange := strings.Cut(text, "-")
	if !isRange {
		to = from
	}
	first, err1 := strconv.Atoi(from)
	last, err2 := strconv.Atoi(to)
	return statusRange{first, last}, err1 == nil && err2 == nil && 100 <= first && first <= last && last <= 599
}

// checkClasses refuses words that are not classes.
func checkClasses(classes []phase.Class) error {
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
