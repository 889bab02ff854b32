// SPDX-License-Identifier: Apache-2.0

// Package builds holds the tests of what operators build: each module alone,
// the whole set through its manifest, and what our requirements do to a build
// of theirs. They take minutes on a cold cache, so they run only where
// GATEHOUSE_BUILDS=1 is set, as .ci/run does.
package builds
