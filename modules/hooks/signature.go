// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"golang.org/x/net/http/httpguts"
)

// signer makes HTTP Message Signatures (RFC 9421) with hmac-sha256, the
// symmetric algorithm that the RFC registers (section 3.3.3).
type signer struct {
	label      string
	keyID      string
	algorithm  string // the parameter alg, left out when empty
	components []string
}

// defaultComponents cover where a request goes.
var defaultComponents = []string{"@method", "@authority", "@path", "@query"}

// derived are the components that are not header fields (RFC 9421, section 2.2).
var derived = map[string]func(r *http.Request) string{
	"@method":    func(r *http.Request) string { return r.Method },
	"@authority": authority,
	"@scheme":    func(r *http.Request) string { return r.URL.Scheme },
	"@target-uri": func(r *http.Request) string {
		return r.URL.Scheme + "://" + authority(r) + r.URL.RequestURI()
	},
	"@request-target": func(r *http.Request) string { return r.URL.RequestURI() },
	"@path":           path,
	"@query":          func(r *http.Request) string { return "?" + r.URL.RawQuery },
}

func path(r *http.Request) string {
	if p := r.URL.EscapedPath(); p != "" {
		return p
	}
	return "/"
}

// authority is the normalised Host field: lower case, no default port.
func authority(r *http.Request) string {
	host := r.Host
	if host == "" {
		host = r.URL.Host
	}
	host = strings.ToLower(host)
	if name, port, err := net.SplitHostPort(host); err == nil {
		if r.URL.Scheme == "http" && port == "80" || r.URL.Scheme == "https" && port == "443" {
			if strings.Contains(name, ":") {
				return "[" + name + "]"
			}
			return name
		}
	}
	return host
}

// checkComponent refuses what can't be signed.
func checkComponent(name string) error {
	if strings.HasPrefix(name, "@") {
		if derived[name] == nil {
			return fmt.Errorf("unrecognized component %q", name)
		}
		return nil
	}
	if !httpguts.ValidHeaderFieldName(name) {
		return fmt.Errorf("component %q is not the name of a header field", name)
	}
	return nil
}

// sign adds Signature-Input and Signature to r. Header fields that r lacks are
// left out of the list of components, which the verifier reads.
func (s *signer) sign(r *http.Request, secret []byte, now time.Time) error {
	var base strings.Builder
	var list []string
	for _, name := range s.components {
		var value string
		if f := derived[name]; f != nil {
			value = f(r)
		} else {
			values := r.Header.Values(name)
			if len(values) == 0 {
				continue
			}
			value = fieldValue(values)
			name = strings.ToLower(name)
		}
		if strings.ContainsAny(value, "\r\n") {
			return errors.New("signing the request: a component holds a line break")
		}
		list = append(list, `"`+name+`"`)
		base.WriteString(`"` + name + `": ` + value + "\n")
	}
	params := "(" + strings.Join(list, " ") + ");created=" + strconv.FormatInt(now.Unix(), 10) +
		`;keyid="` + s.keyID + `"`
	if s.algorithm != "" {
		params += `;alg="` + s.algorithm + `"`
	}
	base.WriteString(`"@signature-params": ` + params)

	mac := hmac.New(sha256.New, secret)
	mac.Write([]byte(base.String()))
	r.Header.Set("Signature-Input", s.label+"="+params)
	r.Header.Set("Signature", s.label+"=:"+base64.StdEncoding.EncodeToString(mac.Sum(nil))+":")
	return nil
}

// fieldValue combines the lines of a field (RFC 9421, section 2.1).
func fieldValue(lines []string) string {
	trimmed := make([]string, len(lines))
	for i, line := range lines {
		trimmed[i] = strings.TrimSpace(line)
	}
	return strings.Join(trimmed, ", ")
}

// contentDigest is the value of the Content-Digest field of body (RFC 9530).
func contentDigest(body []byte) string {
	sum := sha256.Sum256(body)
	return "sha-256=:" + base64.StdEncoding.EncodeToString(sum[:]) + ":"
}

// signingKey reads a secret: what follows base64: is decoded.
func signingKey(content []byte) ([]byte, error) {
	if text, ok := strings.CutPrefix(string(content), "base64:"); ok {
		key, err := base64.StdEncoding.DecodeString(text)
		if err != nil {
			return nil, fmt.Errorf("decoding the secret: %w", err)
		}
		content = key
	}
	if len(content) == 0 {
		return nil, errEmptySecret
	}
	return content, nil
}
