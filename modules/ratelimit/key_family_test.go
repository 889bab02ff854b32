// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"math/rand/v2"
	"net/netip"
	"testing"
)

// TestFamiliesDiffer: an IPv4 prefix and an IPv6 prefix of the same length, of
// addresses with the same bytes wherever they may stand, are two keys, whose
// hashes, which are all that the counters know, differ as well.
func TestFamiliesDiffer(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	for range 2000 {
		var four [4]byte
		for i := range four {
			four[i] = byte(r.UintN(256) & r.UintN(256))
		}
		for _, bits := range []int{1, 8, 24, 32} {
			k := &KeyLevel{Client: true, IPv4Prefix: bits, IPv6Prefix: bits}
			whole := &KeyLevel{Client: true, IPv4Prefix: bits, IPv6Prefix: 96 + bits}
			key := k.prefix(netip.AddrFrom4(four))
			if mapped := whole.prefix(netip.AddrFrom16(netip.AddrFrom4(four).As16())); mapped != key {
				t.Fatalf("%v/%d: mapped, it is %+v, want %+v", four, bits, mapped, key)
			}
			// at the front (6to4 and the like), at the end (::1.2.3.4), behind 64:ff9b::, and
			// with a bit beside the mark of mapped addresses
			for _, at := range []struct {
				offset int
				sixes  []byte
			}{{0, nil}, {2, nil}, {12, nil}, {12, []byte{0, 0x64, 0xff, 0x9b}}, {12, []byte{0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, 0xff}}, {12, []byte{0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff}}} {
				var six [16]byte
				copy(six[:], at.sixes)
				copy(six[at.offset:], four[:])
				for _, level := range []*KeyLevel{k, whole} {
					if other := level.prefix(netip.AddrFrom16(six)); other.Hash == key.Hash || other.Prefix == key.Prefix {
						t.Fatalf("%v and %v are one key", key.Prefix, other.Prefix)
					}
				}
			}
		}
	}
}
