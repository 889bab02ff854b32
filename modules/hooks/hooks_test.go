// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-gatehouse/gatehouse/internal/phase"
)

var nothing = caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error { return nil })

// A handler without hooks costs nothing.
func TestNoHooksNoAllocations(t *testing.T) {
	var h Handler
	w, r := httptest.NewRecorder(), httptest.NewRequest(http.MethodGet, "/", nil)
	if n := testing.AllocsPerRun(100, func() { _ = h.ServeHTTP(w, r, nothing) }); n != 0 {
		t.Errorf("%v allocations, want none", n)
	}
}

// early is a hook of one phase that needs no writer.
type early struct{}

func (early) EarlyRequest(*phase.Exchange, http.ResponseWriter, *http.Request) (bool, error) {
	return false, nil
}

// A phase without hooks puts no wrapper in place.
func TestNoWriterWithoutNeed(t *testing.T) {
	h := &Handler{phases: handlerPhases{any: true}}
	h.table.Add(early{})
	w, r := httptest.NewRecorder(), httptest.NewRequest(http.MethodGet, "/", nil)
	err := h.ServeHTTP(w, r, caddyhttp.HandlerFunc(func(got http.ResponseWriter, _ *http.Request) error {
		if got != http.ResponseWriter(w) {
			t.Errorf("the writer is wrapped in %T", got)
		}
		return nil
	}))
	if err != nil {
		t.Error(err)
	}
}

// An attempt remembers its first failure, an exchange its first and its last attempts.
func TestExchangeIsBounded(t *testing.T) {
	x := phase.NewExchange(t.Context(), &phase.Table{}, time.Now())
	for range 100 {
		x.Begin("a:1", dynamicLabel, time.Now()).Failed(phase.Refused, errStaleConn, time.Now())
	}
	attempts := x.Attempts()
	if len(attempts) != 32 || attempts[0].Facts().Number != 1 || attempts[31].Facts().Number != 100 || x.Last() != attempts[31] {
		t.Errorf("%d attempts, the last is number %d", len(attempts), attempts[len(attempts)-1].Facts().Number)
	}
}
