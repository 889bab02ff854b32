// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"time"

	"github.com/redis/rueidis"
	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
)

func init() {
	caddy.RegisterModule(new(RedisStore))
}

const (
	defaultKeyPrefix     = "gatehouse:ratelimit:"
	defaultRedisDeadline = 50 * time.Millisecond
	leastRedisDeadline   = time.Millisecond
	mostRedisDeadline    = 10 * time.Second
	defaultLease         = 30 * time.Second
	leastLease           = time.Second
	mostLease            = 24 * time.Hour
	mostRedisDB          = 1 << 20
)

// What decides while Redis is away.
const (
	failureLocal  = "local"
	failureOpen   = "open"
	failureClosed = "closed"
)

// RedisStore counts in Redis (6 or newer), so that all nodes that use the same
// Redis, key prefix and zone share their limits.
//
// A decision is one round trip: one script looks at all levels of the zone and
// charges all or none, by the clock of Redis and not by that of the node. The
// verdicts are those of the memory store with a record for every key. Nodes
// admit together exactly the limit and nothing on top as long as Redis answers;
// what Redis loses when it fails over to a replica that lags behind is lost to
// the count. While Redis is away, with `on_failure local`, each node that can't
// reach it admits up to the limit by its own count, which contains what that
// node has admitted through Redis before. What it admits meanwhile is not
// added to Redis later.
//
// Every key that is written expires by itself as soon as it says nothing
// anymore. Of keys other than client addresses only the SHA-256 is sent.
// Requests in flight are leases in Redis: renewed as long as the request lasts,
// given back when it is done, and forgotten after `lease` if the node is gone.
// What is counted after the response (`count_when`) is charged when the request
// comes and taken back, or moved to the time of the response, when it is done;
// when a node dies in between, it stays charged until the window has passed.
//
// After the first command that fails or is not answered in time the store is
// away: requests are decided by `on_failure` at once, and Redis is probed once
// a second in the background until it answers. One line of the log says why
// Redis is away, another one that it is back. In a cluster that holds for the
// whole cluster when one node fails. An unreachable Redis does not keep a
// configuration from being loaded.
//
// The user needs the commands hello, ping, script, eval, evalsha, time, get,
// set, del, pexpire, zadd, zrem, zcount and zremrangebyscore on keys that begin
// with the prefix; with `db` also select, in a cluster also cluster.
type RedisStore struct {
	// Addresses of Redis, `host:port`. One is used, unless `sentinel` or
	// `cluster` is given: then they are the sentinels, or some nodes of the
	// cluster. Required.
	Address []string `json:"address,omitempty"`

	// Name and password of the user, with placeholders that are known when the
	// configuration is loaded, such as {env.REDIS_PASSWORD} or
	// {file./run/secrets/redis}. One that is unknown or empty is an error.
	// Without a username it is the user `default`. Default: no authentication.
	Username string `json:"username,omitempty"`
	Password string `json:"password,omitempty"`

	// Makes connections use TLS, those to sentinels too. Default: they don't.
	TLS *RedisTLS `json:"tls,omitempty"`

	// Asks sentinels for the master. Default: none.
	Sentinel *RedisSentinel `json:"sentinel,omitempty"`

	// Whether Redis is a cluster. The levels of a zone must then be prefixes of
	// one address; a zone with others is an error.
	Cluster bool `json:"cluster,omitempty"`

	// Number of the database. Default: 0. A cluster has no other one.
	DB int `json:"db,omitempty"`

	// What the keys in Redis begin with, without braces. Default: gatehouse:ratelimit:
	KeyPrefix string `json:"key_prefix,omitempty"`

	// How long a request waits for Redis at most, to connect included. Default:
	// 50ms. From 1ms to 10s.
	Deadline caddy.Duration `json:"deadline,omitempty"`

	// What decides while Redis is away: `local` (the default), the node's own
	// counters; `open`, nobody, every request passes; `closed`, nobody, every
	// request is refused.
	OnFailure string `json:"on_failure,omitempty"`

	// How long a request counts as in flight when its node has died. Default:
	// 30s. From 1s to 24h.
	Lease caddy.Duration `json:"lease,omitempty"`

	// Size of the node's own counters of a zone, in bytes, and what happens when
	// they can't tell keys apart anymore, as for the memory store. Default: 16
	// MiB and `refuse`.
	MaxMemory    int64  `json:"max_memory,omitempty"`
	OnSaturation string `json:"on_saturation,omitempty"`

	option      rueidis.ClientOption
	fingerprint string
	logger      *zap.Logger
}

// RedisTLS says how connections to Redis are secured.
type RedisTLS struct {
	// PEM file with the certificates of the authorities that are trusted.
	// Default: those of the system.
	CA string `json:"ca,omitempty"`

	// The name in the server's certificate. Default: the host of the address.
	ServerName string `json:"server_name,omitempty"`

	// PEM files with the certificate and the key of this client. Default: none.
	Certificate string `json:"certificate,omitempty"`
	Key         string `json:"key,omitempty"`

	// Accepts any certificate. Default: false; a warning is printed if set.
	InsecureSkipVerify bool `json:"insecure_skip_verify,omitempty"`
}

