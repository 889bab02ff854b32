// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"bufio"
	"bytes"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// The client and the upstream share the process and the processors with the
// proxy. So both are bare TCP and allocate nothing per request: allocs/op and
// nearly all of the user time are the proxy's.

const bodySize = 1 << 10

// realUpstream makes the upstream a server of net/http instead, as a service
// behind a proxy would be.
var realUpstream = flag.Bool("real-upstream", false, "use an upstream of net/http instead of a bare one")

// listenUpstream answers every request with the same response.
func listenUpstream(tb testing.TB) string {
	tb.Helper()
	if *realUpstream {
		body := []byte(strings.Repeat("x", bodySize))
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/plain")
			_, _ = w.Write(body)
		}))
		tb.Cleanup(srv.Close)
		return srv.Listener.Addr().String()
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = l.Close() })
	response := []byte("HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: " + strconv.Itoa(bodySize) +
		"\r\n\r\n" + strings.Repeat("x", bodySize))
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go answer(c, response)
		}
	}()
	return l.Addr().String()
}

// answer serves a connection. Its requests have no body and come one by one.
func answer(c net.Conn, response []byte) {
	defer c.Close()
	buf := make([]byte, 4<<10)
	n := 0
	for n < len(buf) {
		m, err := c.Read(buf[n:])
		if err != nil {
			return
		}
		if n += m; !bytes.HasSuffix(buf[:n], []byte("\r\n\r\n")) {
			continue
		}
		n = 0
		if _, err := c.Write(response); err != nil {
			return
		}
	}
}

// client is a kept-alive connection to a site.
type client struct {
	net.Conn
	r       *bufio.Reader
	request []byte
	key     []byte // the digits of X-Key in the request, if it has one
	status  []byte // the beginning of the response
	size    int    // of its body; -1: any
}

var contentLength = []byte("Content-Length: ")

// get sends a request and reads its response.
func (c *client) get() error {
	for i, n := 0, rand.Uint32N(1_000_000); i < len(c.key); i++ {
		c.key[i] = '0' + byte(n%10)
		n /= 10
	}
	if _, err := c.Write(c.request); err != nil {
		return err
	}
	line, err := c.r.ReadSlice('\n')
	if err != nil {
		return err
	}
	if !bytes.HasPrefix(line, c.status) {
		return fmt.Errorf("got %q", line)
	}
	length := -1
	for len(line) > len("\r\n") {
		if line, err = c.r.ReadSlice('\n'); err != nil {
			return err
		}
		if value, ok := bytes.CutPrefix(line, contentLength); ok {
			length = 0
			for _, digit := range bytes.TrimSpace(value) {
				length = length*10 + int(digit-'0')
			}
		}
	}
	if length < 0 || c.size >= 0 && length != c.size {
		return errors.New("got a response without the body")
	}
	_, err = c.r.Discard(length)
	return err
}

func newSite(v variant, addr string) *site {
	if v.status == 0 {
		v.status = http.StatusOK
	}
	return &site{variant: v, addr: addr, idle: make(chan *client, 64)}
}

const requestHead = "GET /path?query=1 HTTP/1.1\r\nHost: bench.test\r\nUser-Agent: bench\r\nAccept: */*\r\n"

// take returns an idle connection to the site, or a new one.
func (s *site) take() (*client, error) {
	select {
	case c := <-s.idle:
		return c, nil
	default:
	}
	conn, err := net.Dial("tcp", s.addr)
	if err != nil {
		return nil, err
	}
	c := &client{
		Conn: conn, r: bufio.NewReader(conn), request: []byte(requestHead + "\r\n"),
		status: fmt.Appendf(nil, "HTTP/1.1 %d ", s.status), size: bodySize,
	}
	if s.answer != "" {
		c.size = -1
	}
	if s.keys {
		c.request = []byte(requestHead + "X-Key: 000000\r\n\r\n")
		end := len(c.request) - len("\r\n\r\n")
		c.key = c.request[end-6 : end]
	}
	return c, nil
}

// give takes a connection back.
func (s *site) give(c *client) { s.idle <- c }

func (s *site) close() {
	for {
		select {
		case c := <-s.idle:
			_ = c.Close()
		default:
			return
		}
	}
}

// slice is what came through in a stretch of load.
type slice struct {
	requests int64
	wall     time.Duration
	cpu      time.Duration // of the process; 0 where it is not known
}

// perSecond is the throughput.
func (s slice) perSecond() float64 { return float64(s.requests) / s.wall.Seconds() }

// cpuPerRequest is the processor time of a request, client and upstream included.
func (s slice) cpuPerRequest() float64 { return float64(s.cpu) / float64(s.requests) }

// load sends requests for a while, over as many connections as there are processors.
func (s *site) load(tb testing.TB, d time.Duration) slice {
	tb.Helper()
	var (
		wg       sync.WaitGroup
		stop     atomic.Bool
		requests atomic.Int64
		clients  = make([]*client, runtime.GOMAXPROCS(0))
	)
	for i := range clients {
		c, err := s.take()
		if err != nil {
			tb.Fatal(err)
		}
		clients[i] = c
	}
	start, cpu := time.Now(), cpuTime()
	for _, c := range clients {
		wg.Go(func() {
			var n int64
			for !stop.Load() {
				if err := c.get(); err != nil {
					tb.Errorf("%s: %v", s.name, err)
					break
				}
				n++
			}
			requests.Add(n)
		})
	}
	time.Sleep(d)
	stop.Store(true)
	wg.Wait()
	result := slice{requests: requests.Load(), wall: time.Since(start), cpu: cpuTime() - cpu}
	if tb.Failed() {
		tb.FailNow()
	}
	for _, c := range clients {
		s.give(c)
	}
	return result
}
