// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"context"
	"crypto/sha1" //nolint:gosec // by which Redis names scripts
	"crypto/tls"
	"crypto/x509"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/redis/rueidis"
	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
)

//go:embed redis.lua
var redisSource string

var (
	redisScript = rueidis.NewLuaScript(redisSource)
	redisSHA    = fmt.Sprintf("%x", sha1.Sum([]byte(redisSource))) //nolint:gosec // by which Redis names scripts
)

const (
	// redisOutstanding bounds the decisions that wait for Redis at a time. It
	// must be less than the 2^redisRing places of a connection's queue, on
	// which rueidis waits without a deadline.
	redisOutstanding = 512
	redisRing        = 10

	redisBuffer = 32 << 10

	// redisPause is the time between two attempts to reach a Redis that is away.
	redisPause = time.Second

	// redisPatience is how long anything may take that no request waits for.
	redisPatience = time.Second

	// redisRenewal is after how many vain attempts the client is made anew.
	redisRenewal = 10
)

var (
	errRedisAway = errors.New("redis is away")
	errRedisBusy = errors.New("too many requests wait for redis")
)

// redisClients holds the clients by the fingerprint of their settings.
var redisClients = caddy.NewUsagePool()

// redisClient is the connection to Redis that zones with equal settings share.
// It is either up, or away; while it is away nothing is sent but one probe per
// second, in the background.
type redisClient struct {
	option rueidis.ClientOption
	logger *zap.Logger

	slots chan struct{}
	tried chan struct{} // closed when Redis was probed for the first time
	wake  chan struct{}
	stop  chan struct{}

	up    atomic.Bool
	probe atomic.Pointer[string] // key of the last failure

	mu      sync.RWMutex
	current rueidis.Client // nil as long as there was none
	stopped bool
}

func newRedisClient(option rueidis.ClientOption, key string, logger *zap.Logger) *redisClient {
	c := &redisClient{
		option: option,
		logger: logger,
		slots:  make(chan struct{}, redisOutstanding),
		tried:  make(chan struct{}),
		wake:   make(chan struct{}, 1),
		stop:   make(chan struct{}),
	}
	c.probe.Store(&key)
	go c.watch()
	return c
}

// Destruct implements [caddy.Destructor].
func (c *redisClient) Destruct() error {
	close(c.stop)
	c.up.Store(false)
	c.mu.Lock()
	c.stopped = true
	c.mu.Unlock()
	c.drop()
	return nil
}

// watch probes Redis when it is away.
func (c *redisClient) watch() {
	said, away, vain := "", false, 0 // the last reason that was logged here
	tried := sync.OnceFunc(func() { close(c.tried) })
	for {
		err := c.reach()
		if err == nil {
			if away {
				c.logger.Info("Redis is back", zap.Strings("address", c.option.InitAddress))
			}
			said, vain = "", 0
			c.up.Store(true)
			tried()
			select {
			case <-c.wake: // trip has said why
				away = true
			case <-c.stop:
				return
			}
		} else {
			if reason := redisReason(err); !c.isStopped() && (!away || redisCredentials[reason] && said != reason) {
				c.say(err)
				said = reason
			}
			away = true
			tried()
			if vain++; vain%redisRenewal == 0 {
				c.drop()
			}
		}
		select {
		case <-time.After(redisPause):
		case <-c.stop:
			return
		}
	}
}

func (c *redisClient) say(err error) {
	c.logger.Warn("Redis is away; on_failure decides until it is back",
		zap.String("reason", redisReason(err)),
		zap.Strings("address", c.option.InitAddress),
		zap.Error(err))
}

func (c *redisClient) isStopped() bool {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.stopped
}

func (c *redisClient) get() rueidis.Client {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.current
}

// drop closes the connection.
func (c *redisClient) drop() {
	c.mu.Lock()
	old := c.current
	c.current = nil
	c.mu.Unlock()
	if old != nil {
		old.Close()
	}
}

// reach connects if need be, and asks Redis to run the script and write.
func (c *redisClient) reach() error {
	client := c.get()
	if client == nil {
		fresh, err := rueidis.NewClient(c.option)
		if err != nil {
			if fresh != nil {
				fresh.Close()
			}
			return err
		}
		c.mu.Lock()
		stopped := c.stopped
		if !stopped {
			c.current = fresh
		}
		c.mu.Unlock()
		if stopped {
			fresh.Close()
			return errRedisAway
		}
		client = fresh
	}
	ctx, cancel := context.WithTimeout(context.Background(), redisPatience)
	defer cancel()
	return redisScript.Exec(ctx, client, []string{*c.probe.Load()}, []string{"probe", "", "0", "", "0"}).Error()
}

// trip notes that a command for a key has failed.
func (c *redisClient) trip(key string, err error) {
	if !c.up.CompareAndSwap(true, false) || c.isStopped() {
		return
	}
	key = redisProbeKey(key)
	c.probe.Store(&key)
	c.say(err)
	c.wake <- struct{}{}
}

