// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"crypto/sha256"
	"fmt"
	"maps"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddy-gatehouse/gatehouse/internal/redistest"
)

// unhurried is a deadline that Redis misses only when it does not answer at
// all, however busy the machine is.
const unhurried = "deadline 10s"

// redisSite is a site with one zone z and a store.
func redisSite(addr, upstream, zone string, options ...string) string {
	then := "respond ok"
	if upstream != "" {
		then = "reverse_proxy " + upstream
	}
	return fmt.Sprintf(`http://{addr} {
		ratelimit {
			zone z {
				%s
				store redis {
					address %s
					max_memory 4MiB
					%s
				}
			}
		}
		%s
	}`, zone, addr, strings.Join(options, "\n"), then)
}

const byHeader = "key {http.request.header.X-Api-Key}\n"

// as sends a request with an API key.
func (n *node) as(key string) *answer {
	n.t.Helper()
	return n.get("/", "X-Api-Key", key)
}

// expectAs sends a request with an API key for each of the statuses.
func (n *node) expectAs(key string, statuses ...int) {
	n.t.Helper()
	for i, want := range statuses {
		if got := n.as(key).status; got != want {
			n.t.Errorf("request %d with key %s: status %d, want %d", i+1, key, got, want)
		}
	}
}

// redisKeys are the names of what Redis keeps for an API key.
func redisKeys(server *redistest.Server, key string) []string {
	return strings.Fields(server.CLI("--raw", "keys", fmt.Sprintf("gatehouse:ratelimit:*%x*", sha256.Sum256([]byte(key)))))
}

const (
	storeAway     = `ratelimit_store_away{zone="z"}`
	storeFailures = `ratelimit_store_failures_total{zone="z"}`
)

// state asks the admin endpoint what is counted for a key, level by level.
func (n *node) state(verb, body string) []keyState {
	n.t.Helper()
	return parse[[]keyState](n.t, n.do(http.MethodPost, n.admin, "/gatehouse/ratelimit/z/"+verb, body))
}

type keyState struct {
	Level    int  `json:"level"`
	Exact    bool `json:"exact"`
	Used     int  `json:"used"`
	Limit    int  `json:"limit"`
	Inflight int  `json:"inflight"`
}

// TestRatelimitRedisThreeNodes: three processes admit together exactly the limit.
func TestRatelimitRedisThreeNodes(t *testing.T) {
	for algorithm, least := range map[string]int{"sliding_window": 3000, "token_bucket": 1} {
		t.Run(algorithm, func(t *testing.T) {
			server := redistest.Start(t)
			u := serve(t, "h1", hello)
			var nodes []*node
			for range 3 {
				nodes = append(nodes, startNode(t, redisSite(server.Addr, u.addr, byHeader+"rate 60 1h\nalgorithm "+algorithm, unhurried)))
			}
			const clients, each = 100, 3
			answers := make(chan *answer, clients*each)
			begin := make(chan struct{})
			var wg sync.WaitGroup
			for c := range clients {
				wg.Go(func() {
					<-begin
					for r := range each {
						n := nodes[(c+r)%len(nodes)]
						a, err := ask(n.client, http.MethodGet, n.addr, "/", "", "X-Api-Key", "one")
						if err != nil {
							t.Error(err)
							continue
						}
						answers <- a
					}
				})
			}
			close(begin)
			wg.Wait()
			close(answers)
			statuses := make(map[int]int)
			for a := range answers {
				statuses[a.status]++
				if a.status != 429 {
					continue
				}
				if seconds, err := strconv.Atoi(a.header.Get("Retry-After")); err != nil || seconds < least || seconds > 3700 {
					t.Errorf("Retry-After %q", a.header.Get("Retry-After"))
				}
			}
			if want := map[int]int{200: 60, 429: clients*each - 60}; !maps.Equal(statuses, want) {
				t.Errorf("answers by status: %v, want %v", statuses, want)
			}
			if hits := u.hits.Load(); hits != 60 {
				t.Errorf("%d requests reached the upstream", hits)
			}
			for _, n := range nodes {
				if failures := n.metric(storeFailures); failures != 0 {
					t.Errorf("%v decisions were made without Redis", failures)
				}
				n.expectAs("one", 429)
				n.expectAs("another", 200)
			}
		})
	}
}

