// SPDX-License-Identifier: Apache-2.0

// Command coexist is one Caddy that holds Gatehouse beside the plugins which operators keep while they migrate. Caddy
// panics at start when two of its plugins register one module ID or directive, so this binary must start.
package main

import (
	_ "github.com/mholt/caddy-ratelimit"

	_ "github.com/caddyserver/cache-handler"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	_ "github.com/caddyserver/caddy/v2/modules/standard"

	_ "github.com/caddy-gatehouse/gatehouse"
)

func main() { caddycmd.Main() }
