// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"net/netip"
	"net/url"
	"strconv"
	"sync/atomic"
)

// redisNames names the keys of a zone in Redis:
//
//	<prefix>{<zone>[/<route>]:<tag>}:<level>[:<key>]:<window<quantum>|bucket|inflight>
//
// The quantum is that of the grid on which a window counts: a record of one
// grid says nothing on another, so a zone whose window was changed counts anew.
// A client prefix is written in clear, any other key as its SHA-256. The braces
// are the hash tag that tells a cluster where a key lives. In a cluster the tag
// is the key of the coarsest level, which all keys of one decision share; else
// it is the key itself, so that one of a finer level can be found without the
// others.
type redisNames struct {
	prefix  string
	cluster bool
	last    int // the coarsest level

	// the lengths of the coarsest prefixes, plus one; 0 as long as none was seen
	bits4, bits6 atomic.Int32
}

func (n *redisNames) init(prefix string, cluster bool, spec Spec) {
	n.cluster, n.last = cluster, len(spec.Levels)-1
	n.prefix = prefix + "{" + url.QueryEscape(spec.Zone)
	if spec.Route != "" {
		n.prefix += "/" + url.QueryEscape(spec.Route)
	}
	n.prefix += ":"
}

// probe is a key that is written to find out about Redis.
func (n *redisNames) probe() string { return redisProbeKey(n.prefix + "}") }

// redisText is how a key is written.
func redisText(k *Key) string {
	if k.Prefix.IsValid() {
		return k.Prefix.String()
	}
	sum := sha256.Sum256([]byte(k.Text))
	return hex.EncodeToString(sum[:])
}

// name is the key of a record.
func (n *redisNames) name(tag, text string, level int) string {
	name := n.prefix + tag + "}:" + strconv.Itoa(level)
	if tag != text {
		name += ":" + text
	}
	return name
}

// appendTo appends the keys that the script wants for a level.
func (l *redisLevel) appendTo(keys []string, name string) []string {
	if l.limit.Events > 0 {
		keys = append(keys, name+l.record)
	}
	if l.limit.Inflight > 0 {
		keys = append(keys, name+":inflight")
	}
	return keys
}

// keys are all keys of a decision.
func (n *redisNames) keys(keys []Key, levels []redisLevel) []string {
	names := make([]string, 0, 2*len(levels))
	tag := ""
	if n.cluster {
		tag = redisText(&keys[n.last])
		n.learn(keys[n.last].Prefix)
	}
	for i := range levels {
		text := redisText(&keys[i])
		if !n.cluster {
			tag = text
		}
		names = levels[i].appendTo(names, n.name(tag, text, i))
	}
	return names
}

func (n *redisNames) learn(p netip.Prefix) {
	switch bits := int32(p.Bits()) + 1; { //nolint:gosec // at most 129
	case !p.IsValid():
	case p.Addr().Is4() && n.bits4.Load() != bits:
		n.bits4.Store(bits)
	case p.Addr().Is6() && n.bits6.Load() != bits:
		n.bits6.Store(bits)
	}
}

var errRedisTag = errors.New("in a cluster a key of a finer level is only found after this node has seen a request of the zone from an address of that kind")

// keysOf are the keys of one level.
func (n *redisNames) keysOf(level int, k Key, l *redisLevel) ([]string, error) {
	text := redisText(&k)
	tag := text
	if n.cluster && level != n.last {
		bits := n.bits6.Load()
		if k.Prefix.Addr().Is4() {
			bits = n.bits4.Load()
		}
		coarse, err := k.Prefix.Addr().Prefix(int(bits) - 1)
		if err != nil {
			return nil, errRedisTag
		}
		tag = coarse.String()
	}
	return l.appendTo(nil, n.name(tag, text, level)), nil
}
