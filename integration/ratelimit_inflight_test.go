// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

func init() {
	caddy.RegisterModule(handover{})
	caddy.RegisterModule(listener{})
	httpcaddyfile.RegisterHandlerDirective("handover", func(httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
		return handover{}, nil
	})
	httpcaddyfile.RegisterDirectiveOrder("handover", httpcaddyfile.Before, "respond")
}

// handover is a handler that panics, or takes over the connection and returns
// while it stays open.
type handover struct{}

var handedOver = make(chan net.Conn, 1)

func (handover) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.handlers.gatehouse_test_handover", New: func() caddy.Module { return new(handover) }}
}

func (handover) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	switch r.URL.Path {
	case "/panic":
		panic("as the test wants it")
	case "/hijack":
		c, _, err := http.NewResponseController(w).Hijack()
		if err == nil {
			handedOver <- c
		}
		return err
	case "/error":
		return errors.New("as the test wants it")
	}
	return next.ServeHTTP(w, r)
}

// listener is an event handler.
type listener struct{}

var heard = make(chan caddy.Event, 100)

func (listener) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "events.handlers.gatehouse_test", New: func() caddy.Module { return new(listener) }}
}

func (listener) Handle(_ context.Context, e caddy.Event) error { heard <- e; return nil }

func (listener) UnmarshalCaddyfile(d *caddyfile.Dispenser) error { d.Next(); return nil }

// pending is an upstream whose requests stay until they are let go.
type pending struct {
	*upstream
	came chan string
	let  chan struct{}
	now  atomic.Int64
	most atomic.Int64
}

func startPending(t *testing.T) *pending {
	t.Helper()
	p := &pending{came: make(chan string, 1000), let: make(chan struct{})}
	p.upstream = serve(t, "h1", func(w http.ResponseWriter, r *http.Request) {
		n := p.now.Add(1)
		defer p.now.Add(-1)
		for {
			if most := p.most.Load(); n <= most || p.most.CompareAndSwap(most, n) {
				break
			}
		}
		if strings.HasPrefix(r.URL.Path, "/stream") {
			w.Header().Set("Content-Type", "text/event-stream")
			_, _ = io.WriteString(w, "data: x\n\n")
			_ = http.NewResponseController(w).Flush()
		}
		p.came <- r.URL.Path
		if strings.HasPrefix(r.URL.Path, "/quick") {
			return
		}
		select {
		case <-p.let:
		case <-r.Context().Done():
		}
	})
	return p
}

func (p *pending) await(t *testing.T) string {
	t.Helper()
	select {
	case path := <-p.came:
		return path
	case <-time.After(patience):
		t.Fatal("nothing reached the upstream")
		return ""
	}
}

const echoHandshake = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"

// upgrade opens a WebSocket through the site.
func (l *limited) upgrade(path string) net.Conn {
	l.t.Helper()
	c, err := net.Dial("tcp", l.addr)
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { _ = c.Close() })
	fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n", path, l.addr)
	res, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil || res.StatusCode != 101 {
		l.t.Fatalf("upgrade: %v, %v", res, err)
	}
	return c
}

