// SPDX-License-Identifier: Apache-2.0

package ratelimit

// topSlots is how many of the heaviest keys a shard names.
const topSlots = 8

// maxKey is the length up to which a key is kept as it is.
const maxKey = 1 << 10

// topSize is the most that the names of a shard need, in bytes.
const topSize = topSlots * (maxKey + 80)

// top names the heaviest keys: Space-Saving (Metwally, Agrawal, El Abbadi
// 2005), whose counts are halved in each window. It is not safe for concurrent
// use.
type top struct {
	hashes [topSlots]uint64
	counts [topSlots]uint64
	errors [topSlots]uint64
	names  [topSlots]name
	halve  int64 // when
}

// name is a key whose text is kept in a buffer that is used again.
type name struct {
	key  Key
	text []byte
}

func (t *top) add(k *Key, n int, now, window int64) {
	if now >= t.halve {
		t.decay(now, window)
	}
	least := 0
	for i, h := range t.hashes {
		if h == k.Hash {
			t.counts[i] += uint64(n)
			return
		}
		if t.counts[i] < t.counts[least] {
			least = i
		}
	}
	t.errors[least] = t.counts[least]
	t.counts[least] += uint64(n)
	t.hashes[least] = k.Hash
	m := &t.names[least]
	m.text = append(m.text[:0], k.Text...)
	m.key = Key{Hash: k.Hash, Prefix: k.Prefix}
}

func (t *top) decay(now, window int64) {
	for i := range t.counts {
		t.counts[i] /= 2
		t.errors[i] /= 2
		if t.counts[i] == 0 {
			t.hashes[i] = 0
		}
	}
	t.halve = now + window
}

func (t *top) appendTo(list []Heavy) []Heavy {
	for i, h := range t.hashes {
		if h == 0 {
			continue
		}
		k := t.names[i].key
		k.Text = string(t.names[i].text)
		list = append(list, Heavy{Key: k, Count: t.counts[i], Error: t.errors[i]})
	}
	return list
}
