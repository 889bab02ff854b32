// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/maphash"
	"net/http"
	"net/netip"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

const (
	defaultIPv4Prefix = 32
	defaultIPv6Prefix = 64
)

// KeyLevel tells requests apart: by the client's address or by a text. Exactly
// one of both is set.
type KeyLevel struct {
	// Text with placeholders. One of more than 1 KiB is kept as its SHA-256.
	Text string `json:"text,omitempty"`

	// The address of the client, as trusted proxies tell it (`{client_ip}`). An
	// IPv4-mapped IPv6 address is the IPv4 address.
	Client bool `json:"client,omitempty"`

	// How many bits of an IPv4 address count. Default: 32.
	IPv4Prefix int `json:"ipv4_prefix,omitempty"`

	// How many bits of an IPv6 address count. Default: 64, which is what one
	// subscriber has at least.
	IPv6Prefix int `json:"ipv6_prefix,omitempty"`

	// The limits of this level are those of the zone, times this. Default: 1.
	Times int `json:"times,omitempty"`
}

func (k *KeyLevel) setDefaults() {
	if k == nil {
		return
	}
	if k.Times == 0 {
		k.Times = 1
	}
	if !k.Client {
		return
	}
	if k.IPv4Prefix == 0 {
		k.IPv4Prefix = defaultIPv4Prefix
	}
	if k.IPv6Prefix == 0 {
		k.IPv6Prefix = defaultIPv6Prefix
	}
}

func (k *KeyLevel) check() error {
	switch {
	case k == nil:
		return errors.New("keys: there is a null")
	case k.Client == (k.Text != ""):
		return errors.New("a key is either `client` or a text")
	case k.Text != "" && (k.IPv4Prefix != 0 || k.IPv6Prefix != 0):
		return errors.New("ipv4_prefix and ipv6_prefix are for `key client`")
	case k.Times < 1 || k.Times > maxNumber:
		return fmt.Errorf("times %d: must be from 1 to %d", k.Times, maxNumber)
	case k.Client && (k.IPv4Prefix < 1 || k.IPv4Prefix > 32):
		return fmt.Errorf("ipv4_prefix %d: must be from 1 to 32", k.IPv4Prefix)
	case k.Client && (k.IPv6Prefix < 1 || k.IPv6Prefix > 128):
		return fmt.Errorf("ipv6_prefix %d: must be from 1 to 128", k.IPv6Prefix)
	}
	return nil
}

// nested tells whether each level is a prefix of the one before.
func nested(levels []*KeyLevel) bool {
	for i, k := range levels {
		if !k.Client || i > 0 && (k.IPv4Prefix > levels[i-1].IPv4Prefix || k.IPv6Prefix > levels[i-1].IPv6Prefix) {
			return false
		}
	}
	return true
}

var errEmptyKey = errors.New("it is empty")

// of returns the key of a request.
func (k *KeyLevel) of(r *http.Request, repl *caddy.Replacer) (Key, error) {
	if k.Client {
		ip, _ := caddyhttp.GetVar(r.Context(), caddyhttp.ClientIPVarKey).(string)
		addr, err := netip.ParseAddr(ip)
		if err != nil {
			return Key{}, errors.New("the client has no address")
		}
		return k.prefix(addr), nil
	}
	text, err := repl.ReplaceOrErr(k.Text, false, true)
	switch {
	case err != nil:
		return Key{}, err
	case text == "":
		return Key{}, errEmptyKey
	}
	return keyOfText(text), nil
}

// read returns the key that an operator means with a text.
func (k *KeyLevel) read(text string) (Key, error) {
	if !k.Client {
		return keyOfText(text), nil
	}
	if p, err := netip.ParsePrefix(text); err == nil {
		return k.prefix(p.Addr()), nil
	}
	addr, err := netip.ParseAddr(text)
	if err != nil {
		return Key{}, fmt.Errorf("%q is not an address", text)
	}
	return k.prefix(addr), nil
}

func (k *KeyLevel) prefix(addr netip.Addr) Key {
	addr = addr.Unmap().WithZone("")
	bits := k.IPv6Prefix
	if addr.Is4() {
		bits = k.IPv4Prefix
	}
	p := netip.PrefixFrom(addr, bits).Masked()
	// IPv4 stands where mapped addresses do, and no IPv6 address is there anymore
	var b [17]byte
	a16 := p.Addr().As16()
	copy(b[:], a16[:])
	b[16] = byte(bits)
	return Key{Prefix: p, Hash: nonzero(maphash.Bytes(hashSeed, b[:]))}
}

// hashSeed is random, so that nobody can choose keys that collide.
var hashSeed = maphash.MakeSeed()

func keyOfText(text string) Key {
	if len(text) > maxKey {
		sum := sha256.Sum256([]byte(text))
		text = "sha256:" + hex.EncodeToString(sum[:])
	}
	return Key{Text: text, Hash: nonzero(maphash.String(hashSeed, text))}
}

// sharedKey is the key of all requests without one.
var sharedKey = Key{Hash: nonzero(maphash.String(hashSeed, ""))}

func nonzero(hash uint64) uint64 {
	if hash == 0 {
		return 1
	}
	return hash
}

// show is how a key appears in logs: in clear only where that is an address, or
// if the operator wants it.
func (k *KeyLevel) show(key *Key, clearly bool) string {
	switch {
	case key.Hash == 0:
		return ""
	case key.Prefix.IsSingleIP():
		return key.Prefix.Addr().String()
	case key.Prefix.IsValid():
		return key.Prefix.String()
	case clearly || key.Text == "":
		return strings.ToValidUTF8(key.Text, "\ufffd")
	}
	return keyedHash(key.Text)
}

// showSecret is the key of the hashes that are shown. It is of this process.
var showSecret = func() []byte {
	b := make([]byte, sha256.Size)
	_, _ = rand.Read(b) // never fails
	return b
}()

func keyedHash(text string) string {
	mac := hmac.New(sha256.New, showSecret)
	mac.Write([]byte(text))
	return "hmac:" + hex.EncodeToString(mac.Sum(nil)[:8])
}
