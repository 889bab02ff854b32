// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-gatehouse/gatehouse/internal/option"
	"github.com/caddy-gatehouse/gatehouse/internal/phase"
)

// Credential proves to an upstream who asks.
type Credential struct {
	// bearer_file: `Authorization: Bearer` with the token in file.
	//
	// basic: `Authorization: Basic` with username and password.
	//
	// basic_file: the same with `username:password` in file.
	//
	// hmac: an HTTP Message Signature (RFC 9421, hmac-sha256) with the secret in
	// file, in the fields Signature-Input and Signature.
	Type string `json:"type"`

	// The file that holds the secret, at most 64 KiB; space around it is cut.
	// It is looked at once a second at most and read again when it has changed.
	// When it vanishes or turns bad, the last good secret stays in use, and one
	// line of the log says so. For hmac, a secret that begins with `base64:` is decoded.
	File string `json:"file,omitempty"`

	// Name and password for basic, with placeholders that are known when the
	// configuration is loaded, such as {env.PASSWORD}.
	Username string `json:"username,omitempty"`
	Password string `json:"password,omitempty"`

	// The name of the key, the parameter keyid of a signature.
	KeyID string `json:"key_id,omitempty"`

	// The label of a signature. Default: sig1.
	Label string `json:"label,omitempty"`

	// What a signature covers: header fields, and the derived components
	// @method, @authority, @scheme, @target-uri, @request-target, @path and
	// @query. A field that a request lacks is left out of the list that the
	// verifier reads. Default: @method @authority @path @query.
	Components []string `json:"components,omitempty"`

	// Makes the signature cover the body as well, through the field
	// Content-Digest (RFC 9530, sha-256): the body is held in memory up to this
	// many bytes, and a request with a larger one fails with 413. Default: 0;
	// the signature covers no body.
	MaxBody int64 `json:"max_body,omitempty"`

	secret *secretFile
	fixed  string // value of Authorization that never changes
	signer *signer
}

// check looks at what the credential itself says.
func (c *Credential) check() error {
	switch c.Type {
	case "bearer_file", "basic_file":
		if c.File == "" {
			return fmt.Errorf("credential %s has no file", c.Type)
		}
	case "basic":
		if c.Username == "" || strings.Contains(c.Username, ":") {
			return errors.New("credential basic needs a username without a colon")
		}
	case "hmac":
		return c.checkHMAC()
	default:
		return fmt.Errorf("unrecognized credential %q: must be bearer_file, basic, basic_file or hmac", c.Type)
	}
	return nil
}

func (c *Credential) checkHMAC() error {
	if c.File == "" {
		return errors.New("credential hmac has no secret_file")
	}
	if c.MaxBody < 0 {
		return errors.New("max_body must not be negative")
	}
	return errors.Join(c.checkKeyID(), c.checkLabel(), c.checkComponents())
}

func (c *Credential) checkKeyID() error {
	if c.KeyID == "" || strings.ContainsFunc(c.KeyID, func(r rune) bool { return r < ' ' || r > '~' || r == '"' || r == '\\' }) {
		return fmt.Errorf("key_id %q must be visible ASCII without quotes", c.KeyID)
	}
	return nil
}

func (c *Credential) checkLabel() error {
	bad := strings.ContainsFunc(c.Label, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '_' && r != '-'
	})
	if bad || c.Label != "" && (c.Label[0] < 'a' || c.Label[0] > 'z') {
		return fmt.Errorf("label %q must be lower-case letters, digits, - and _ and begin with a letter", c.Label)
	}
	return nil
}

func (c *Credential) checkComponents() error {
	for _, name := range c.Components {
		if err := checkComponent(name); err != nil {
			return err
		}
		if phase.ConnectionField(name) {
			return fmt.Errorf("component %q belongs to one connection and can't be signed", name)
		}
	}
	return nil
}

// parser returns how the content of the file is read.
func (c *Credential) parser() func([]byte) ([]byte, error) {
	switch c.Type {
	case "bearer_file":
		return func(content []byte) ([]byte, error) {
			token, err := headerSecret(content)
			if err != nil {
				return nil, err
			}
			return append([]byte("Bearer "), token...), nil
		}
	case "basic_file":
		return func(content []byte) ([]byte, error) {
			pair, err := headerSecret(content)
			if err != nil {
				return nil, err
			}
			if !bytes.Contains(pair, []byte(":")) {
				return nil, errors.New("is not of the form username:password")
			}
			return []byte(basicAuth(string(pair))), nil
		}
	default:
		return signingKey
	}
}

func basicAuth(pair string) string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(pair))
}

