// SPDX-License-Identifier: Apache-2.0

// Package integration holds the tests of the whole set in a running Caddy,
// against real servers.
package integration