// TestRatelimitInflight: however a request ends, its place is given back.
func TestRatelimitInflight(t *testing.T) {
	p := startPending(t)
	closeSocket := make(chan struct{}, 1)
	sockets := rawServer(t, func(_ int, c *net.TCPConn) {
		br := bufio.NewReader(c)
		if readRequest(br) != nil {
			return
		}
		_, _ = io.WriteString(c, echoHandshake)
		gone := make(chan struct{})
		go func() { _, _ = io.Copy(io.Discard, br); close(gone) }()
		select {
		case <-closeSocket:
		case <-gone:
		}
	})
	config := `http://{addr} {
		ratelimit {
			zone places {
				key client
				inflight 1
			}
		}
		handover
		reverse_proxy /ws ` + sockets + `
		reverse_proxy ` + p.addr + ` {
			flush_interval -1
		}
	}`
	l := startLimited(t, config)
	// under starts a request and returns how to abort it
	under := func(client *http.Client, path string) (abort func(), ended chan error) {
		ctx, cancel := context.WithCancel(t.Context())
		ended = make(chan error, 1)
		go func() {
			req, _ := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+l.addr+path, nil)
			res, err := client.Do(req)
			if err == nil {
				_, err = io.Copy(io.Discard, res.Body)
				res.Body.Close()
			}
			ended <- err
		}()
		if got := p.await(t); got != path {
			t.Fatalf("%s reached the upstream", got)
		}
		return cancel, ended
	}
	full := func() {
		t.Helper()
		l.until(`inflight_requests{zone="places"} 1`)
		l.expect("127.0.0.1", "/quick", 429)
	}
	free := func() {
		t.Helper()
		l.until(`inflight_requests{zone="places"} 0`)
		l.expect("127.0.0.1", "/quick", 200)
		p.await(t)
		l.until(`inflight_requests{zone="places"} 0`)
	}
	for protocol, client := range downstreams() {
		for _, path := range []string{"/slow", "/stream"} {
			t.Run(protocol+path, func(t *testing.T) {
				_, ended := under(client, path)
				full()
				p.let <- struct{}{}
				if err := <-ended; err != nil {
					t.Error(err)
				}
				free()
				abort, ended := under(client, path)
				full()
				abort()
				<-ended
				free()
			})
		}
	}
	t.Run("panic", func(*testing.T) { _, _, _ = l.try("GET", "/panic", nil); free() })
	t.Run("error", func(*testing.T) { l.expect("127.0.0.1", "/error", 500); free() })
	t.Run("websocket closed by the client", func(*testing.T) {
		c := l.upgrade("/ws")
		full()
		_ = c.Close()
		free()
	})
	t.Run("websocket closed by the server", func(*testing.T) {
		c := l.upgrade("/ws")
		full()
		closeSocket <- struct{}{}
		_, _ = io.Copy(io.Discard, c)
		_ = c.Close() // Caddy hands on the half-close, and waits for the other half
		free()
	})
	t.Run("websocket closed by a reload", func(*testing.T) {
		c := l.upgrade("/ws")
		full()
		l.reload(strings.Replace(config, "handover", "header X-Generation 2\nhandover", 1))
		_, _ = io.Copy(io.Discard, c)
		free()
	})
	t.Run("taken over", func(t *testing.T) {
		c, err := net.Dial("tcp", l.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		fmt.Fprintf(c, "GET /hijack HTTP/1.1\r\nHost: %s\r\n\r\n", l.addr)
		ours := <-handedOver
		full()
		_ = ours.Close()
		free()
	})
}

// TestRatelimitCrowd: a hundred clients at once, of which the upstream never
// sees more than three.
func TestRatelimitCrowd(t *testing.T) {
	p := startPending(t)
	l := startLimited(t, `http://{addr} {
		ratelimit {
			zone crowd {
				key all
				inflight 3
				queue 1000 1m
			}
		}
		reverse_proxy `+p.addr+`
	}`)
	var wg sync.WaitGroup
	var refused atomic.Int64
	transport := &http.Transport{}
	defer transport.CloseIdleConnections()
	for range 100 {
		wg.Go(func() {
			for range 5 {
				res, err := (&http.Client{Transport: transport, Timeout: patience}).Get("http://" + l.addr + "/quick")
				if err != nil {
					t.Error(err)
					return
				}
				res.Body.Close()
				if res.StatusCode != 200 {
					refused.Add(1)
				}
			}
		})
	}
	wg.Wait()
	if n := p.most.Load(); n > 3 || refused.Load() > 0 {
		t.Errorf("%d at once, %d refused", n, refused.Load())
	}
	l.until(`inflight_requests{zone="crowd"} 0`)
	l.until(`waiting_requests{zone="crowd"} 0`)
}

