// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
)

// adminAPI lets operators see and forgive keys:
//
//	GET  /gatehouse/ratelimit/{zone}/top
//	POST /gatehouse/ratelimit/{zone}/inspect
//	POST /gatehouse/ratelimit/{zone}/forgive
//
// top lists the keys with the most requests in about the last window, as this
// server has seen them, at most 100 per level. inspect says what is counted
// for a key, forgive forgets it; what is under way stays. Their body is
// `{"key": …}`, or `{"key_base64": …}` for a key that is not UTF-8, and may have a
// `"level"`, from 0; default: all levels.
type adminAPI struct{}

const (
	maxTop       = 100
	maxAdminBody = 4 << 20
	adminTimeout = 5 * time.Second
	adminPrefix  = "/gatehouse/ratelimit/"
)

// CaddyModule returns the Caddy module information.
func (*adminAPI) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "admin.api.gatehouse_ratelimit",
		New: func() caddy.Module { return new(adminAPI) },
	}
}

// Routes returns the routes of the admin endpoint.
func (a *adminAPI) Routes() []caddy.AdminRoute {
	return []caddy.AdminRoute{{Pattern: adminPrefix, Handler: caddy.AdminHandlerFunc(a.serve)}}
}

// keyView is a key in an answer.
type keyView struct {
	Route string `json:"route,omitempty"`
	Level int    `json:"level"`
	Key   string `json:"key"`
	Count uint64 `json:"count"` // at most
	Error uint64 `json:"error"` // by which count may be too high
}

// stateView is what is counted for a key.
type stateView struct {
	Route string `json:"route,omitempty"`
	Level int    `json:"level"`
	State
	BlockedSeconds int64 `json:"blocked_seconds"`
	ResetSeconds   int64 `json:"reset_seconds"`
}

func (a *adminAPI) serve(w http.ResponseWriter, r *http.Request) error {
	zone, verb, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, adminPrefix), "/")
	method, ok := map[string]string{"top": http.MethodGet, "inspect": http.MethodPost, "forgive": http.MethodPost}[verb]
	if !ok {
		return apiError(http.StatusNotFound, fmt.Errorf("no such path; want %s{zone}/top, inspect or forgive", adminPrefix))
	}
	if r.Method != method {
		return apiError(http.StatusMethodNotAllowed, fmt.Errorf("%s wants %s", verb, method))
	}
	list := statesOf(zone)
	if len(list) == 0 {
		return apiError(http.StatusNotFound, fmt.Errorf("there is no zone %q", zone))
	}
	if verb == "top" {
		return answer(w, topOf(list))
	}
	q, err := readQuestion(r.Body)
	if err != nil {
		return apiError(http.StatusBadRequest, err)
	}
	ctx, cancel := context.WithTimeout(r.Context(), adminTimeout)
	defer cancel()
	views, err := q.ask(ctx, list, verb == "forgive")
	if err != nil {
		return err
	}
	return answer(w, views)
}

func topOf(list []*state) []keyView {
	views := make([]keyView, 0)
	for _, s := range list {
		for level, k := range s.keys {
			top := s.counters.Top(level)
			for _, h := range top[:min(len(top), maxTop)] {
				views = append(views, keyView{s.spec.Route, level, k.show(&h.Key, s.logKeys()), h.Count, h.Error})
			}
		}
	}
	return views
}

// question is the body of inspect and forgive.
type question struct {
	Key    *string `json:"key"`
	Base64 *string `json:"key_base64"`
	Level  *int    `json:"level"`

	text string
}

func readQuestion(body io.Reader) (*question, error) {
	q := new(question)
	d := json.NewDecoder(io.LimitReader(body, maxAdminBody))
	d.DisallowUnknownFields()
	if err := d.Decode(q); err != nil {
		return nil, fmt.Errorf("reading the body: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("reading the body: something follows the object")
	}
	switch {
	case (q.Key == nil) == (q.Base64 == nil):
		return nil, errors.New(`the body must have "key" or "key_base64"`)
	case q.Key != nil:
		q.text = *q.Key
	default:
		text, err := base64.StdEncoding.DecodeString(*q.Base64)
		if err != nil {
			return nil, fmt.Errorf("reading key_base64: %w", err)
		}
		q.text = string(text)
	}
	return q, nil
}

// ask inspects the key on its levels, and forgives it before if wanted.
func (q *question) ask(ctx context.Context, list []*state, forgive bool) ([]stateView, error) {
	views := make([]stateView, 0)
	for _, s := range list {
		if q.Level != nil && (*q.Level < 0 || *q.Level >= len(s.keys)) {
			return nil, apiError(http.StatusBadRequest, fmt.Errorf("there is no level %d", *q.Level))
		}
		for level, k := range s.keys {
			if q.Level != nil && *q.Level != level {
				continue
			}
			key, err := k.read(q.text)
			if err != nil {
				return nil, apiError(http.StatusBadRequest, err)
			}
			if forgive {
				if err := s.counters.Forgive(ctx, level, key); err != nil {
					return nil, apiError(http.StatusBadGateway, err)
				}
			}
			st, err := s.counters.Inspect(ctx, level, key)
			if err != nil {
				return nil, apiError(http.StatusBadGateway, err)
			}
			views = append(views, stateView{s.spec.Route, level, st, seconds(st.Blocked), seconds(st.Reset)})
		}
	}
	slices.SortStableFunc(views, func(a, b stateView) int { return strings.Compare(a.Route, b.Route) })
	return views, nil
}

func answer(w http.ResponseWriter, v any) error {
	w.Header().Set("Content-Type", "application/json")
	if err := json.NewEncoder(w).Encode(v); err != nil {
		return apiError(http.StatusInternalServerError, err)
	}
	return nil
}

func apiError(status int, err error) error { return caddy.APIError{HTTPStatus: status, Err: err} }

// Interface guards
var _ caddy.AdminRouter = (*adminAPI)(nil)