// holding is three processes before an upstream whose requests stay until they
// are let go, and requests with one key.
type holding struct {
	t        *testing.T
	server   *redistest.Server
	upstream *pending
	nodes    []*node
	statuses chan int
}

func startHolding(t *testing.T, lease string) *holding {
	t.Helper()
	h := &holding{t: t, server: redistest.Start(t), upstream: startPending(t), statuses: make(chan int, 100)}
	for range 3 {
		h.nodes = append(h.nodes, startNode(t, redisSite(h.server.Addr, h.upstream.addr, byHeader+"inflight 3", unhurried, lease)))
	}
	return h
}

// send sends a request whose status await gets, or 0 if it has no answer.
func (h *holding) send(n *node) {
	go func() {
		a, err := ask(n.client, http.MethodGet, n.addr, "/", "", "X-Api-Key", "one")
		if err != nil {
			a = new(answer)
		}
		h.statuses <- a.status
	}()
}

func (h *holding) await(want ...int) {
	h.t.Helper()
	for i, want := range want {
		select {
		case got := <-h.statuses:
			if got != want {
				h.t.Errorf("answer %d: %d, want %d", i+1, got, want)
			}
		case <-time.After(patience):
			h.t.Fatalf("no answer %d", i+1)
		}
	}
}

// enter sends requests until one of them reaches the upstream.
func (h *holding) enter(n *node) {
	h.t.Helper()
	eventually(h.t, "there is a place", func() bool {
		h.send(n)
		select {
		case <-h.upstream.came:
			return true
		case got := <-h.statuses:
			if got != 429 {
				h.t.Errorf("status %d before there is a place", got)
			}
			return false
		case <-time.After(patience):
			h.t.Fatal("no answer")
			return false
		}
	})
}

// let lets requests go that are with the upstream.
func (h *holding) let(requests int) {
	h.t.Helper()
	for range requests {
		select {
		case h.upstream.let <- struct{}{}:
		case <-time.After(patience):
			h.t.Fatal("nothing is with the upstream")
		}
	}
}

// inflight is what the last process sees of all of them.
func (h *holding) inflight() int {
	h.t.Helper()
	return h.nodes[2].state("inspect", `{"key":"one"}`)[0].Inflight
}

// finish checks what holds at the end.
func (h *holding) finish(alive []*node) {
	h.t.Helper()
	eventually(h.t, "nothing is in flight", func() bool { return h.inflight() == 0 })
	if most := h.upstream.most.Load(); most != 3 {
		h.t.Errorf("the upstream saw %d requests at once", most)
	}
	for _, n := range alive {
		if failures := n.metric(storeFailures); failures != 0 {
			h.t.Errorf("%v decisions were made without Redis", failures)
		}
	}
}

// TestRatelimitRedisInflight: three processes hold together at most three requests.
func TestRatelimitRedisInflight(t *testing.T) {
	h := startHolding(t, "lease 1h") // no place comes free because it runs out
	for range 10 {
		for _, n := range h.nodes {
			h.send(n)
		}
	}
	h.await(repeat(27, 429)...)
	h.let(3)
	h.await(200, 200, 200)
	for range 3 {
		h.upstream.await(t)
	}
	h.enter(h.nodes[2])
	h.let(1)
	h.await(200)

	// many come and go
	churned := make(chan struct{})
	var feeder, churn sync.WaitGroup
	feeder.Go(func() {
		for {
			select {
			case h.upstream.let <- struct{}{}:
			case <-churned:
				return
			}
		}
	})
	const clients, each = 12, 25
	passed := make(chan bool, clients*each)
	for c := range clients {
		churn.Go(func() {
			for range each {
				n := h.nodes[c%len(h.nodes)]
				a, err := ask(n.client, http.MethodGet, n.addr, "/", "", "X-Api-Key", "one")
				if err != nil || a.status != 200 && a.status != 429 {
					t.Errorf("%v, %+v", err, a)
					return
				}
				passed <- a.status == 200
			}
		})
	}
	churn.Wait()
	close(churned)
	feeder.Wait()
	close(passed)
	through := 0
	for ok := range passed {
		if ok {
			through++
		}
	}
	if through < 4 {
		t.Errorf("only %d requests passed", through)
	}
	h.finish(h.nodes)
}

