// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"bufio"
	"crypto/sha1"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// streamSite has everything in the way that a response can meet.
const streamSite = `http://{addr} {
	log
	encode
	hooks {
		connection
		all_phases x
		on_error {
			page status 4xx 5xx {
				html
			}
			page origin 5xx {
				html
			}
		}
	}
	%s
}`

// h2c makes the site speak HTTP/2 without TLS, too.
const h2c = `servers {
	protocols h1 h2c
}`

// downstreams are the protocols on the client's side.
func downstreams() map[string]*http.Client {
	h2 := new(http.Protocols)
	h2.SetUnencryptedHTTP2(true)
	return map[string]*http.Client{
		"h1":  {Transport: &http.Transport{DisableKeepAlives: true}, Timeout: patience},
		"h2c": {Transport: &http.Transport{Protocols: h2, DisableCompression: true}, Timeout: patience},
	}
}

func TestServerSentEvents(t *testing.T) {
	next := make(chan struct{})
	u := serve(t, "h1", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		for i := range 3 {
			fmt.Fprintf(w, "data: %d\n\n", i)
			_ = http.NewResponseController(w).Flush()
			select {
			case <-next:
			case <-r.Context().Done():
				return
			}
		}
	})
	s := start(t, fmt.Sprintf(streamSite, `reverse_proxy `+u.addr+` {
		transport hooks
	}`), h2c)
	for name, client := range downstreams() {
		t.Run(name, func(t *testing.T) {
			res, err := client.Get("http://" + s.addr + "/x")
			if err != nil {
				t.Fatal(err)
			}
			defer res.Body.Close()
			br := bufio.NewReader(res.Body)
			for i := range 3 {
				// the next event is made only when this one has arrived
				line, err := br.ReadString('\n')
				if err != nil || line != fmt.Sprintf("data: %d\n", i) {
					t.Fatalf("event %d: %q, %v", i, line, err)
				}
				_, _ = br.ReadString('\n')
				next <- struct{}{}
			}
			if rest, err := io.ReadAll(br); err != nil || len(rest) > 0 {
				t.Errorf("rest %q, %v", rest, err)
			}
		})
	}
}

func TestWebSocket(t *testing.T) {
	u := serve(t, "h1", func(w http.ResponseWriter, r *http.Request) {
		sum := sha1.Sum([]byte(r.Header.Get("Sec-WebSocket-Key") + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
		w.Header().Set("Upgrade", "websocket")
		w.Header().Set("Connection", "Upgrade")
		w.Header().Set("Sec-WebSocket-Accept", base64.StdEncoding.EncodeToString(sum[:]))
		w.WriteHeader(http.StatusSwitchingProtocols)
		c, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return
		}
		defer c.Close()
		// an echo that says goodbye when the client's side is closed
		_, _ = io.Copy(c, rw)
		_, _ = io.WriteString(c, "bye")
	})
	for _, transport := range []string{"hooks", "http"} {
		t.Run(transport, func(t *testing.T) {
			s := start(t, fmt.Sprintf(streamSite, `reverse_proxy `+u.addr+` {
				transport `+transport+`
			}`))
			c, err := net.Dial("tcp", s.addr)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			fmt.Fprintf(c, "GET /x HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"+
				"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n", s.addr)
			br := bufio.NewReader(c)
			res, err := http.ReadResponse(br, nil)
			if err != nil || res.StatusCode != 101 || res.Header.Get("Sec-WebSocket-Accept") != "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" {
				t.Fatalf("response %v, %v", res, err)
			}
			for _, text := range []string{"one", "two"} {
				_, _ = io.WriteString(c, text)
				echo := make([]byte, len(text))
				if _, err := io.ReadFull(br, echo); err != nil || string(echo) != text {
					t.Fatalf("echo %q, %v", echo, err)
				}
			}
			// the half-close goes through to the upstream
			_ = c.(*net.TCPConn).CloseWrite()
			if rest, _ := io.ReadAll(br); string(rest) != "bye" {
				t.Errorf("rest = %q", rest)
			}
			e := s.access("/x", 1)
			if e.number("status") != 101 || e.errorClass() != "" {
				t.Errorf("status %v, class %q", e["status"], e.errorClass())
			}
		})
	}
}

func TestTrailers(t *testing.T) {
	for _, protocol := range []string{"h1", "h2", "h2c"} {
		u := serve(t, protocol, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "application/grpc")
			w.Header().Set("Trailer", "Grpc-Status")
			_, _ = io.Copy(w, r.Body)
			_ = http.NewResponseController(w).Flush()
			w.Header().Set("Grpc-Status", "0")
			w.Header().Set(http.TrailerPrefix+"Grpc-Message", "seen "+r.Trailer.Get("X-End"))
		})
		s := start(t, fmt.Sprintf(streamSite, `reverse_proxy `+u.dial+` {
			transport hooks {
				`+strings.Join(u.opts, "\n")+`
			}
		}`), h2c)
		for name, client := range downstreams() {
			t.Run(protocol+"/"+name, func(t *testing.T) {
				req, _ := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://"+s.addr+"/x",
					io.MultiReader(strings.NewReader("message")))
				req.Trailer = http.Header{"X-End": {"sent"}}
				res, err := client.Do(req)
				if err != nil {
					t.Fatal(err)
				}
				defer res.Body.Close()
				body, err := io.ReadAll(res.Body)
				if err != nil || string(body) != "message" || res.Trailer.Get("Grpc-Status") != "0" ||
					res.Trailer.Get("Grpc-Message") != "seen sent" {
					t.Errorf("body %q, %v, trailers %v", body, err, res.Trailer)
				}
			})
		}
	}
}

