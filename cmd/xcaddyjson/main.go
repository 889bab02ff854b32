// SPDX-License-Identifier: Apache-2.0

// Command xcaddyjson turns the build manifest xcaddy.json into the xcaddy command that carries it out. It prints that
// command, or runs it with -run:
//
//	go run ./cmd/xcaddyjson [-file xcaddy.json] [-output path] [-run]
//
// The manifest has the field names of xcaddy's Builder. It is read strictly: an unknown or repeated field, a version
// that is not exact, or a replacement that leads nowhere is an error with its line. The fields timeout_get and
// timeout_build, for which xcaddy has no option, count as unknown. Paths in the manifest are relative to it.
//
// With -run, xcaddy is taken from PATH. Where it is not there, and a tools.mod lies beside the manifest, it is built
// from the version named in that file.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	if errors.Is(err, flag.ErrHelp) {
		os.Exit(2)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "xcaddyjson:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	flags := flag.NewFlagSet("xcaddyjson", flag.ContinueOnError)
	flags.SetOutput(stderr)
	file := flags.String("file", "xcaddy.json", "the manifest to read")
	output := flags.String("output", "", "where the binary goes; xcaddy's own default is ./caddy")
	execute := flags.Bool("run", false, "run the command instead of printing it")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", flags.Arg(0))
	}

	m, err := readManifest(*file)
	if err != nil {
		return err
	}
	cmd := m.command(filepath.Dir(*file), *output)
	if !*execute {
		_, _ = fmt.Fprintln(stdout, cmd)
		return nil
	}

	_, _ = fmt.Fprintln(stderr, cmd)
	prefix, err := findXcaddy(filepath.Dir(*file))
	if err != nil {
		return err
	}
	argv := slices.Concat(prefix, cmd.args)
	c := exec.CommandContext(ctx, argv[0], argv[1:]...) //nolint:gosec // running what the manifest asks for is the purpose
	c.Env = append(os.Environ(), cmd.env...)
	c.Stdout, c.Stderr = stdout, stderr
	if err := c.Run(); err != nil {
		return fmt.Errorf("running xcaddy: %w", err)
	}
	return nil
}

// findXcaddy returns the words that start xcaddy.
func findXcaddy(dir string) ([]string, error) {
	if path, err := exec.LookPath("xcaddy"); err == nil {
		return []string{path}, nil
	}
	tools, err := filepath.Abs(filepath.Join(dir, "tools.mod"))
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(tools); err != nil {
		return nil, errors.New("finding xcaddy: it is neither in PATH nor named by a tools.mod beside the manifest")
	}
	return []string{"go", "tool", "-modfile=" + tools, "xcaddy"}, nil
}