// TestRatelimitRedisNodeKilled: what a process held that was killed comes
// free, what others hold does not.
func TestRatelimitRedisNodeKilled(t *testing.T) {
	const lease = 2 * time.Second
	h := startHolding(t, "lease "+lease.String())
	h.enter(h.nodes[0])
	h.enter(h.nodes[0])
	h.enter(h.nodes[1])
	for _, n := range h.nodes {
		n.expectAs("one", 429)
	}
	if got := h.inflight(); got != 3 {
		t.Errorf("%d in flight", got)
	}
	h.nodes[0].kill()
	h.await(0, 0)
	eventually(t, "the leases have run out", func() bool { return h.inflight() == 1 })
	h.enter(h.nodes[2])
	h.enter(h.nodes[2])
	h.nodes[1].expectAs("one", 429)

	keys := redisKeys(h.server, "one")
	if len(keys) != 1 {
		t.Fatalf("Redis keeps %q", keys)
	}
	// by the clock of Redis, all three last until a time that is more than one lease away
	runOut := func(earliest bool) (at float64) {
		for i, word := range strings.Fields(h.server.CLI("zrange", keys[0], "0", "-1", "withscores")) {
			score, err := strconv.ParseFloat(word, 64)
			if i%2 == 1 && err == nil && (at == 0 || earliest == (score < at)) {
				at = score
			}
		}
		return at
	}
	latest := runOut(false)
	eventually(t, "leases were renewed for longer than they last", func() bool {
		return runOut(true) > latest+float64(lease.Microseconds())
	})
	if got := h.inflight(); got != 3 {
		t.Errorf("%d in flight after that", got)
	}
	h.nodes[1].expectAs("one", 429)
	h.let(3)
	h.await(200, 200, 200)
	h.finish(h.nodes[1:])
}

// flow is requests that keep coming, each with a key of its own.
type flow struct {
	stop func()

	mu       sync.Mutex
	statuses map[int]int
	slowest  time.Duration
}

// flow sends requests to the node until the test ends, or stop is called. Those
// without an answer are repeated up to so many times.
func (n *node) flow(repeats int) *flow {
	f := &flow{statuses: make(map[int]int)}
	done := make(chan struct{})
	var wg sync.WaitGroup
	for worker := range 4 {
		wg.Go(func() {
			pace := time.NewTicker(5 * time.Millisecond)
			defer pace.Stop()
			for i := 0; ; i++ {
				select {
				case <-pace.C:
				case <-done:
					return
				}
				begun := time.Now()
				key := fmt.Sprintf("flow %d %d", worker, i)
				a, err := ask(n.client, http.MethodGet, n.addr, "/flow", "", "X-Api-Key", key)
				for tries := 0; err != nil && tries < repeats; tries++ {
					a, err = ask(n.client, http.MethodGet, n.addr, "/flow", "", "X-Api-Key", key)
				}
				if err != nil {
					n.t.Errorf("a request of the flow: %v", err)
					return
				}
				f.mu.Lock()
				f.statuses[a.status]++
				f.slowest = max(f.slowest, time.Since(begun))
				f.mu.Unlock()
			}
		})
	}
	f.stop = sync.OnceFunc(func() { close(done); wg.Wait() })
	n.t.Cleanup(f.stop)
	return f
}

