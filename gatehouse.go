// SPDX-License-Identifier: Apache-2.0

// Package gatehouse adds the whole Gatehouse set of plugins to a Caddy build. It holds no code of its own: it is
// the package that an xcaddy --with option or a blank import names.
//
// A build that wants single modules imports their packages instead, such as
// github.com/caddy-gatehouse/gatehouse/modules/hooks. Each registers its own directive with its place in Caddy's
// order, and needs none of the others.
package gatehouse

import (
	// the set
	_ "github.com/caddy-gatehouse/gatehouse/caddyfile"
	_ "github.com/caddy-gatehouse/gatehouse/modules/hooks"
	_ "github.com/caddy-gatehouse/gatehouse/modules/ratelimit"
)
