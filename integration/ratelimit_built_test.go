// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// startBuilt runs the built binary, and makes it look like a site of this process.
func startBuilt(t *testing.T, config string) (*node, *limited) {
	t.Helper()
	n := startNode(t, config)
	return n, &limited{site: &site{t: t, addr: n.addr, logs: n.logs}, admin: n.admin}
}

// crowdOf starts that many clients at the same time, and hands on the answers
// when all have one.
func crowdOf(t *testing.T, clients int, client *http.Client, addr, path string) <-chan []*answer {
	t.Helper()
	begin, done := make(chan struct{}), make(chan []*answer, 1)
	answers := make([]*answer, clients)
	var wg sync.WaitGroup
	for i := range answers {
		wg.Go(func() {
			<-begin
			a, err := ask(client, http.MethodGet, addr, path, "")
			if err != nil {
				t.Error(err)
				a = new(answer)
			}
			answers[i] = a
		})
	}
	close(begin)
	go func() { wg.Wait(); done <- answers }()
	return done
}

func statuses(answers []*answer) map[int]int {
	count := make(map[int]int)
	for _, a := range answers {
		count[a.status]++
	}
	return count
}

// release lets one request of the upstream go.
func (p *pending) release(t *testing.T) {
	t.Helper()
	select {
	case p.let <- struct{}{}:
	case <-time.After(patience):
		t.Fatal("no request is at the upstream")
	}
}

// cancellable is a request that can be aborted.
type cancellable struct {
	abort func()
	ended chan error // what became of it
}

func cancellableGet(t *testing.T, client *http.Client, url string) *cancellable {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel)
	c := &cancellable{abort: cancel, ended: make(chan error, 1)}
	go func() {
		req, _ := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		res, err := client.Do(req)
		if err == nil {
			_, err = io.Copy(io.Discard, res.Body)
			res.Body.Close()
			if err == nil && res.StatusCode != http.StatusOK {
				err = fmt.Errorf("status %d", res.StatusCode)
			}
		}
		c.ended <- err
	}()
	return c
}

// end waits for the end and checks whether the request has succeeded.
func (c *cancellable) end(t *testing.T, succeeds bool) {
	t.Helper()
	select {
	case err := <-c.ended:
		if (err == nil) != succeeds {
			t.Errorf("ended with %v, want success: %v", err, succeeds)
		}
	case <-time.After(patience):
		t.Fatal("a request does not end")
	}
}

// builtPlaces has three places and a line before them.
const builtPlaces = `http://{addr} {
	ratelimit {
		zone built {
			key all
			inflight 3
			queue 200 10s
		}
	}
	reverse_proxy %s {
		flush_interval -1
	}
}`

// TestRatelimitBuiltCrowd: of a hundred clients at once the upstream never sees
// more than three, and all are served in the end.
func TestRatelimitBuiltCrowd(t *testing.T) {
	const clients = 100
	for protocol, client := range downstreams() {
		t.Run(protocol, func(t *testing.T) {
			p := startPending(t)
			_, l := startBuilt(t, fmt.Sprintf(builtPlaces, p.addr))
			t.Cleanup(client.CloseIdleConnections)
			done := crowdOf(t, clients, client, l.addr, "/slow")
			l.until(`inflight_requests{zone="built"} 3`)
			l.until(fmt.Sprintf(`waiting_requests{zone="built"} %d`, clients-3))
			if n := p.hits.Load(); n > 3 {
				t.Errorf("%d requests have reached the upstream while none has ended", n)
			}
			for range clients {
				p.await(t)
				p.release(t)
			}
			if got, want := statuses(<-done), map[int]int{200: clients}; !maps.Equal(got, want) {
				t.Errorf("answers by status: %v, want %v", got, want)
			}
			if most, hits := p.most.Load(), p.hits.Load(); most != 3 || hits != clients {
				t.Errorf("the upstream has seen %d requests, at most %d at once", hits, most)
			}
			l.until(`inflight_requests{zone="built"} 0`)
			l.until(`waiting_requests{zone="built"} 0`)
		})
	}
}