// count is how many requests had an answer with the status.
func (f *flow) count(status int) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.statuses[status]
}

// await waits until more requests had an answer with the status.
func (f *flow) await(t *testing.T, status, more int) {
	t.Helper()
	want := f.count(status) + more
	eventually(t, fmt.Sprintf("%d more requests have had the answer %d", more, status), func() bool { return f.count(status) >= want })
}

// TestRatelimitRedisOutages takes Redis away from a process under load, in
// every way and under every policy, and brings it back.
func TestRatelimitRedisOutages(t *testing.T) {
	outages := []struct {
		name        string
		stop, start func(s *redistest.Server)
		empty       bool // Redis has lost what it has counted
		requests    int  // while it is away
	}{
		{"stopped", (*redistest.Server).Pause, (*redistest.Server).Resume, false, 20},
		{
			"paused", func(s *redistest.Server) { s.CLI("client", "pause", "600000", "WRITE") },
			func(s *redistest.Server) { s.CLI("client", "unpause") }, false, 20,
		},
		// at their pace these take two seconds or more, in which Redis is probed in vain
		{"killed", (*redistest.Server).Kill, (*redistest.Server).Restart, true, 1600},
	}
	const deadline, slack = time.Second, 5 * time.Second
	for policy, away := range map[string]int{"local": 200, "open": 200, "closed": 503} {
		t.Run(policy, func(t *testing.T) {
			t.Parallel()
			server := redistest.Start(t)
			n := startNode(t, redisSite(server.Addr, "", byHeader+"rate 3 1h", "on_failure "+policy, "deadline "+deadline.String()))
			f := n.flow(0)
			f.await(t, 200, 20)
			said := func(times int) {
				t.Helper()
				n.logs.await(t, "line that Redis is back", times, message("Redis is back"))
				for _, text := range []string{"Redis is away; on_failure", "Redis is back"} {
					if lines := n.logs.find(message(text)); len(lines) != times {
						t.Errorf("after outage %d the log has: %v", times, lines)
					}
				}
			}
			for i, outage := range outages {
				if value := n.metric(storeAway); value != 0 {
					t.Errorf("before it is %s: %s is %v", outage.name, storeAway, value)
				}
				key := outage.name
				n.expectAs(key, 200, 200)

				outage.stop(server)
				eventually(t, "the metric says that Redis is away", func() bool { return n.metric(storeAway) == 1 })
				switch policy {
				case "local": // no fresh budget
					n.expectAs(key, 200, 429, 429)
					n.expectAs(key+" alone", 200, 200, 200, 429)
				case "open":
					n.expectAs(key, 200, 200, 200, 200)
				default:
					n.expectAs(key, 503, 503, 503, 503)
				}
				f.await(t, away, outage.requests)
				if value := n.metric(storeAway); value != 1 {
					t.Errorf("while it is %s: %s is %v", outage.name, storeAway, value)
				}

				outage.start(server)
				eventually(t, "the metric says that Redis is back", func() bool { return n.metric(storeAway) == 0 })
				said(i + 1)
				failures := n.metric(storeFailures)
				if outage.empty {
					n.expectAs(key, 200, 200, 200, 429)
				} else {
					n.expectAs(key, 200, 429)
				}
				f.await(t, 200, 20)
				if more := n.metric(storeFailures) - failures; more != 0 {
					t.Errorf("%v decisions were made without Redis when it was back", more)
				}
				if len(redisKeys(server, key)) == 0 {
					t.Error("Redis has not counted")
				}
			}
			server.Restart() // which a request may notice or not
			f.await(t, 200, 20)
			eventually(t, "Redis decides", func() bool {
				before := n.metric(storeFailures)
				n.as("at last")
				return n.metric(storeAway) == 0 && n.metric(storeFailures) == before && len(redisKeys(server, "at last")) > 0
			})
			f.stop()
			for status, count := range f.statuses {
				if status != 200 && status != away {
					t.Errorf("%d answers have the status %d", count, status)
				}
			}
			if f.slowest > deadline+slack {
				t.Errorf("a request took %v", f.slowest)
			}
		})
	}
}

