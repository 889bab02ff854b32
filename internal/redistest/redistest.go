// SPDX-License-Identifier: Apache-2.0

// Package redistest runs real Redis servers in tests: each on free ports of the
// loopback interface, with a directory of its own, ended with the test.
package redistest

import (
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// patience is generous, because a server may start beside a compiler that keeps every core busy.
const patience = time.Minute

// Server is a redis-server, or a sentinel.
type Server struct {
	Addr, Host, Port string

	t       testing.TB
	dir     string
	command []string
	cli     []string
	cmd     *exec.Cmd
	exited  chan struct{}
}

// Free returns a loopback address with a port that was free a moment ago.
func Free(tb testing.TB) string {
	tb.Helper()
	ln, err := (&net.ListenConfig{}).Listen(tb.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	return ln.Addr().String()
}

// Start runs a redis-server with options such as "--requirepass", "secret", and
// waits until it answers. A test whose machine has no Redis is skipped.
func Start(tb testing.TB, args ...string) *Server {
	tb.Helper()
	return StartAt(tb, Free(tb), args...)
}

// StartAt is Start on an address.
func StartAt(tb testing.TB, addr string, args ...string) *Server {
	tb.Helper()
	s := newServer(tb, "redis-server", addr)
	s.command = append([]string{
		s.command[0], "--port", s.Port, "--bind", s.Host, "--dir", s.dir, "--save", "", "--appendonly", "no",
		"--enable-debug-command", "yes",
	}, args...)
	s.run()
	return s
}

// StartTLS is Start with TLS only. The client arguments are for redis-cli.
func StartTLS(tb testing.TB, client []string, args ...string) *Server {
	tb.Helper()
	s := newServer(tb, "redis-server", Free(tb))
	s.cli = client
	s.command = append([]string{
		s.command[0], "--port", "0", "--tls-port", s.Port, "--bind", s.Host, "--dir", s.dir, "--save", "",
	}, args...)
	s.run()
	return s
}

// Replica runs a redis-server that replicates another one.
func (s *Server) Replica(args ...string) *Server {
	s.t.Helper()
	return Start(s.t, append([]string{"--replicaof", s.Host + " " + s.Port}, args...)...)
}

// Sentinel runs a sentinel that watches the server under a name, alone in
// its decisions, and fails over after a second.
func (s *Server) Sentinel(name string) *Server {
	s.t.Helper()
	sentinel := newServer(s.t, "redis-server", Free(s.t)) // Debian's redis-sentinel is a link to it
	config := filepath.Join(sentinel.dir, "sentinel.conf")
	lines := []string{
		"port " + sentinel.Port,
		"bind " + sentinel.Host,
		"dir " + sentinel.dir,
		"sentinel monitor " + name + " " + s.Host + " " + s.Port + " 1",
		"sentinel down-after-milliseconds " + name + " 1000",
		"sentinel failover-timeout " + name + " 3000",
	}
	if err := os.WriteFile(config, []byte(strings.Join(lines, "\n")+"\n"), 0o600); err != nil {
		s.t.Fatal(err)
	}
	sentinel.command = []string{sentinel.command[0], config, "--sentinel"}
	sentinel.run()
	return sentinel
}

// Cluster runs a cluster of three masters.
func Cluster(tb testing.TB) []*Server {
	tb.Helper()
	const size = 3
	nodes := make([]*Server, 0, size)
	create := append(make([]string, 0, size+3), "--cluster", "create")
	for range size {
		_, bus, _ := net.SplitHostPort(Free(tb))
		s := Start(tb, "--cluster-enabled", "yes", "--cluster-port", bus, "--cluster-node-timeout", "2000")
		nodes = append(nodes, s)
		create = append(create, s.Addr)
	}
	nodes[0].CLI(append(create, "--cluster-yes")...)
	for _, s := range nodes {
		s.Until("the cluster is formed", func() bool { return s.Says("cluster_state:ok", "cluster", "info") })
	}
	return nodes
}

func newServer(tb testing.TB, program, addr string) *Server {
	tb.Helper()
	path, err := exec.LookPath(program)
	if err != nil {
		tb.Skipf("NOT TESTED: %s is not installed, so nothing of this test has run", program)
	}
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		tb.Fatal(err)
	}
	s := &Server{Addr: addr, Host: host, Port: port, t: tb, dir: tb.TempDir(), command: []string{path}}
	tb.Cleanup(s.Kill)
	return s
}

// run starts the process and waits until it answers.
func (s *Server) run() {
	s.t.Helper()
	s.cmd = exec.CommandContext(context.Background(), s.command[0], s.command[1:]...) //nolint:gosec // a test's own words
	s.cmd.Dir = s.dir
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	cmd, exited := s.cmd, make(chan struct{})
	s.exited = exited
	go func() {
		_ = cmd.Wait()
		close(exited)
	}()
	s.Until("the server answers", func() bool {
		out, _ := s.try("ping")
		return strings.Contains(out, "PONG") || strings.Contains(out, "NOAUTH")
	})
}

// Until waits for a condition and fails the test if it does not come true.
func (s *Server) Until(what string, condition func() bool) {
	s.t.Helper()
	for end := time.Now().Add(patience); !condition(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			s.t.Fatalf("%s: waited for %v until %s", s.Addr, patience, what)
		}
	}
}

func (s *Server) try(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	all := append([]string{"-h", s.Host, "-p", s.Port}, s.cli...)
	out, err := exec.CommandContext(ctx, "redis-cli", append(all, args...)...).CombinedOutput() //nolint:gosec // a test's own words
	return strings.TrimSpace(string(out)), err
}

// CLI runs redis-cli and returns what it prints.
func (s *Server) CLI(args ...string) string {
	s.t.Helper()
	out, err := s.try(args...)
	if err != nil {
		s.t.Fatalf("redis-cli %v: %v\n%s", args, err, out)
	}
	return out
}

// Says tells whether redis-cli succeeds and prints a text.
func (s *Server) Says(text string, args ...string) bool {
	out, err := s.try(args...)
	return err == nil && strings.Contains(out, text)
}

// Authenticate makes CLI use a password.
func (s *Server) Authenticate(password string) {
	s.cli = append(s.cli, "--no-auth-warning", "-a", password)
}

// Kill ends the process at once, without a word to its clients.
func (s *Server) Kill() {
	if s.cmd == nil || s.cmd.Process == nil {
		return
	}
	_ = s.cmd.Process.Kill()
	<-s.exited
	s.cmd = nil
}

// Restart ends the process and starts it again on the same address, empty.
func (s *Server) Restart() {
	s.t.Helper()
	s.Kill()
	s.run()
}
