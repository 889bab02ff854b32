// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddy-gatehouse/gatehouse/internal/redistest"
)

// redisCommands is what the documentation says a user needs.
var redisCommands = []string{
	"+hello", "+ping", "+script", "+eval", "+evalsha", "+time", "+get", "+set", "+del",
	"+pexpire", "+zadd", "+zrem", "+zcount", "+zremrangebyscore",
}

// TestRedisUser logs in with no more permissions than documented, and with a
// password from a file.
func TestRedisUser(t *testing.T) {
	server := redistest.Start(t)
	server.CLI(append([]string{"acl", "setuser", "limiter", "on", ">s3cret", "~gatehouse:ratelimit:*"}, redisCommands...)...)
	server.CLI("config", "set", "requirepass", "root")
	server.Authenticate("root")
	file := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(file, []byte("s3cret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("GATEHOUSE_TEST_USER", "limiter")
	l := Limit{Events: 3, Window: time.Hour, Inflight: 3, Penalty: time.Second}
	s := &RedisStore{Address: []string{server.Addr}, Username: "{env.GATEHOUSE_TEST_USER}", Password: "{file." + file + "}"}
	c := openRedis(t, s, Spec{Levels: []Limit{l}})
	for range 4 {
		if a := textAsk(1, 1); take(t, c, a).Allowed {
			settle(t, c, a, true)
		}
	}
	if err := c.Forgive(t.Context(), 0, textKey(1)); err != nil {
		t.Fatal(err)
	}
}

// TestRedisWrongPassword names what the operator has to mend.
func TestRedisWrongPassword(t *testing.T) {
	server := redistest.Start(t, "--requirepass", "right")
	for name, c := range map[string]struct {
		store  RedisStore
		reason string
	}{
		"wrong":      {RedisStore{Password: "wrong"}, "wrong password"},
		"wrong user": {RedisStore{Username: "nobody", Password: "right"}, "wrong password"},
		"none":       {RedisStore{}, "a password is required"},
	} {
		t.Run(name, func(t *testing.T) {
			logger, logs := observed()
			s := c.store
			s.Address, s.Deadline = []string{server.Addr}, caddy.Duration(defaultRedisDeadline)
			counters := openRedis(t, &s, Spec{Levels: []Limit{{Events: 3, Window: time.Hour}}, Logger: logger})
			if v := prompt(t, counters, textAsk(1, 1)); !v.Allowed {
				t.Fatalf("%+v", v)
			}
			until(t, "it is logged", func() bool { return logs.Len() > 0 })
			if w := messages(logs, "warn"); len(w) != 1 || w[0] != c.reason {
				t.Fatalf("warnings: %q", w)
			}
			for _, e := range logs.All() {
				if text, _ := json.Marshal(e.ContextMap()); strings.Contains(string(text), `"right"`) || strings.Contains(string(text), `"wrong"`) {
					t.Fatalf("the log has the password: %s", text)
				}
			}
		})
	}
	t.Run("mended", func(t *testing.T) {
		s := &RedisStore{Address: []string{server.Addr}, Password: "later", Deadline: caddy.Duration(defaultRedisDeadline)}
		counters := openRedis(t, s, Spec{Levels: []Limit{{Events: 3, Window: time.Hour}}})
		prompt(t, counters, textAsk(1, 1))
		server.Authenticate("right")
		server.CLI("config", "set", "requirepass", "later")
		byRedis(t, counters)
	})
}

// certificate writes a certificate that signs itself, and its key.
func certificate(t *testing.T) (cert, key string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "redis.test"}, DNSNames: []string{"redis.test"},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore:   time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &private.PublicKey, private)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	cert, key = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	for path, block := range map[string]*pem.Block{
		cert: {Type: "CERTIFICATE", Bytes: der}, key: {Type: "PRIVATE KEY", Bytes: secret},
	} {
		if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return cert, key
}

// TestRedisTLS connects with certificates of both sides.
func TestRedisTLS(t *testing.T) {
	cert, key := certificate(t)
	stranger, strangerKey := certificate(t)
	server := redistest.StartTLS(t, []string{"--tls", "--cacert", cert, "--cert", cert, "--key", key},
		"--tls-cert-file", cert, "--tls-key-file", key, "--tls-ca-cert-file", cert)
	for name, c := range map[string]struct {
		tls    *RedisTLS
		reason string
	}{
		"good":              {&RedisTLS{CA: cert, Certificate: cert, Key: key}, ""},
		"name":              {&RedisTLS{CA: cert, Certificate: cert, Key: key, ServerName: "redis.test"}, ""},
		"insecure":          {&RedisTLS{Certificate: cert, Key: key, InsecureSkipVerify: true}, ""},
		"unknown":           {&RedisTLS{Certificate: cert, Key: key}, "TLS handshake failed"},
		"wrong name":        {&RedisTLS{CA: cert, Certificate: cert, Key: key, ServerName: "other.test"}, "TLS handshake failed"},
		"stranger":          {&RedisTLS{CA: cert, Certificate: stranger, Key: strangerKey}, "TLS handshake failed, connection lost"},
		"plain, not spoken": {nil, "connection lost"},
	} {
		t.Run(name, func(t *testing.T) {
			logger, logs := observed()
			s := &RedisStore{Address: []string{server.Addr}, TLS: c.tls}
			counters := openRedis(t, s, Spec{Levels: []Limit{{Events: 3, Window: time.Hour}}, Logger: logger})
			if c.reason == "" {
				take(t, counters, textAsk(1, 1))
				return
			}
			prompt(t, counters, textAsk(1, 1))
			if w := messages(logs, "warn"); len(w) != 1 || !strings.Contains(c.reason, w[0]) {
				t.Fatalf("warnings: %q, %+v", w, logs.All())
			}
		})
	}
}

// nestedAsk asks for an address on two levels.
func nestedAsk(addr string) *Ask {
	a := &Ask{Cost: 1}
	for _, bits := range []int{64, 48} {
		p, _ := netip.MustParseAddr(addr).Prefix(bits)
		a.Keys = append(a.Keys, Key{Hash: mix(uint64(p.Addr().As16()[7]) + uint64(bits)), Prefix: p})
	}
	return a
}

// TestRedisCluster counts in a cluster of three, and takes one of them away.
func TestRedisCluster(t *testing.T) {
	nodes := redistest.Cluster(t)
	s := &RedisStore{Address: []string{nodes[0].Addr, nodes[1].Addr}, Cluster: true}
	levels := []Limit{{Events: 2, Window: time.Hour, Inflight: 9}, {Events: 3, Window: time.Hour}}
	c := openRedis(t, s, Spec{Levels: levels, Nested: true})
	if v := take(t, c, nestedAsk("2001:db8:0:1::1")); !v.Allowed {
		t.Fatalf("%+v", v)
	}
	for i, want := range []bool{true, false} { // /64
		if v := take(t, c, nestedAsk("2001:db8:0:1::2")); v.Allowed != want || !want && v.Level != 0 {
			t.Fatalf("%d: %+v", i, v)
		}
	}
	for i, want := range []bool{true, false} { // /48
		if v := take(t, c, nestedAsk("2001:db8:0:2::2")); v.Allowed != want || !want && v.Level != 1 {
			t.Fatalf("%d: %+v", i, v)
		}
	}
	a := nestedAsk("2001:db8:0:1::1")
	for level, want := range []int{2, 3} {
		if st, err := c.Inspect(t.Context(), level, a.Keys[level]); err != nil || st.Used != want {
			t.Fatalf("level %d: %+v, %v", level, st, err)
		}
	}
	if _, err := c.Inspect(t.Context(), 0, Key{Hash: 1, Prefix: netip.MustParsePrefix("192.0.2.1/32")}); err == nil {
		t.Fatal("a key whose slot can't be known was found")
	}
	if _, err := s.Open(Spec{Zone: "mixed", Levels: levels}); err == nil || !strings.Contains(err.Error(), "prefixes of one address") {
		t.Fatalf("keys that don't nest: %v", err)
	}
	// many slots, also given back in one go
	flying := openRedis(t, s, Spec{Zone: "flying", Levels: []Limit{{Inflight: 1}}})
	var asks []*Ask
	for n := range 50 {
		asks = append(asks, textAsk(1, n))
		take(t, flying, asks[n])
	}
	for _, a := range asks {
		flying.Done(a, false)
	}
	for n := range 50 {
		until(t, "all is given back", func() bool {
			st, err := flying.Inspect(t.Context(), 0, textKey(n))
			return err == nil && st.Inflight == 0
		})
	}
	nodes[2].Kill()
	for n := range 100 {
		if v := prompt(t, c, &Ask{Cost: 1, Keys: []Key{textKey(1000 + n), textKey(1000 + n)}}); !v.Allowed {
			t.Fatalf("with a node gone: %+v", v)
		}
	}
}

// TestRedisSentinel kills a master and goes on with its replica.
func TestRedisSentinel(t *testing.T) {
	master := redistest.Start(t)
	replica := master.Replica()
	master.Until("the replica is there", func() bool { return master.Says("state=online", "info", "replication") })
	sentinel := master.Sentinel("limits")
	sentinel.Until("the sentinel knows the replica", func() bool { return sentinel.Says(replica.Port, "sentinel", "replicas", "limits") })
	s := &RedisStore{Address: []string{sentinel.Addr}, Sentinel: &RedisSentinel{Master: "limits"}}
	c := openRedis(t, s, Spec{Levels: []Limit{{Events: 2, Window: time.Hour}}})
	take(t, c, textAsk(1, 1))
	take(t, c, textAsk(1, 1))
	record := c.names.keys(textAsk(1, 1).Keys, c.levels)[0]
	master.Until("the replica has it", func() bool { return replica.CLI("get", record) == master.CLI("get", record) })
	master.Kill()
	if v := prompt(t, c, textAsk(1, 1)); v.Allowed {
		t.Fatalf("the node's own counters forgot: %+v", v)
	}
	sentinel.Until("the replica is the master", func() bool { return replica.Says("master", "role") })
	byRedis(t, c)
	if v := take(t, c, textAsk(1, 1)); v.Allowed {
		t.Fatalf("the replica forgot: %+v", v)
	}
}

// TestRedisCaddyfile reads all options.
func TestRedisCaddyfile(t *testing.T) {
	d := caddyfile.NewTestDispenser(`redis {
		address a:1 b:2
		username u
		password {env.P}
		tls {
			ca ca.pem
			server_name n
			certificate c.pem k.pem
			insecure_skip_verify
		}
		sentinel m {
			username su
			password sp
		}
		db 4
		key_prefix p:
		deadline 20ms
		on_failure closed
		lease 10s
		max_memory 1MiB
		on_saturation pass
	}`)
	s := new(RedisStore)
	if err := s.UnmarshalCaddyfile(d); err != nil {
		t.Fatal(err)
	}
	got, _ := json.Marshal(s)
	const want = `{"address":["a:1","b:2"],"username":"u","password":"{env.P}",` +
		`"tls":{"ca":"ca.pem","server_name":"n","certificate":"c.pem","key":"k.pem","insecure_skip_verify":true},` +
		`"sentinel":{"master":"m","username":"su","password":"sp"},"db":4,"key_prefix":"p:","deadline":20000000,` +
		`"on_failure":"closed","lease":10000000000,"max_memory":1048576,"on_saturation":"pass"}`
	if string(got) != want {
		t.Fatalf("got  %s\nwant %s", got, want)
	}
}

// TestRedisBadInput refuses what makes no sense, and says where.
func TestRedisBadInput(t *testing.T) {
	for text, want := range map[string]string{
		"redis":                                                "Testfile:1: store redis has no address",
		"redis x":                                              "Testfile:1: wrong argument count",
		"redis {\n address\n}":                                 "Testfile:2: wrong argument count",
		"redis {\n address a\n}":                               `Testfile:2: address "a": must be host:port`,
		"redis {\n address a:b:c\n}":                           `must be host:port`,
		"redis {\n address a:0\n}":                             `must be host:port`,
		"redis {\n address a:70000\n}":                         `must be host:port`,
		"redis {\n address a:1 b:2\n}":                         "several addresses need sentinel or cluster",
		"redis {\n address a:1\n word\n}":                      `Testfile:3: unrecognized store redis option "word"`,
		"redis {\n address a:1\n address a:1\n}":               "Testfile:3: address already specified",
		"redis {\n address a:1\n db -1\n}":                     "Testfile:3: parsing db \"-1\": must be a whole number",
		"redis {\n address a:1\n db 1\n cluster\n}":            "db 1: a cluster has only database 0",
		"redis {\n address a:1\n sentinel\n}":                  "Testfile:3: wrong argument count",
		"redis {\n address a:1\n sentinel m\n cluster\n}":      "sentinel and cluster exclude each other",
		"redis {\n address a:1\n sentinel m {\n x y\n }\n}":    `Testfile:4: unrecognized sentinel option "x"`,
		"redis {\n address a:1\n username u\n}":                "username without a password",
		"redis {\n address a:1\n tls {\n certificate c\n }\n}": "Testfile:4: wrong argument count",
		"redis {\n address a:1\n tls {\n bogus\n }\n}":         `Testfile:4: unrecognized tls option "bogus"`,
		"redis {\n address a:1\n key_prefix {x}\n}":            "Testfile:3: key_prefix \"{x}\": must not contain braces",
		"redis {\n address a:1\n deadline 0\n}":                "Testfile:3: parsing deadline \"0\": must be greater than zero",
		"redis {\n address a:1\n deadline 1h\n}":               "Testfile:3: deadline 1h0m0s: must be from 1ms to 10s",
		"redis {\n address a:1\n lease 1ms\n}":                 "Testfile:3: lease 1ms: must be from 1s to 24h",
		"redis {\n address a:1\n on_failure maybe\n}":          `Testfile:3: parsing on_failure "maybe": must be local, open or closed`,
		"redis {\n address a:1\n max_memory 1\n}":              `Testfile:3: parsing max_memory "1": must be from`,
		"redis {\n address a:1\n on_saturation never\n}":       `Testfile:3: parsing on_saturation "never"`,
		"redis {\n address a:1\n tls now\n}":                   "Testfile:3: wrong argument count",
		"redis {\n address a:1\n cluster yes\n}":               "Testfile:3: wrong argument count",
	} {
		err := new(RedisStore).UnmarshalCaddyfile(caddyfile.NewTestDispenser(text))
		place, words, found := strings.Cut(want, ": ")
		if !found || !strings.HasPrefix(place, "Testfile") {
			place, words = "Testfile:", want
		}
		if err == nil || !strings.Contains(err.Error(), words) || !strings.Contains(err.Error(), ", at "+place) {
			t.Errorf("%q: %v, want %s", text, err, want)
		}
	}
	ctx, cancel := caddy.NewContext(caddy.Context{Context: t.Context()})
	defer cancel()
	address := []string{"127.0.0.1:1"}
	for want, s := range map[string]*RedisStore{
		"store redis has no address": {},
		"db -1: must be a whole":     {Address: address, DB: -1},
		"password":                   {Address: address, Password: "{env.NOT_SET_ANYWHERE}"},
		"username":                   {Address: address, Username: "{no.such}", Password: "x"},
		"sentinel password":          {Address: address, Sentinel: &RedisSentinel{Master: "m", Password: "{file./nonexistent}"}},
		"reading a file of tls":      {Address: address, TLS: &RedisTLS{CA: "/nonexistent"}},
		"needs a certificate":        {Address: address, TLS: &RedisTLS{Key: "/nonexistent"}},
		"name of the master":         {Address: address, Sentinel: &RedisSentinel{}},
		`on_failure "x"`:             {Address: address, OnFailure: "x"},
		"lease -1s":                  {Address: address, Lease: caddy.Duration(-time.Second)},
	} {
		if err := s.Provision(ctx); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v, want %s", s, err, want)
		}
	}
}
