// SPDX-License-Identifier: Apache-2.0

package ratelimit

import (
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddy-gatehouse/gatehouse/internal/option"
)

// UnmarshalCaddyfile reads:
//
//	store redis {
//		address       <host:port…>
//		username      <text>
//		password      <text>
//		tls
//		tls {
//			ca                   <pem_file>
//			server_name          <name>
//			certificate          <pem_file> <key_file>
//			insecure_skip_verify
//		}
//		sentinel <master> {
//			username <text>
//			password <text>
//		}
//		cluster
//		db            <number>
//		key_prefix    <text>
//		deadline      <duration>
//		on_failure    local|open|closed
//		lease         <duration>
//		max_memory    <size>
//		on_saturation refuse|pass
//	}
func (s *RedisStore) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next()
	here := option.Here(d)
	if d.NextArg() {
		return d.ArgErr()
	}
	once := make(option.Set)
	for d.NextBlock(0) {
		if err := once.First(d); err != nil {
			return err
		}
		check, err := s.unmarshalOption(d)
		if err != nil {
			return err
		}
		if check == nil {
			continue
		}
		if err := check(); err != nil {
			return d.Errf("%v", err)
		}
	}
	if err := s.check(); err != nil {
		return here.Errf("%v", err)
	}
	return nil
}

// unmarshalOption reads one option, and returns how its value is checked.
func (s *RedisStore) unmarshalOption(d *caddyfile.Dispenser) (check func() error, err error) {
	switch d.Val() {
	case "address":
		s.Address, err = option.Arguments(d)
		for _, address := range s.Address {
			if err := checkRedisAddress(address); err != nil {
				return nil, d.Errf("%v", err)
			}
		}
	case "username":
		s.Username, err = option.Argument(d)
	case "password":
		s.Password, err = option.Argument(d)
	case "tls":
		s.TLS = new(RedisTLS)
		return s.TLS.check, s.TLS.unmarshal(d)
	case "sentinel":
		s.Sentinel = new(RedisSentinel)
		return s.Sentinel.check, s.Sentinel.unmarshal(d)
	case "cluster":
		s.Cluster, err = true, option.Flag(d)
	case "db":
		s.DB, err = option.Number(d, 0, mostRedisDB)
	case "key_prefix":
		s.KeyPrefix, err = option.Argument(d)
		check = s.checkKeyPrefix
	case "deadline":
		s.Deadline, err = option.Duration(d)
		check = s.checkDeadline
	case "on_failure":
		s.OnFailure, err = option.Word(d, failureLocal, failureOpen, failureClosed)
	case "lease":
		s.Lease, err = option.Duration(d)
		check = s.checkLease
	case "max_memory":
		err = readMaxMemory(d, &s.MaxMemory)
	case "on_saturation":
		s.OnSaturation, err = option.Word(d, saturationRefuse, saturationPass)
	default:
		err = option.Unrecognized(d, "store redis")
	}
	return check, err
}

func (t *RedisTLS) unmarshal(d *caddyfile.Dispenser) error {
	if err := option.Flag(d); err != nil {
		return err
	}
	once := make(option.Set)
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		if err := once.First(d); err != nil {
			return err
		}
		var err error
		switch d.Val() {
		case "ca":
			t.CA, err = option.Argument(d)
		case "server_name":
			t.ServerName, err = option.Argument(d)
		case "certificate":
			if !d.AllArgs(&t.Certificate, &t.Key) {
				err = d.ArgErr()
			}
		case "insecure_skip_verify":
			t.InsecureSkipVerify, err = true, option.Flag(d)
		default:
			err = option.Unrecognized(d, "tls")
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (s *RedisSentinel) unmarshal(d *caddyfile.Dispenser) error {
	var err error
	if s.Master, err = option.Argument(d); err != nil {
		return err
	}
	once := make(option.Set)
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		if err := once.First(d); err != nil {
			return err
		}
		switch d.Val() {
		case "username":
			s.Username, err = option.Argument(d)
		case "password":
			s.Password, err = option.Argument(d)
		default:
			err = option.Unrecognized(d, "sentinel")
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// Interface guards
var _ caddyfile.Unmarshaler = (*RedisStore)(nil)