// TestRatelimitBuiltAborts: clients that leave free their places, at the
// upstream and in the line.
func TestRatelimitBuiltAborts(t *testing.T) {
	for protocol, client := range downstreams() {
		for _, path := range []string{"/slow", "/stream"} {
			t.Run(protocol+path, func(t *testing.T) {
				p := startPending(t)
				_, l := startBuilt(t, fmt.Sprintf(builtPlaces, p.addr))
				t.Cleanup(client.CloseIdleConnections)
				send := func(n int) (list []*cancellable) {
					for range n {
						list = append(list, cancellableGet(t, client, "http://"+l.addr+path))
					}
					return list
				}
				under := send(3)
				for range under {
					p.await(t)
				}
				waiting := send(4)
				l.until(`waiting_requests{zone="built"} 4`)
				for _, c := range waiting[:2] {
					c.abort()
					c.end(t, false)
				}
				l.until(`waiting_requests{zone="built"} 2`)
				l.until(`inflight_requests{zone="built"} 3`)
				for _, c := range under {
					c.abort()
					c.end(t, false)
				}
				for range waiting[2:] {
					p.await(t) // only now
				}
				l.until(`waiting_requests{zone="built"} 0`)
				l.until(`inflight_requests{zone="built"} 2`)
				for range waiting[2:] {
					p.release(t)
				}
				for _, c := range waiting[2:] {
					c.end(t, true)
				}
				l.until(`inflight_requests{zone="built"} 0`)
				// the upstream may notice later than the proxy that a client has left
				if hits := p.hits.Load(); hits != 5 {
					t.Errorf("the upstream has seen %d requests, want those of the five that did not leave the line", hits)
				}

				// a hundred, of which all leave
				crowd := send(100)
				l.until(`waiting_requests{zone="built"} 97`)
				for _, c := range crowd {
					c.abort()
				}
				for _, c := range crowd {
					c.end(t, false)
				}
				l.until(`waiting_requests{zone="built"} 0`)
				l.until(`inflight_requests{zone="built"} 0`)
				l.expect("127.0.0.1", "/quick", 200, 200, 200, 200)
			})
		}
	}
}

// TestRatelimitBuiltWebSocket: a WebSocket holds its place until it is closed,
// by whomever.
func TestRatelimitBuiltWebSocket(t *testing.T) {
	p := startPending(t)
	const goodbye = "bye!"
	sockets := rawServer(t, func(_ int, c *net.TCPConn) {
		br := bufio.NewReader(c)
		if readRequest(br) != nil {
			return
		}
		_, _ = io.WriteString(c, echoHandshake)
		for text := make([]byte, len(goodbye)); ; _, _ = c.Write(text) {
			if _, err := io.ReadFull(br, text); err != nil || string(text) == goodbye {
				return
			}
		}
	})
	config := `http://{addr} {
		ratelimit {
			zone sockets {
				key all
				inflight 4
			}
		}
		reverse_proxy /ws ` + sockets + `
		reverse_proxy ` + p.addr + `
	}`
	n, l := startBuilt(t, config)
	open := []net.Conn{l.upgrade("/ws"), l.upgrade("/ws"), l.upgrade("/ws"), l.upgrade("/ws")}
	l.until(`inflight_requests{zone="sockets"} 4`)
	res, _ := l.get("/quick")
	if res.StatusCode != 429 || res.Header.Get("Retry-After") != "" {
		t.Errorf("beside four sockets: %d, Retry-After %q; nobody knows when they end", res.StatusCode, res.Header.Get("Retry-After"))
	}
	for i, c := range open {
		_, _ = io.WriteString(c, "echo")
		text := make([]byte, 4)
		if _, err := io.ReadFull(c, text); err != nil || string(text) != "echo" {
			t.Errorf("socket %d: %q, %v", i, text, err)
		}
	}
	for _, way := range []struct {
		name  string
		close func(c net.Conn)
	}{
		{"by the client", func(c net.Conn) { _ = c.Close() }},
		{"with a reset", func(c net.Conn) { cut(c.(*net.TCPConn)) }},
		{"by the server", func(c net.Conn) {
			_, _ = io.WriteString(c, goodbye)
			_, _ = io.Copy(io.Discard, c)
			_ = c.Close() // Caddy hands on the half-close, and waits for the other half
		}},
		{"by a reload", func(net.Conn) {
			n.load(strings.Replace(config, "reverse_proxy /ws", "header X-Generation 2\nreverse_proxy /ws", 1))
		}},
	} {
		way.close(open[0])
		open = open[1:]
		l.until(fmt.Sprintf(`inflight_requests{zone="sockets"} %d`, len(open)))
		l.expect("127.0.0.1", "/quick", 200)
		l.until(fmt.Sprintf(`inflight_requests{zone="sockets"} %d`, len(open)))
		if t.Failed() {
			t.Fatalf("closed %s", way.name)
		}
	}
}

