// SPDX-License-Identifier: Apache-2.0

// Package bench measures what the modules cost in front of a reverse_proxy.
// It has benchmarks only; docs/benchmarks.md tells how to run and read them.
package bench