// A message in both directions at once, as gRPC streams do.
func TestBidirectionalStream(t *testing.T) {
	u := serve(t, "h2c", func(w http.ResponseWriter, r *http.Request) {
		rc := http.NewResponseController(w)
		_ = rc.Flush()
		buf := make([]byte, 16)
		for {
			n, err := r.Body.Read(buf)
			if n > 0 {
				_, _ = w.Write(buf[:n])
				_ = rc.Flush()
			}
			if err != nil {
				return
			}
		}
	})
	s := start(t, fmt.Sprintf(streamSite, `reverse_proxy `+u.dial+` {
		transport hooks
	}`), h2c)
	pr, pw := io.Pipe()
	req, _ := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://"+s.addr+"/x", pr)
	// encode holds the header until the first byte of the body
	go func() { _, _ = io.WriteString(pw, "ping") }()
	res, err := downstreams()["h2c"].Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	for i, text := range []string{"ping", "pong"} {
		if i > 0 {
			_, _ = io.WriteString(pw, text)
		}
		echo := make([]byte, len(text))
		if _, err := io.ReadFull(res.Body, echo); err != nil || string(echo) != text {
			t.Fatalf("echo %q, %v", echo, err)
		}
	}
	_ = pw.Close()
	if rest, err := io.ReadAll(res.Body); err != nil || len(rest) > 0 {
		t.Errorf("rest %q, %v", rest, err)
	}
}

func TestInformationalResponses(t *testing.T) {
	u := serve(t, "h1", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Link", "</style.css>; rel=preload")
		w.WriteHeader(http.StatusEarlyHints)
		w.WriteHeader(http.StatusTeapot)
	})
	s := start(t, fmt.Sprintf(streamSite, `reverse_proxy `+u.addr+` {
		transport hooks
	}`))
	var hints []int
	trace := &httptrace.ClientTrace{Got1xxResponse: func(code int, _ textproto.MIMEHeader) error {
		hints = append(hints, code)
		return nil
	}}
	req, _ := http.NewRequestWithContext(httptrace.WithClientTrace(t.Context(), trace), http.MethodGet, "http://"+s.addr+"/x", nil)
	res, err := downstreams()["h1"].Do(req)
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	if res.StatusCode != http.StatusTeapot || len(hints) != 1 || hints[0] != http.StatusEarlyHints {
		t.Errorf("status %d, hints %v", res.StatusCode, hints)
	}
}

// file_server copies with ReadFrom.
func TestReadFrom(t *testing.T) {
	dir := t.TempDir()
	content := strings.Repeat("0123456789abcdef", 1<<16)
	if err := os.WriteFile(filepath.Join(dir, "file.bin"), []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	s := start(t, fmt.Sprintf(streamSite, "root "+dir+"\nfile_server"), h2c)
	for name, client := range downstreams() {
		t.Run(name, func(t *testing.T) {
			res, err := client.Get("http://" + s.addr + "/file.bin")
			if err != nil {
				t.Fatal(err)
			}
			defer res.Body.Close()
			body, err := io.ReadAll(res.Body)
			if err != nil || string(body) != content || res.ContentLength != int64(len(content)) {
				t.Errorf("%d bytes, length %d, %v", len(body), res.ContentLength, err)
			}
		})
	}
	s.access("/file.bin", 2)
	if _, outcome := lastVisit(); outcome.Bytes != int64(len(content)) {
		t.Errorf("outcome = %+v", outcome)
	}
	if res, body := s.get("/none"); res.StatusCode != 404 || !strings.Contains(body, "<h1>Not Found</h1>") {
		t.Errorf("got %d %q", res.StatusCode, body)
	}
}

// Compressed responses go through encode as without hooks.
func TestEncodedResponses(t *testing.T) {
	u := serve(t, "h1", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain")
		_, _ = io.WriteString(w, strings.Repeat("hello ", 1000))
	})
	s := start(t, fmt.Sprintf(streamSite, `reverse_proxy `+u.addr+` {
		transport hooks
	}`))
	res, _ := s.get("/x", "Accept-Encoding", "gzip")
	if res.Header.Get("Content-Encoding") != "gzip" {
		t.Errorf("header = %v", res.Header)
	}
}