// RedisSentinel says how to find the master.
type RedisSentinel struct {
	// The name under which the sentinels know the master. Required.
	Master string `json:"master"`

	// Name and password for the sentinels themselves, with placeholders as
	// above. Default: no authentication.
	Username string `json:"username,omitempty"`
	Password string `json:"password,omitempty"`
}

// CaddyModule returns the Caddy module information.
func (*RedisStore) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.ratelimit.stores.redis",
		New: func() caddy.Module { return new(RedisStore) },
	}
}

// Provision checks the settings and reads the secrets. It does not connect.
func (s *RedisStore) Provision(ctx caddy.Context) error {
	s.logger = ctx.Logger()
	if err := s.check(); err != nil {
		return err
	}
	s.setDefaults()
	if s.OnFailure == failureOpen {
		s.logger.Warn("on_failure open: nothing is limited while Redis is away")
	}
	if s.TLS != nil && s.TLS.InsecureSkipVerify {
		s.logger.Warn("insecure_skip_verify: the certificate of Redis is not checked")
	}
	return s.build()
}

// check looks at what the settings themselves say.
func (s *RedisStore) check() error {
	if len(s.Address) == 0 {
		return errors.New("store redis has no address")
	}
	if len(s.Address) > 1 && !s.Cluster && s.Sentinel == nil {
		return errors.New("several addresses need sentinel or cluster")
	}
	if s.Cluster && s.Sentinel != nil {
		return errors.New("sentinel and cluster exclude each other")
	}
	if s.Cluster && s.DB != 0 {
		return fmt.Errorf("db %d: a cluster has only database 0", s.DB)
	}
	if s.DB < 0 || s.DB > mostRedisDB {
		return fmt.Errorf("db %d: must be a whole number from 0 to %d", s.DB, mostRedisDB)
	}
	if s.Username != "" && s.Password == "" {
		return errors.New("username without a password")
	}
	for _, address := range s.Address {
		if err := checkRedisAddress(address); err != nil {
			return err
		}
	}
	return errors.Join(s.checkKeyPrefix(), s.checkDeadline(), s.checkLease(), s.checkLocal(), s.TLS.check(), s.Sentinel.check())
}

// checkRedisAddress looks at one address.
func checkRedisAddress(address string) error {
	host, port, err := net.SplitHostPort(address)
	if err != nil || host == "" || port == "" {
		return fmt.Errorf("address %q: must be host:port", address)
	}
	if number, err := net.LookupPort("tcp", port); err != nil || number == 0 { //nolint:noctx // numbers and well-known names only
		return fmt.Errorf("address %q: must be host:port", address)
	}
	return nil
}

func (s *RedisStore) checkKeyPrefix() error {
	if strings.ContainsAny(s.KeyPrefix, "{}") {
		return fmt.Errorf("key_prefix %q: must not contain braces", s.KeyPrefix)
	}
	return nil
}

func (s *RedisStore) checkDeadline() error {
	if d := time.Duration(s.Deadline); d != 0 && (d < leastRedisDeadline || d > mostRedisDeadline) {
		return fmt.Errorf("deadline %v: must be from %v to %v", d, leastRedisDeadline, mostRedisDeadline)
	}
	return nil
}

func (s *RedisStore) checkLease() error {
	if d := time.Duration(s.Lease); d != 0 && (d < leastLease || d > mostLease) {
		return fmt.Errorf("lease %v: must be from 1s to 24h", d)
	}
	return nil
}

// checkLocal looks at what the node's own counters need.
func (s *RedisStore) checkLocal() error {
	if s.MaxMemory != 0 && (s.MaxMemory < leastMaxMemory || s.MaxMemory > mostMaxMemory) {
		return fmt.Errorf("max_memory %d: %s", s.MaxMemory, wantMaxMemory())
	}
	return errors.Join(
		checkWord("on_saturation", s.OnSaturation, saturationRefuse, saturationPass),
		checkWord("on_failure", s.OnFailure, failureLocal, failureOpen, failureClosed))
}

func (t *RedisTLS) check() error {
	if t != nil && (t.Certificate == "") != (t.Key == "") {
		return errors.New("tls needs a certificate and its key, or neither")
	}
	return nil
}

func (s *RedisSentinel) check() error {
	switch {
	case s == nil:
	case s.Master == "":
		return errors.New("sentinel needs the name of the master")
	case s.Username != "" && s.Password == "":
		return errors.New("sentinel: username without a password")
	}
	return nil
}

func (s *RedisStore) setDefaults() {
	if s.KeyPrefix == "" {
		s.KeyPrefix = defaultKeyPrefix
	}
	if s.Deadline == 0 {
		s.Deadline = caddy.Duration(defaultRedisDeadline)
	}
	if s.OnFailure == "" {
		s.OnFailure = failureLocal
	}
	if s.Lease == 0 {
		s.Lease = caddy.Duration(defaultLease)
	}
	if s.MaxMemory == 0 {
		s.MaxMemory = defaultMaxMemory
	}
}

