// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"encoding/base64"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"
)

// The example of RFC 9421, appendix B.2.5.
func TestSignatureOfRFC9421(t *testing.T) {
	secret, err := base64.StdEncoding.DecodeString("uzvJfB4u3N0Jy4T7NZ75MDVcr8zSTInedJtkgcu46YW4XByzNJjxBdtjUkdJPBtbmHhIDi6pcl8jsasjlTMtDQ==")
	if err != nil {
		t.Fatal(err)
	}
	r := httptest.NewRequest(http.MethodPost, "http://example.com/foo?param=Value&Pet=dog", nil)
	r.Header.Set("Date", "Tue, 20 Apr 2021 02:07:55 GMT")
	r.Header.Set("Content-Type", "application/json")
	s := &signer{label: "sig-b25", keyID: "test-shared-secret", components: []string{"date", "@authority", "content-type"}}
	if err := s.sign(r, secret, time.Unix(1618884473, 0)); err != nil {
		t.Fatal(err)
	}
	if got, want := r.Header.Get("Signature-Input"),
		`sig-b25=("date" "@authority" "content-type");created=1618884473;keyid="test-shared-secret"`; got != want {
		t.Errorf("Signature-Input = %s, want %s", got, want)
	}
	if got, want := r.Header.Get("Signature"), "sig-b25=:pxcQw6G3AjtMBQjwo8XzkZf/bws5LelbaMk5rGIGtE8=:"; got != want {
		t.Errorf("Signature = %s, want %s", got, want)
	}
}

// The digest of RFC 9421, appendix B.2, with sha-256 (RFC 9530, appendix B).
func TestContentDigest(t *testing.T) {
	if got, want := contentDigest([]byte(`{"hello": "world"}`)), "sha-256=:X48E9qOokqqrvdts8nOJRJN3OWDUoyWxBf7kbu9DBPE=:"; got != want {
		t.Errorf("contentDigest = %s, want %s", got, want)
	}
}

func TestDerivedComponents(t *testing.T) {
	for _, tt := range []struct{ url, host, component, want string }{
		{"http://a/", "Example.COM:80", "@authority", "example.com"},
		{"https://a/", "example.com:443", "@authority", "example.com"},
		{"http://a/", "example.com:443", "@authority", "example.com:443"},
		{"http://a/", "[::1]:80", "@authority", "[::1]"},
		{"http://a:8080/", "", "@authority", "a:8080"},
		{"http://a/b%20c?d", "h", "@path", "/b%20c"},
		{"http://a", "h", "@path", "/"},
		{"http://a/b?c=d%20e", "h", "@query", "?c=d%20e"},
		{"http://a/b", "h", "@query", "?"},
		{"http://a/b?c", "h", "@target-uri", "http://h/b?c"},
		{"http://a/b?c", "h", "@request-target", "/b?c"},
		{"https://a/", "h", "@scheme", "https"},
	} {
		r := httptest.NewRequest(http.MethodGet, tt.url, nil)
		r.Host = tt.host
		if got := derived[tt.component](r); got != tt.want {
			t.Errorf("%s of %s (Host %s) = %q, want %q", tt.component, tt.url, tt.host, got, tt.want)
		}
	}
}

func TestFieldValues(t *testing.T) {
	if got := fieldValue([]string{" a ", "b", "\tc"}); got != "a, b, c" {
		t.Errorf("fieldValue = %q", got)
	}
}
