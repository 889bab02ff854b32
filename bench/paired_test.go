// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"flag"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

var sliceLength = flag.Duration("slice", 200*time.Millisecond, "length of a slice of the paired benchmarks")

// paired compares a site with a base: rounds of four slices in the order
// base, site, site, base, so that what drifts over a round falls on both
// alike. Each round gives one ratio, site to base; reported is the median of
// all rounds with its 95 % interval. The number of rounds is b.N, so
// -benchtime 100x asks for a hundred.
func paired(b *testing.B, base, site *site) {
	var throughput, cpu []float64
	add := func(x, y slice) slice {
		return slice{x.requests + y.requests, x.wall + y.wall, x.cpu + y.cpu}
	}
	base.load(b, *sliceLength/4)
	site.load(b, *sliceLength/4)
	b.ResetTimer()
	for range b.N {
		base1, site1 := base.load(b, *sliceLength), site.load(b, *sliceLength)
		site2, base2 := site.load(b, *sliceLength), base.load(b, *sliceLength)
		both, of := add(site1, site2), add(base1, base2)
		throughput = append(throughput, both.perSecond()/of.perSecond())
		cpu = append(cpu, both.cpuPerRequest()/of.cpuPerRequest())
	}
	b.StopTimer()
	b.ReportMetric(0, "ns/op")
	report := func(unit string, ratios []float64) {
		median, low, high := medianInterval(ratios)
		if math.IsNaN(median) {
			return
		}
		b.ReportMetric(median, unit)
		b.ReportMetric(low, unit+"-low")
		b.ReportMetric(high, unit+"-high")
	}
	report("x-throughput", throughput)
	report("x-cpu/req", cpu)
}

// medianInterval returns the median and its 95 % interval by the bootstrap:
// the medians of samples drawn from the ratios, with a fixed seed.
func medianInterval(ratios []float64) (mid, low, high float64) {
	const draws = 10_000
	rng := rand.New(rand.NewPCG(1, 2))
	medians := make([]float64, draws)
	sample := make([]float64, len(ratios))
	for i := range medians {
		for j := range sample {
			sample[j] = ratios[rng.IntN(len(ratios))]
		}
		medians[i] = median(sample)
	}
	slices.Sort(medians)
	return median(slices.Clone(ratios)), medians[draws*25/1000], medians[draws*975/1000-1]
}

// median sorts its argument.
func median(s []float64) float64 {
	slices.Sort(s)
	n := len(s)
	return (s[(n-1)/2] + s[n/2]) / 2
}

func TestMedianInterval(t *testing.T) {
	var ratios []float64
	for i := range 101 {
		ratios = append(ratios, float64(i))
	}
	mid, low, high := medianInterval(ratios)
	// by order statistics the interval is from the 41st to the 61st value
	if mid != 50 || low < 36 || low > 44 || high < 56 || high > 64 {
		t.Errorf("got %v from %v to %v", mid, low, high)
	}
}
