// SPDX-License-Identifier: Apache-2.0

// Package option reads the arguments of Caddyfile options, with the same errors
// in every module. In all of it the dispenser is at the name of the option.
package option

import (
	"slices"
	"strconv"
	"strings"

	"github.com/dustin/go-humanize"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
)

// Set remembers which options of a block were seen.
type Set map[string]bool

// First reports an error if the option that d is at was there before.
func (o Set) First(d *caddyfile.Dispenser) error {
	if o[d.Val()] {
		return d.Errf("%s already specified", d.Val())
	}
	o[d.Val()] = true
	return nil
}

// Unrecognized is the error for an unknown word in the block of an option.
func Unrecognized(d *caddyfile.Dispenser, block string) error {
	return d.Errf("unrecognized %s option %q", block, d.Val())
}

// Argument returns the one argument of the option that d is at.
func Argument(d *caddyfile.Dispenser) (string, error) {
	var arg string
	if !d.AllArgs(&arg) {
		return "", d.ArgErr()
	}
	return arg, nil
}

// Arguments returns one or more arguments of the option that d is at.
func Arguments(d *caddyfile.Dispenser) ([]string, error) {
	args := d.RemainingArgs()
	if len(args) == 0 {
		return nil, d.ArgErr()
	}
	return args, nil
}

// Flag makes sure that the option that d is at has no argument.
func Flag(d *caddyfile.Dispenser) error {
	if d.NextArg() {
		return d.ArgErr()
	}
	return nil
}

// Number reads a whole number in a range.
func Number(d *caddyfile.Dispenser, lowest, highest int) (int, error) {
	n, err := NextNumber(d, d.Val(), lowest, highest)
	if err != nil {
		return 0, err
	}
	return n, Flag(d)
}

// NextNumber reads the next argument of an option as a whole number in a range.
func NextNumber(d *caddyfile.Dispenser, option string, lowest, highest int) (int, error) {
	if !d.NextArg() {
		return 0, d.ArgErr()
	}
	n, err := strconv.Atoi(d.Val())
	if err != nil || n < lowest || n > highest {
		return 0, d.Errf("parsing %s %q: must be a whole number from %d to %d", option, d.Val(), lowest, highest)
	}
	return n, nil
}

// Duration reads a duration greater than zero.
func Duration(d *caddyfile.Dispenser) (caddy.Duration, error) {
	dur, err := NextDuration(d, d.Val())
	if err != nil {
		return 0, err
	}
	return dur, Flag(d)
}

// NextDuration reads the next argument of an option as a duration greater than zero.
func NextDuration(d *caddyfile.Dispenser, option string) (caddy.Duration, error) {
	if !d.NextArg() {
		return 0, d.ArgErr()
	}
	dur, err := caddy.ParseDuration(d.Val())
	if err != nil {
		return 0, d.Errf("parsing %s %q: %v", option, d.Val(), err)
	}
	if dur <= 0 {
		return 0, d.Errf("parsing %s %q: must be greater than zero", option, d.Val())
	}
	return caddy.Duration(dur), nil
}

// Size reads a size in bytes greater than zero.
func Size(d *caddyfile.Dispenser) (int64, error) {
	option := d.Val()
	arg, err := Argument(d)
	if err != nil {
		return 0, err
	}
	n, err := humanize.ParseBytes(arg)
	if err != nil {
		return 0, d.Errf("parsing %s %q: must be a size such as 64KiB", option, arg)
	}
	if n == 0 || n > 1<<62 {
		return 0, d.Errf("parsing %s %q: must be greater than zero", option, arg)
	}
	return int64(n), nil
}

// Word reads one of some words.
func Word(d *caddyfile.Dispenser, words ...string) (string, error) {
	option := d.Val()
	arg, err := Argument(d)
	if err != nil {
		return "", err
	}
	if !slices.Contains(words, arg) {
		return "", d.Errf("parsing %s %q: must be %s", option, arg, Choice(words))
	}
	return arg, nil
}

// Choice lists words: "a, b or c".
func Choice(words []string) string {
	last := len(words) - 1
	if last < 1 {
		return strings.Join(words, "")
	}
	return strings.Join(words[:last], ", ") + " or " + words[last]
}

// Here returns a dispenser that stays at the token that d is at, for errors
// that are found later.
func Here(d *caddyfile.Dispenser) *caddyfile.Dispenser {
	here := caddyfile.NewDispenser([]caddyfile.Token{d.Token()})
	here.Next()
	return here
}
