// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
)

var update = flag.Bool("update", false, "rewrite the second half of the golden adapter files")

const separator = "\n----------\n"

// TestGolden adapts the Caddyfile in the first half of each file under
// testdata and compares with its second half: the JSON, or the error. JSON is
// also loaded, as one that an operator has written would be.
func TestGolden(t *testing.T) {
	files, err := filepath.Glob("testdata/*.caddyfiletest")
	if err != nil || len(files) == 0 {
		t.Fatalf("no golden files (%v)", err)
	}
	for _, name := range files {
		t.Run(filepath.Base(name), func(t *testing.T) {
			content, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			config, want, ok := strings.Cut(string(content), separator)
			if !ok {
				t.Fatalf("%s has no line of ten dashes", name)
			}
			got := adapted(t, config)
			if *update {
				if err := os.WriteFile(name, []byte(config+separator+got+"\n"), 0o600); err != nil {
					t.Fatal(err)
				}
				return
			}
			if want = strings.TrimSpace(want); got != want {
				t.Errorf("got:\n%s\nwant:\n%s", got, want)
			}
			if !strings.Contains(filepath.Base(name), "_err_") {
				validate(t, want)
			} else if strings.HasPrefix(want, "{") {
				t.Error("an error was expected")
			}
		})
	}
}

// adapted is the JSON that a Caddyfile becomes, or the error.
func adapted(t *testing.T, config string) string {
	t.Helper()
	doc, _, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(config), map[string]any{"filename": "Caddyfile"})
	if err != nil {
		return err.Error()
	}
	var pretty bytes.Buffer
	if err := json.Indent(&pretty, doc, "", "\t"); err != nil {
		t.Fatal(err)
	}
	return pretty.String()
}

func validate(t *testing.T, doc string) {
	t.Helper()
	var cfg caddy.Config
	if err := json.Unmarshal([]byte(doc), &cfg); err != nil {
		t.Fatal(err)
	}
	if err := caddy.Validate(&cfg); err != nil {
		t.Errorf("validating: %v", err)
	}
}

// Mistakes in JSON are found as well, and the running configuration stays.
func TestBadJSONIsRefused(t *testing.T) {
	s := start(t, `http://{addr} {
		respond ok
	}`)
	for hook, want := range map[string]string{
		`{"hook": "on_error", "pages": [{"classes": ["bogus"]}]}`:                                                                         `provisioning page 0: unrecognized class "bogus"`,
		`{"hook": "on_error", "pages": [{"classes": ["dns"], "statuses": ["502"]}]}`:                                                      `a page needs one of classes, statuses and origin`,
		`{"hook": "on_error", "pages": [{"statuses": ["700"]}]}`:                                                                          `parsing status "700"`,
		`{"hook": "on_error", "pages": [{"origin": ["9xx"]}]}`:                                                                            `parsing status "9xx"`,
		`{"hook": "on_error", "pages": [{"classes": ["dns"], "formats": [{"type": "xml"}]}]}`:                                             `unrecognized format "xml"`,
		`{"hook": "on_error", "pages": [{"classes": ["dns"], "formats": [{"type": "html", "file": "n"}]}]}`:                               `reading template "n"`,
		`{"hook": "on_error", "pages": [{"classes": ["dns"], "formats": [{"type": "html", "file": "testdata/page.html", "body": "x"}]}]}`: `both a file and a body`,
		`{"hook": "on_error", "pages": [{"classes": ["dns"], "header": {"Upgrade": ["x"]}}]}`:                                             `header field Upgrade can't be set on a page`,
		`{"hook": "upstream_request", "headers": {"set": {"transfer-encoding": ["x"]}}}`:                                                  `header field transfer-encoding can't be set`,
		`{"hook": "upstream_request", "credentials": [{"type": "bearer_file", "file": "none"}]}`:                                          `reading credential file "none"`,
		`{"hook": "upstream_request", "credentials": [{"type": "magic"}]}`:                                                                `unrecognized credential "magic"`,
		`{"hook": "connection", "max_upstreams": -1}`:                                                                                     `max_upstreams must be at least 1`,
		`{"hook": "request_summary"}`:                        `text must not be empty`,
		`{"hook": "log_field"}`:                              `log_field has no name`,
		`{"hook": "suppress_error_log", "classes": ["dns"]}`: `suppress_error_log dns has no answer`,
		`{"hook": "suppress_error_log"}`:                     `names no class and no status`,
		`{"hook": "connection", "bogus": 1}`:                 `unknown field "bogus"`,
		`{"hook": "bogus"}`:                                  `unknown module: http.hooks.bogus`,
	} {
		doc := `{"admin": {"disabled": true, "config": {"persist": false}}, "logging": {"logs": {"default": {"level": "FATAL"}}}, "apps": {"http": {"servers": {"s": {"listen": ["` + s.addr +
			`"], "routes": [{"handle": [{"handler": "hooks", "hooks": [` + hook + `]}]}]}}}}}`
		if err := caddy.Load([]byte(doc), true); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s\n\tgot  %v\n\twant %s", hook, err, want)
		}
		if _, body := s.get("/"); body != "ok" {
			t.Fatalf("the running configuration is gone after %s", hook)
		}
	}
}
