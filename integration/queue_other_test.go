// SPDX-License-Identifier: Apache-2.0

//go:build !linux

package integration

import "testing"

func listenWithoutQueue(t *testing.T) string {
	t.Helper()
	t.Skip("SKIPPED: a full queue of connections can only be made on Linux")
	return ""
}
