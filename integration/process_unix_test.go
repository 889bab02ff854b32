// SPDX-License-Identifier: Apache-2.0

//go:build unix

package integration

import (
	"os/exec"
	"syscall"
)

// ownGroup makes the command and what it starts one group of processes.
func ownGroup(cmd *exec.Cmd) { cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} }

// endGroup ends that group.
func endGroup(cmd *exec.Cmd) { _ = syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