// TestRatelimitReload: what is counted and who waits outlives it.
func TestRatelimitReload(t *testing.T) {
	p := startPending(t)
	config := func(more string, n int) string {
		return fmt.Sprintf(`http://{addr} {
			header X-Generation %d
			ratelimit /slow {
				zone reload-places {
					key all
					inflight 1
					queue 5 1m
				}
			}
			ratelimit /quick {
				zone reload-rate {
					key client
					rate 2 1h
					%s
				}
			}
			reverse_proxy %s
		}`, n, more, p.addr)
	}
	l := startLimited(t, config("", 0))
	ended := make(chan int, 2)
	send := func() { res, _ := l.get("/slow"); ended <- res.StatusCode }
	go send()
	p.await(t)
	go send()
	l.until(`waiting_requests{zone="reload-places"} 1`)
	l.expect("192.0.2.1", "/quick", 200)
	p.await(t)

	// it waits for what is under way
	loaded := make(chan struct{})
	go func() { defer close(loaded); l.reload(config("", 1)) }()
	l.logs.await(t, "end of the old server", 1, message("servers shutting down"))
	p.let <- struct{}{}
	p.await(t) // the one that waited has its turn
	p.let <- struct{}{}
	for range 2 {
		if status := <-ended; status != 200 {
			t.Errorf("status %d", status)
		}
	}
	<-loaded
	l.until(`waiting_requests{zone="reload-places"} 0`)
	l.until(`inflight_requests{zone="reload-places"} 0`)
	l.expect("192.0.2.1", "/quick", 200, 429)
}

// TestRatelimitReloads: nothing is left of fifty configurations.
func TestRatelimitReloads(t *testing.T) {
	config := func(n int) string {
		return fmt.Sprintf(`http://{addr} {
			header X-Generation %d
			ratelimit {
				zone reloads-same {
					key client
					rate 2 1h
				}
				zone reloads-other-%[1]d {
					key client
					inflight 3
					queue 2 1s
				}
			}
			respond ok
		}`, n)
	}
	l := startLimited(t, config(0))
	l.expect("192.0.2.1", "/", 200, 200, 429)
	l.reload(config(1))
	goroutines, heap := usage()
	for n := 2; n < 50; n++ {
		l.reload(config(n))
		l.expect("192.0.2.1", "/", 429)
	}
	http.DefaultClient.CloseIdleConnections()
	for deadline := time.Now().Add(patience); ; runtime.Gosched() {
		g, h := usage()
		if g <= goroutines+5 && h <= heap+4<<20 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d goroutines, before %d; heap %d, before %d", g, goroutines, h, heap)
		}
	}
	m := l.metrics()
	if strings.Contains(m, "reloads-other-48") || !strings.Contains(m, "reloads-other-49") {
		t.Errorf("metrics:\n%s", m)
	}
	// a configuration that fails changes nothing
	bad := strings.Replace(config(50), "respond ok", "file_server {\n\troot {\n\t}", 1)
	if l.tryLoad(bad, l.options()...) == nil {
		t.Error("the broken configuration was loaded")
	}
	l.expect("192.0.2.1", "/", 429)
	l.reload(strings.Replace(config(51), "rate 2 1h", "rate 3 1h", 1))
	l.expect("192.0.2.1", "/", 200, 200, 200, 429)
	// the store alone makes the counts begin anew, too
	l.reload(strings.Replace(config(52), "rate 2 1h", "rate 3 1h\nstore memory {\nmax_memory 1MiB\n}", 1))
	l.expect("192.0.2.1", "/", 200, 200, 200, 429)
}

// TestRatelimitEvent reaches who subscribes.
func TestRatelimitEvent(t *testing.T) {
	l := startLimited(t, `http://{addr} {
		respond ok
	}`)
	l.load(`http://{addr} {
		ratelimit {
			zone event {
				key {http.request.header.X-Key}
				rate 1 1h
			}
		}
		respond ok
	}`, append(l.options(), "events {\n\ton ratelimit_exceeded gatehouse_test\n}")...)
	for range 2 {
		l.get("/", "X-Key", "secret")
	}
	select {
	case e := <-heard:
		key, _ := e.Data["key"].(string)
		if e.Data["zone"] != "event" || e.Data["reason"] != "rate" || e.Data["decision"] != "refused" || !strings.HasPrefix(key, "hmac:") {
			t.Errorf("event %v", e.Data)
		}
	case <-time.After(patience):
		t.Error("no event")
	}
	if n := len(heard); n != 0 {
		t.Errorf("%d events more", n)
	}
}