// provision reads the secret.
func (c *Credential) provision(logger *zap.Logger) error {
	if err := c.check(); err != nil {
		return err
	}
	if c.Type == "basic" {
		repl := caddy.NewReplacer()
		c.fixed = basicAuth(repl.ReplaceAll(c.Username, "") + ":" + repl.ReplaceAll(c.Password, ""))
		return nil
	}
	if c.Type == "hmac" {
		components := c.Components
		if len(components) == 0 {
			components = defaultComponents
		}
		if c.MaxBody > 0 {
			components = append(slices.Clip(components), "content-digest")
		}
		c.signer = &signer{label: c.Label, keyID: c.KeyID, algorithm: "hmac-sha256", components: components}
		if c.signer.label == "" {
			c.signer.label = "sig1"
		}
	}
	path := caddy.NewReplacer().ReplaceAll(c.File, "")
	secret, err := openSecret(path, c.parser(), func(err error) {
		if err != nil {
			logger.Error("reading a credential file again; the last good secret stays in use",
				zap.String("file", path), zap.Error(err))
			return
		}
		logger.Info("credential file is readable again", zap.String("file", path))
	})
	c.secret = secret
	return err
}

// probe reads the secret at adapt time, where the line is still known.
func (c *Credential) probe() error {
	if err := c.check(); err != nil {
		return err
	}
	if c.File == "" || strings.Contains(c.File, "{") {
		return nil
	}
	_, err := openSecret(c.File, c.parser(), nil)
	return err
}

// apply puts the credential on a request.
func (c *Credential) apply(x *phase.Exchange, r *http.Request) error {
	switch {
	case c.signer != nil:
		return c.applySignature(x, r)
	case c.secret != nil:
		r.Header["Authorization"] = []string{string(c.secret.get(time.Now()))}
	default:
		r.Header["Authorization"] = []string{c.fixed}
	}
	return nil
}

func (c *Credential) applySignature(x *phase.Exchange, r *http.Request) error {
	now := time.Now()
	if c.MaxBody > 0 {
		body, err := holdBody(x, r, c.MaxBody)
		if err != nil {
			return err
		}
		r.Header.Set("Content-Digest", contentDigest(body))
	}
	return c.signer.sign(r, c.secret.get(now), now)
}

type heldBodyKey struct{}

// holdBody reads the whole body of r, at most limit bytes, and makes r send it.
// It is kept for the next attempt, which finds nothing left to read.
func holdBody(x *phase.Exchange, r *http.Request, limit int64) ([]byte, error) {
	body, held := x.Get(heldBodyKey{}).([]byte)
	if !held && r.Body != nil && r.Body != http.NoBody {
		if r.ContentLength > limit {
			return nil, errTooLarge(limit)
		}
		var err error
		if body, err = io.ReadAll(io.LimitReader(r.Body, limit+1)); err != nil {
			return nil, err
		}
		if int64(len(body)) > limit {
			return nil, errTooLarge(limit)
		}
		x.Set(heldBodyKey{}, body)
	}
	if len(body) == 0 {
		return nil, nil
	}
	if int64(len(body)) > limit {
		return nil, errTooLarge(limit)
	}
	r.ContentLength = int64(len(body))
	r.TransferEncoding = nil
	r.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(body)), nil }
	r.Body, _ = r.GetBody()
	return body, nil
}

// errTooLarge is the refusal of a body that can't be held.
func errTooLarge(limit int64) error {
	return caddyhttp.HandlerError{
		StatusCode: http.StatusRequestEntityTooLarge,
		Err:        fmt.Errorf("the request body exceeds max_body, %d bytes, up to which it can be signed", limit),
	}
}

// unmarshal reads what follows the word credential.
func (c *Credential) unmarshal(d *caddyfile.Dispenser) error {
	if !d.NextArg() {
		return d.ArgErr()
	}
	c.Type = d.Val()
	switch c.Type {
	case "bearer_file", "basic_file":
		if !d.AllArgs(&c.File) {
			return d.ArgErr()
		}
	case "basic":
		if !d.AllArgs(&c.Username, &c.Password) {
			return d.ArgErr()
		}
	case "hmac":
		if err := c.unmarshalHMAC(d); err != nil {
			return err
		}
	}
	if err := c.probe(); err != nil {
		return d.Errf("%v", err)
	}
	return nil
}

func (c *Credential) unmarshalHMAC(d *caddyfile.Dispenser) error {
	if d.NextArg() {
		return d.ArgErr()
	}
	once := make(option.Set)
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		if err := once.First(d); err != nil {
			return err
		}
		var err error
		check := func() error { return nil }
		switch d.Val() {
		case "key_id":
			c.KeyID, err = option.Argument(d)
			check = c.checkKeyID
		case "secret_file":
			c.File, err = option.Argument(d)
		case "label":
			c.Label, err = option.Argument(d)
			check = c.checkLabel
		case "components":
			c.Components, err = option.Arguments(d)
			check = c.checkComponents
		case "max_body":
			c.MaxBody, err = option.Size(d)
		default:
			return option.Unrecognized(d, "credential hmac")
		}
		if err != nil {
			return err
		}
		if err := check(); err != nil {
			return d.Errf("%v", err)
		}
	}
	return nil
}
