// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"encoding/json"
	"slices"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// foreignTransport tells whether a reverse_proxy of the server may have a
// transport that does not run phases, so that its attempts must be observed
// from outside. While the handlers of a route are provisioned, the server still
// holds the configuration of that route and of all that follow; what came
// before can't be behind a handler. Named routes may be gone already, so a
// route that invokes one counts as foreign.
func foreignTransport(srv *caddyhttp.Server) bool {
	var doc any
	text, err := json.Marshal([]any{srv.Routes, srv.NamedRoutes})
	if err != nil || json.Unmarshal(text, &doc) != nil {
		return true
	}
	return foreignIn(doc)
}

func foreignIn(doc any) bool {
	switch v := doc.(type) {
	case []any:
		return slices.ContainsFunc(v, foreignIn)
	case map[string]any:
		switch v["handler"] {
		case "invoke":
			return true
		case "reverse_proxy":
			transport, _ := v["transport"].(map[string]any)
			if p := transport["protocol"]; p != "hooks" && p != "fastcgi" {
				return true
			}
		}
		for _, member := range v {
			if foreignIn(member) {
				return true
			}
		}
	}
	return false
}
