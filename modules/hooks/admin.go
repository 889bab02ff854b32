// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"encoding/json"
	"net/http"

	"github.com/caddyserver/caddy/v2"
)

// adminAPI shows what the hooks have learned:
//
//	GET /gatehouse/hooks/upstreams
//
// lists the upstreams that closed kept-alive connections, most recently seen
// first, with the times in milliseconds and the keepalive that fits.
type adminAPI struct{}

// CaddyModule returns the Caddy module information.
func (*adminAPI) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "admin.api.gatehouse_hooks",
		New: func() caddy.Module { return new(adminAPI) },
	}
}

// Routes returns the routes of the admin endpoint.
func (a *adminAPI) Routes() []caddy.AdminRoute {
	return []caddy.AdminRoute{{
		Pattern: "/gatehouse/hooks/upstreams",
		Handler: caddy.AdminHandlerFunc(a.upstreams),
	}}
}

// upstreamView is one upstream in the answer.
type upstreamView struct {
	Upstream       string  `json:"upstream"`
	Resets         int     `json:"resets"`
	ShortestIdleMS float64 `json:"shortest_idle_ms"`
	SurvivedIdleMS float64 `json:"survived_idle_ms"`
	Keepalive      string  `json:"keepalive,omitempty"`
}

func (*adminAPI) upstreams(w http.ResponseWriter, r *http.Request) error {
	if r.Method != http.MethodGet {
		return caddy.APIError{HTTPStatus: http.StatusMethodNotAllowed}
	}
	views := make([]upstreamView, 0)
	doctors.Range(func(_, v any) bool {
		for _, p := range v.(*doctor).all() {
			view := upstreamView{
				Upstream: p.upstream, Resets: p.resets,
				ShortestIdleMS: milliseconds(p.shortest), SurvivedIdleMS: milliseconds(p.survived),
			}
			if k := p.keepalive(); k > 0 {
				view.Keepalive = k.String()
			}
			views = append(views, view)
		}
		return true
	})
	w.Header().Set("Content-Type", "application/json")
	if err := json.NewEncoder(w).Encode(views); err != nil {
		return caddy.APIError{HTTPStatus: http.StatusInternalServerError, Err: err}
	}
	return nil
}

// Interface guards
var _ caddy.AdminRouter = (*adminAPI)(nil)