// redisProbeKey is a key in the same slot.
func redisProbeKey(key string) string {
	if i := strings.IndexByte(key, '}'); i >= 0 {
		key = key[:i+1]
	}
	return key + ":probe"
}

// ready tells whether Redis may be asked. It waits for the first connection.
func (c *redisClient) ready(ctx context.Context) bool {
	if c.up.Load() {
		return true
	}
	select {
	case <-c.tried:
	case <-ctx.Done():
	}
	return c.up.Load()
}

// away tells without waiting whether Redis can't be asked now.
func (c *redisClient) away() bool {
	if c.up.Load() {
		return false
	}
	select {
	case <-c.tried:
		return true
	default:
		return false
	}
}

type redisReply struct {
	values []rueidis.RedisMessage
	err    error
}

// run runs the script and waits for it until ctx is done, but not longer: what
// rueidis does may exceed its context when it connects or finds out about a cluster.
func (c *redisClient) run(ctx context.Context, keys, args []string) ([]rueidis.RedisMessage, error) {
	if !c.ready(ctx) {
		return nil, errRedisAway
	}
	select {
	case c.slots <- struct{}{}:
	default:
		select {
		case c.slots <- struct{}{}:
		case <-ctx.Done():
			return nil, errRedisBusy
		}
	}
	client := c.get()
	if client == nil || !c.up.Load() {
		<-c.slots
		return nil, errRedisAway
	}
	answer := make(chan redisReply, 1)
	go func() {
		var r redisReply
		r.values, r.err = redisScript.Exec(ctx, client, keys, args).ToArray()
		if r.err != nil {
			c.trip(keys[0], r.err)
		}
		answer <- r
		<-c.slots // after trip, so that nobody follows into a queue that stands
	}()
	select {
	case r := <-answer:
		return r.values, r.err
	case <-ctx.Done():
		c.trip(keys[0], ctx.Err())
		return nil, ctx.Err()
	}
}

// redisCall is one run of the script.
type redisCall struct{ keys, args []string }

// runAll runs the script several times in one round trip, and tells whether it
// could. No request waits for it.
func (c *redisClient) runAll(calls []redisCall) bool {
	client := c.get()
	if client == nil || !c.up.Load() {
		return false
	}
	ctx, cancel := context.WithTimeout(context.Background(), redisPatience)
	defer cancel()
	commands := make(rueidis.Commands, len(calls))
	for i, call := range calls {
		commands[i] = client.B().Evalsha().Sha1(redisSHA).Numkeys(int64(len(call.keys))).Key(call.keys...).Arg(call.args...).Build()
	}
	results := client.DoMulti(ctx, commands...)
	for i, call := range calls {
		err := results[i].Error()
		if reply, ok := rueidis.IsRedisErr(err); ok && reply.IsNoScript() {
			err = redisScript.Exec(ctx, client, call.keys, call.args).Error()
		}
		if err != nil {
			c.trip(call.keys[0], err)
			return false
		}
	}
	return true
}

// redisCredentials are the reasons that are told even if Redis was away before
// for another one, since only the operator can help.
var redisCredentials = map[string]bool{
	"wrong password": true, "a password is required": true, "the user lacks a permission": true,
}

// redisReplies are the errors that Redis answers with, by their first word.
var redisReplies = map[string]string{
	"WRONGPASS":   "wrong password",
	"NOAUTH":      "a password is required",
	"NOPERM":      "the user lacks a permission",
	"READONLY":    "it is a read-only replica",
	"LOADING":     "it is loading its data",
	"MASTERDOWN":  "its master is down",
	"CLUSTERDOWN": "the cluster is down",
	"MISCONF":     "it can't persist its data",
	"OOM":         "it is out of memory",
	"BUSY":        "it is busy with a script",
	"NOREPLICAS":  "it has too few replicas",
}

// redisReason names what went wrong.
func redisReason(err error) string {
	if reply, ok := rueidis.IsRedisErr(err); ok {
		text := reply.Error()
		word, _, _ := strings.Cut(text, " ")
		if reason, ok := redisReplies[word]; ok {
			return reason
		}
		if strings.Contains(text, "invalid password") || strings.Contains(text, "AUTH <password>") {
			return "wrong password"
		}
		return "it answers with an error"
	}
	var (
		timeout  net.Error
		name     *net.DNSError
		record   tls.RecordHeaderError
		remote   *net.OpError
		verified *tls.CertificateVerificationError
		unknown  x509.UnknownAuthorityError
	)
	switch {
	case errors.As(err, &verified), errors.As(err, &unknown), errors.As(err, &record),
		errors.As(err, &remote) && remote.Op == "remote error": // an alert of TLS
		return "TLS handshake failed"
	case errors.As(err, &name):
		return "its name can't be resolved"
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded),
		errors.As(err, &timeout) && timeout.Timeout():
		return "no answer in time"
	case errors.Is(err, syscall.ECONNREFUSED):
		return "connection refused"
	case errors.Is(err, io.EOF), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE), errors.Is(err, net.ErrClosed):
		return "connection lost"
	default:
		return "unreachable"
	}
}
