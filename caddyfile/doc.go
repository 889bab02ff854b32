// SPDX-License-Identifier: Apache-2.0

// Package caddyfile is the place of the configuration adapters "kdl" and "gatehouse". It registers nothing yet.
//
// The package stands above the modules: it may import them, and none of them imports it.
package caddyfile