// TestRatelimitRedisAbsent starts two processes before their Redis.
func TestRatelimitRedisAbsent(t *testing.T) {
	addr := redistest.Free(t)
	config := redisSite(addr, "", byHeader+"rate 3 1h", unhurried)
	a, b := startNode(t, config), startNode(t, config)
	for _, n := range []*node{a, b} {
		n.expectAs("alone", 200, 200, 200, 429)
		e := n.logs.await(t, "warning", 1, message("Redis is away"))
		if e.text("level") != "warn" || e.text("reason") != "connection refused" || !strings.Contains(fmt.Sprint(e["address"]), addr) {
			t.Errorf("%v", e)
		}
		if value := n.metric(storeAway); value != 1 {
			t.Errorf("%s is %v", storeAway, value)
		}
	}
	redistest.StartAt(t, addr)
	for _, n := range []*node{a, b} {
		eventually(t, "Redis is there", func() bool { return n.metric(storeAway) == 0 })
	}
	a.expectAs("together", 200, 200)
	b.expectAs("together", 200, 429)
	a.expectAs("together", 429)
}

// TestRatelimitRedisWrongPassword: the log names it, requests are served, and
// it can be mended where Redis runs.
func TestRatelimitRedisWrongPassword(t *testing.T) {
	const secret = "horse-battery-staple"
	server := redistest.Start(t, "--requirepass", "correct")
	n := startNode(t, redisSite(server.Addr, "", byHeader+"rate 3 1h", unhurried, "password "+secret))
	n.expectAs("alone", 200, 200, 200, 429)
	if e := n.logs.await(t, "warning", 1, message("Redis is away")); e.text("reason") != "wrong password" {
		t.Errorf("%v", e)
	}
	server.Authenticate("correct")
	server.CLI("config", "set", "requirepass", secret)
	server.Authenticate(secret)
	n.logs.await(t, "line that Redis is back", 1, message("Redis is back"))
	n.expectAs("alone", 200)
	if len(redisKeys(server, "alone")) == 0 {
		t.Error("Redis has not counted")
	}
	if strings.Contains(n.output.String(), secret) {
		t.Error("the log has the password")
	}
}