// TestRatelimitBuiltRate: of a hundred clients at once exactly twenty pass.
func TestRatelimitBuiltRate(t *testing.T) {
	u := serve(t, "h1", hello)
	zone := func(name, algorithm string) string {
		return fmt.Sprintf("zone %s {\nmatch path /%[1]s\nkey all\nrate 20 1h\nalgorithm %s\n}\n", name, algorithm)
	}
	least := map[string]int{"window-h1": 3590, "window-h2c": 3590, "bucket-h1": 170, "bucket-h2c": 170}
	var zones strings.Builder
	for _, name := range slices.Sorted(maps.Keys(least)) {
		algorithm := "sliding_window"
		if strings.HasPrefix(name, "bucket") {
			algorithm = "token_bucket"
		}
		zones.WriteString(zone(name, algorithm))
	}
	_, l := startBuilt(t, "http://{addr} {\nratelimit {\n"+zones.String()+"}\nreverse_proxy "+u.addr+"\n}")
	for name, seconds := range least {
		t.Run(name, func(t *testing.T) {
			before := u.hits.Load()
			_, protocol, _ := strings.Cut(name, "-")
			client := downstreams()[protocol]
			defer client.CloseIdleConnections()
			answers := <-crowdOf(t, 100, client, l.addr, "/"+name)
			if got, want := statuses(answers), map[int]int{200: 20, 429: 80}; !maps.Equal(got, want) {
				t.Errorf("answers by status: %v, want %v", got, want)
			}
			if n := u.hits.Load() - before; n != 20 {
				t.Errorf("%d requests have reached the upstream", n)
			}
			for _, a := range answers {
				if wait, err := strconv.Atoi(a.header.Get("Retry-After")); a.status == 429 && (err != nil || wait < seconds || wait > 3604) {
					t.Errorf("Retry-After %q", a.header.Get("Retry-After"))
				}
			}
			l.until(fmt.Sprintf(`decisions_total{decision="allowed",zone=%q} 20`, name))
			l.until(fmt.Sprintf(`refusals_total{reason="rate",zone=%q} 80`, name))
		})
	}
}

