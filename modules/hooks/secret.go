// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// maxSecret bounds the size of a file that holds a secret.
	maxSecret = 64 << 10

	// how often a secret's file is looked at, at the most
	secretInterval = time.Second
)

// secretFile is a secret that is read again when its file changes. The last
// good value stays when the file vanishes or turns bad; that is reported once.
// It is safe for concurrent use.
type secretFile struct {
	path  string
	parse func([]byte) ([]byte, error)

	// report is told of a change: nil when the file was read well again.
	report func(error)

	value atomic.Pointer[[]byte]
	next  atomic.Int64 // when to look again, in Unix nanoseconds

	mu   sync.Mutex
	info os.FileInfo // of the file that was read last
	bad  bool
}

// openSecret reads the file for the first time.
func openSecret(path string, parse func([]byte) ([]byte, error), report func(error)) (*secretFile, error) {
	s := &secretFile{path: path, parse: parse, report: report}
	if err := s.read(); err != nil {
		return nil, fmt.Errorf("reading credential file %q: %w", path, err)
	}
	return s, nil
}

// get returns the secret; it must not be changed.
func (s *secretFile) get(now time.Time) []byte {
	if due := s.next.Load(); now.UnixNano() >= due && s.next.CompareAndSwap(due, now.Add(secretInterval).UnixNano()) {
		s.look()
	}
	return *s.value.Load()
}

// look reads the file if it is another one than before.
func (s *secretFile) look() {
	s.mu.Lock()
	defer s.mu.Unlock()
	info, err := os.Stat(s.path)
	if err == nil {
		if os.SameFile(info, s.info) && info.ModTime().Equal(s.info.ModTime()) && info.Size() == s.info.Size() && !s.bad {
			return
		}
		err = s.readLocked()
	}
	if bad := err != nil; bad != s.bad {
		s.bad = bad
		s.report(err)
	}
}

func (s *secretFile) read() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.readLocked()
}

func (s *secretFile) readLocked() error {
	info, err := os.Stat(s.path)
	if err != nil {
		return err
	}
	content, err := readLimited(s.path, maxSecret)
	if err != nil {
		return err
	}
	value, err := s.parse(bytes.TrimSpace(content))
	if err != nil {
		return err
	}
	s.info = info
	s.value.Store(&value)
	return nil
}

var errEmptySecret = errors.New("is empty")

// headerSecret checks a secret that becomes part of a header field.
func headerSecret(content []byte) ([]byte, error) {
	if len(content) == 0 {
		return nil, errEmptySecret
	}
	for _, c := range content {
		if c < ' ' || c == 0x7f {
			return nil, errors.New("holds a control character or more than one line")
		}
	}
	return content, nil
}