// TestRatelimitRedisLogin counts failed logins of addresses and their networks
// over two processes; each can look at and forgive what the other has counted.
func TestRatelimitRedisLogin(t *testing.T) {
	server := redistest.Start(t)
	u := serve(t, "h1", func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/bad" {
			w.WriteHeader(401)
		}
	})
	config := redisSite(server.Addr, u.addr, `key client
		key client {
			ipv4_prefix 24
			times 2
		}
		rate 3 1h
		count_when status 401`, unhurried)
	a, b := startNode(t, config), startNode(t, config)
	login := func(n *node, client, path string, statuses ...int) {
		t.Helper()
		for i, want := range statuses {
			if got := n.get(path, "X-Forwarded-For", client).status; got != want {
				t.Errorf("login %d of %s: %d, want %d", i+1, client, got, want)
			}
		}
	}
	// used is what a node sees of a client and its network; what is given back
	// reaches Redis a moment after the response.
	used := func(n *node, client string, want ...int) {
		t.Helper()
		var states []keyState
		for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(time.Millisecond) {
			states = n.state("inspect", `{"key":"`+client+`"}`)
			if len(states) == 2 && states[0].Used == want[0] && states[1].Used == want[1] {
				break
			}
		}
		if want := []keyState{{0, true, want[0], 3, 0}, {1, true, want[1], 6, 0}}; fmt.Sprint(states) != fmt.Sprint(want) {
			t.Fatalf("%s: %+v, want %+v", client, states, want)
		}
	}
	forgive := func(n *node, client string, level int) {
		t.Helper()
		n.state("forgive", fmt.Sprintf(`{"key":%q,"level":%d}`, client, level))
	}
	for range 4 { // good ones don't count
		login(a, "192.0.2.1", "/good", 200)
		used(b, "192.0.2.1", 0, 0)
	}
	login(a, "192.0.2.1", "/bad", 401, 401)
	login(b, "192.0.2.1", "/bad", 401, 429)
	login(a, "192.0.2.1", "/good", 429)
	used(a, "192.0.2.1", 3, 3)
	used(b, "192.0.2.1", 3, 3)
	used(b, "192.0.2.2", 0, 3)
	login(b, "192.0.2.2", "/bad", 401, 401, 401)
	login(a, "192.0.2.3", "/bad", 429) // the network has had six
	login(a, "192.0.3.3", "/bad", 401)

	forgive(b, "192.0.2.1", 0)
	used(a, "192.0.2.1", 0, 6)
	login(a, "192.0.2.1", "/bad", 429) // still the network
	forgive(b, "192.0.2.1", 1)
	used(a, "192.0.2.1", 0, 0)
	login(a, "192.0.2.1", "/bad", 401, 401, 401, 429)
	login(b, "192.0.2.2", "/bad", 429) // its own three
	login(b, "192.0.2.3", "/bad", 401)
	used(a, "192.0.2.3", 1, 4)
	for _, n := range []*node{a, b} {
		if failures := n.metric(storeFailures); failures != 0 {
			t.Errorf("%v decisions were made without Redis", failures)
		}
	}
}

// spelled is a name with some of its letters in upper case, others for each n.
func spelled(name string, n int) string {
	letters := []byte(name)
	for i := range letters {
		if n>>i&1 == 1 {
			letters[i] -= 'a' - 'A'
		}
	}
	return string(letters)
}

// TestRatelimitRedisReload goes on counting over reloads under traffic,
// whether the zone, its store or the connection changes, and leaves nothing behind.
func TestRatelimitRedisReload(t *testing.T) {
	server := redistest.Start(t)
	config := func(i int) string {
		address, policy := server.Addr, "local"
		switch i % 3 {
		case 1:
			policy = "closed" // counters of their own
		case 2:
			address = spelled("localhost", i) + ":" + server.Port // and a connection
		}
		return fmt.Sprintf("%s\n# %d", redisSite(address, "", byHeader+"rate 30 1h", unhurried, "on_failure "+policy), i)
	}
	n := startNode(t, config(0))
	for i := range 4 {
		n.load(config(i))
	}
	n.as("warm")
	before := n.goroutines()
	f := n.flow(5)
	var got []int
	for i := range 20 {
		n.load(config(i))
		f.await(t, 200, 20)
		got = append(got, n.as("one").status, n.as("one").status)
	}
	if want := append(repeat(30, 200), repeat(10, 429)...); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("two requests after each reload: %v", got)
	}
	f.stop()
	if statuses := fmt.Sprint(f.statuses); len(f.statuses) != 1 || f.count(200) == 0 {
		t.Errorf("answers by status: %s", statuses)
	}
	var after int
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if after = n.goroutines(); after <= before+5 {
			break
		}
	}
	if after > before+5 {
		t.Errorf("%d goroutines, %d before 20 reloads\n%s", after, before, n.do(http.MethodGet, n.admin, "/debug/pprof/goroutine?debug=1", "").body)
	}
	if lines := n.logs.find(message("Redis is away")); len(lines) != 0 {
		t.Errorf("%v", lines)
	}
	connections := func() int { return strings.Count(server.CLI("client", "list"), "name=gatehouse-ratelimit") }
	eventually(t, "one connection to Redis is left", func() bool { return connections() == 1 })
}