// TestRatelimitBuiltPenalty: a key over its limit is blocked, longer with every
// request, until an operator forgives it.
func TestRatelimitBuiltPenalty(t *testing.T) {
	for _, algorithm := range []string{"sliding_window", "token_bucket"} {
		t.Run(algorithm, func(t *testing.T) {
			_, l := startBuilt(t, `http://{addr} {
				ratelimit {
					zone strict {
						key client
						rate 2 1m
						algorithm `+algorithm+`
						penalty 10m
					}
				}
				respond ok
				handle_errors {
					respond "{http.ratelimit.reason}" {err.status_code}
				}
			}`)
			client := "192.0.2.1"
			l.expect(client, "/", 200, 200)
			last := 0
			for i, want := range []string{"rate", "penalty", "penalty", "penalty"} {
				res, reason := l.get("/", "X-Forwarded-For", client)
				seconds, err := strconv.Atoi(res.Header.Get("Retry-After"))
				if res.StatusCode != 429 || reason != want || err != nil || seconds < max(last, 600) || seconds > 601 {
					t.Errorf("refusal %d: %d %q, Retry-After %q after %d", i+1, res.StatusCode, reason, res.Header.Get("Retry-After"), last)
				}
				last = seconds
			}
			l.expect("192.0.2.2", "/", 200)
			state := func(verb string) (blocked, used float64) {
				t.Helper()
				status, text := l.ask("POST", "strict/"+verb, `{"key":"`+client+`"}`)
				var views []map[string]any
				if err := json.Unmarshal([]byte(text), &views); status != 200 || err != nil || len(views) != 1 {
					t.Fatalf("%s: %d %s", verb, status, text)
				}
				blocked, _ = views[0]["blocked_seconds"].(float64)
				used, _ = views[0]["used"].(float64)
				return blocked, used
			}
			if blocked, used := state("inspect"); blocked < 580 || blocked > 600 || used != 2 {
				t.Errorf("blocked for %v s, used %v", blocked, used)
			}
			if blocked, used := state("forgive"); blocked != 0 || used != 0 {
				t.Errorf("after forgiving: blocked for %v s, used %v", blocked, used)
			}
			l.expect(client, "/", 200, 200, 429)
			l.expect("192.0.2.2", "/", 200, 429)
		})
	}
}

// TestRatelimitBuiltCost: a request is as many events as it costs.
func TestRatelimitBuiltCost(t *testing.T) {
	_, l := startBuilt(t, `http://{addr} {
		ratelimit /told {
			headers legacy
			zone told {
				key client
				rate 10 1h
				cost {http.request.header.X-Cost}
			}
		}
		ratelimit /fixed {
			headers legacy
			zone fixed {
				key client
				rate 10 1h
				cost 4
			}
		}
		ratelimit /free {
			zone free {
				key client
				rate 1 1h
				cost 0
			}
		}
		respond ok
	}`)
	for i, c := range []struct {
		path, client, cost string
		status             int
		remaining          string
	}{
		{"/told", "192.0.2.1", "4", 200, "6"},
		{"/told", "192.0.2.1", "3.2", 200, "2"}, // rounded up
		{"/told", "192.0.2.1", "3", 429, "2"},
		{"/told", "192.0.2.1", "0", 200, "2"},
		{"/told", "192.0.2.1", "2", 200, "0"},
		{"/told", "192.0.2.1", "1", 429, "0"},
		{"/told", "192.0.2.1", "0", 200, "0"},
		{"/told", "192.0.2.2", "11", 429, "10"}, // never
		{"/told", "192.0.2.2", "1e99", 429, "10"},
		{"/told", "192.0.2.2", "10", 200, "0"},
		{"/told", "192.0.2.3", "", 200, "9"}, // no number: one event
		{"/told", "192.0.2.3", "-5", 200, "8"},
		{"/told", "192.0.2.3", "NaN", 200, "7"},
		{"/told", "192.0.2.3", "{http.request.uri}", 200, "6"},
		{"/fixed", "192.0.2.1", "0", 200, "6"},
		{"/fixed", "192.0.2.1", "0", 200, "2"},
		{"/fixed", "192.0.2.1", "0", 429, "2"},
		{"/free", "192.0.2.1", "", 200, ""},
		{"/free", "192.0.2.1", "", 200, ""},
	} {
		res, _ := l.get(c.path, "X-Forwarded-For", c.client, "X-Cost", c.cost)
		if remaining := res.Header.Get("X-RateLimit-Remaining"); res.StatusCode != c.status || remaining != c.remaining {
			t.Errorf("request %d, %+v: %d, %q remain", i+1, c, res.StatusCode, remaining)
		}
	}
	l.logs.await(t, "line of a cost that is no number", 1, func(e entry) bool {
		return strings.HasPrefix(e.text("msg"), "the cost of a request is not a number") && e.text("zone") == "told"
	})
}
