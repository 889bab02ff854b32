// SPDX-License-Identifier: Apache-2.0

//go:build !unix

package redistest

// Pause stops the process; its connections stay.
func (s *Server) Pause() {
	s.t.Helper()
	s.t.Skip("NOT TESTED: no process can be stopped on this system")
}

// Resume lets a paused process go on.
func (s *Server) Resume() {}
