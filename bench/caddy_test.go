// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"

	_ "github.com/mholt/caddy-ratelimit"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	_ "github.com/caddyserver/caddy/v2/modules/standard"

	_ "github.com/caddy-gatehouse/gatehouse"
)

func TestMain(m *testing.M) {
	for _, name := range []string{"HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY", "all_proxy"} {
		_ = os.Unsetenv(name)
	}
	dir, err := os.MkdirTemp("", "gatehouse-bench-")
	if err != nil {
		panic(err)
	}
	_ = os.Setenv("XDG_DATA_HOME", dir)
	_ = os.Setenv("XDG_CONFIG_HOME", dir)
	caddy.RegisterModule(new(next))
	httpcaddyfile.RegisterHandlerDirective("bench_next", func(httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
		return new(next), nil
	})
	httpcaddyfile.RegisterDirectiveOrder("bench_next", httpcaddyfile.After, "encode")
	code := m.Run()
	_ = os.RemoveAll(dir)
	os.Exit(code)
}

// next is the least that a handler can be: the price of any handler in a
// route, which is Caddy's own.
type next struct{}

// CaddyModule returns the Caddy module information.
func (*next) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.handlers.bench_next", New: func() caddy.Module { return new(next) }}
}

func (*next) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	return next.ServeHTTP(w, r)
}

// globals is the head of the configuration: no admin endpoint, no TLS, and a log
// of a level that goes nowhere.
const globals = `{
	admin off
	persist_config off
	auto_https off
	log {
		output discard
		level %s
	}
}
`

// variant is one way to put a reverse_proxy in front of the upstream, or to
// answer without one.
type variant struct {
	name      string
	handlers  string // in front of reverse_proxy
	transport string
	answer    string // instead of reverse_proxy

	status int  // of the responses; default: 200
	keys   bool // each request has a random X-Key, one of a million
}

// site is a variant that is served.
type site struct {
	variant
	addr string
	idle chan *client
}

// serve runs Caddy with a site for each variant, all of them at once, until
// the end of the benchmark, with one upstream behind them. The first site is
// not Caddy's: it is the upstream itself.
func serve(tb testing.TB, variants []variant) []*site {
	tb.Helper()
	return serveLogging(tb, "ERROR", variants)
}

// serveLogging is serve with a level of the log.
func serveLogging(tb testing.TB, level string, variants []variant) []*site {
	tb.Helper()
	upstream := listenUpstream(tb)
	sites := []*site{newSite(variant{name: "upstream"}, upstream)}
	var text strings.Builder
	fmt.Fprintf(&text, globals, level)
	for _, v := range variants {
		s := newSite(v, freeAddr(tb))
		_, port, _ := net.SplitHostPort(s.addr)
		answer := v.answer
		if answer == "" {
			answer = fmt.Sprintf("reverse_proxy %s {\ntransport %s {\nkeepalive_idle_conns_per_host 64\n}\n}", upstream, v.transport)
		}
		fmt.Fprintf(&text, "http://:%s {\nbind 127.0.0.1\n%s\n%s\n}\n", port, v.handlers, answer)
		sites = append(sites, s)
	}
	doc, _, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(text.String()), map[string]any{"filename": "Caddyfile"})
	if err != nil {
		tb.Fatalf("adapting: %v\n%s", err, text.String())
	}
	if err := caddy.Load(doc, true); err != nil {
		tb.Fatalf("loading: %v", err)
	}
	tb.Cleanup(func() {
		for _, s := range sites {
			s.close()
		}
		if err := caddy.Stop(); err != nil {
			tb.Errorf("stopping: %v", err)
		}
	})
	return sites
}

func freeAddr(tb testing.TB) string {
	tb.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}
