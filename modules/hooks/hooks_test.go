// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
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

// A request that was aborted before it was sent can't be sent anymore.
func TestAbortedRequestIsUnsendable(t *testing.T) {
	x := phase.NewExchange(t.Context(), &phase.Table{}, time.Now())
	c := newCall(t.Context(), new(Transport), x, x.Begin("a:1", dynamicLabel, time.Now()))
	out := httptest.NewRequest(http.MethodGet, "http://a:1/path", nil).WithContext(c)
	c.guard(nil, out)
	c.abort(errStaleConn)
	var sent bytes.Buffer
	if err := out.Write(&sent); err == nil || sent.Len() > 0 {
		t.Errorf("%q was sent (%v)", &sent, err)
	}
	if !errors.Is(context.Cause(c), errStaleConn) {
		t.Errorf("cause = %v", context.Cause(c))
	}
}

// The server's configuration tells whether attempts must be observed from outside.
func TestForeignTransport(t *testing.T) {
	for name, tt := range map[string]struct {
		routes string
		want   bool
	}{
		"nothing":         {`[]`, false},
		"own":             {`[{"handle":[{"handler":"reverse_proxy","transport":{"protocol":"hooks"}}]}]`, false},
		"default":         {`[{"handle":[{"handler":"reverse_proxy"}]}]`, true},
		"stock":           {`[{"handle":[{"handler":"reverse_proxy","transport":{"protocol":"http"}}]}]`, true},
		"fastcgi":         {`[{"handle":[{"handler":"reverse_proxy","transport":{"protocol":"fastcgi"}}]}]`, false},
		"nested":          {`[{"handle":[{"handler":"subroute","routes":[{"handle":[{"handler":"reverse_proxy"}]}]}]}]`, true},
		"behind a name":   {`[{"handle":[{"handler":"invoke","name":"x"}]}]`, true},
		"own and default": {`[{"handle":[{"handler":"reverse_proxy","transport":{"protocol":"hooks"}},{"handler":"reverse_proxy"}]}]`, true},
	} {
		var srv caddyhttp.Server
		if err := json.Unmarshal([]byte(tt.routes), &srv.Routes); err != nil {
			t.Fatal(err)
		}
		if got := foreignTransport(&srv); got != tt.want {
			t.Errorf("%s: %v, want %v", name, got, tt.want)
		}
	}
}
