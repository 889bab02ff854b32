// SPDX-License-Identifier: Apache-2.0

//go:build !unix

package integration

import "os/exec"

func ownGroup(*exec.Cmd) {}

func endGroup(cmd *exec.Cmd) { _ = cmd.Process.Kill() }
