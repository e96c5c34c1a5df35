// Package tig is what nerdctl's command needs of the test framework tigron: the
// name of one type. Nothing of it is ever called.
package tig

import "testing"

// T is a test.
type T = testing.TB
