// SPDX-License-Identifier: Apache-2.0

// Command caddy is a stock Caddy with the whole Gatehouse set and cache-handler. It is meant for trying the set out
// from a checkout; production builds are made with xcaddy.
package main

import (
	_ "github.com/caddyserver/cache-handler"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	_ "github.com/caddyserver/caddy/v2/modules/standard"

	// plug in Caddy modules here
	_ "github.com/caddy-gatehouse/gatehouse"
)

func main() { caddycmd.Main() }
