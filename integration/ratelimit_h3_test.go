// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/quic-go/quic-go/http3"
)

// certificateFiles writes the certificate of net/http/httptest, which is for
// 127.0.0.1.
func certificateFiles(t *testing.T) (cert, key string) {
	t.Helper()
	srv := httptest.NewTLSServer(nil)
	defer srv.Close()
	pair := srv.TLS.Certificates[0]
	secret, err := x509.MarshalPKCS8PrivateKey(pair.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	write := func(name, kind string, der []byte) string {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	return write("cert.pem", "CERTIFICATE", pair.Certificate[0]), write("key.pem", "PRIVATE KEY", secret)
}

// TestRatelimitHTTP3: places are given back when a stream ends, is cancelled or
// goes with its connection; a refusal says how long to wait. Caddy is a process
// of its own: its TLS app and a first handshake race (v2.11.9).
func TestRatelimitHTTP3(t *testing.T) {
	p := startPending(t)
	cert, key := certificateFiles(t)
	_, l := startBuilt(t, `{
		admin {admin}
		default_bind 127.0.0.1
		persist_config off
		grace_period 5s
		default_sni 127.0.0.1
		servers {
			protocols h1 h2 h3
		}
	}
	https://{addr} {
		tls `+cert+` `+key+`
		ratelimit {
			zone h3-places {
				match not path /rate
				key client
				inflight 1
				queue 5 1m
			}
			zone h3-rate {
				match path /rate
				key client
				rate 2 1h
			}
		}
		respond /rate ok
		reverse_proxy `+p.addr+` {
			flush_interval -1
		}
	}`)
	connect := func(t *testing.T) (*http3.Transport, *http.Client) {
		t.Helper()
		transport := &http3.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}
		t.Cleanup(func() { _ = transport.Close() })
		return transport, &http.Client{Transport: transport, Timeout: patience}
	}
	url := "https://" + l.addr
	places := func(inflight, waiting string) {
		t.Helper()
		l.until(`inflight_requests{zone="h3-places"} ` + inflight)
		l.until(`waiting_requests{zone="h3-places"} ` + waiting)
	}
	_, client := connect(t)
	for _, path := range []string{"/slow", "/stream"} {
		t.Run(path[1:], func(t *testing.T) {
			ends := cancellableGet(t, client, url+path)
			p.await(t)
			places("1", "0")
			waits, leaves := cancellableGet(t, client, url+path), cancellableGet(t, client, url+path)
			places("1", "2")
			leaves.abort()
			leaves.end(t, false)
			places("1", "1")
			p.release(t)
			ends.end(t, true)
			p.await(t)
			places("1", "0")
			waits.abort()
			waits.end(t, false)
			places("0", "0")

			other, own := connect(t)
			cut := cancellableGet(t, own, url+path)
			p.await(t)
			places("1", "0")
			_ = other.Close()
			cut.end(t, false)
			places("0", "0")
		})
	}
	for i, want := range []int{200, 200, 429} {
		res, err := client.Get(url + "/rate")
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, res.Body)
		res.Body.Close()
		if res.StatusCode != want || res.Proto != "HTTP/3.0" {
			t.Errorf("request %d: %s %d, want %d", i+1, res.Proto, res.StatusCode, want)
		}
		seconds, _ := strconv.Atoi(res.Header.Get("Retry-After"))
		if want == 429 && (seconds < 3590 || seconds > 3604) || want == 200 && seconds != 0 {
			t.Errorf("request %d: Retry-After %q", i+1, res.Header.Get("Retry-After"))
		}
	}
	if hits := p.hits.Load(); hits != 6 {
		t.Errorf("the upstream has seen %d requests, want those of the six that did not leave the line", hits)
	}
}