// build makes the options of the client, and what stands for them.
func (s *RedisStore) build() error {
	var secrets redisSecrets
	username, password := secrets.read("username", s.Username), secrets.read("password", s.Password)
	dialer := net.Dialer{Timeout: redisPatience, KeepAlive: redisPatience}
	s.option = rueidis.ClientOption{
		InitAddress:         s.Address,
		Username:            username,
		Password:            password,
		SelectDB:            s.DB,
		ClientName:          "gatehouse-ratelimit",
		Dialer:              dialer,
		ConnWriteTimeout:    redisPatience,
		RingScaleEachConn:   redisRing,
		ReadBufferEachConn:  redisBuffer,
		WriteBufferEachConn: redisBuffer,
		PipelineMultiplex:   -1,
		DisableRetry:        true,
		DisableCache:        true,
		ForceSingleClient:   !s.Cluster && s.Sentinel == nil,
	}
	if s.Sentinel != nil {
		s.option.Sentinel = rueidis.SentinelOption{
			Dialer:                  dialer,
			MasterSet:               s.Sentinel.Master,
			Username:                secrets.read("sentinel username", s.Sentinel.Username),
			Password:                secrets.read("sentinel password", s.Sentinel.Password),
			TopologyRefreshInterval: 5 * time.Second,
		}
	}
	files := [][]byte{}
	if s.TLS != nil {
		config, read, err := s.TLS.build()
		if err != nil {
			return err
		}
		s.option.TLSConfig, s.option.Sentinel.TLSConfig, files = config, config, read
	}
	if secrets.err != nil {
		return secrets.err
	}
	settings, err := json.Marshal([]any{
		s.Address, username, password, s.TLS, files, s.Sentinel, s.option.Sentinel.Username, s.option.Sentinel.Password,
		s.Cluster, s.DB,
	})
	if err != nil {
		return err
	}
	sum := sha256.Sum256(settings)
	s.fingerprint = hex.EncodeToString(sum[:])
	return nil
}

// redisSecrets reads texts with placeholders and keeps the first error.
type redisSecrets struct{ err error }

func (r *redisSecrets) read(what, text string) string {
	out, err := caddy.NewReplacer().ReplaceOrErr(text, true, true)
	if err != nil && r.err == nil {
		r.err = fmt.Errorf("%s: %w", what, err)
	}
	return out
}

// build reads the files. It returns their content, too.
func (t *RedisTLS) build() (*tls.Config, [][]byte, error) {
	config := &tls.Config{
		MinVersion:         tls.VersionTLS12,
		ServerName:         t.ServerName,
		InsecureSkipVerify: t.InsecureSkipVerify, //nolint:gosec // the operator says so, and is warned
	}
	var files [][]byte
	for _, path := range []string{t.CA, t.Certificate, t.Key} {
		var content []byte
		if path != "" {
			var err error
			if content, err = os.ReadFile(path); err != nil { //nolint:gosec // the operator names it
				return nil, nil, fmt.Errorf("reading a file of tls: %w", err)
			}
		}
		files = append(files, content)
	}
	if t.CA != "" {
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(files[0]) {
			return nil, nil, fmt.Errorf("ca %s: no certificate in PEM found", t.CA)
		}
	}
	if t.Certificate != "" {
		pair, err := tls.X509KeyPair(files[1], files[2])
		if err != nil {
			return nil, nil, fmt.Errorf("certificate %s: %w", t.Certificate, err)
		}
		config.Certificates = []tls.Certificate{pair}
	}
	return config, files, nil
}

// Open makes the counters of a zone. It connects in the background.
func (s *RedisStore) Open(spec Spec) (Counters, error) {
	if s.Cluster && len(spec.Levels) > 1 && !spec.Nested {
		return nil, fmt.Errorf("zone %s: in a Redis cluster the keys of a zone must be prefixes of one address, so that they share a node", spec.Zone)
	}
	c := &redisCounters{
		spec:      spec,
		local:     openMemory(spec, s.MaxMemory, s.OnSaturation == saturationPass),
		onFailure: s.OnFailure,
		deadline:  time.Duration(s.Deadline),
	}
	c.names.init(s.KeyPrefix, s.Cluster, spec)
	for _, l := range spec.Levels {
		c.levels = append(c.levels, newRedisLevel(l))
	}
	fingerprint := s.fingerprint
	client, _, err := redisClients.LoadOrNew(fingerprint, func() (caddy.Destructor, error) {
		return newRedisClient(s.option, c.names.probe(), spec.Logger), nil
	})
	if err != nil {
		return nil, err
	}
	c.client = client.(*redisClient)
	c.leases = newRedisLeases(c, time.Duration(s.Lease), func() { _, _ = redisClients.Delete(fingerprint) })
	go c.leases.work()
	return c, nil
}

// Interface guards
var (
	_ Store             = (*RedisStore)(nil)
	_ caddy.Provisioner = (*RedisStore)(nil)
)
