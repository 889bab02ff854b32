// SPDX-License-Identifier: Apache-2.0

// Package promreg registers metrics the way Caddy's registries need it: each
// configuration has a registry of its own, and several modules of one
// configuration may bring the same collectors.
package promreg

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"
)

// Register registers the collectors with reg, those that it has already excepted.
func Register(reg prometheus.Registerer, collectors ...prometheus.Collector) error {
	for _, c := range collectors {
		err := reg.Register(c)
		if are, ok := errors.AsType[prometheus.AlreadyRegisteredError](err); ok && are.ExistingCollector == c {
			continue
		}
		if err != nil {
			return err
		}
	}
	return nil
}
